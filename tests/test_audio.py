"""Reading, resampling and writing sound files."""

import math
import os
import warnings
from pathlib import Path

import mlx.core as mx
import numpy as np
import soundfile
from common import REFERENCE, Test

import encodec
from encodec import load_audio, resample, save_audio


class TestAudioFiles(Test):
    def test_resample(self):
        signals = mx.load(str(REFERENCE / "resample.safetensors"))
        rates = [name[: -len("_input")] for name in signals if name.endswith("_input")]
        self.assertEqual(len(rates), 4)
        for name in rates:
            source, target = map(int, name.split("_"))
            got = resample(np.array(signals[f"{name}_input"]).T, source, target)
            self.assertClose(mx.array(got.T), signals[f"{name}_output"])

    def test_resample_in_blocks(self):
        audio = np.random.default_rng(0).normal(size=(150_000, 1)).astype(np.float32)
        whole = resample(audio, 32000, 48000)
        self.assertEqual(whole.shape, (225_000, 1))
        middle = resample(audio[60_000:110_000], 32000, 48000)
        self.assertClose(
            mx.array(middle[300:-300]), mx.array(whole[90_300:164_700]), 1e-6
        )

    def test_minutes_of_ogg(self):
        path = self.folder / "long.ogg"
        save_audio(path, mx.zeros((32000 * 400, 1)), 32000)
        self.assertEqual(soundfile.info(path).frames, 32000 * 400)

    def test_places_that_cannot_be_written(self):
        (self.folder / "dir.wav").mkdir()
        (self.folder / "dangling.wav").symlink_to(self.folder / "no" / "x.wav")
        os.mkfifo(self.folder / "pipe.wav")
        places = ["dir.wav", "dangling.wav", "pipe.wav"]
        if Path("/proc/self").exists():
            (self.folder / "proc").symlink_to("/proc/self")
            places.append("proc/x.wav")
        for name in places:
            with self.assertRaisesRegex(OSError, "choose another place"):
                encodec.check_audio_path(self.folder / name)
        encodec.check_audio_path(self.folder / "new.wav")
        self.assertFalse((self.folder / "new.wav").exists())

    def test_shapes(self):
        path = self.folder / "x.wav"
        save_audio(path, mx.zeros((0, 1)), 32000)
        self.assertEqual(soundfile.info(path).frames, 0)
        for shape in ((2, 3, 1), (), (4, 0), (4, 300)):
            with self.assertRaisesRegex(ValueError, "must have the shape"):
                save_audio(path, mx.zeros(shape), 32000)
        for rate in (0, 10**6):
            with self.assertRaisesRegex(ValueError, "sampling_rate must"):
                save_audio(self.folder / "x.ogg", mx.zeros((9, 1)), rate)

    def test_round_trip(self):
        tone = np.sin(np.arange(32000) * 0.05)[:, None] * [0.5, 0.25]
        for suffix, tolerance in (
            (".wav", 1e-4),
            (".flac", 1e-4),
            (".ogg", 0.05),
            (".mp3", 0.05),
        ):
            path = self.folder / f"tone{suffix}"
            save_audio(path, mx.array(tone), 32000)
            audio = load_audio(path, 32000, 2)
            self.assertEqual(audio.shape[1], 2)
            middle = slice(8000, 24000)
            self.assertClose(audio[middle], mx.array(tone)[middle], tolerance)

    def test_channels(self):
        path = self.folder / "in.wav"
        sound = np.array([[0.5, -0.25, 0.125]] * 100)
        for found, wanted, result in (
            (1, 2, [0.5, 0.5]),
            (2, 1, [0.125]),
            (3, 2, [0.5, -0.25]),
        ):
            soundfile.write(path, sound[:, :found], 32000, subtype="FLOAT")
            self.assertSame(load_audio(path, 32000, wanted)[50], result)
        soundfile.write(path, sound[:, :2], 32000)
        with self.assertRaisesRegex(ValueError, "has 2 channels, but 4"):
            load_audio(path, 32000, 4)

    def test_dither(self):
        quiet = np.full((40_000, 2), 0.3 / 32767, np.float32)  # less than half a step
        found = encodec.to_int16(quiet, np.random.default_rng(1))
        self.assertEqual(found.dtype, np.int16)
        self.assertLess(np.abs(found.mean(axis=0) - 0.3).max(), 0.02)  # it is heard
        # and what is added is the same noise, however loud the sound
        for level in (0.0, 0.5, 0.77):
            audio = np.full((40_000, 1), level / 32767, np.float32)
            error = encodec.to_int16(audio, np.random.default_rng(2)) - level
            self.assertLess(abs(error.var() - 0.25), 0.01)
        ends = encodec.to_int16(np.array([[1.5], [-1.5]]), np.random.default_rng(3))
        self.assertLessEqual(np.abs(ends - [[32766], [-32766]]).max(), 1)  # no clip
        random, noise = np.random.default_rng(0), np.random.default_rng(0)
        parts = [encodec.to_int16(quiet[a:b], random) for a, b in ((0, 7), (7, 99))]
        self.assertSame(np.concatenate(parts), encodec.to_int16(quiet[:99], noise))

    def test_subtypes(self):
        audio = np.random.default_rng(0).uniform(-1.5, 1.5, (999, 2))
        for name, subtype, error in (
            ("x.wav", "PCM_16", 2 / 32767),  # and dither
            ("x.wav", "PCM_24", 1 / 2**23),
            ("x.flac", "PCM_24", 1 / 2**23),
        ):
            path, peak = self.folder / name, np.abs(audio).max()
            with self.assertWarnsRegex(UserWarning, "scaled down"):
                save_audio(path, audio, 32000, "told", subtype)
            self.assertEqual(soundfile.info(path).subtype, subtype)
            found = soundfile.read(path)[0]
            self.assertLess(np.abs(found - audio / peak).max(), 2.5 * error)
            self.assertEqual(soundfile.SoundFile(path).comment, "told")
        path = self.folder / "x.wav"
        save_audio(path, audio, 32000, subtype="FLOAT")  # as it is, without a warning
        self.assertLess(np.abs(soundfile.read(path)[0] - audio).max(), 1e-6)
        for name, subtype in (("x.flac", "FLOAT"), ("x.mp3", "PCM_16"), ("x.wav", "x")):
            with self.assertRaisesRegex(ValueError, f"subtype of a .*{subtype}"):
                save_audio(self.folder / name, audio, 32000, subtype=subtype)

    def test_never_clips_silently(self):
        path = self.folder / "loud.wav"
        with self.assertWarnsRegex(UserWarning, "scaled down: its peak of 4.00"):
            save_audio(path, mx.array([1.0, -4.0, 2.0]), 32000)
        self.assertClose(
            load_audio(path, 32000, 1)[:, 0], mx.array([0.25, -1, 0.5]), 1e-4
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            save_audio(self.folder / "LOUD.WAV", mx.array([0.9, -1.0]), 32000)
        audio = load_audio(self.folder / "LOUD.WAV", 32000, 1)
        self.assertClose(audio[:, 0], mx.array([0.9, -1.0]), 1e-4)

    def test_bad_files(self):
        text = self.folder / "text.wav"
        text.write_text("not sound")
        empty, broken = self.folder / "empty.wav", self.folder / "nan.wav"
        soundfile.write(empty, np.zeros((0, 1)), 32000)
        soundfile.write(broken, np.array([0.0, np.nan]), 32000, subtype="FLOAT")
        for path in (text, empty, broken):
            with self.assertRaisesRegex(ValueError, path.name):
                load_audio(path, 32000, 1)
        with self.assertRaisesRegex(FileNotFoundError, "no sound file"):
            load_audio(self.folder / "none.wav", 32000, 1)
        with self.assertRaisesRegex(ValueError, "must be finite"):
            save_audio(self.folder / "out.wav", mx.array([0.0, math.nan]), 32000)
