"""Reading, resampling and writing sound files."""

import io
import math
import os
import struct
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from unittest.mock import patch

import mlx.core as mx
import numpy as np
import soundfile
from common import REFERENCE, Test

import audio as audio_script
from audio import (
    check_audio_path,
    check_samples,
    load_audio,
    resample,
    save_audio,
    to_int16,
    wav_header,
)


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
                check_audio_path(self.folder / name)
        check_audio_path(self.folder / "new.wav")
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
        found = to_int16(quiet, np.random.default_rng(1))
        self.assertEqual(found.dtype, np.int16)
        self.assertLess(np.abs(found.mean(axis=0) - 0.3).max(), 0.02)  # it is heard
        # and what is added is the same noise, however loud the sound
        for level in (0.0, 0.5, 0.77):
            audio = np.full((40_000, 1), level / 32767, np.float32)
            error = to_int16(audio, np.random.default_rng(2)) - level
            self.assertLess(abs(error.var() - 0.25), 0.01)
        ends = to_int16(np.array([[1.5], [-1.5]]), np.random.default_rng(3))
        self.assertLessEqual(np.abs(ends - [[32766], [-32766]]).max(), 1)  # no clip
        random, noise = np.random.default_rng(0), np.random.default_rng(0)
        parts = [to_int16(quiet[a:b], random) for a, b in ((0, 7), (7, 99))]
        self.assertSame(np.concatenate(parts), to_int16(quiet[:99], noise))

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

    def test_samples(self):
        """What a caller gives as a sound, of MLX or numpy, mono or stereo."""
        for sound in (np.zeros((3, 2)), mx.zeros((3, 1), mx.float16)):
            found = check_samples("melody", sound)
            self.assertEqual((found.shape, found.dtype), (sound.shape, mx.float32))
        for sound, pattern in (
            ("a.wav", "got 'a.wav'. Read the file with load_audio"),
            (Path("a.wav"), "got 'a.wav'. Read the file with load_audio"),
            (None, "must be samples .*, got NoneType"),
            ([["x"]], "must be samples .*, got list"),
            (mx.zeros(9), r"must have the shape \(N, C\).*got \(9,\)"),
            (mx.zeros((0, 1)), r"must have the shape \(N, C\).*got \(0, 1\)"),
            (mx.zeros((9, 3)), r"1 to 2 channels, got \(9, 3\)"),
            (mx.zeros((1, 9, 1)), r"must have the shape \(N, C\).*got \(1, 9, 1\)"),
            (mx.array([[0.0], [math.nan]]), "must be finite"),
            (np.array([[0.0], [-math.inf]]), "must be finite"),
        ):
            with self.assertRaisesRegex(ValueError, f"^melody .*{pattern}"):
                check_samples("melody", sound, channels=2)

    def test_script(self):
        source, target = self.folder / "in.wav", self.folder / "out.flac"
        save_audio(source, 0.1 * mx.random.normal((4410, 1)), 44100)
        arguments = ["audio.py", str(source), str(target)]
        for more, rate, shape in (
            ([], 44100, (4410,)),
            (["--sampling-rate", "48000", "--channels", "2"], 48000, (4800, 2)),
        ):
            with patch("sys.argv", arguments + more):
                with redirect_stdout(io.StringIO()) as out:
                    audio_script.main()
            self.assertEqual(out.getvalue(), f"{target}: 0.10 s\n")
            audio, found = soundfile.read(target)
            self.assertEqual((audio.shape, found), (shape, rate))
        for source, target, pattern in (
            ("none.wav", "x.wav", "error: There is no sound file .*none.wav"),
            ("in.wav", "x.xyz", "error: .*x.xyz must end in one of"),
        ):
            paths = [str(self.folder / name) for name in (source, target)]
            with patch("sys.argv", ["audio.py", *paths]):
                with self.assertRaisesRegex(SystemExit, pattern):
                    audio_script.main()

    def test_rates_beyond_all_bounds(self):
        path = self.folder / "x.wav"
        soundfile.write(path, np.full((99, 1), 0.5), 32000)
        content = bytearray(path.read_bytes())
        for rate in (1, 99, 10**6, 2**31 - 1):  # the header's, of which nobody is sure
            content[24:28] = struct.pack("<I", rate)
            path.write_bytes(content)
            with self.assertRaisesRegex(ValueError, f"a rate of 100 .* got {rate}"):
                load_audio(path, 32000, 1)

    def test_header_of_an_endless_stream(self):
        header = wav_header(2, 48000, 2**33)
        self.assertEqual(header[4:8], b"\xff" * 4)
        self.assertEqual(header[-4:], b"\xff" * 4)
