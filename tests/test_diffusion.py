"""diffusion.py, bands.py and diffusion_files.py against audiocraft's values."""

from unittest.mock import patch

import mlx.core as mx
import numpy as np
from common import REFERENCE, Test

import bands
import diffusion
import diffusion_files
from bands import split_bands
from diffusion import MultiBandDiffusion
from musicgen import MusicGen

FOLDER = REFERENCE / "diffusion-audiocraft"
BANDS, ROWS = 3, 2


def numbers(seed: int, *shape: int) -> mx.array:
    drawn = np.random.RandomState(seed).standard_normal(shape).astype("f4")
    return mx.array(drawn).swapaxes(1, 2)


class TestAgainstAudiocraft(Test):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.wanted = mx.load(str(FOLDER / "expected.safetensors"))
        cls.model = MultiBandDiffusion.from_pretrained(FOLDER, dtype=mx.float32)
        cls.codec = MusicGen.from_pretrained(
            REFERENCE / "mono-audiocraft"
        ).audio_encoder
        cls.codes = cls.wanted["codes"].swapaxes(1, 2)
        cls.condition = cls.codec.quantizer.decode(cls.codes)
        cls.N = cls.wanted["whole"].shape[2]
        cls.x = numbers(1, ROWS, 1, cls.N - 3)
        drawn = iter(numbers(100 + i, ROWS, 1, cls.N) for i in range(BANDS * 20))
        cls.noise = [[next(drawn) for _ in range(20)] for _ in range(BANDS)]

    def want(self, name: str) -> mx.array:
        return self.wanted[name].swapaxes(1, 2)

    def test_unet(self):
        for band in range(BANDS):
            for step in (0, 499, 999):
                found = self.model.unet(band)(self.x, step, self.condition)
                self.assertClose(found, self.want(f"unet.{band}.{step}"), 1e-5)

    def test_unet_in_float16(self):
        """What it takes and gives is float32, and the error 50 dB below the noise."""
        half = MultiBandDiffusion.from_pretrained(FOLDER, dtype=mx.float16)
        for band in range(BANDS):
            found = half.unet(band)(self.x, 499, self.condition)
            self.assertEqual(found.dtype, mx.float32)
            want = self.want(f"unet.{band}.499")
            error = mx.std(found - want) / mx.std(want)
            self.assertTrue(1e-5 < error.item() < 10 ** (-50 / 20), error)

    def test_processor(self):
        for band in range(BANDS):
            found = self.model.processor(band)(self.x)
            self.assertClose(found, self.want(f"processor.{band}"), 1e-5)

    def test_sample(self):
        found = self.model.sample(self.condition, self.noise)
        self.assertClose(found, self.want("sample"), 1e-4)

    def test_as_many_noises_as_steps(self):
        for noise in (self.noise[:2], [one[1:] for one in self.noise]):
            with self.assertRaisesRegex(ValueError, "noise must be 20 of each of 3"):
                self.model.sample(self.condition, noise)

    def test_re_eq_and_the_whole(self):
        sample, codec = self.want("sample"), self.want("codec")
        self.assertClose(self.model.re_eq(sample, codec), self.want("re_eq"), 1e-5)
        found = self.model.sample(self.condition, self.noise)
        made = self.model.re_eq(found, self.codec.decode_chunk(self.codes))
        self.assertClose(made, self.want("whole"), 1e-4)

    def test_re_eq_of_silence(self):
        noise, silence = self.x[:1, :3000], mx.zeros((1, 3000, 1))
        for sound, reference in ((silence, noise), (noise, silence)):
            found = self.model.re_eq(sound, reference)
            self.assertEqual(mx.abs(found).max().item(), 0)

    def test_loudness_of_a_long_sound(self):
        """MLX's own sums on a CPU were wrong by 3e-4."""
        noise = np.random.default_rng(0).normal(size=(1, 960_000, 1)).astype("f4")
        wanted = np.std(noise, ddof=1, dtype=np.float64)
        self.assertLess(abs(diffusion.spread(mx.array(noise)) / wanted - 1), 1e-6)


