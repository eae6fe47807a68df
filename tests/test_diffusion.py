"""diffusion.py, bands.py and diffusion_files.py against audiocraft's values."""

import mlx.core as mx
import numpy as np
from common import REFERENCE, Test

import bands
import diffusion
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
        cls.model = MultiBandDiffusion.from_pretrained(FOLDER)
        cls.codec = MusicGen.from_pretrained(REFERENCE / "mono-audiocraft").audio_encoder
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

    def test_processor(self):
        for band in range(BANDS):
            found = self.model.processor(band)(self.x)
            self.assertClose(found, self.want(f"processor.{band}"), 1e-5)

    def test_sample(self):
        found = self.model.sample(self.condition, self.noise)
        self.assertClose(found, self.want("sample"), 1e-4)

    def test_re_eq_and_the_whole(self):
        sample, codec = self.want("sample"), self.want("codec")
        self.assertClose(self.model.re_eq(sample, codec), self.want("re_eq"), 1e-5)
        found = self.model.sample(self.condition, self.noise)
        made = self.model.re_eq(found, self.codec.decode_chunk(self.codes))
        self.assertClose(made, self.want("whole"), 1e-4)
