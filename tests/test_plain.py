"""Plain and fast: what a reader opens gives what the engine gives."""

from collections.abc import Iterator
from dataclasses import replace
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
    def models(self) -> Iterator[tuple[str, MusicGen, dict, dict]]:
        """Each kind of model, with the sounds that two prompts and one follow."""
        for name in TRANSFORMERS + AUDIOCRAFT:
            yield name, exact(name), {}, {}
        tune = EXPECTED["melody-transformers"]["tunes"][0]
        one = dict(separate=False, melody=mx.array(sounds.tune(32000, tune)))
        for name in MELODIES:
            yield name, exact(name), one | dict(melody=[one["melody"], None]), one
        tune = EXPECTED["style-audiocraft"]["tunes"][0]
        style = dict(style_start=0.0, style=mx.array(sounds.tune(32000, tune)))
        with patch.dict(audiocraft.SCALES, default=4):
            model = exact("style-audiocraft")
        yield "style", model, style, style
        yield "style and more text", model, style | dict(guidance_beta=5.0), style
        yield "no style", model, {}, {}
        folder, options = REFERENCE / "mono-transformers", dict(q_group_size=32)
        model = MusicGen.from_pretrained(folder, mx.float32, q_bits=8, **options)
        yield "quantized", model, {}, {}

    def check(self, model: MusicGen, *prompts, **options) -> None:
        """The plain step gives the engine's codes; and in every step of every window
        and batch, given the same tokens, the engine's logits."""
        fast = model.generate_codes(*prompts, **options)
        made, steps = [], 0

        def forward(model, *given):
            pair = (kind(model.decoder, *given) for kind in (PlainStep, Engine))
            made.append(BothSteps(self, *pair))
            return made[-1]

        with patch.object(MusicGen, "make_forward", forward):
            take = model.steps(*prompts, **options)
            for _ in take:
                steps += 1
        self.assertSame(take.codes, fast)
        self.assertGreater(steps, 10)
        self.assertEqual(sum(both.calls for both in made), steps)

    @slow(10)
    def test_codes_and_logits(self):
        noise = np.random.default_rng(0).normal(size=(1500, 1))
        for name, model, two, one in self.models():
            for options in (
                dict(temp=0, negative_prompt=NEGATIVE),
                dict(seed=4, guidance_coef=1, batch_size=1),
                dict(seed=4, audio_prompt=mx.array(noise, mx.float32)),
            ):
                with self.subTest(name, options=[*options]):
                    self.check(model, PROMPTS, duration=0.3, **two, **options)
            with self.subTest(name, windows=True):
                self.enterContext(patch.object(model.config, "max_duration", 15 / 50))
                self.check(model, PROMPTS, duration=0.7, seed=5, **two)
                codes = model.generate_codes("a", duration=0.36, seed=1)
                prompt = dict(codes_prompt=codes)
                self.check(model, "a", duration=0.7, temp=0, **prompt, **one)

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

    def test_plain_is_asked_for(self):
        model = exact("mono-audiocraft")
        fast = model.generate("drums", duration=0.2, seed=1)
        model.plain = True
        names = ("engine.Engine", "encodec_stream.DecodingStream")
        twins = [patch(name) for name in (*names, "encodec_stream.encode")]
        engine, stream, encode = map(self.enterContext, twins)
        plain = model.generate("drums", duration=0.2, seed=1)
        self.assertClose(plain, fast, 1e-5)
        sound = mx.full((640, 1), 0.5)
        model.generate_codes("drums", duration=0.2, audio_prompt=sound, batch_size=1)
        counts = [twin.call_count for twin in (engine, stream, encode)]
        self.assertEqual(counts, [0, 0, 0])

    def test_codec_with_group_norm(self):
        # which no stream can decode
        config = exact("mono-audiocraft").config
        codec = replace(config.audio_encoder, norm_type="time_group_norm")
        model = MusicGen(replace(config, audio_encoder=codec), None)
        codes = mx.zeros((1, 5, 4), mx.uint32)
        samples = model.decode(codes)
        self.assertFalse(model.plain)
        self.assertSame(samples, model.audio_encoder.decode_chunk(codes))

    def test_without_the_twins_it_is_plain(self):
        self.assertFalse(MusicGen.plain)  # they lie beside it here