class TestBands(Test):
    def test_as_julius(self):
        """Which computes in float32, and convolves by FFT: its narrowest filter is 1.7e-6
        off the exact one."""
        wanted = mx.load(str(FOLDER / "expected.safetensors"))
        for rate, count in ((32000, 8), (24000, 8), (32000, 32)):
            found = bands.low_pass_filters(rate, count)
            self.assertEqual(found.shape[0], count - 1)
            want = wanted[f"filters.{rate}.{count}"]
            self.assertClose(found[mx.array([0, -1])], want, 2e-6)
        taps = [
            bands.low_pass_filters(r, n).shape[1]
            for r, n in ((24000, 8), (32000, 8), (24000, 32), (32000, 32))
        ]
        self.assertEqual(taps, [629, 751, 2 * 1446 + 1, 2 * 1754 + 1])
        sound = numbers(1, ROWS, 1, 5757)[:1, :2000]
        want = wanted["bands"].swapaxes(2, 3)
        self.assertClose(split_bands(sound, 32000, 8), want, 1e-5)

    def test_they_sum_up(self):
        """A tone of 1 kHz, noise and chords, in stereo and mono."""
        time = mx.arange(32000)[None, :, None] / 32000
        tone = mx.sin(2 * np.pi * 1000 * time)
        chord = sum(mx.sin(2 * np.pi * f * time) for f in (110, 277, 440, 3520)) / 4
        mx.random.seed(0)
        noise = mx.random.normal((2, 9000, 2))
        for sound in (tone, chord, noise):
            for count in (1, 2, 8, 32):
                parts = split_bands(sound, 32000, count)
                self.assertEqual(parts.shape, (count, *sound.shape))
                self.assertLess(mx.abs(parts.sum(axis=0) - sound).max().item(), 1e-5)

    def test_blocks(self):
        """As all at once, in the memory of one block."""
        sound = mx.random.normal((2, 9000, 2))
        whole = split_bands(sound, 32000, 8)
        for block in (1000, 9000, 8999):
            with patch.object(bands, "BLOCK", block):
                self.assertClose(split_bands(sound, 32000, 8), whole, 1e-6)
        sound = mx.random.normal((1, 160_000, 1))  # in one go it took 500 MB
        mx.eval(sound)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(split_bands(sound, 32000, 8))
        self.assertLess(mx.get_peak_memory() - before, 2e8)

    def test_a_tone_lies_in_its_band(self):
        time = mx.arange(32000)[None, :, None] / 32000
        places = []
        for frequency in (60, 1000, 3000, 14000):
            tone = mx.sin(2 * np.pi * frequency * time)
            power = (split_bands(tone, 32000, 8) ** 2).mean(axis=(1, 2, 3))
            places.append(power.argmax().item())
            self.assertGreater(power.max().item(), 0.4)
        edges = bands.edges(32000, 8)
        wanted = [int((edges < f).sum()) for f in (60, 1000, 3000, 14000)]
        self.assertEqual(places, wanted)

    def test_what_cannot_be(self):
        with self.assertRaisesRegex(ValueError, "n_bands must be 1 or more, got 0"):
            split_bands(mx.zeros((1, 9, 1)), 32000, 0)


