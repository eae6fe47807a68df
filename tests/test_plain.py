"""Plain and fast: what a reader opens gives what the engine gives."""

from collections.abc import Iterator
from unittest.mock import patch

import mlx.core as mx
import numpy as np
import sounds
from common import AUDIOCRAFT, EXPECTED, REFERENCE, TRANSFORMERS, Test, exact, slow

import audiocraft
import encodec_stream
from engine import Engine
from musicgen import MusicGen, PlainStep

MELODIES = ("melody-transformers", "stereo-melody-transformers", "melody-audiocraft")
PROMPTS = ["slow", "a loud guitar, heavy drums and a very long text"]
NEGATIVE = "a negative prompt that is longer still than the other two, of many words"


class BothSteps:
    """Two steps as one: the logits of the first, once the second gave the same."""

    def __init__(self, test: Test, *steps):
        self._test, self._steps, self.calls = test, steps, 0

    def rewind(self, *sound) -> None:
        for step in self._steps:
            step.rewind(*sound)

    def __call__(self, tokens: mx.array) -> mx.array:
        first, second = (step(tokens) for step in self._steps)
        self._test.assertClose(second, first, 1e-5)
        self.calls += 1
        return first


class TestPlain(Test):
    def models(self) -> Iterator[tuple[MusicGen, dict, dict]]:
        """Each kind of model, with the sounds that two prompts and one follow."""
        for name in TRANSFORMERS + AUDIOCRAFT:
            with self.subTest(name):
                yield exact(name), {}, {}
        tune = EXPECTED["melody-transformers"]["tunes"][0]
        melody = mx.array(sounds.tune(32000, tune))
        for name in MELODIES:
            with self.subTest(name):
                two = dict(separate=False, melody=[melody, None])
                yield exact(name), two, two | dict(melody=melody)
        with self.subTest("style"):
            tune = EXPECTED["style-audiocraft"]["tunes"][0]
            style = dict(style_start=0.0, style=mx.array(sounds.tune(32000, tune)))
            with patch.dict(audiocraft.SCALES, default=4):
                model = exact("style-audiocraft")
            yield model, style, style
            yield model, style | dict(guidance_beta=5.0), style
            yield model, {}, {}
        with self.subTest("quantized"):
            options = dict(q_bits=8, q_group_size=32)
            folder = REFERENCE / "mono-transformers"
            yield MusicGen.from_pretrained(folder, mx.float32, **options), {}, {}

    def check_codes(self, model: MusicGen, *prompts, **options) -> None:
        """The plain step gives the codes of the engine."""
        model.plain = False
        fast = model.generate_codes(*prompts, **options)
        model.plain = True
        with patch("engine.Engine", None):  # which nobody asks for
            plain = model.generate_codes(*prompts, **options)
        self.assertSame(plain, fast)

    def check_logits(self, model: MusicGen, *prompts, **options) -> None:
        """In every step of every window and batch, the engine's logits are those of
        the plain step, given the same tokens."""
        made, steps = [], 0

        def forward(model, *given):
            pair = (kind(model.decoder, *given) for kind in (PlainStep, Engine))
            made.append(BothSteps(self, *pair))
            return made[-1]

        with patch.object(MusicGen, "forward", forward):
            for _ in model.steps(*prompts, **options):
                steps += 1
        self.assertGreater(steps, 10)
        self.assertEqual(sum(both.calls for both in made), steps)

    def check_all(self, check) -> None:
        """Check all that can be asked for, of each kind of model."""
        noise = np.random.default_rng(0).normal(size=(1500, 1))
        for model, two, one in self.models():
            for options in (
                dict(temp=0),
                dict(seed=4),
                dict(seed=4, top_p=0.8, batch_size=1),
                dict(seed=4, guidance_coef=1),
                dict(seed=4, negative_prompt=NEGATIVE),
                dict(seed=4, audio_prompt=mx.array(noise, mx.float32)),
            ):
                if "guidance_beta" in two:
                    options.pop("guidance_coef", None)
                check(model, PROMPTS, duration=0.3, **two, **options)
            model.config.max_duration = 15 / 50  # windows
            check(model, PROMPTS[0], duration=0.7, temp=0, **one)
            check(model, PROMPTS, duration=0.7, seed=5, **two)
            prompt = model.generate_codes("a", duration=0.36, seed=1)
            check(model, PROMPTS[0], duration=0.7, codes_prompt=prompt, **one)

    @slow(9)
    def test_codes(self):
        self.check_all(self.check_codes)

    @slow(9)
    def test_logits(self):
        self.check_all(self.check_logits)

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
