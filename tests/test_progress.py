"""One line that says what goes on."""

import fcntl
import io
import os
import pty
import struct
import sys
import termios
from unittest.mock import patch

from common import Test

import progress
from messages import Forgiving
from progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        return [line.strip() for line in self.getvalue().split("\r") if line.strip()]


class Broken(Terminal):
    def write(self, text: str) -> int:
        raise BrokenPipeError("nobody reads")

    def flush(self) -> None:
        raise BrokenPipeError("nobody reads")


def use(stream, shown: bool = True) -> None:
    with Progress(shown, stream) as shows:
        shows.stage("loading small")
        shows.begin("take 1 of 2", 30.0)
        shows.to(0.5)
        shows.to(30.0)
        shows.stage("decoding")


class TestProgress(Test):
    def test_terminal(self):
        terminal = Terminal()
        use(terminal)
        lines = terminal.lines()
        self.assertEqual(lines[0], "loading small")
        self.assertRegex(
            lines[1], r"^take 1 of 2:   0% .* 0.0 of 30.0 s of audio, \? left$"
        )
        self.assertEqual(lines[-1], "decoding")
        self.assertTrue(terminal.getvalue().endswith("\r"))  # and nothing is left

    def test_no_terminal(self):
        stream = io.StringIO()
        use(stream)
        self.assertEqual(stream.getvalue(), "")
        with patch.object(progress, "MINUTE", 0.0):
            use(stream)
        counts = [f"take 1 of 2: {n} of 30.0 s of audio" for n in (0.5, 30.0)]
        want = ",".join(["loading small", *counts, "decoding", ""])
        self.assertEqual(stream.getvalue().replace("\n", ","), want)

    def test_lines_stand_above(self):
        terminal = Forgiving(Terminal())  # as generate.py has both
        with patch("sys.stdout", terminal), patch("sys.stderr", terminal):
            with Progress() as shows:
                shows.begin("take 1 of 2", 30.0)
                progress.say("x.wav is made", sys.stdout)
        lines = [
            line.strip() for line in terminal.getvalue().replace("\n", "\r").split("\r")
        ]
        self.assertIn("x.wav is made", lines)

    def test_once_a_minute(self):
        stream = io.StringIO()
        with patch("progress.time.monotonic", side_effect=[0, 59, 60, 61, 121]):
            with Progress(stream=stream) as shows:
                shows.begin("x", 3.0, "s")
                for seconds in range(4):
                    shows.to(seconds)
        self.assertEqual(stream.getvalue(), "x: 1.0 of 3.0 s\nx: 3.0 of 3.0 s\n")

    def test_a_terminal_of_no_columns(self):
        """As of programs that run others in one: the line is there all the same."""
        for rows, columns in ((24, 80), (0, 0), (24, 0), (0, 80)):
            ours, theirs = pty.openpty()
            self.addCleanup(os.close, ours)
            size = struct.pack("HHHH", rows, columns, 0, 0)
            fcntl.ioctl(theirs, termios.TIOCSWINSZ, size)
            with open(theirs, "w") as terminal:
                use(terminal)
                print("end", file=terminal, flush=True)
                shown = b""
                while b"end" not in shown:
                    shown += os.read(ours, 9999)
            for text in (b"loading small", b" 0.0 of 30.0 s of audio", b"decoding"):
                self.assertIn(text, shown, columns)

    def test_what_is_not_shown(self):
        for stream in (Terminal(), io.StringIO()):
            with patch.object(progress, "MINUTE", 0.0):
                use(stream, shown=False)
            self.assertEqual(stream.getvalue(), "")

    def test_streams_that_cannot_be_written(self):
        closed = io.StringIO()
        closed.close()
        for stream in (Broken(), closed):
            with patch.object(progress, "MINUTE", 0.0):
                use(stream)
        with patch("sys.stderr", None):
            use(None)
