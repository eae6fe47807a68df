"""What scripts say: one line each, and in words that lead on."""

import subprocess
import sys

import numpy as np
from common import ROOT, Test

import audio
from musicgen import MusicGen


class TestWords(Test):
    def test_warnings_are_one_line(self):
        """And nothing of the code that gave them."""
        loud = 3 * np.random.default_rng(0).normal(size=(32000, 1)).clip(-1, 1)
        source = self.folder / "loud.wav"
        audio.save_audio(source, loud, 32000, subtype="FLOAT")
        clips = ["--listen", "9", "--output-dir", self.folder / "clips"]
        louder = ["--loudness", "-5", "--output", self.folder / "b.wav"]
        for name, *arguments in (
            ("audio", source, self.folder / "a.wav"),
            ("loudness", source, *louder),
            ("synth", *clips),
        ):
            command = [sys.executable, f"{name}.py", *map(str, arguments)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertNotEqual(done.stderr, "", name)
            for line in done.stderr.splitlines():
                self.assertRegex(line, rf"^{name}.py: warning: .*\.$")

    def test_what_a_model_follows(self):
        tiny = MusicGen.from_pretrained("tiny")
        want = "such as 'melody', but tiny follows the text alone"
        with self.assertRaisesRegex(ValueError, want):
            tiny.generate("bell", melody=np.zeros((32000, 1), np.float32))
        with self.assertRaisesRegex(
            ValueError, "a list of 2, one for each prompt, got"
        ):
            tiny.generate(["bell", "drums"], melody=[None] * 3)
