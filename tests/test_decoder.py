"""The decoder: logits, steps, and what makes them fast."""

from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
from common import (
    AUDIOCRAFT,
    REFERENCE,
    TRANSFORMERS,
    Test,
    exact,
    expected,
    last,
    random_decoder,
    slow,
)

import benchmark
import checkpoints
import musicgen


class TestDecoder(Test):
    def test_text_states_and_logits(self):
        for name in TRANSFORMERS + AUDIOCRAFT:
            with self.subTest(name):
                model, want = exact(name), expected(name)
                decoder, mask = model.decoder, want["text_mask"] == 1
                text = model.text_encoder(want["text_ids"], mask)
                states = decoder.output_proj(text) * mask[..., None]
                self.assertClose(states, want["text_states"])

                tokens = last(want["tokens"])
                B, S, _ = tokens.shape
                conditioning = decoder.condition(text[:B], mask[:B], S)
                logits = decoder(tokens, conditioning, decoder.make_cache(B, S))
                self.assertClose(logits.swapaxes(1, 2), want["logits"])

    def test_step_by_step_equals_one_pass(self):
        decoder, conditioning, tokens = random_decoder()
        whole = decoder(tokens, conditioning, decoder.make_cache(2, 9))
        cache, steps = decoder.make_cache(2, 9), []
        for start, stop in ((0, 4), (4, 5), (5, 9)):
            steps.append(decoder(tokens[:, start:stop], conditioning, cache))
        self.assertClose(mx.concatenate(steps, axis=1), whole, 1e-5)

    @slow(12)
    def test_compiled_steps_equal_the_plain_ones(self):
        # float16 and bfloat16 round after each operation, and compiled code after
        # fewer: two units in the last place of the largest logits.
        tolerances = {mx.float32: 1e-5, mx.float16: 2e-3, mx.bfloat16: 2e-2}
        for dtype, tolerance in tolerances.items():
            decoder, conditioning, tokens = random_decoder(dtype)
            cache = decoder.make_cache(2, 9)
            lower, upper = decoder.compile(conditioning, decoder.make_cache(2, 9))
            for i in range(9):
                plain = decoder(tokens[:, i : i + 1], conditioning, cache)
                fast = upper(lower(tokens[:, i : i + 1]))
                self.assertClose(
                    fast.astype(mx.float32), plain.astype(mx.float32), tolerance
                )

    def test_products_as_columns(self):
        layer, x = nn.Linear(6, 4, bias=False), mx.random.normal((2, 1, 6))
        plain = layer(x)
        residual = mx.random.normal((2, 1, 4))
        for limit in (0, 8):
            with patch("musicgen.MAX_COLUMNS", limit):
                self.assertClose(musicgen.project(layer, x), plain, 1e-6)
                both = musicgen.project(layer, x, residual)
                self.assertClose(both, plain + residual, 1e-6)

    def test_operations_per_layer(self):
        # Each costs the host some microseconds, whatever its size. On CUDA adding
        # to the residual is apart, see MAX_COLUMNS: two more.
        with patch("musicgen.MAX_COLUMNS", 0):
            counts = [operations_per_step(layers) for layers in (2, 3)]
        self.assertLessEqual(counts[1] - counts[0], 14)

    def test_one_dtype(self):
        for dtype in (mx.float16, mx.bfloat16):
            decoder, conditioning, tokens = random_decoder(dtype)
            cache = decoder.make_cache(2, 9)
            logits = decoder(tokens, conditioning, cache)
            late = cache[-1].update(mx.zeros((2, 4, 0, 8), dtype))
            memory, mask, positions = conditioning
            for array in (logits, *late, *memory[-1], mask, positions):
                self.assertEqual(array.dtype, dtype)

    def test_empty_text_adds_nothing(self):
        decoder, _, tokens = random_decoder()
        empty = decoder.condition(mx.ones((2, 5, 12)), mx.zeros((2, 5), mx.bool_), 9)
        logits = decoder(tokens, empty, decoder.make_cache(2, 9))
        for layer in decoder.layers:
            layer.cross_attention.out_proj.weight *= 0
        without = decoder(tokens, empty, decoder.make_cache(2, 9))
        self.assertSame(logits, without)

    def test_sanitize_twice(self):
        for name in TRANSFORMERS:
            weights = checkpoints.read_weights(REFERENCE / name)
            once = checkpoints.sanitize(weights)
            twice = checkpoints.sanitize(once)
            self.assertEqual(once.keys(), twice.keys())
            self.assertTrue(all(mx.array_equal(once[k], twice[k]) for k in once))


def operations_per_step(layers: int) -> int:
    """Operations, views aside, in the graph of one step of a decoder.

    MLX fuses attention and norm on GPUs only; here one operation stands for each.
    """

    def attention(queries, keys, values, scale, mask):
        return mx.concatenate([queries, keys, values], axis=2)[:, :, :1]

    def norm(x, weight, bias, eps):
        return mx.softmax(x, axis=-1)

    config = musicgen.DecoderConfig(64, 128, layers, 2, 256)
    decoder = musicgen.Decoder(config, text_width=12)
    mx.eval(decoder.parameters())
    fast = dict(scaled_dot_product_attention=attention, layer_norm=norm)
    with patch.multiple("mlx.core.fast", **fast):
        return benchmark.operations_per_step(decoder)
