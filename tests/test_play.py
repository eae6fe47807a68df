"""Playing, with players of our own on the path."""

import io
import os
import stat
from contextlib import redirect_stderr, redirect_stdout
from unittest.mock import patch

import mlx.core as mx
import numpy as np
import soundfile
from common import ROOT, Test

import play
from audio import save_audio

PLAYER = """#!/bin/sh
echo "$0" "$@" >> "$0.log"
{does}
"""


class TestPlay(Test):
    def setUp(self):
        super().setUp()
        self.bin = self.folder / "bin"
        self.bin.mkdir()
        path = patch.dict(os.environ, PATH=f"{self.bin}:/usr/bin:/bin")
        path.start()
        self.addCleanup(path.stop)
        save_audio(self.folder / "a.wav", mx.zeros((800, 1)), 8000)
        save_audio(self.folder / "a.flac", mx.zeros((800, 1)), 8000)

    def add(self, name: str, does: str = "exit 0") -> None:
        path = self.bin / name
        path.write_text(PLAYER.format(does=does))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def log(self, name: str) -> str:
        return (self.bin / f"{name}.log").read_text()

    def test_file(self):
        with self.assertRaisesRegex(OSError, "nothing that plays a .wav .*ffmpeg"):
            play.play_file(self.folder / "a.wav")
        self.add("aplay")
        play.play_file(self.folder / "a.wav")
        self.assertIn(f"-q {self.folder / 'a.wav'}", self.log("aplay"))
        with self.assertRaisesRegex(OSError, "nothing that plays a .flac"):
            play.play_file(self.folder / "a.flac")
        self.add("ffplay")
        play.play_file(self.folder / "a.flac")
        self.assertIn("-autoexit", self.log("ffplay"))
        self.add("afplay", "exit 3")
        with self.assertRaisesRegex(OSError, "afplay does not play .*: status 3"):
            play.play_file(self.folder / "a.wav")
        with self.assertRaisesRegex(FileNotFoundError, "no sound file .*gone.wav"):
            play.play_file(self.folder / "gone.wav")
        self.add("afplay")
        with patch.dict(os.environ, HOME=str(self.folder)):
            play.play_file("~/a.wav")
        self.assertIn(f"afplay {self.folder / 'a.wav'}", self.log("afplay"))

    def test_samples_while_they_come(self):
        pieces = [mx.random.uniform(-0.5, 0.5, (n, 2)) for n in (800, 1, 9000)]
        with self.assertRaisesRegex(OSError, "while it is made"):
            list(play.heard(pieces, 2, 8000))
        self.add("afplay")  # which reads no pipe
        with self.assertRaisesRegex(OSError, "while it is made"):
            list(play.heard(pieces, 2, 8000))
        self.add("ffplay", 'cat > "$0.wav"')
        self.assertEqual([*map(id, play.heard(pieces, 2, 8000))], [*map(id, pieces)])
        data = (self.bin / "ffplay.wav").read_bytes()
        samples, rate = soundfile.read(io.BytesIO(data))
        self.assertEqual(rate, 8000)
        want = np.concatenate([*map(np.array, pieces)])
        self.assertClose(mx.array(samples), mx.array(want), 1e-4)

    def test_player_that_is_closed(self):
        self.add("ffplay", "exit 1")
        pieces = [mx.zeros((32000, 1))] * 20  # more than a pipe holds
        with self.assertWarnsRegex(UserWarning, "ffplay did not play .*: status 1"):
            self.assertEqual(len(list(play.heard(pieces, 1, 32000))), 20)

    def test_take_that_is_left(self):
        """What came is heard, and the player ends."""
        self.add("ffplay", 'cat > "$0.wav"')
        playing = play.heard([mx.zeros((800, 1))] * 9, 1, 8000)
        next(playing), next(playing)
        playing.close()
        size = (self.bin / "ffplay.wav").stat().st_size
        self.assertGreaterEqual(size, 2 * 1600)
        self.assertLess(size, 3 * 1600)

    def test_script(self):
        self.add("aplay")
        with patch("sys.argv", ["play.py", str(self.folder / "a.wav")]):
            play.main()
        self.assertIn("a.wav", self.log("aplay"))
        with patch("sys.argv", ["play.py", str(ROOT / "gone.wav")]):
            with self.assertRaisesRegex(
                SystemExit, "^play.py: error: There is no sound"
            ):
                play.main()
        for arguments, status in (([], 2), (["--help"], 0)):
            with redirect_stdout(io.StringIO()) as out:
                with redirect_stderr(out), patch("sys.argv", ["play.py", *arguments]):
                    with self.assertRaises(SystemExit) as stop:
                        play.main()
            self.assertEqual(stop.exception.code, status)
            self.assertRegex(out.getvalue(), r"^usage: play.py \[-h\] FILE")

    def test_a_name_without_ending(self):
        """Of which one would not know what is missing."""
        (self.folder / "a").write_bytes((self.folder / "a.wav").read_bytes())
        with self.assertRaisesRegex(OSError, "nothing that plays this sound here"):
            play.play_file(self.folder / "a")
