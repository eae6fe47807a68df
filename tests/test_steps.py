"""A take is an iteration: progress is counting, stopping is `break`."""

import inspect
import itertools

import mlx.core as mx
import numpy as np
from common import Test, exact

from demucs import HTDemucs
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

    def test_left_by_an_error(self):
        model = self.load()
        options = dict(prompts=["drums", "piano"], duration=0.8, seed=7)
        whole = model.generate_codes(**options)
        for error in (KeyboardInterrupt, RuntimeError):
            take = model.steps(**options)
            with self.assertRaises(error):
                for _ in take:
                    if take.step == 25:
                        raise error
            self.assertEqual((take.step, take.frames), (25, 19))
            self.assertSame(take.codes, whole[:, :19])

    def test_left_among_rows_of_several_lengths(self):
        # where a prefix comes before the codes, those of a length run together
        model = exact("melody-audiocraft")
        prompts = ["a", "a much longer text than the others", "b"]
        options = dict(prompts=prompts, duration=0.3, seed=7)
        whole = model.generate_codes(**options)
        for row, prompt in enumerate(prompts):
            alone = model.generate_codes(prompt, duration=0.3, seed=7 + row)
            self.assertSame(alone[0], whole[row])
        for stop, rows, frames in ((10, 1, 7), (18, 1, 15), (24, 1, 15), (36, 3, 15)):
            take = model.steps(**options)
            self.assertEqual(take.total, 2 * 18)
            for _ in itertools.islice(take, stop):
                pass
            self.assertEqual(take.codes.shape, (rows, frames, 4))
            self.assertSame(take.codes, whole[:rows, :frames])

    def test_nothing_made(self):
        take = self.load().steps("drums", duration=0.8)
        self.assertEqual((take.step, take.codes.shape), (0, (1, 0, 8)))
        for _ in take:
            break
        self.assertEqual((take.step, take.codes.shape), (1, (1, 0, 8)))

    def test_one_iteration_at_a_time(self):
        take = self.load().steps("drums", duration=0.2, seed=0)
        first = iter(take)
        next(first)
        again = iter(take)
        next(again)
        with self.assertRaisesRegex(RuntimeError, "started anew"):
            next(first)
        for _ in again:
            pass
        whole = self.load().generate_codes("drums", duration=0.2, seed=0)
        self.assertSame(take.codes, whole)

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
            (HTDemucs, ("from_pretrained", "separate")),
        ):
            for name in names:
                self.assertTrue(callable(getattr(kind, name)))
        self.assertTrue(callable(extract_chroma))
        loading = inspect.signature(MusicGen.from_pretrained).parameters
        names = (
            "path_or_repo dtype q_bits q_group_size lazy group adapter adapter_scale "
            "q_mode files"
        )
        self.assertEqual([*loading], names.split())

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
        for name, value in values.items():
            with self.subTest(name):
                given = {"seed": 3, name: value, "prompts": "a", "duration": 0.1}
                codes = model.generate_codes(**given)
                whole = model.generate(**given)
                self.assertSame(whole, model.decode(codes))
                pieces = model.stream(given.pop("prompts"), chunk=0.1, **given)
                self.assertClose(mx.concatenate([*pieces]), whole[0], 1e-5)
        for gone in ("tempo", "callback", "stop", "on_codes"):
            for make in (model.generate, model.generate_codes, model.stream):
                with self.assertRaisesRegex(TypeError, gone):
                    make("a", **{gone: None})
