"""generate.py with a style."""

import json
from unittest.mock import patch

import mlx.core as mx
import numpy as np
import soundfile
import sounds
from common import EXPECTED, REFERENCE, FollowingTest, ScriptTest, exact

import audiocraft
import settings
from audio import load_audio, save_audio
from endings import FADE, fade
from musicgen import MusicGen
from resample import true_peak
from style import StyleRequest


class TestStyleCommands(FollowingTest):
    model = str(REFERENCE / "style-audiocraft")

    def setUp(self):
        super().setUp()
        self.enterContext(patch.dict(audiocraft.SCALES, default=4))
        self.tune = self.folder / "tune.wav"
        notes = EXPECTED["style-audiocraft"]["tunes"][0]
        save_audio(self.tune, sounds.tune(44100, notes), 44100)

    def test_style(self):
        flags = ["-p", "drums", "--style", self.tune]
        audio = self.make("a.wav", *flags)
        model = MusicGen.from_pretrained(self.model)
        sound = load_audio(self.tune, 32000, 1)
        want = model.generate("drums", duration=0.3, seed=3, style=sound)[0]
        want = mx.array(fade(want, 32000, 0, FADE))
        want = want / max(1, true_peak(np.array(want)))
        self.assertClose(mx.array(audio)[:, None], want, 2e-4)
        told = settings.read_settings(self.folder / "a.wav")
        start, _ = model.conditioner.excerpt(StyleRequest(sound), 3)
        self.assertEqual(told["style"], str(self.tune))
        self.assertEqual(told["style_start"], start)
        self.assertSame(self.make("again.wav", "--again", self.folder / "a.wav"), audio)
        for more in (
            ["--style-start", "0.5"],
            ["--style-length", "1.5"],
            ["--style-quantizers", "6"],
            ["--guidance-beta", "5"],
        ):
            other = self.make("other.wav", *flags, *more)
            self.assertNotEqual(other.tolist(), audio.tolist())
        self.make("stream.wav", *flags, "--stream")
        free = self.make("free.wav", "--style", self.tune)  # the excerpt alone
        self.assertNotEqual(free.tolist(), audio.tolist())

    def test_settings_that_replace_others(self):
        flags = ["-p", "drums", "--style", self.tune, "--guidance-beta", "5"]
        self.make("a.wav", *flags)
        again = ["--again", self.folder / "a.wav"]
        self.make("text.wav", *again, "--style", "")
        told = settings.read_settings(self.folder / "text.wav")
        self.assertNotIn("style", told)
        self.assertIsNone(told["guidance_beta"])
        self.make("long.wav", *again, "--style-length", "4.5")
        told = settings.read_settings(self.folder / "long.wav")
        self.assertEqual((told["style_length"], told["guidance_beta"]), (4.5, 5))

    def test_redecode_needs_no_style(self):
        codes = self.folder / "codes.safetensors"
        flags = ["-p", "a", "--style", self.tune, "--save-codes", codes]
        audio = self.make("a.wav", *flags)
        self.tune.unlink()
        output = ["--output", self.folder / "b.wav"]
        status, _, err = ScriptTest.run_script(self, "--redecode", codes, *output)
        self.assertEqual(status, 0, err)
        self.assertSame(soundfile.read(self.folder / "b.wav")[0], audio)

    def test_silent_excerpts_fail_alone(self):
        half = self.folder / "half.wav"
        tune = np.array(sounds.tune(32000, [60] * 8))
        save_audio(half, np.concatenate([tune, tune, 0 * tune]), 32000)
        output = ["--output", self.folder / "x.wav", "--takes", "6", "--style", half]
        status, _, err = self.run_script("-p", "a", *output)
        self.assertEqual(status, 1)
        self.assertIn("must not be silent", err)
        made = len(list(self.folder.glob("x-*.wav")))
        self.assertIn(made, range(1, 6), err)

    def test_takes_each_have_their_excerpt(self):
        self.make("a.wav", "-p", "a", "--takes", "1", "--style", self.tune)
        output = ["--output", self.folder / "b.wav"]
        flags = ["-p", "a", "--takes", "2", "--style", self.tune]
        self.assertEqual(self.run_script(*output, *flags)[0], 0)
        paths = [self.folder / name for name in ("a.wav", "b-1.wav", "b-2.wav")]
        starts = [settings.read_settings(path)["style_start"] for path in paths]
        self.assertEqual(starts[0], starts[1])
        self.assertNotEqual(starts[1], starts[2])
        self.assertSame(soundfile.read(paths[0])[0], soundfile.read(paths[1])[0])

    def test_resume(self):
        codes = self.folder / "codes.safetensors"
        flags = ["-p", "a", "--style", self.tune, "--dtype", "float32"]
        self.make("short.wav", *flags, "--save-codes", codes)
        whole = self.folder / "whole.safetensors"
        output = ["--output", self.folder / "long.wav", "--save-codes", whole]
        script = ScriptTest.run_script
        status, _, err = script(
            self, *output, "--resume", codes, "--duration", "0.6", "--seed", "3"
        )
        self.assertEqual(status, 0, err)
        model = exact("style-audiocraft")
        sound = load_audio(self.tune, 32000, 1)
        want = model.generate_codes("a", duration=0.6, seed=3, style=sound)
        self.assertSame(settings.load_codes(whole)[0], want)

    def test_lines(self):
        lines, none = self.folder / "lines.jsonl", str(self.folder / "none.wav")
        told = [
            dict(prompt="a", style=str(self.tune), guidance_beta=5),
            dict(prompt="a", style=str(self.tune), style_start=99),
            dict(prompt="a"),
            dict(prompt="a", style=none),
        ]
        bad = self.folder / "bad.jsonl"
        bad.write_text(json.dumps(dict(prompt="a", guidance_beta=5)))
        status, _, err = self.run_script("--prompts", bad)
        self.assertEqual(status, 1)
        self.assertRegex(err, "line 1: guidance_beta must come with a style.\n$")
        lines.write_text("\n".join(map(json.dumps, told)))
        output = ["--output", self.folder / "x.wav", "--style-quantizers", "2"]
        status, _, err = self.run_script("--prompts", lines, *output)
        self.assertEqual(status, 1)
        self.assertIn("line 2: style_start must be at most", err)
        self.assertIn("line 4: There is no sound file", err)
        made = sorted(path.name for path in self.folder.glob("x-*.wav"))
        self.assertEqual(made, ["x-1.wav", "x-3.wav"])

    def test_bad_input(self):
        short = self.folder / "short.wav"
        save_audio(short, sounds.tune(32000, [60, 64]), 32000)
        with_style = ["--style", self.tune]
        for flags, status, pattern in (
            (["--style", "none.wav"], 1, "no sound file none.wav"),
            (["--style", short], 1, "at least the 3 s"),
            ([*with_style, "--style-length", "5"], 1, "from 1.5 to 4.5"),
            ([*with_style, "--style-quantizers", "7"], 1, "from 1 to 6"),
            ([*with_style, "--style-start", "3"], 1, "at most 2 s"),
            ([*with_style, "--style-start", "-3"], 2, "0 s or more"),
            ([*with_style, "--guidance-beta", "nan"], 2, "must be a finite number"),
            (["--guidance-beta", "5"], 2, "come with a style"),
            (["--style-start", "1"], 2, "come with a style"),
            ([*with_style, "--melody", self.tune], 1, "go with a melody model"),
        ):
            with self.subTest(flags=flags):
                output = ["--output", self.folder / "no.wav", "-p", "a"]
                got, _, err = self.run_script(*output, *flags)
                self.assertEqual(got, status, err)
                self.assertRegex(err, f"generate.py: error: .*{pattern}.*\n$")
                self.assertFalse((self.folder / "no.wav").exists())
        output = ["-p", "a", "--output", self.folder / "no.wav", *with_style]
        with patch.object(self, "model", str(REFERENCE / "mono-transformers")):
            status, _, err = self.run_script(*output)
        self.assertEqual(status, 1)
        self.assertRegex(err, "must go with a style model")
