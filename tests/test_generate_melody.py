"""generate.py with a melody."""

import json
from unittest.mock import patch

import mlx.core as mx
import numpy as np
import soundfile
import sounds
from common import REFERENCE, FollowingTest, exact

import demucs
import melody
import settings
from audio import load_audio, save_audio
from endings import FADE, fade
from musicgen import MusicGen
from resample import true_peak


class TestMelodyCommands(FollowingTest):
    model = str(REFERENCE / "melody-transformers")

    def setUp(self):
        super().setUp()
        self.tune = self.folder / "tune.wav"
        save_audio(self.tune, sounds.tune(44100, [60, 64, 67, 72]), 44100)

    def test_melody(self):
        flags = ["-p", "drums", "--melody", self.tune, "--no-separate"]
        audio = self.make("a.wav", *flags)
        model = MusicGen.from_pretrained(self.model)
        sound = load_audio(self.tune, 32000, 1)
        options = dict(duration=0.3, seed=3, melody=sound, separate=False)
        want = model.generate("drums", **options)[0]
        want = mx.array(fade(want, 32000, 0, FADE))
        want = want / max(1, true_peak(np.array(want)))
        self.assertClose(mx.array(audio)[:, None], want, 2e-4)
        told = settings.read_settings(self.folder / "a.wav")
        self.assertEqual(told["melody"], str(self.tune))
        self.assertTrue(told["no_separate"])
        self.assertSame(self.make("again.wav", "--again", self.folder / "a.wav"), audio)
        text = self.make("text.wav", "-p", "drums")
        later = self.make("later.wav", *flags, "--melody-start", "1.2")
        self.make("stream.wav", *flags, "--stream")
        for other in (text, later):
            self.assertNotEqual(other.tolist(), audio.tolist())

    def test_separated_first(self):
        tiny = demucs.HTDemucs.from_pretrained(REFERENCE / "htdemucs")
        kept = self.folder / "kept.wav"
        flags = ["-p", "drums", "--melody", self.tune, "--save-melody", kept]
        with patch("melody.published_demucs", return_value=tiny) as loaded:
            audio = self.make("a.wav", *flags, "--takes", "1", "--show-melody")
            self.assertEqual(loaded.call_count, 1)  # for all that wants it
            bare = self.make("b.wav", *flags[:4], "--no-separate")
            self.assertEqual(loaded.call_count, 1)
        self.assertNotEqual(audio.tolist(), bare.tolist())
        want = melody.isolate_melody(load_audio(self.tune, 32000, 1), 32000, tiny)
        found = mx.array(soundfile.read(kept)[0])[:, None]
        self.assertClose(found, want / max(1, true_peak(np.array(want))), 3e-4)

    def test_show(self):
        flags = ["-p", "drums", "--melody", self.tune, "--no-separate"]
        flags += ["--output", self.folder / "a.wav", "--show-melody"]
        _, out, _ = self.run_script(*flags)
        lines = out.splitlines()
        self.assertEqual(
            [line[:2].strip() for line in lines[:12]], [*melody.NOTES[::-1]]
        )
        self.assertIn("█", lines[11])  # C

    def test_silence_in_the_melody(self):
        model = exact("melody-audiocraft")  # whose windows have a second
        gap = np.concatenate([sounds.tune(32000, [60, 64]), np.zeros((96000, 1))])
        options = dict(duration=2.5, extend_stride=0.6, separate=False)
        codes = model.generate_codes("a", melody=mx.array(gap), **options)
        self.assertEqual(codes.shape[1], 125)

    def test_stopped_among_lengths(self):
        model, prompts = exact("melody-transformers"), [
            "x",
            "a long slow song with drums",
            "x",
        ]
        take = model.steps(prompts, duration=0.4, seed=1)
        for _ in take:
            if take.step > 30:
                break
        codes = take.codes
        self.assertEqual(len(codes), 1)  # the third is made, but not the second
        alone = model.generate_codes("x", duration=0.4, seed=1)
        self.assertSame(codes, alone)

    def test_nothing_is_overwritten(self):
        before = self.tune.read_bytes()
        flags = ["-p", "a", "--melody", self.tune, "--no-separate"]
        for more in (
            ["--save-melody", self.tune, "--output", self.folder / "x.wav"],
            ["--save-melody", self.folder / "x.wav", "--output", self.folder / "x.wav"],
            ["--output", self.tune],
        ):
            status, _, err = self.run_script(*flags, *more)
            self.assertIn(status, (1, 2))
            self.assertRegex(err, "^generate.py: error: .* must .*\n$")
        self.assertEqual(self.tune.read_bytes(), before)
        self.assertEqual(len(list(self.folder.iterdir())), 1)

    def test_lines_with_melodies(self):
        lines = self.folder / "lines.jsonl"
        lines.write_text(
            json.dumps(dict(prompt="drums", melody=str(self.tune), no_separate=True))
            + "\n"
            + json.dumps(dict(prompt="drums", melody=str(self.tune), melody_start=99))
            + "\n"
            + json.dumps(dict(prompt="drums"))
        )
        output = ["--output", self.folder / "x.wav", "--no-separate"]
        status, _, err = self.run_script("--prompts", lines, *output)
        self.assertEqual(status, 1)
        self.assertIn("line 2: melody_start must be less than the 2 s", err)
        made = sorted(path.name for path in self.folder.glob("x-*.wav"))
        self.assertEqual(made, ["x-1.wav", "x-3.wav"])

    def test_bad_input(self):
        short, silent = self.folder / "short.wav", self.folder / "silent.wav"
        save_audio(short, mx.ones((9, 1)), 32000)
        with patch("audio.to_int16", lambda x, _: (x * 0).astype(np.int16)):
            save_audio(silent, mx.zeros((44100, 1)), 44100)
        (self.folder / "noise.wav").write_bytes(b"noise")
        for flags, status, pattern in (
            (["--melody", "none.wav"], 1, "no sound file none.wav"),
            (["--melody", short], 1, "at least 0.512 s"),
            (["--melody", silent], 1, "must not be silent"),
            (["--melody", self.folder / "noise.wav"], 1, "not a readable sound file"),
            (["--melody", self.tune, "--melody-start", "2"], 1, "melody_start must"),
            (["--melody-start", "2"], 2, "need a melody"),
            (["--melody", self.tune, "--melody-start", "-1"], 2, "melody_start must"),
            (["--show-melody"], 2, "need a --melody"),
            (["--melody", self.tune, "--save-melody", "x.doc"], 2, "must end in"),
        ):
            with self.subTest(flags=flags):
                output = ["--output", self.folder / "no.wav", "-p", "a"]
                more = ["--no-separate"] if "--melody" in flags else []
                got, _, err = self.run_script(*output, *flags, *more)
                self.assertEqual(got, status, err)
                self.assertRegex(err, f"generate.py: error: .*{pattern}.*\n$")
                self.assertFalse((self.folder / "no.wav").exists())
        flags = ["-p", "a", "--melody", self.tune, "--output", self.folder / "no.wav"]
        with patch.object(self, "model", str(REFERENCE / "mono-transformers")):
            status, _, err = self.run_script(*flags)
        self.assertEqual(status, 1)
        self.assertRegex(err, "must go with a melody model")
