"""Paths that begin with `~`: a shell expands some of them, and Python none."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import mlx.core as mx
import numpy as np
from common import REFERENCE, ROOT, Test

import audio
import convert
import lora
import outputs
import settings
import synth
import train
from musicgen import MusicGen

SOUND = np.random.default_rng(0).normal(size=(32000, 1)).astype(np.float32) / 9


class TestHome(Test):
    def setUp(self):
        super().setUp()
        self.enterContext(patch.dict(os.environ, HOME=str(self.folder)))

    def test_sound_files(self):
        audio.save_audio("~/a.wav", SOUND, 32000)
        self.assertTrue((self.folder / "a.wav").is_file())
        self.assertEqual(audio.load_audio("~/a.wav", 16000, 2).shape, (16000, 2))
        self.assertEqual(audio.count_samples("~/a.wav", 32000), 32000)
        audio.save_audio("~/b.wav", SOUND, 32000, settings.to_comment({"seed": 1}))
        self.assertEqual(settings.read_settings("~/b.wav"), {"seed": 1})
        with self.assertRaisesRegex(OSError, "could not|must exist"):
            audio.save_audio("~/no/a.wav", SOUND, 32000)

    def test_of_nobody(self):
        """As a shell does, they stay as they are."""
        with self.assertRaisesRegex(FileNotFoundError, "no sound file ~no-body/a.wav"):
            audio.load_audio("~no-body/a.wav", 32000, 1)

    def test_codes_and_adapters(self):
        codes = mx.zeros((1, 5, 4), mx.uint32)
        settings.save_codes("~/a.safetensors", codes, {"seed": 1})
        self.assertSame(settings.load_codes("~/a.safetensors")[0], codes)
        self.assertEqual(settings.read_settings("~/a.safetensors"), {"seed": 1})
        model = MusicGen.from_pretrained("tiny")
        lora.add_adapters(model.decoder, 2, 1.0)
        lora.save_adapter("~/b.safetensors", model.decoder, 2, {})
        self.assertEqual(lora.read_adapter("~/b.safetensors")[1]["rank"], 2)
        MusicGen.from_pretrained("tiny", adapter="~/b.safetensors")

    def test_files_to_write(self):
        (self.folder / "a.wav").write_text("x")
        self.assertEqual(outputs.free("~/a.wav"), self.folder / "a-2.wav")
        with self.assertRaisesRegex(FileExistsError, "is there already"):
            outputs.check_new("~/a.wav")
        with self.assertRaisesRegex(ValueError, "must not be written"):
            outputs.check_apart("~/a.wav", {"melody": self.folder / "a.wav"})
        (self.folder / "model").mkdir()
        (self.folder / "model" / "x.bin").write_text("x")
        with self.assertRaisesRegex(ValueError, "must not be written"):
            outputs.check_apart(self.folder / "model/x.bin", {"model": "~/model"})

    def test_converted_models(self):
        shutil.copytree(ROOT / "tiny", self.folder / "tiny")
        convert.convert("~/tiny", Path("~/ours"), mx.float16)
        self.assertTrue(convert.is_converted(Path("~/ours")))
        self.assertTrue((self.folder / "ours" / "config.json").is_file())
        card = convert.model_card(self.folder / "ours", "someone/ours", "~/tiny")
        self.assertNotIn("base_model", card)

    def test_clips(self):
        synth.listen(1, Path("~/clips"))
        text = (self.folder / "clips" / "000.txt").read_text().strip()
        lines = f'{{"file": "~/clips/000.wav", "caption": "{text}"}}\n'
        (self.folder / "named").mkdir()
        (self.folder / "named" / "captions.jsonl").write_text(lines)
        clips = train.find_clips(self.folder / "named")
        self.assertEqual(clips, [(self.folder / "clips" / "000.wav", text)])
        arguments = ["train.py", "lora", "--model=x", "--data=~/a", "--output=~/b"]
        with patch("sys.argv", arguments):
            args = train.parse_arguments()
        self.assertEqual(args.data, self.folder / "a")
        self.assertEqual(args.output, self.folder / "b")

    def test_commands(self):
        """As a shell leaves them behind a `=`."""
        comment = settings.to_comment({"seed": 1})
        audio.save_audio("~/a.wav", SOUND, 32000, comment)
        for name, arguments, written in (
            ("audio", ["~/a.wav", "~/b.flac"], "b.flac"),
            ("loudness", ["~/a.wav", "--loudness=-20", "--output=~/c.wav"], "c.wav"),
            ("melody", ["~/a.wav"], None),
            ("settings", ["~/a.wav"], None),
            ("synth", ["--listen=1", "--output-dir=~/clips"], "clips/000.wav"),
        ):
            command = [sys.executable, f"{name}.py", *arguments]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            self.assertEqual(done.returncode, 0, done.stderr)
            if written:
                self.assertTrue((self.folder / written).is_file(), name)
        codec = "encodec.py", "~/a.wav", "~/d.wav", f"--model={REFERENCE}/encodec_24khz"
        command = [sys.executable, *codec]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        self.assertTrue((self.folder / "d.wav").is_file())
