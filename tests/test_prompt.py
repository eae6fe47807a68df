"""What a take starts with."""

import math
import re
from unittest.mock import patch

import mlx.core as mx
import numpy as np
import soundfile
from common import REFERENCE, Test, exact, last

import prompt
from audio import load_audio
from prompt import check_codes, encode_prompt, prompt_frames, start_with


def noise(samples: int, channels: int = 1) -> mx.array:
    random = np.random.default_rng(0)
    return mx.array(random.normal(size=(samples, channels)), mx.float32)


class TestPrompt(Test):
    def test_plain_and_fast_are_the_reference(self):
        for name in ("mono-transformers", "stereo-audiocraft"):
            model = exact(name)
            want = mx.load(str(REFERENCE / name / "continued.safetensors"))
            for model.plain in (False, True):
                codes = encode_prompt(model, want["audio"][0].T, 15)
                self.assertEqual(codes.dtype, mx.uint32)
                self.assertSame(last(codes), want["codes"])

    def test_frames(self):
        model = exact("mono-audiocraft")
        self.assertEqual(prompt_frames(model, None), 0)
        for samples, frames in ((1, 1), (640, 1), (641, 2), (1280, 2)):
            sound = noise(samples)
            self.assertEqual(prompt_frames(model, sound), frames)
            codes = encode_prompt(model, sound, frames + 1)
            self.assertEqual(codes.shape, (1, frames, 4))

    def test_arrays_of_numpy(self):
        model = exact("mono-audiocraft")
        sound = noise(1000)
        codes = encode_prompt(model, np.array(sound, np.float64), 9)
        self.assertSame(codes, encode_prompt(model, sound, 9))

    def test_files_and_integers(self):
        """A file, its integers, and what load_audio gives of it are one sound."""
        path = self.folder / "x.wav"
        for name, channels in (("mono-audiocraft", 2), ("stereo-audiocraft", 1)):
            model, sound = exact(name), 0.1 * np.array(noise(4410, channels))
            integers = np.rint(sound * 32767).astype(np.int16)
            soundfile.write(path, integers, 44100)
            want = encode_prompt(model, load_audio(path, 32000, model.channels), 9)
            for given in (path, str(path)):
                self.assertSame(encode_prompt(model, given, 9), want)
                self.assertEqual(prompt_frames(model, given), 5)
            soundfile.write(path, integers, 32000)
            floats = encode_prompt(model, integers / 32768, 9)
            for given in (integers, mx.array(integers), path):
                self.assertSame(encode_prompt(model, given, 9), floats)
        self.assertSame(
            encode_prompt(model, integers[:, 0], 9), encode_prompt(model, integers, 9)
        )
        with self.assertRaisesRegex(ValueError, "prompt is 0.137813 s long, but a"):
            encode_prompt(model, path, 6)
        with self.assertRaisesRegex(FileNotFoundError, "no sound file none.wav"):
            encode_prompt(model, "none.wav", 6)

    def test_a_file_as_prompt_of_a_take(self):
        model, path = exact("mono-audiocraft"), self.folder / "x.flac"
        soundfile.write(path, 0.1 * np.array(noise(4000)), 44100)
        sound = load_audio(path, 32000, 1)
        for drop in (False, True):
            options = dict(duration=0.3, seed=1, drop_prompt=drop)
            want = model.generate("a", audio_prompt=sound, **options)
            got = model.generate("a", audio_prompt=str(path), **options)
            self.assertSame(got, want)
            self.assertEqual(got.shape[1], (15 - 5 * drop) * 640)

    def test_nothing_to_drop(self):
        """It is told before anything is made."""
        model = exact("mono-audiocraft")
        for options in ({}, dict(codes_prompt=mx.zeros((1, 3, 4), mx.int32))):
            with patch.object(model, "steps", side_effect=AssertionError):
                words = "drop_prompt must come with an audio_prompt"
                with self.assertRaisesRegex(ValueError, words):
                    model.generate("a", 0.3, drop_prompt=True, **options)

    def test_start(self):
        model = exact("stereo-audiocraft")
        sound, codes = noise(1000, 2), mx.zeros((1, 3, 8), mx.int32)
        self.assertSame(start_with(model, None, codes, 0.1), codes)
        own = start_with(model, sound, None, 0.1)
        self.assertSame(own, encode_prompt(model, sound, 5))
        nothing = start_with(model, None, codes[:, :0], 0.1)
        self.assertEqual(nothing.shape, (1, 0, 8))
        with self.assertRaisesRegex(ValueError, "must not come together"):
            start_with(model, sound, codes, 0.1)

    def test_no_room_for_more(self):
        model = exact("mono-audiocraft")
        start_with(model, noise(4 * 640), None, 0.1)
        message = (
            "The audio prompt is 0.0800312 s long, but a duration of 0.1 s has room for "
            "0.08 s: give a longer duration, or take less of the prompt."
        )
        with self.assertRaisesRegex(ValueError, f"^{re.escape(message)}$"):
            start_with(model, noise(4 * 640 + 1), None, 0.1)
        start_with(model, None, mx.zeros((1, 4, 4), mx.int32), 0.1)
        message = "The codes are 0.1 s long already, but the duration is 0.1 s: give"
        with self.assertRaisesRegex(ValueError, message):
            start_with(model, None, mx.zeros((1, 5, 4), mx.int32), 0.1)

    def test_sounds_that_are_none(self):
        model = exact("stereo-audiocraft")
        for audio, message in (
            (mx.zeros((0, 1)), "shape (N, C), with N > 0 samples of 1 to 2 channels"),
            (mx.zeros((9, 3)), "audio_prompt must have the shape (N, C)"),
            (mx.zeros((1, 9, 1)), "audio_prompt must have the shape (N, C)"),
            (0.5, "audio_prompt must have the shape (N, C)"),
            (5, "audio_prompt must be samples (N, C) in floats"),
            (mx.array([[math.inf]]), "audio_prompt must be finite"),
            ({}, "audio_prompt must be samples (N, C) in floats"),
        ):
            with self.assertRaisesRegex(ValueError, re.escape(message)):
                encode_prompt(model, audio, 9)
        with self.assertWarnsRegex(UserWarning, "audio prompt is silent"):
            encode_prompt(model, mx.full((640, 1), 9e-5), 9)

    def test_codes_of_other_models(self):
        model = exact("mono-audiocraft")
        good = mx.zeros((1, 3, 4), mx.int32)
        check_codes(model, good + 63)
        for bad in (
            good[0],
            good[..., :3],
            good[:, :0],
            good + 64,
            good - 1,
            good.astype(mx.float32),
            mx.zeros((1, 3, 8), mx.int32),
        ):
            with self.assertRaisesRegex(
                ValueError, "^The codes must be numbers from 0 to 63 in 4 codebooks"
            ):
                check_codes(model, bad)
        for bad in (good[0], mx.concatenate([good, good])):
            with self.assertRaisesRegex(ValueError, "must be codes \\(1, T, K\\), got"):
                prompt.check_prompt(model, bad, 9)
