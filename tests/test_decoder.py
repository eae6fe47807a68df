"""The decoder: logits, steps, dtypes, its config."""

import mlx.core as mx
from common import (
    AUDIOCRAFT,
    REFERENCE,
    TRANSFORMERS,
    Test,
    exact,
    expected,
    last,
    random_decoder,
)

import decoder as decoder_script
import published
from decoder import Condition, stack_rows


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
                text_kv = decoder.text_kv(Condition(text[:B], mask[:B]))
                logits = decoder(tokens, text_kv, decoder.make_cache(B, S))
                self.assertClose(logits.swapaxes(1, 2), want["logits"])

    def test_step_by_step_equals_one_pass(self):
        decoder, text, tokens = random_decoder()
        text_kv = decoder.text_kv(text)
        whole = decoder(tokens, text_kv, decoder.make_cache(2, 9))
        cache, steps = decoder.make_cache(2, 9), []
        for start, stop in ((0, 4), (4, 5), (5, 9)):
            steps.append(decoder(tokens[:, start:stop], text_kv, cache))
        self.assertClose(mx.concatenate(steps, axis=1), whole, 1e-5)

    def test_without_a_past_equals_with_a_cache(self):
        # as it is trained
        decoder, text, tokens = random_decoder()
        text_kv = decoder.text_kv(text)
        whole = decoder(tokens, text_kv, decoder.make_cache(2, 9))
        no_past = [None] * len(decoder.layers)
        self.assertClose(decoder(tokens, text_kv, no_past), whole, 1e-6)

    def test_one_dtype(self):
        for dtype in (mx.float16, mx.bfloat16):
            decoder, text, tokens = random_decoder(dtype)
            cache, text_kv = decoder.make_cache(2, 9), decoder.text_kv(text)
            logits = decoder(tokens, text_kv, cache)
            late = cache[-1].update_and_fetch(mx.zeros((2, 4, 0, 8), dtype))
            positions = decoder.positions(0, 3)
            for array in (logits, *late, *text_kv[-1], positions):
                self.assertEqual(array.dtype, dtype)

    def test_empty_text_adds_nothing(self):
        decoder, _, tokens = random_decoder()
        empty = Condition(mx.ones((2, 5, 12)), mx.zeros((2, 5), mx.bool_))
        text_kv = decoder.text_kv(empty)
        logits = decoder(tokens, text_kv, decoder.make_cache(2, 9))
        for layer in decoder.layers:
            layer.cross_attention.out_proj.weight *= 0
        without = decoder(tokens, text_kv, decoder.make_cache(2, 9))
        self.assertSame(logits, without)

    def test_positions_go_on(self):
        decoder, _, _ = random_decoder()
        self.assertSame(decoder.positions(4, 3), decoder.positions(0, 9)[4:7])

    def test_rows_of_conditions(self):
        a = Condition(mx.zeros((1, 2, 3)), mx.ones((1, 2), mx.bool_))
        b = Condition(mx.ones((2, 2, 3)), mx.zeros((2, 2), mx.bool_))
        rows = stack_rows([a, b])
        self.assertEqual((rows.states.shape, rows.mask.shape), ((3, 2, 3), (3, 2)))
        self.assertSame(rows.mask.any(axis=1), [True, False, False])

    def test_sanitize_twice(self):
        for name in TRANSFORMERS:
            weights = published.read_weights(REFERENCE / name)
            once = published.sanitize(weights)
            twice = published.sanitize(once)
            self.assertEqual(once.keys(), twice.keys())
            self.assertTrue(all(mx.array_equal(once[k], twice[k]) for k in once))

    def test_config(self):
        sizes = dict(vocab_size=10, hidden_size=128, num_hidden_layers=1, ffn_dim=8)
        read = lambda **more: decoder_script.read_config(  # noqa: E731
            sizes | dict(num_codebooks=4) | more, 0
        )
        self.assertEqual(read().num_attention_heads, 2)
        self.assertEqual(read().delays, (0, 1, 2, 3))
        stereo = read(num_codebooks=8, audio_channels=2)
        self.assertEqual(stereo.delays, (0, 0, 1, 1, 2, 2, 3, 3))
        self.assertEqual(read(delays=[0, 2, 2, 9]).delays, (0, 2, 2, 9))
        for change, pattern in (
            (dict(activation_function="relu"), "activation_function must be 'gelu'"),
            (dict(scale_embedding=True), "scale_embedding must be False"),
        ):
            with self.subTest(change):
                with self.assertRaisesRegex(ValueError, pattern):
                    read(**change)
        for name in sizes:
            with self.assertRaisesRegex(ValueError, f"config must have {name}"):
                rest = {k: v for k, v in sizes.items() if k != name}
                rest |= dict(num_codebooks=4, num_attention_heads=2)
                decoder_script.read_config(rest, 0)
