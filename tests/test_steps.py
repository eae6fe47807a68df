"""A take is an iteration: progress is counting, stopping is `break`."""

import inspect

import mlx.core as mx
import numpy as np
from common import Test, exact

from encodec import Encodec
from melody import extract_chroma
from musicgen import MusicGen
from options import Options
from t5 import T5

OPTIONS = (
    """temp top_k top_p guidance_coef seed negative_prompt audio_prompt codes_prompt
melody separate style extend_stride batch_size guidance_beta style_start style_length
style_quantizers""".split()
)


class TestSteps(Test):
    def load(self) -> MusicGen:
        model = exact("stereo-audiocraft")
        model.config.max_duration = 15 / 50
        return model

    def test_codes_are_whole_frames_at_any_time(self):
        model = self.load()
        options = dict(prompts=["drums", "slow piano"], duration=0.8, seed=7)
        whole = model.generate_codes(**options)
        for prompt in (None, model.generate_codes("a", duration=0.1, seed=1)):
            take = model.steps(**options, codes_prompt=prompt)
            whole = model.generate_codes(**options, codes_prompt=prompt)
            self.assertEqual(take.codes.shape[1], 0 if prompt is None else 5)
            before = take.frames
            for _ in take:
                codes = take.codes
                self.assertEqual(codes.shape, (2, take.frames, 8))
                self.assertSame(codes, whole[:, : take.frames])
                self.assertGreaterEqual(take.frames, before)
                before = take.frames
            self.assertEqual(take.frames, 40)
            self.assertEqual(take.step, take.total)

    def test_left_early_and_gone_on_with(self):
        model, random = self.load(), np.random.default_rng(0)
        options = dict(prompts="drums", duration=0.8, seed=7)
        whole = model.generate_codes(**options)
        for stop in random.integers(5, 40, 6).tolist():
            take = model.steps(**options)
            for _ in take:
                if take.step == stop:
                    break
            rest = model.generate_codes(**options, codes_prompt=take.codes)
            self.assertSame(rest, whole)

    def test_nothing_made(self):
        take = self.load().steps("drums", duration=0.8)
        self.assertEqual((take.step, take.codes.shape), (0, (1, 0, 8)))
        for _ in take:
            break
        self.assertEqual((take.step, take.codes.shape), (1, (1, 0, 8)))

    def test_steps_are_counted_over_batches_and_windows(self):
        model = self.load()
        # 15 frames, then 9 new ones, then 16 - 9 of the rest; delays take 3 steps more
        take = model.steps(["a"] * 5, duration=31 / 50, batch_size=2)
        self.assertEqual(take.total, 3 * (15 + 3 + 9 + 3 + 7 + 3))
        self.assertEqual([t.step for t in take], list(range(1, take.total + 1)))
        self.assertEqual(take.codes.shape, (5, 31, 8))

    def test_iterated_again_it_is_made_again(self):
        take = self.load().steps("a", duration=0.1, seed=1)
        first = [step.codes for step in take][-1]
        again = [step.codes for step in take][-1]
        self.assertSame(first, again)
        self.assertEqual(take.step, take.total)

    def test_public_names(self):
        steps = inspect.signature(MusicGen.steps).parameters
        for name in OPTIONS:
            self.assertTrue(name in steps or hasattr(Options, name), name)
        self.assertEqual(list(steps)[1:3], ["prompts", "duration"])
        longest = max(
            len(inspect.signature(f).parameters)
            for f in vars(MusicGen).values()
            if inspect.isfunction(f)
        )
        self.assertLessEqual(longest, 16)
        for name in (
            "generate",
            "generate_codes",
            "decode",
            "stream",
            "from_pretrained",
        ):
            self.assertTrue(callable(getattr(MusicGen, name)))
        model = exact("mono-audiocraft")
        self.assertEqual((model.sampling_rate, model.frame_rate), (32000, 50))
        self.assertEqual(model.channels, 1)
        for kind, names in (
            (T5, ("from_pretrained",)),
            (Encodec, ("from_pretrained", "encode", "decode")),
        ):
            for name in names:
                self.assertTrue(callable(getattr(kind, name)))
        self.assertTrue(callable(extract_chroma))

    def test_each_option_by_name(self):
        model = exact("mono-audiocraft")
        values = dict(temp=0.9, top_k=5, top_p=0.5, guidance_coef=2, seed=3)
        values |= dict(negative_prompt="a", audio_prompt=mx.ones((640, 1)), melody=None)
        values |= dict(separate=True, style=None, extend_stride=0.1, batch_size=1)
        values |= dict(codes_prompt=None, guidance_beta=None, style_start=None)
        values |= dict(style_length=None, style_quantizers=None)
        self.assertEqual(values.keys(), {*OPTIONS})
        codes = model.generate_codes("a", 0.2, **values)
        self.assertEqual(codes.shape, (1, 10, 4))
        with self.assertRaisesRegex(TypeError, "tempo"):
            model.generate_codes("a", tempo=3)
