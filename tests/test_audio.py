"""Reading, resampling and writing sound files."""

import io
import math
import os
import struct
import threading
import time
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
    whole_file,
)
from resample import true_peak
from wav_stream import wav_header


class TestAudioFiles(Test):
    def noise(self, samples: int, channels: int = 1) -> np.ndarray:
        """(samples, channels), in about -0.5 to 0.5."""
        noise = np.random.default_rng(0).normal(size=(samples, channels))
        return (0.1 * noise).astype(np.float32)

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
        with self.assertRaisesRegex(
            ValueError, "has 2 channels, but 4 .* or ask for f"
        ):
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
            path, peak = self.folder / name, true_peak(audio)
            with self.assertWarnsRegex(UserWarning, "scaled down"):
                save_audio(path, audio, 32000, "told", subtype)
            self.assertEqual(soundfile.info(path).subtype, subtype)
            found = soundfile.read(path)[0]
            self.assertLess(np.abs(found - audio / peak).max(), 2.5 * error)
            self.assertEqual(soundfile.SoundFile(path).comment, "told")
        path = self.folder / "x.wav"
        save_audio(path, audio, 32000, subtype="FLOAT")  # as it is, without a warning
        self.assertLess(np.abs(soundfile.read(path)[0] - audio).max(), 1e-6)
        for name, subtype, pattern in (
            ("x.flac", "FLOAT", "subtype of a .flac must be .* got 'FLOAT'"),
            ("x.wav", "x", "subtype of a .wav must be .* got 'x'"),
            ("x.mp3", "PCM_16", "x.mp3 takes no subtype, .*: leave it out, or write a"),
        ):
            with self.assertRaisesRegex(ValueError, pattern):
                save_audio(self.folder / name, audio, 32000, subtype=subtype)

    def test_never_clips_silently(self):
        path = self.folder / "loud.wav"
        loud = np.array([1.0, 4.0, 3.5, 2.0])
        peak = true_peak(loud[:, None])  # between the samples
        self.assertGreater(peak, 4.1)
        with self.assertWarnsRegex(
            UserWarning, "scaled down by 1[23] dB: its peaks would"
        ):
            save_audio(path, loud, 32000)
        found = load_audio(path, 32000, 1)[:, 0]
        self.assertClose(found, mx.array(loud / peak), 1e-4)
        fits = 0.999 * loud / peak
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            save_audio(self.folder / "LOUD.WAV", fits, 32000)
        audio = load_audio(self.folder / "LOUD.WAV", 32000, 1)
        self.assertClose(audio[:, 0], mx.array(fits), 1e-4)

    def test_encoding_raises_peaks(self):
        """mp3 and ogg are heard again, and lowered until they do not clip."""
        noise = np.sign(self.noise(64000, 2)) * np.abs(self.noise(64000, 2)) ** 0.2
        noise /= true_peak(noise) * 1.0001
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            save_audio(self.folder / "x.wav", noise, 32000)
        for name in ("x.mp3", "x.ogg"):
            path = self.folder / name
            audio_script.write_samples(
                path, noise, 32000, "", audio_script.choose_subtype(path)
            )
            over = 20 * math.log10(true_peak(soundfile.read(path)[0]))
            self.assertGreater(over, 0.1)
            told = rf"{name} was scaled down by [\d.]+ dB: as .{name[2:]} its peaks"
            with self.assertWarnsRegex(UserWarning, told):
                save_audio(path, noise, 32000, "kept")
            found = true_peak(soundfile.read(path)[0])
            self.assertLessEqual(found, 1.0005)
            self.assertGreater(found, 0.9)
            self.assertEqual(soundfile.SoundFile(path).comment, "kept")
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                save_audio(path, noise / 2, 32000)

    def test_a_ceiling_holds_after_encoding(self):
        """And not before it only."""
        noise = np.sign(self.noise(64000, 2)) * np.abs(self.noise(64000, 2)) ** 0.2
        for ceiling in (-1.0, -12.0):
            highest = 10 ** (ceiling / 20)
            level = noise * (highest / true_peak(noise))
            for name in ("x.mp3", "x.ogg"):
                path = self.folder / name
                with warnings.catch_warnings(action="ignore"):
                    save_audio(path, level, 32000)
                self.assertGreater(true_peak(soundfile.read(path)[0]), 1.01 * highest)
                told = rf"{name} was scaled .* as .{name[2:]} .* above {ceiling:g} dB"
                with self.assertWarnsRegex(UserWarning, told):
                    save_audio(path, level, 32000, ceiling=ceiling)
                found = true_peak(soundfile.read(path)[0])
                self.assertLessEqual(found, 1.0005 * highest)
                self.assertGreater(found, 0.85 * highest)
            with self.assertWarnsRegex(
                UserWarning, f"peaks would be above {ceiling:g}"
            ):
                save_audio(self.folder / "x.wav", noise, 32000, ceiling=ceiling)
            found = true_peak(soundfile.read(self.folder / "x.wav")[0])
            self.assertAlmostEqual(found / highest, 1, delta=0.001)

    def test_rates_and_channels_that_a_format_does_not_take(self):
        """Are told, with those that it takes; all others are written."""
        rates = (1000, 8000, 16_001, 44_100, 65_535, 65_536, 88_200, 96_000, 191_999)
        refused = set()
        for suffix in ("wav", "flac", "ogg", "mp3"):
            for rate in rates:
                for channels in (1, 2, 3, 8):
                    path = self.folder / f"x.{suffix}"
                    path.unlink(missing_ok=True)
                    try:
                        save_audio(path, self.noise(500, channels), rate)
                        info = soundfile.info(path)
                        self.assertEqual(
                            (info.samplerate, info.channels), (rate, channels)
                        )
                    except ValueError as error:
                        self.assertRegex(
                            str(error), f"x.{suffix} takes .*: write a .wav"
                        )
                        refused.add((suffix, rate, channels))
        taken = {("mp3", rate, c) for rate in (8000, 44_100) for c in (1, 2)}
        odd = {("flac", rate, c) for rate in (65_536, 191_999) for c in (1, 2, 3, 8)}
        mp3 = {("mp3", rate, c) for rate in rates for c in (1, 2, 3, 8)}
        self.assertEqual(refused, odd | mp3 - taken)
        with self.assertRaisesRegex(
            ValueError, "44100 or 48000 Hz, got 96000: write a"
        ):
            save_audio(self.folder / "x.mp3", self.noise(9), 96_000)

    def test_bit_rates(self):
        path, noise = self.folder / "x.mp3", self.noise(32000 * 4, 2)
        for rate, bitrate, got in (
            (32000, 320, 320),
            (32000, 192, 192),
            (32000, 128, 128),
            (32000, 8, 32),  # the lowest there
            (16000, 64, 64),
            (8000, 320, 64),  # the highest there
        ):
            save_audio(path, noise, rate, bitrate=bitrate)
            seconds = len(noise) / rate
            found = path.stat().st_size * 8 / 1000 / seconds
            self.assertAlmostEqual(found / got, 1, delta=0.05)
        for name, bitrate, pattern in (
            ("x.mp3", 7, "from 8 to 320 kbit/s, got 7"),
            ("x.mp3", 321, "from 8 to 320 kbit/s, got 321"),
            ("x.mp3", "128", "from 8 to 320 kbit/s, got '128'"),
            ("x.wav", 128, "go with an .mp3, got .*x.wav"),
        ):
            with self.assertRaisesRegex(ValueError, f"^mp3_bitrate must .*{pattern}"):
                save_audio(self.folder / name, noise, 32000, bitrate=bitrate)

    def test_two_writers_of_one_file(self):
        """The last one wins, and in between there is always a whole file."""
        path, wrong = self.folder / "x.wav", []
        takes = [np.full(20_000, level) for level in (0.25, 0.5)]

        def write(take):
            try:
                for _ in range(30):
                    save_audio(path, take, 32000, subtype="FLOAT")
            except Exception as error:
                wrong.append(error)

        threads = [threading.Thread(target=write, args=[take]) for take in takes]
        save_audio(path, takes[0], 32000, subtype="FLOAT")
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            found = soundfile.read(path)[0]
            if not any(np.array_equal(found, take) for take in takes):
                wrong.append(len(found))
        for thread in threads:
            thread.join()
        self.assertEqual(wrong, [])
        self.assertEqual([*self.folder.iterdir()], [path])

    def test_what_killed_writers_left_goes(self):
        path = self.folder / "x.wav"
        names = []
        for name in ("x.wav", "x.wav", "y.wav"):
            with whole_file(self.folder / name) as part:
                part.touch()
            names.append(part)
        young, old, other = names
        self.assertNotEqual(young, old)
        (self.folder / "y.wav").unlink()
        for part, age in ((young, 3600), (old, 90_000), (other, 90_000)):
            part.write_bytes(b"half")
            os.utime(part, (time.time() - age,) * 2)
        save_audio(path, self.noise(9), 32000)
        self.assertEqual({*self.folder.iterdir()}, {path, other})
        with self.assertRaises(KeyError):
            with whole_file(path) as part:
                part.write_bytes(b"half")
                raise KeyError
        self.assertFalse(part.exists())
        self.assertEqual(soundfile.info(path).frames, 9)
        link = self.folder / "link.wav"
        link.symlink_to(path)
        with whole_file(link) as part:
            part.write_bytes(b"whole")
        self.assertEqual((link.is_symlink(), path.read_bytes()), (True, b"whole"))

    def test_bad_files(self):
        text = self.folder / "text.wav"
        text.write_text("not sound")
        empty, broken = self.folder / "empty.wav", self.folder / "nan.wav"
        soundfile.write(empty, np.zeros((0, 1)), 32000)
        soundfile.write(broken, np.array([0.0, np.nan]), 32000, subtype="FLOAT")
        for path, pattern in (
            (text, "is not a readable sound file"),
            (empty, "must hold sound, but it is empty"),
            (broken, "must hold sound, but it holds NaN or infinity"),
        ):
            with self.assertRaisesRegex(ValueError, f"{path.name} {pattern}.*"):
                load_audio(path, 32000, 1)
        for rate, channels, pattern in (
            (32000, 0, "channels must be 1 or more, got 0"),
            (32000, -1, "channels must be 1 or more, got -1"),
            (0, 1, "sampling_rate must be 1 or more, got 0"),
        ):
            with self.assertRaisesRegex(ValueError, pattern):
                load_audio(text, rate, channels)
        with self.assertRaisesRegex(FileNotFoundError, "no sound file"):
            load_audio(self.folder / "none.wav", 32000, 1)
        with self.assertRaisesRegex(ValueError, "must be finite"):
            save_audio(self.folder / "out.wav", mx.array([0.0, math.nan]), 32000)

    def test_samples(self):
        """What a caller gives as a sound, of MLX or numpy, mono or stereo."""
        kinds = [np.float16, np.float32, np.float64, np.longdouble, ">f4", "<f8"]
        given = [np.array([[0.5, -0.25]] * 3).astype(kind) for kind in kinds]
        given += [mx.array(given[0]).astype(t) for t in (mx.float16, mx.bfloat16)]
        given += [given[0].tolist()]
        for sound in given:
            found = check_samples("melody", sound, 32000)
            self.assertEqual(found.dtype, mx.float32)
            self.assertSame(found, [[0.5, -0.25]] * 3)
            mono = [row[0] for row in sound] if isinstance(sound, list) else sound[:, 0]
            self.assertSame(check_samples("melody", mono, 32000), [[0.5]] * 3)
        for sound, pattern in (
            (None, "must be samples .*, got None"),
            (3, "must be samples .*, got 3"),
            ([["x"]], "must be samples .*, got list"),
            ([[0.5], [0.5, 0.5]], r"must be samples \(N, C\)"),
            (np.zeros((9, 1), np.int64), "got ndarray of int64"),
            (np.zeros((9, 1), np.uint16), "got ndarray of uint16"),
            (np.zeros((9, 1), bool), "got ndarray of bool"),
            (mx.zeros((9, 1), mx.complex64), "got array of complex64"),
            (mx.zeros(()), r"must have the shape \(N, C\).*got \(\)"),
            (mx.zeros((0, 1)), r"must have the shape \(N, C\).*got \(0, 1\)"),
            (mx.zeros((9, 3)), r"1 to 2 channels, got \(9, 3\)"),
            (mx.zeros((1, 9, 1)), r"must have the shape \(N, C\).*got \(1, 9, 1\).$"),
            (mx.array([[0.0], [math.nan]]), "must be finite"),
            (np.array([[0.0], [-math.inf]]), "must be finite"),
        ):
            with self.assertRaisesRegex(ValueError, f"^melody .*{pattern}"):
                check_samples("melody", sound, 32000, channels=2)

    def test_floats_in_the_range_of_integers(self):
        sound = mx.full((9, 1), 20000.0)
        with self.assertWarnsRegex(UserWarning, "melody reaches 2e.04, but floats are"):
            self.assertSame(check_samples("melody", sound, 32000), sound)

    def test_integers_are_scaled_by_their_type(self):
        """As libsndfile does, so that a file's integers sound as the file does."""
        for kind, ends in (
            (np.uint8, (0, 255)),
            (np.int8, (-128, 127)),
            (np.int16, (-(2**15), 2**15 - 1)),
            (np.int32, (-(2**31), 2**31 - 1)),
        ):
            half = np.array(1 << (np.iinfo(kind).bits - 1), np.int64)
            rest = half if kind == np.uint8 else 0
            middle = (rest + half // 2, rest)
            sound = np.array([*ends, *middle]).astype(kind)
            want = mx.array([-1, float(1 - 1 / half), 0.5, 0])[:, None]
            for given in (
                sound,
                mx.array(sound),
                sound.astype(sound.dtype.newbyteorder()),
            ):
                self.assertClose(check_samples("x", given, 32000), want, 1e-7)
            save_audio(self.folder / "x.wav", sound[2:], 32000, subtype="FLOAT")
            found = load_audio(self.folder / "x.wav", 32000, 1)
            self.assertClose(found, want[2:], 1e-7)

    def test_a_file_in_place_of_samples(self):
        path, sound = self.folder / "x.flac", self.noise(9000, 2)
        soundfile.write(path, sound, 44100, subtype="PCM_24")
        for given in (path, str(path)):
            for channels in (1, 2):
                found = check_samples("melody", given, 32000, 8, channels)
                self.assertSame(found, load_audio(path, 32000, channels))
                part = check_samples("melody", given, 32000, 8, channels, count=500)
                self.assertClose(part, found[:500], 1e-6)
        with self.assertRaisesRegex(FileNotFoundError, "no sound file none.wav"):
            check_samples("melody", "none.wav", 32000)

    def test_script(self):
        source, target = self.folder / "in.wav", self.folder / "out.flac"
        save_audio(source, 0.1 * mx.random.normal((4410, 1)), 44100)
        arguments = ["audio.py", str(source), str(target), "--force"]
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
        before = {path: path.read_bytes() for path in self.folder.iterdir()}
        (self.folder / "link.wav").symlink_to(source)
        for source, target, more, pattern in (
            ("none.wav", "x.wav", [], "error: There is no sound file .*none.wav"),
            ("in.wav", "x.xyz", [], "error: .*x.xyz must end in one of"),
            ("in.wav", "out.flac", [], "out.flac is there already: .* with --force"),
            ("in.wav", "in.wav", ["--force"], "in.wav must not be written, since it"),
            (
                "in.wav",
                "link.wav",
                ["--force"],
                "must not be written, since it is read",
            ),
            (
                "in.wav",
                "x.wav",
                ["--channels", "-1"],
                "--channels must be 1 to 8, got -1",
            ),
            (
                "in.wav",
                "x.wav",
                ["--channels", "0"],
                "--channels must be 1 to 8, got 0",
            ),
            (
                "in.wav",
                "x.wav",
                ["--channels", "9"],
                "--channels must be 1 to 8, got 9",
            ),
        ):
            paths = [str(self.folder / name) for name in (source, target)]
            with patch("sys.argv", ["audio.py", *paths, *more]):
                with self.assertRaisesRegex(SystemExit, pattern):
                    audio_script.main()
        self.assertEqual({p: p.read_bytes() for p in before}, before)
        self.assertFalse((self.folder / "x.wav").exists())

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
