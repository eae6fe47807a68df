"""Plain and fast: what a reader opens gives what the engine gives."""

from unittest.mock import patch

import mlx.core as mx
import numpy as np
import sounds
from common import AUDIOCRAFT, EXPECTED, REFERENCE, TRANSFORMERS, Test, exact, slow

import audiocraft
import encodec_stream
from musicgen import MusicGen


class TestPlain(Test):
    def check(self, model: MusicGen, *prompts, **options) -> None:
        """The plain step gives the codes of the engine."""
        model.plain = False
        fast = model.generate_codes(*prompts, **options)
        model.plain = True
        with patch("engine.Engine", None):  # which nobody asks for
            plain = model.generate_codes(*prompts, **options)
        self.assertSame(plain, fast)

    @slow(4)
    def test_texts(self):
        sound = mx.array(np.random.default_rng(0).normal(size=(1500, 1)), mx.float32)
        for name in TRANSFORMERS + AUDIOCRAFT:
            model = exact(name)
            with self.subTest(name):
                prompts = ["slow", "a loud guitar and heavy drums"]
                for options in (
                    dict(temp=0),
                    dict(seed=4),
                    dict(seed=4, top_p=0.8),
                    dict(seed=4, guidance_coef=1),
                    dict(seed=4, negative_prompt="a long negative prompt of words"),
                    dict(seed=4, audio_prompt=sound),
                    dict(seed=4, batch_size=1),
                ):
                    self.check(model, prompts, duration=0.3, **options)
                model.config.max_duration = 15 / 50  # windows
                self.check(model, prompts, duration=0.9, seed=5)

    def test_quantized(self):
        model = MusicGen.from_pretrained(
            REFERENCE / "mono-transformers", mx.float32, q_bits=8, q_group_size=32
        )
        self.check(model, "drums", duration=0.3, seed=1)

    def test_melodies(self):
        melody = mx.array(
            sounds.tune(32000, EXPECTED["melody-transformers"]["tunes"][0])
        )
        for name in ("melody-audiocraft", "stereo-melody-transformers"):
            model = exact(name)
            options = dict(duration=0.3, seed=2, separate=False)
            self.check(model, ["a", "b"], melody=[melody, None], **options)
            self.check(model, "a", **options)

    def test_styles(self):
        with patch.dict(audiocraft.SCALES, default=4):
            model = exact("style-audiocraft")
        tune = mx.array(sounds.tune(32000, EXPECTED["style-audiocraft"]["tunes"][0]))
        options = dict(duration=0.3, seed=2, style_start=0.0)
        self.check(model, ["a", "b"], style=tune, guidance_beta=5.0, **options)
        self.check(model, ["a", "b"], style=[tune, None], **options)
        self.check(model, "a", duration=0.3, seed=2)

    def test_sound(self):
        for name in ("mono-audiocraft", "stereo-transformers"):
            model = exact(name)
            K, V = model.config.decoder.num_codebooks, model.config.decoder.vocab_size
            for B, T in ((1, 1), (1, 7), (2, 50), (3, 450)):
                codes = mx.random.randint(0, V, (B, T, K), key=mx.random.key(T))
                model.plain = False
                fast = model.decode(codes)
                model.plain = True
                with patch.object(encodec_stream, "DecodingStream", None):
                    plain = model.decode(codes)
                self.assertClose(fast, plain, 1e-5)

    def test_without_the_twins_it_is_plain(self):
        self.assertFalse(MusicGen.plain)  # they lie beside it here
