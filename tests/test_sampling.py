"""The delay pattern, and what is drawn from logits."""

import mlx.core as mx
import numpy as np
from common import Test

import musicgen
from musicgen import delay_mask, make_sampler, sampling_keys, undelay


class TestDelayPattern(Test):
    def test_drawing(self):
        rows = ["0123...", ".0123..", "..0123.", "...0123"]
        drawn = [[cell != "." for cell in row] for row in rows]
        self.assertSame(delay_mask(4, (0, 1, 2, 3)).T, drawn)

    def test_undone_exactly(self):
        for delays in ((0, 1, 2, 3), (0, 0, 1, 1, 2, 2, 3, 3)):
            frames, K = 6, len(delays)
            codes = np.random.default_rng(0).integers(0, 50, (2, frames, K))
            sequence = np.full((2, frames + 3, K), 99)
            for k, delay in enumerate(delays):
                sequence[:, delay : delay + frames, k] = codes[:, :, k]
            self.assertSame(undelay(mx.array(sequence), delays), codes)
            self.assertSame(delay_mask(frames, delays), sequence[0] != 99)

    def test_too_short(self):
        with self.assertRaisesRegex(ValueError, "more than 3 steps"):
            undelay(mx.zeros((1, 3, 4), mx.int32), (0, 1, 2, 3))


class TestSampling(Test):
    logits = mx.array([2.0, 1.0, 0.0, 0.0, -1.0, -3.0])

    def frequencies(self, draws: int = 20000, **options) -> np.ndarray:
        """Share of each token in draws of rows with a key each."""
        logits = mx.broadcast_to(self.logits, (draws, 1, 1, 6))
        keys = sampling_keys(list(range(draws)), 1)[0]
        tokens = make_sampler(**options)(logits, keys)
        return np.bincount(np.array(tokens).ravel(), minlength=6) / draws

    def check(self, kept: list[int], temp: float = 1.0, **options):
        """The shares are the softmax over `kept`, within four deviations."""
        weights = np.exp(np.array(self.logits) / temp) * np.isin(np.arange(6), kept)
        exact = weights / weights.sum()
        got = self.frequencies(temp=temp, **options)
        self.assertTrue((np.abs(got - exact) <= 4 * np.sqrt(exact / 20000)).all(), got)
        self.assertEqual(got[exact == 0].sum(), 0)

    def test_temperature(self):
        self.check([0, 1, 2, 3, 4, 5], temp=1.7, top_k=2048)
        self.check([0, 1, 2, 3, 4, 5], temp=0.6, top_k=6)

    def test_top_k_keeps_ties(self):
        self.check([0, 1], top_k=2)
        self.check([0, 1, 2, 3], top_k=3)  # the third ties with the fourth
        self.check([0], top_k=1)

    def test_top_p(self):
        # Probabilities 0.59, 0.22, 0.08, 0.08, 0.03, 0.004: an entry stays where
        # those before it reach no more than p.
        self.check([0], top_p=0.58)
        self.check([0, 1], top_p=0.6)
        self.check([0, 1], temp=0.5, top_p=0.9, top_k=1)  # and top_k is ignored
        self.check([0, 1, 2, 3, 4, 5], top_p=1.0)

    def test_top_p_reached_exactly(self):
        # audiocraft drops what comes after more than p: here half is no more.
        self.logits = mx.array([0.0, 0.0, -100.0, -100.0, -100.0, -100.0])
        self.check([0, 1], top_p=0.5)
        self.check([0], top_p=0.49)

    def test_greedy(self):
        self.assertEqual(self.frequencies(draws=3, temp=0).tolist(), [1, 0, 0, 0, 0, 0])

    def test_guidance_is_in_float32(self):
        logits = mx.array([[[[1.0, 2049.0]]], [[[1.0, 2048.0]]]]).astype(mx.float16)
        for coefficient in (1, 3):
            options = musicgen.Options(guidance_coef=coefficient)
            guided = musicgen.guide(logits, options)
            self.assertEqual(guided.dtype, mx.float32)

    def test_seeds_of_64_bits_differ(self):
        keys = sampling_keys([5, 5 + 2**32], 1)
        self.assertNotEqual(keys[0, 0].tolist(), keys[0, 1].tolist())

    def test_keys_depend_on_seed_and_step_alone(self):
        several = sampling_keys([5, 7, 2**64 - 1], 9)
        self.assertSame(several[:4, 1:2], sampling_keys([7], 4))
        self.assertEqual(len(np.unique(np.array(several).reshape(-1, 2), axis=0)), 27)