class TestDecode(Test):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.model = MultiBandDiffusion.from_pretrained(
            FOLDER / "mbd_tiny.th", dtype=mx.float32
        )
        cls.codec = MusicGen.from_pretrained(
            REFERENCE / "mono-audiocraft"
        ).audio_encoder
        mx.random.seed(0)
        cls.codes = mx.random.randint(0, 64, (2, 12, 4)).astype(mx.uint32)

    def test_a_take_is_that_of_its_seed(self):
        both = self.model.decode(self.codes, 3, self.codec)
        self.assertEqual(both.shape, (2, 12 * 640, 1))
        alone = self.model.decode(self.codes[1:], 4, self.codec)
        self.assertClose(both[1:], alone, 1e-6)
        other = self.model.decode(self.codes[1:], 5, self.codec)
        self.assertGreater(mx.abs(other - alone).max().item(), 1e-3)

    def test_a_seed_for_each_row(self):
        for seeds in ([], [3], [3, 4, 5]):
            with self.assertRaisesRegex(
                ValueError, "seed must be a number from 0 to .*, or a list of 2"
            ):
                self.model.decode(self.codes, seeds, self.codec)

    def test_stereo_is_two_rows(self):
        codes = mx.stack([self.codes[0], self.codes[1]], axis=-1).reshape(1, 12, 8)
        sound = self.model.decode(codes, 3, self.codec, channels=2)
        self.assertEqual(sound.shape, (1, 12 * 640, 2))
        quiet = mx.std(self.codec.decode_chunk(self.codes), axis=1)
        self.assertTrue((mx.std(sound, axis=1) > quiet.min() / 9).all().item())

    def test_pieces(self):
        """Of the same noises, gone over from one into the next."""
        whole = self.model.decode(self.codes[:1], 3, self.codec)
        with patch.multiple(diffusion, PIECE=0.16, OVERLAP=0.08):
            parts = self.model.decode(self.codes[:1], 3, self.codec)
        self.assertEqual(parts.shape, whole.shape)
        self.assertEqual(diffusion.cut(12, 8, 4), [(0, 8), (4, 12)])
        self.assertEqual(diffusion.cut(12, 20, 4), [(0, 12)])
        self.assertEqual(diffusion.cut(13, 8, 4), [(0, 8), (4, 12), (8, 13)])
        self.assertEqual(diffusion.cut(1510, 1500, 50), [(0, 782), (732, 1510)])
        for frames in range(1, 30_000, 7):
            pieces = diffusion.cut(frames, 1500, 50)
            self.assertEqual((pieces[0][0], pieces[-1][1]), (0, frames))
            self.assertFalse(any(start % 4 for start, _ in pieces))
            sizes = [end - start for start, end in pieces]
            self.assertLessEqual(max(sizes), 1503)
            self.assertGreater(min(sizes), 0.9 * max(sizes))
            shared = {a - b for (_, a), (b, _) in zip(pieces, pieces[1:])}
            self.assertLessEqual(shared, {50})
        ones = [mx.ones((1, n, 1)) for n in (8, 8, 5)]
        joined = diffusion.join(ones, [0, 4, 8])
        self.assertEqual(joined.shape, (1, 13, 1))
        self.assertClose(joined, mx.ones((1, 13, 1)), 1e-6)

    def test_pieces_share_noises_and_conditions(self):
        """Those of the whole take, each at its place."""
        told = []

        class Schedule:
            def steps(self, unet, condition, noise):
                told.append([condition, *noise])
                yield from [mx.zeros_like(told[-1][1])] * 20

        band = self.model.band(0)._replace(schedule=Schedule())
        with patch.object(MultiBandDiffusion, "band", lambda self, number: band):
            self.model.decode(self.codes[:1], 3, self.codec)
            with patch.multiple(diffusion, PIECE=0.16, OVERLAP=0.08):
                self.model.decode(self.codes[:1], 3, self.codec)
        wholes, pieces = told[:BANDS], told[BANDS:]
        self.assertEqual(len(pieces), 2 * BANDS)
        for i, piece in enumerate(pieces):
            whole, first = wholes[i // 2], 4 * (i % 2)
            for place, (part, all_of_it) in enumerate(zip(piece, whole, strict=True)):
                hop = 640 if place else 1  # the condition is of frames
                cut = slice(first * hop, (first + 8) * hop)
                self.assertSame(part, all_of_it[:, cut])

    def test_seeds(self):
        """Are told of before anything is computed."""
        told = "seed must be a number from 0 to 2..64 - 2, or a list of 2, got "
        for bad in ([1], [1, 2, 3], [1, -2], [1, "2"], -1, 2**64 - 1, 1.5, None):
            with self.subTest(bad), self.assertRaisesRegex(ValueError, told):
                diffusion.Decoding(self.model, self.codes[:2], bad, self.codec)
        for good in ([7, 8], (7, 8), 7, np.int64(7)):
            decoding = diffusion.Decoding(self.model, self.codes, good, self.codec)
            self.assertEqual(decoding._seeds, [7, 8])

    def test_what_a_unet_does_not_take(self):
        """Rather than numbers that are not there, or are others."""
        unet, condition = self.model.unet(0), mx.zeros((1, 2, 16))
        for shape, step, told in (
            ((1, 1280, 1), 1000, "step must be from 0 to 999, got 1000"),
            ((1, 1280, 1), -1, "step must be from 0 to 999, got -1"),
            ((1, 1280, 2), 0, "x must be .B, N, 1., got .1, 1280, 2."),
            ((1280, 1), 0, "x must be .B, N, 1., got .1280, 1."),
        ):
            with self.assertRaisesRegex(ValueError, told):
                unet(mx.zeros(shape), step, condition)

    def test_a_codec_of_another_rate(self):
        codec = MusicGen.from_pretrained(
            REFERENCE / "audiogen-audiocraft"
        ).audio_encoder
        with self.assertRaisesRegex(
            ValueError, "of 32000 Hz made, not one of 16000 Hz"
        ):
            self.model.decode(self.codes, 0, codec)

    def test_one_band_at_a_time(self):
        model = MultiBandDiffusion(diffusion_files.open_files(FOLDER), keep=False)
        first = model.unet(0)
        self.assertIs(model.unet(0), first)
        model.unet(1)
        self.assertEqual([*model._bands], [1])
        with self.assertRaisesRegex(ValueError, "band must be from 0 to 2, got 3"):
            model.unet(3)
