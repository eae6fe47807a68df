"""What commands print, where it cannot be written: a line about a full disk, nothing
where nobody reads any more, and never a traceback."""

import os
import subprocess
import sys
import unittest
from pathlib import Path

import mlx.core as mx
import numpy as np
import soundfile
from common import REFERENCE, ROOT, Test, slow

import settings

QUICK = ("--duration", "1", "--prompts", "1")
FULL = Path("/dev/full")


class TestPrinting(Test):
    def commands(self) -> dict[str, list]:
        """A command of every script whose product is what it prints."""
        song, codes = self.folder / "a.wav", self.folder / "a.safetensors"
        noise = np.random.default_rng(0).normal(size=(32000, 1)) / 9
        soundfile.write(song, noise, 32000)
        settings.save_codes(codes, mx.ones((1, 3, 4), mx.uint32), {"seed": 3})
        mert = REFERENCE / "style-audiocraft" / "MERT-v1-95M"
        package = REFERENCE / "mono-audiocraft" / "state_dict.bin"
        return {
            "models": ["models.py"],
            "list": ["generate.py", "--list-models"],
            "torch_file": ["torch_file.py", package],
            "settings": ["settings.py", codes],
            "t5": ["t5.py", "--model", REFERENCE / "t5-gated"],
            "mert": ["mert.py", song, "--model", mert],
            "loudness": ["loudness.py", song],
            "melody": ["melody.py", song],
            "evaluate": ["evaluate.py", "--model", "tiny", *QUICK],
            "fidelity": ["fidelity.py", "--model", "tiny", "--duration", "0.1"],
            "benchmark": ["benchmark.py", "--model", "tiny", "--duration", "0.1"],
        }

    def run_into(self, stream, command: list) -> subprocess.CompletedProcess:
        command = [sys.executable, *map(str, command)]
        ends = dict(stdout=stream, stderr=subprocess.PIPE, text=True)
        return subprocess.run(command, cwd=ROOT, **ends)

    @slow(30)
    @unittest.skipUnless(FULL.exists(), "no /dev/full here")
    def test_a_full_disk(self):
        for name, command in self.commands().items():
            with self.subTest(name), open(FULL, "w") as full:
                done = self.run_into(full, command)
                told = f"{command[0]}: error: standard output: the disk is full\n"
                self.assertEqual((done.returncode, done.stderr), (1, told))

    @slow(30)
    def test_nobody_reads(self):
        for name, command in self.commands().items():
            with self.subTest(name):
                reader, writer = os.pipe()
                os.close(reader)
                done = self.run_into(writer, command)
                os.close(writer)
                self.assertEqual((done.returncode, done.stderr), (0, ""))

    def test_a_closed_one(self):
        """Nothing is to be told then."""
        for name in ("models", "loudness", "torch_file"):
            script, *rest = map(str, self.commands()[name])
            line = 'exec "$0" "$@" >&-'
            command = ["bash", "-c", line, sys.executable, script, *rest]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            self.assertEqual((name, done.returncode, done.stderr), (name, 0, ""))

    def test_what_was_made_is_made(self):
        """A line about it may be lost."""
        self.commands()
        for name, command in (
            (
                "b.wav",
                ["loudness.py", "a.wav", "--loudness", "-20", "--output", "b.wav"],
            ),
            ("c.wav", ["audio.py", "a.wav", "c.wav"]),
            (
                "out/adapter_config.json",
                ["peft_files.py", REFERENCE / "peft" / "ours-mono.safetensors", "out"],
            ),
        ):
            reader, writer = os.pipe()
            os.close(reader)
            command = [sys.executable, ROOT / command[0], *command[1:]]
            done = subprocess.run(
                command, cwd=self.folder, stdout=writer, stderr=subprocess.PIPE
            )
            os.close(writer)
            self.assertEqual((done.returncode, done.stderr), (0, b""), name)
            self.assertTrue((self.folder / name).is_file())
