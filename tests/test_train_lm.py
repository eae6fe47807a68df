"""train_lm.py: songs whose text changes are learned as sections are made."""

from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from common import ROOT, Test

import train_lm
from musicgen import MusicGen, delay
from train_lm import attended, draw_changes, lm_loss, padded, song_loss

TEXTS = ("slow bell", "fast saw melody with drums")


class TestSongs(Test):
    def setUp(self):
        super().setUp()
        self.model = MusicGen.from_pretrained(ROOT / "tiny")
        mx.random.seed(0)
        self.codes = mx.random.randint(0, 512, (1, 30, 4))
        ids = [self.model.tokenizer.encode(text) for text in TEXTS]
        self.ids, self.mask = padded(ids, 16)

    def song(self, change: int, told: bool = True) -> float:
        texts = (self.ids[:, None], self.mask[:, None], mx.array([told]))
        return song_loss(self.model, *texts, self.codes, mx.array([change]))[0].item()

    def plain(self, text: int, told: bool = True) -> float:
        texts = (self.ids[text, None], self.mask[text, None], mx.array([told]))
        return lm_loss(self.model, *texts, self.codes)[0].item()

    def test_a_text_that_does_not_change(self):
        self.assertAlmostEqual(self.song(30), self.plain(0), 4)
        self.assertAlmostEqual(self.song(0), self.plain(1), 4)
        self.assertNotAlmostEqual(self.plain(0), self.plain(1), 2)

    def test_rows_without_text(self):
        self.assertAlmostEqual(self.song(12, told=False), self.plain(0, told=False), 4)

    def test_it_is_what_sections_compute(self):
        """Step by step, under the text of each step's frame."""
        model, decoder = self.model, self.model.decoder
        losses, cache = [], decoder.make_cache(1, 30)
        tokens = delay(self.codes, model.config.decoder.delays, 30, 512)
        inputs = mx.pad(tokens, [(0, 0), (1, 0), (0, 0)], constant_values=512)
        for step in range(30):
            row = slice(0, 1) if step < 12 else slice(1, 2)
            states = model.text_encoder(self.ids[row], self.mask[row])
            text = train_lm.Condition(states, self.mask[row])
            now = inputs[:, step : step + 1]
            logits = decoder(now, decoder.text_kv(text), cache)[0, 0]
            loss = nn.losses.cross_entropy(logits, tokens[0, step] % 512)
            losses.append(mx.where(tokens[0, step] == 512, mx.nan, loss))
        wanted = np.nanmean(np.array(mx.stack(losses)), axis=0).mean()
        self.assertAlmostEqual(self.song(12), float(wanted), 3)
        for other in (11, 13):
            self.assertNotAlmostEqual(self.song(other), float(wanted), 3)

    def test_who_sees_what(self):
        mask = mx.array([[[True, True]], [[True, False]]])  # 2 texts, 1 row, 2 tokens
        sees = attended(mask, mx.array([2]), 4)
        first, second = [True, True, False, False], [False, False, True, False]
        self.assertEqual(sees.tolist(), [[first, first, second, second]])

    def test_changes(self):
        """In half of the rows, at any frame but the first."""
        drawn = np.array(draw_changes(20, 4000, np.random.default_rng(0)))
        self.assertAlmostEqual((drawn == 20).mean(), 0.5, delta=0.03)
        self.assertEqual({*drawn}, {*range(1, 21)})
        with patch.object(train_lm, "CHANGING", 0.0):
            drawn = draw_changes(20, 50, np.random.default_rng(0))
        self.assertTrue((drawn == 20).all())
