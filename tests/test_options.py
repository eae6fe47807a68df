"""What may be asked, told without a model."""

import math

import mlx.core as mx
import numpy as np
from common import Test

import options
from options import Options


class TestOptions(Test):
    def test_what_cannot_be_made(self):
        Options().check()
        for name, values, rule in (
            ("duration", (0, 0.01, -1), "at least a frame, 1/50 s"),
            (
                "duration",
                (math.nan, math.inf, 10**400, "1", True),
                "a finite number below 1e6",
            ),
            ("temp", (-0.1, 1e-39), r"0 \(greedy\) or 0.001 up"),
            ("temp", (math.nan, "1", None), "a finite number below 1e6"),
            ("top_k", (0, 2049, 2.5, True, "1", None), "from 1 to 2048; "),
            ("top_p", (-0.1, 1.1), r"between 0 \(off\) and 1"),
            ("top_p", (math.nan, None), "a finite number below 1e6"),
            ("guidance_coef", (math.nan, math.inf, "1"), "a finite number below 1e6"),
            ("negative_prompt", (3, None), "a text"),
            (
                "extend_stride",
                (0, 30, 31, "1", math.nan),
                "from 1/50 s to less than .* 30",
            ),
            ("guidance_beta", (math.nan, "1"), "a finite number below 1e6"),
            ("style_start", (-1,), "0 s or more"),
            ("style_start", (math.nan, "1"), "a finite number below 1e6"),
            ("style_length", (math.inf, "1"), "a finite number below 1e6"),
            ("style_quantizers", (2.5,), "whole"),
        ):
            for value in values:
                with self.subTest(name, value=value):
                    pattern = f"^{name} must be {rule}.*, got "
                    with self.assertRaisesRegex(ValueError, pattern):
                        Options(**{name: value}).check()
        with self.assertRaisesRegex(ValueError, "1/25 s, got 0.02"):
            Options(duration=0.02).check(frame_rate=25)
        with self.assertRaisesRegex(ValueError, "less than .* 8 s, got 8.0"):
            Options(extend_stride=8.0).check(max_duration=8)
        Options(duration=0.02, temp=0, top_k=np.int64(1), extend_stride=29).check()
        with self.assertRaisesRegex(
            ValueError, "guidance_coef must be other than 1 beside a neg"
        ):
            Options(negative_prompt="a", guidance_coef=1).check()
        Options(negative_prompt="a").check()
        Options(duration=None).check()  # the model's own

    def test_the_ends_of_each_range(self):
        for given in (
            dict(duration=1 / 50, temp=0.001, top_k=1, top_p=1),
            dict(duration=999_999, top_k=2048, guidance_coef=-3),
            dict(duration=np.float32(3), temp=np.float64(1), extend_stride=1 / 50),
            dict(guidance_coef=0, negative_prompt="a", extend_stride=29.9),
            dict(guidance_coef=1, guidance_beta=2, negative_prompt="a"),
            dict(style_start=0, style_length=3, style_quantizers=6),
        ):
            with self.subTest(**given):
                Options(**given).check()
        Options(extend_stride=100).check(max_duration=math.inf)

    def test_style(self):
        self.assertFalse(Options().has_style)
        for name in options.STYLE_OPTIONS:
            self.assertTrue(Options(**{name: 0}).has_style)

    def test_equal_ones_run_together(self):
        self.assertEqual(Options(3), Options(duration=3.0))
        self.assertNotEqual(Options(3), Options(3, top_k=9))

    def test_rows_of_a_take(self):
        for given, copies in (
            ({}, 2),
            (dict(guidance_coef=1), 1),
            (dict(guidance_beta=5), 3),
            (dict(guidance_beta=0, guidance_coef=1), 3),
        ):
            self.assertEqual(Options(**given).copies, copies)

    def test_prompts(self):
        self.assertEqual(options.check_prompts("a"), ["a"])
        self.assertEqual(options.check_prompts(("a", "")), ["a", ""])
        for prompts in ([], (), None, 3, ["a", 3], [None], {"a": 1}):
            with self.assertRaisesRegex(ValueError, "There must be a prompt"):
                options.check_prompts(prompts)

    def test_seeds(self):
        self.assertEqual(options.row_seeds(3, rows=3), [3, 4, 5])
        self.assertEqual(options.row_seeds(np.int64(3), rows=1), [3])
        self.assertEqual(options.row_seeds([7, 2], rows=2), [7, 2])
        first, second = options.row_seeds(None, rows=2)
        self.assertEqual(second, first + 1)
        self.assertNotEqual(options.row_seeds(None, rows=1), [first])
        with self.assertRaises(ValueError) as caught:
            options.row_seeds([-1], 1)
        want = "seed must be a number from 0 to 2**64 - 1, got -1."
        self.assertEqual(str(caught.exception), want)
        for seed in (-1, 2**64, 2**64 - 1, [1], [1, 2, 3], [1, 0.5], 1.5, "1", True):
            with self.assertRaisesRegex(
                ValueError, "^seed must be .* or a list of 2, got"
            ):
                options.row_seeds(seed, rows=2)

    def test_batch_size_and_dtype(self):
        options.check_batch_size(None)
        options.check_batch_size(np.int64(3))
        for size in (0, -1, 1.5, True, "1"):
            with self.assertRaisesRegex(ValueError, "^batch_size must be 1 or more"):
                options.check_batch_size(size)
        for dtype in (None, mx.float16, mx.bfloat16, mx.float32):
            options.check_dtype(dtype)
        for dtype in (mx.int32, mx.complex64, "float16", np.float32):
            with self.assertRaisesRegex(
                ValueError, "^dtype must be mx.float16, mx.bfloat16"
            ):
                options.check_dtype(dtype)
