"""The engine: the plain step's twin, in fewer operations."""

import os
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
from common import Test, random_decoder, slow
from mlx.utils import tree_flatten

import engine
from decoder import Condition, Decoder, DecoderConfig, stack_rows
from engine import Engine, Lane
from musicgen import PlainStep


class TestEngine(Test):
    @slow(12)
    def test_compiled_steps_equal_the_plain_ones(self):
        # float16 and bfloat16 round after each operation, and compiled code after
        # fewer: two units in the last place of the largest logits.
        tolerances = {mx.float32: 1e-5, mx.float16: 2e-3, mx.bfloat16: 2e-2}
        for dtype, tolerance in tolerances.items():
            decoder, text, tokens = random_decoder(dtype)
            plain, fast = (kind(decoder, text, 1, 9) for kind in (PlainStep, Engine))
            for i in range(9):
                step = tokens[:, i : i + 1]
                got = fast(step).astype(mx.float32)
                self.assertClose(got, plain(step).astype(mx.float32), tolerance)

    def test_rows_of_guidance(self):
        null = Condition(*map(mx.zeros_like, random_decoder()[1]))
        for lanes in (1, 2):  # as on a GPU, and on the CPU
            decoder, text, tokens = random_decoder()
            decoder.group = "some processes" if lanes == 1 else None
            for rows in ([text, null], [text, text], [text, null, null]):
                steps = [
                    kind(decoder, stack_rows(rows), len(rows), 12)
                    for kind in (PlainStep, Engine)
                ]
                for start, end in ((0, 4), (4, 5), (5, 6), (6, 9)):
                    plain, fast = (step(tokens[:, start:end]) for step in steps)
                    self.assertEqual(plain.shape, (2 * len(rows), 1, 4, 10))
                    self.assertClose(fast, plain, 1e-5)
                if mx.default_device() == mx.cpu:
                    self.assertEqual(len(steps[1]._lanes), lanes)

    def test_rewound_is_new(self):
        decoder, text, tokens = random_decoder()
        for kind in (PlainStep, Engine):
            forward = kind(decoder, text, 1, 9)
            first = [forward(tokens[:, :3]), forward(tokens[:, 3:4])]
            mx.eval(first)
            forward.rewind()
            again = [forward(tokens[:, :3]), forward(tokens[:, 3:4])]
            for a, b in zip(first, again):
                self.assertSame(a, b)

    def test_products_as_columns(self):
        layer, x = nn.Linear(6, 4, bias=False), mx.random.normal((2, 1, 6))
        plain = layer(x)
        residual = mx.random.normal((2, 1, 4))
        for limit in (0, 8):
            with patch("engine.max_columns", return_value=limit):
                self.assertClose(engine.project(layer, x), plain, 1e-6)
                both = engine.project(layer, x, residual)
                self.assertClose(both, plain + residual, 1e-6)

    def test_columns_are_a_setting(self):
        default = 16 if mx.cuda.is_available() else 0
        for value, most in ((None, default), ("0", 0), ("2", 2)):
            with patch.dict(os.environ):
                os.environ.pop("MUSICGEN_COLUMNS", None)
                if value is not None:
                    os.environ["MUSICGEN_COLUMNS"] = value
                self.assertEqual(engine.max_columns(), most)
        decoder, text, _ = random_decoder()
        for value in ("", "-1", "two", "\u0662"):
            with patch.dict(os.environ, MUSICGEN_COLUMNS=value):
                with self.assertRaisesRegex(
                    ValueError, "a whole number from 0 on, got"
                ):
                    Engine(decoder, text, 1, 9)

    def test_columns_hold_the_same_numbers(self):
        decoder, text, tokens = random_decoder()
        before = dict(tree_flatten(decoder.parameters()))
        rows = decoder(tokens, decoder.text_kv(text), decoder.make_cache(2, 9))
        engine.store_columns(decoder)
        after = dict(tree_flatten(decoder.parameters()))
        self.assertTrue(all(mx.array_equal(before[k], after[k]) for k in before))
        columns = decoder(tokens, decoder.text_kv(text), decoder.make_cache(2, 9))
        self.assertClose(columns, rows, 1e-5)

    def test_operations_per_layer(self):
        # Each costs the host some microseconds, whatever its size. On CUDA adding
        # to the residual is apart, see max_columns: two more.
        with patch("engine.max_columns", return_value=0):
            counts = [operations_per_step(layers) for layers in (2, 3)]
        self.assertLessEqual(counts[1] - counts[0], 14)

    def test_one_dtype(self):
        for dtype in (mx.float16, mx.bfloat16):
            decoder, text, tokens = random_decoder(dtype)
            lane = Lane(decoder, text, 9, mx.default_stream(mx.default_device()))
            logits = lane.upper(lane.lower(tokens[:, :1]))
            late = lane._cache[-1].update_and_fetch(mx.zeros((2, 4, 0, 8), dtype))
            for array in (logits, *late, *lane._text_kv[-1], lane._positions):
                self.assertEqual(array.dtype, dtype)

    def test_rows_without_a_text_are_left_out(self):
        decoder, text, _ = random_decoder()
        null = Condition(*map(mx.zeros_like, text))
        guided = engine.prepare_text(decoder, stack_rows([text, null]))
        self.assertEqual(len(guided[0].keys), 2)
        both = engine.prepare_text(decoder, stack_rows([text, text]))
        self.assertEqual(len(both[0].keys), 4)
        full = Condition(text.states, mx.ones_like(text.mask))
        self.assertIsNone(engine.prepare_text(decoder, full)[0].mask)

    def test_text_lies_as_it_is_attended(self):
        """Or Metal would copy it in every step, where there are several rows."""
        decoder, text, _ = random_decoder()
        null = Condition(*map(mx.zeros_like, text))
        for rows, kept in (([text], 1), ([text, null], 1), ([text, text], 2)):
            got = engine.prepare_text(decoder, stack_rows(rows))
            plain = decoder.text_kv(stack_rows(rows[:kept]))
            for layer, want in zip(got, plain):
                self.assertEqual(layer.mask.shape, (2 * kept, 2, 1, 5))
                for part, array in zip(layer, want):
                    self.assertTrue(memoryview(part).c_contiguous)
                    self.assertSame(part, mx.broadcast_to(array, part.shape))

    def test_lanes_do_the_same_work(self):
        """So that both take a matrix from memory at one time, and it is read once."""
        import benchmark

        if mx.default_device() != mx.cpu:
            self.skipTest("a GPU takes all rows in one lane")
        decoder, text, tokens = random_decoder()
        null = Condition(*map(mx.zeros_like, text))
        lanes = Engine(decoder, stack_rows([text, null]), 2, 9)._lanes
        counts = []
        for lane in lanes:
            mx.eval(lane.lower(tokens[:, :1]))  # the first call compiles
            counts.append(benchmark.count_operations(lane.lower(tokens[:, :1])[0]))
        self.assertEqual(len(counts), 2)
        self.assertEqual(*counts)


def operations_per_step(layers: int) -> int:
    """Operations, views aside, in the graph of one step of a decoder.

    MLX fuses attention and norm on GPUs only; here one operation stands for each.
    """
    import benchmark
    from musicgen import MusicGen

    def attention(queries, keys, values, scale, mask):
        return mx.concatenate([queries, keys, values], axis=2)[:, :, :1]

    def norm(x, weight, bias, eps):
        return mx.softmax(x, axis=-1)

    model = MusicGen.__new__(MusicGen)
    nn.Module.__init__(model)
    config = DecoderConfig(64, 128, layers, 2, 256)
    model.decoder = Decoder(config, text_width=768)
    model.config = benchmark.MusicGenConfig(config)
    mx.eval(model.decoder.parameters())
    fast = dict(scaled_dot_product_attention=attention, layer_norm=norm)
    with patch.multiple("mlx.core.fast", **fast):
        return benchmark.operations_per_step(model)
