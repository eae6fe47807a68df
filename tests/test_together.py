"""Processes of mlx.launch that end together."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import mlx.core as mx
from common import REFERENCE, ROOT, TELLING, Test, slow

import together


def free_port() -> int:
    """The first of two ports that nobody listens at."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as first:
            port = first.getsockname()[1]
            try:
                with socket.create_server(("127.0.0.1", port + 1)):
                    return port
            except OSError:
                continue


class TestTogether(Test):
    def setUp(self):
        super().setUp()
        self.launcher = Path(sys.executable).with_name("mlx.launch")
        if not mx.distributed.is_available("ring") or not self.launcher.exists():
            self.skipTest("mlx.launch or MLX's ring backend is not there")

    def launch(self) -> tuple[subprocess.Popen, list[int]]:
        """Two processes that share a long take: the launcher, and their numbers."""
        prompts, log = self.folder / "p.txt", self.folder / "log"
        prompts.write_text("drums\n")
        command = [str(self.launcher), "-n", "2", "--backend", "ring", "-p"]
        command += [str(free_port()), "--", sys.executable, "-c", TELLING]
        command += ["--prompts", str(prompts), "--output", str(self.folder / "x.wav")]
        command += ["--model", str(REFERENCE / "stereo-audiocraft"), "--seed", "3"]
        command += ["--duration", "600", "--tensor-parallel"]
        with open(log, "wb") as file:
            process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)
        self.addCleanup(process.kill)
        while b"generating: " not in log.read_bytes():
            self.assertIsNone(process.poll(), log.read_text())
            time.sleep(0.05)
        found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True)
        numbers = [int(n) for n in found.stdout.split()]
        self.assertEqual(len(numbers), 2, log.read_text())
        for number in numbers:
            self.addCleanup(end, number)
        return process, numbers

    def ended(self, numbers: list[int]) -> bool:
        """Whether all of them are gone within 30 s."""
        until = time.monotonic() + 30
        while any(map(lives, numbers)) and time.monotonic() < until:
            time.sleep(0.1)
        return not any(map(lives, numbers))

    @slow(12)
    def test_one_that_ends_ends_the_others(self):
        for which, number in (
            (0, signal.SIGKILL),
            (1, signal.SIGTERM),
            (1, signal.SIGINT),
        ):
            with self.subTest(which=which, number=number):
                process, numbers = self.launch()
                os.kill(numbers[which], number)
                self.assertTrue(self.ended(numbers))
                process.wait(30)
                log = (self.folder / "log").read_text()
                # The survivor says so, unless the launcher was first to end it.
                said = re.findall("error: another process that shares .* ended", log)
                said += re.findall("was killed|exited with code -15", log)
                wanted = 2 if number == signal.SIGTERM else 1
                self.assertGreaterEqual(len(said), wanted, log)
                self.assertNotIn("Traceback", log)

    def test_the_end_of_another_is_told(self):
        """And it ends a process whose main thread waits for something else."""
        script = (
            "import socket, time; from unittest.mock import Mock\n"
            "from together import Peers\n"
            "peers = Peers(Mock(size=lambda: 1))\n"
            "link, other = socket.socketpair()\n"
            "peers._links = [link]\n"
            "with peers.watched('the other one has ended.'):\n"
            "    other.close()\n"
            "    time.sleep(30)\n"
        )
        program = self.folder / "anyone.py"
        program.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{script}")
        run = subprocess.run(
            [sys.executable, str(program)], capture_output=True, text=True
        )
        message = "anyone.py: error: the other one has ended."
        self.assertEqual((run.returncode, run.stderr.strip()), (1, message))

    @slow(4)
    def test_a_launcher_that_is_gone_ends_all(self):
        process, numbers = self.launch()
        process.kill()
        process.wait()
        self.assertTrue(self.ended(numbers))

    def test_a_stranger_is_no_peer(self):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            stranger = socket.create_connection(("127.0.0.1", port))
            stranger.sendall(b"GET ")
            friend = socket.create_connection(("127.0.0.1", port))
            friend.sendall(b"abcd")
            (link,) = together.accept(server, 1, b"abcd")
            self.assertEqual(friend.recv(1), b"!")
            for one in (stranger, friend, link):
                one.close()

    def test_one_process_has_no_peers(self):
        before = signal.getsignal(signal.SIGTERM)
        peers = together.Peers(Mock(size=lambda: 1))
        with peers.watched("nobody"):
            self.assertEqual(signal.getsignal(signal.SIGTERM), signal.SIG_DFL)
        self.assertEqual(signal.getsignal(signal.SIGTERM), before)


def lives(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    try:  # ended, but nobody has asked how
        return Path(f"/proc/{number}/stat").read_text().split()[2] != "Z"
    except OSError:
        return os.path.exists("/proc") is False


def end(number: int) -> None:
    try:
        os.kill(number, signal.SIGKILL)
    except ProcessLookupError:
        pass
