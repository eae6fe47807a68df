"""A style model's conditioner by itself: its settings, requests and tokens."""

import json
import math
from dataclasses import asdict
from unittest.mock import patch

import mlx.core as mx
import numpy as np
from common import EXPECTED, REFERENCE, Test, sounds
from mlx.utils import tree_flatten

import audiocraft
from audiocraft import load_package, read_yaml
from encodec import Encodec
from mert import MERT
from style import StyleConditioner, StyleConfig, StyleRequest

PREFIX = "condition_provider.conditioners.self_wav."
STYLE = audiocraft.STYLE


class TestStyleSettings(Test):
    def setUp(self):
        super().setUp()
        # The tiny model's heads show nowhere: it calls itself "default".
        self.enterContext(patch.dict(audiocraft.SCALES, default=4))
        self.about = EXPECTED["style-audiocraft"]
        self.start = self.about["start"] / 32000
        self.tunes = [
            mx.array(sounds.tune(32000, notes)) for notes in self.about["tunes"]
        ]

    def read(self, name: str) -> tuple[dict[str, mx.array], dict]:
        """The conditioner's weights by our names, and audiocraft's settings."""
        package = load_package(REFERENCE / name / "state_dict.bin")
        weights = {
            key.removeprefix(PREFIX): weight
            for key, weight in package["best_state"].items()
            if key.startswith(PREFIX) and not key.startswith(PREFIX + "output_proj")
        }
        return StyleConditioner.sanitize(weights), read_yaml(package["xp.cfg"])

    def load(self, name: str = "style-audiocraft") -> StyleConditioner:
        weights, cfg = self.read(name)
        settings = audiocraft.style_settings(weights, cfg) | {"mert": None}
        if settings["encodec_n_q"] == 0:
            mert = MERT.from_pretrained(REFERENCE / name / "MERT-v1-95M")
            settings["mert"] = asdict(mert.config)
            parameters = tree_flatten(mert.parameters())
            weights |= {f"mert.{key}": weight for key, weight in parameters}
        codec = Encodec.from_pretrained(REFERENCE / name)
        model = StyleConfig.from_dict(settings).build(codec, 30.0)
        model.load_weights(list(weights.items()))
        return model

    def expected(self, name: str) -> dict[str, mx.array]:
        return mx.load(str(REFERENCE / name / "expected.safetensors"))

    def test_tokens(self):
        model, want = self.load(), self.expected("style-audiocraft")
        for i, tune in enumerate(self.tunes):
            for count in self.about["quantizers"]:
                request = StyleRequest(tune, self.start, quantizers=count)
                tokens = model.prepare(request, 0, 8.0)
                self.assertSame(tokens, want[f"style_{i}_q{count}"])
        for length in self.about["lengths"]:
            request = StyleRequest(self.tunes[0], self.start, length)
            tokens = model.prepare(request, 0, 8.0)
            self.assertSame(tokens, want[f"style_0_len{length}"])
            self.assertLessEqual(model.frames(tokens), model.longest)

    def test_tokens_of_the_codec(self):
        name = "style-encodec-audiocraft"
        model, want = self.load(name), self.expected(name)
        tokens = model.prepare(StyleRequest(self.tunes[0], self.start), 0, 8.0)
        self.assertSame(tokens, want["style_0_q3"])

    def test_states(self):
        model = self.load()
        self.assertIsNone(model.prepare(None, 0, 8.0))
        self.assertEqual(model.frames(None), 1)
        values, mask = model.states([None, None], None)
        self.assertSame(values, mx.zeros((2, 1, model.config.width)))
        self.assertFalse(mask.any().item())
        tokens = model.prepare(StyleRequest(self.tunes[0]), 0, 8.0)
        values, mask = model.states([tokens, tokens], 0)
        self.assertEqual(values.shape, (2, *tokens.shape))
        self.assertTrue(mask.all().item())
        null, mask = model.null_states(values.shape)
        self.assertSame(null, 0 * values)
        self.assertFalse(mask.any().item())

    def test_the_seed_draws_the_start(self):
        model, request = self.load(), StyleRequest(self.tunes[0])
        starts = [model.excerpt(request, seed)[0] for seed in range(9)]
        self.assertEqual(len(set(starts)), 9)
        self.assertTrue(all(0 <= start <= 2 for start in starts))
        drawn = model.prepare(request, 3, 8.0)
        told = model.prepare(request._replace(start=starts[3]), 4, 8.0)
        self.assertSame(drawn, told)

    def test_bad_requests(self):
        model, tune = self.load(), self.tunes[0]
        for request, pattern in (
            (StyleRequest(tune[:64000]), "at least the 3 s .* got 2 s"),
            (StyleRequest(tune, length=1.4), "from 1.5 to 4.5 s, got 1.4"),
            (StyleRequest(tune, length=math.nan), "from 1.5 to 4.5 s, got nan"),
            (StyleRequest(tune, start=2.1), "at most 2 s .* got 2.1"),
            (StyleRequest(tune, start=-1), "0 s or more, got -1"),
            (StyleRequest(tune, start=math.inf), "0 s or more, got inf"),
            (StyleRequest(tune, quantizers=0), "from 1 to 6, got 0"),
            (StyleRequest(tune, quantizers=1.5), "from 1 to 6, got 1.5"),
            (StyleRequest(0 * tune), "must not be silent"),
            (StyleRequest(tune * math.nan), "must be finite"),
            (StyleRequest(tune[None]), r"must have the shape \(N, C\)"),
            (StyleRequest(np.array(tune).T), "1 to 8 channels, got .*audio.T"),
            (StyleRequest({}), "must be samples .* got dict"),
            (StyleRequest(["a"]), "must be samples .* got list"),
        ):
            with self.subTest(pattern=pattern):
                with self.assertRaisesRegex(ValueError, pattern):
                    model.prepare(request, 0, 8.0)

    def test_settings(self):
        weights, cfg = self.read("style-audiocraft")
        config = audiocraft.style_settings(weights, cfg)
        self.assertEqual((config["eval_q"], config["num_heads"]), (3, 4))
        bare = {k: v for k, v in cfg.items() if not k.startswith("conditioners.")}
        whole = StyleConfig.from_dict(config)
        bare = StyleConfig.from_dict(audiocraft.style_settings(weights, bare))
        self.assertEqual(bare, whole)
        self.assertEqual(
            StyleConfig.from_dict(json.loads(json.dumps(asdict(whole)))), whole
        )
        more = {"eval_q": "2", "ds_factor": "5", "length": "4", "rvq_threshold": "null"}
        more |= {"varying_lengths": "null", "encodec_checkpoint": "//sig/1"}
        more |= {"q_dropout": "false", "encodec_n_q": "2"}  # MERT hears without a codec
        cfg = cfg | {STYLE + name: value for name, value in more.items()}
        config = StyleConfig.from_dict(audiocraft.style_settings(weights, cfg))
        self.assertEqual((config.eval_q, config.ds_factor, config.length), (2, 5, 4.0))
        self.assertEqual(config.varying_lengths, (1.5, 4.5))

    def test_others_are_refused_by_name(self):
        cases = (
            ("use_middle_of_segment", "true", "must be false"),
            ("batch_norm", "false", "must be true"),
            ("sample_rate", "16000", "must be 32000, got 16000"),
            ("transformer_scale", "none", "must be xsmall or default or large"),
            ("model_name", "encodec", "must be mert, as in the weights"),
            ("n_q_out", "0", "must be 6, as in the weights"),
            ("bins", "3", "must be .*, as in the weights, got 3"),
            ("dim", "512", "is set to .* in style, which"),
            ("eval_q", "9", "must be at most num_quantizers, 6, got 9"),
            ("length", "x", "must be a number, got x"),
            ("varying_lengths", ["3", "1"], "the least and the most"),
            ("varying_lengths", ["1.5", "inf"], "must be a number"),
        )
        weights, cfg = self.read("style-audiocraft")
        for name, value, pattern in cases:
            with self.subTest(name):
                with self.assertRaisesRegex(ValueError, f"{name}.* {pattern}"):
                    changed = cfg | {STYLE + name: value}
                    settings = audiocraft.style_settings(weights, changed)
                    StyleConfig.from_dict(settings)
        weights, cfg = self.read("style-encodec-audiocraft")
        for name, value, pattern in (
            ("encodec_checkpoint", "//sig/1", "must be //pretrained/facebook/enc"),
            ("encodec_n_q", "1", "must be .*, as in the weights, got 1"),
            ("model_name", "mert", "must be encodec, as in the weights"),
        ):
            with self.assertRaisesRegex(ValueError, f"{name}.* {pattern}"):
                audiocraft.style_settings(weights, cfg | {STYLE + name: value})

    def test_absurd_config(self):
        for change, pattern in (
            ({"width": 10**9}, "width must be from 4"),
            ({"num_heads": 7}, "num_heads must split width"),
            ({"mert": []}, "mert must be an object"),
            ({"mert": None}, "either mert or encodec_n_q"),
            ({"encodec_n_q": 3}, "either mert or encodec_n_q"),
            ({"length": math.nan}, "must be seconds"),
            ({"varying_lengths": 3}, "must be seconds"),
        ):
            with self.assertRaisesRegex(ValueError, pattern):
                StyleConfig.from_dict(change)
        codec = Encodec.from_pretrained(REFERENCE / "style-audiocraft")
        config = StyleConfig.from_dict({"mert": None, "encodec_n_q": 9})
        with self.assertRaisesRegex(ValueError, "at most the codec's 4 codebooks"):
            config.build(codec, 30.0)
