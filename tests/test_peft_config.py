"""What the settings of PEFT's adapters ask for, and what does not go with the tensors."""

import json
import math
import os
import shutil
from pathlib import Path
from unittest.mock import patch

import mlx.core as mx
import numpy as np
from common import REFERENCE, Test, exact
from mlx.utils import tree_flatten
from test_peft_files import ADAPTERS, LAYER, adapted

import adapters
import checkpoints
import encodec_files
import hub
import lines
import lora
import mert
import peft_config
import peft_files
import published
import strict
import t5_files
from musicgen import MusicGen

MONO = REFERENCE / "mono-transformers"
TABLES = ("embed_tokens", "shared", "relative_attention_bias")
HEADS = "base_model.model.decoder.lm_heads."


class TestModules(Test):
    def test_which_ones_peft_wraps(self):
        """Of all that it could, by each setting that chooses."""
        every, *cases = json.loads((ADAPTERS / "matched.json").read_text())
        self.assertGreater(len(cases), 10)
        for case in cases:
            with self.subTest(case["settings"]):
                kept = []
                for module in every["modules"]:
                    is_table = any(word in module for word in TABLES)
                    asked = (case["settings"], module, is_table)
                    if peft_config.left_out_by(*asked) is None:
                        kept.append(module)
                self.assertEqual(kept, case["modules"])


class TestAdapter(Test):
    def setUp(self):
        super().setUp()
        self.adapter = Path(shutil.copytree(ADAPTERS / "mono", self.folder / "bad"))
        self.config = json.loads((self.adapter / peft_config.CONFIG).read_text())
        self.tensors = mx.load(str(self.adapter / peft_files.WEIGHTS))
        mx.eval(self.tensors)

    def set_config(self, **settings):
        text = json.dumps(self.config | settings)
        (self.adapter / peft_config.CONFIG).write_text(text)

    def set_tensors(self, tensors: dict[str, mx.array]):
        tensors = self.tensors | tensors
        mx.save_safetensors(str(self.adapter / peft_files.WEIGHTS), tensors)

    def assertRefused(self, pattern: str, **options):
        with self.assertRaisesRegex(ValueError, pattern) as caught:
            adapted("mono-transformers", self.adapter, **options)
        self.assertLessEqual(len(str(caught.exception)), 400)


class TestSettings(TestAdapter):
    def test_tensors_that_the_settings_leave_out(self):
        for settings, name, key in (
            (dict(target_modules=["q_proj"]), "lora_", "target_modules"),
            (dict(target_modules=[]), "lora_", "target_modules"),
            (dict(target_modules=".*q_proj"), "lora_", "target_modules"),
            (dict(target_modules="all-linear"), "lora_embed", "target_modules"),
            (dict(exclude_modules=["fc1"]), "fc1.lora_", "exclude_modules"),
            (dict(exclude_modules=".*fc1"), "fc1.lora_", "exclude_modules"),
            (dict(modules_to_save=["fc1"]), "fc1.lora_", "modules_to_save"),
            (dict(layers_to_transform=[0]), "lora_", "layers_to_transform"),
        ):
            with self.subTest(settings):
                self.set_config(**settings)
                self.assertRefused(
                    f"bad/.*{name}.* that {key} in adapter_config.json leaves out, .*PEFT"
                )

    def test_what_peft_cannot_read(self):
        for settings, pattern in (
            (dict(bias="x"), "bias must be 'none', 'all' or 'lora_only', got 'x'"),
            (dict(target_modules="["), r"has the pattern '\[': unterminated"),
            (dict(exclude_modules="("), r"has the pattern '\(': missing"),
            (dict(target_modules=[3]), "target_modules must hold texts, got 3"),
            (dict(r="16"), "r must be a whole number above 0, got '16'"),
            (dict(r=16.5), "r must be a whole number above 0, got 16.5"),
            (dict(r=True), "r must be a whole number above 0, got True"),
            (dict(r=10**30), "r must be below 1e6, got 1000"),
            (dict(r=0), "r must be above 0, got 0"),
            (dict(lora_alpha="16"), "lora_alpha must be a number above 0, got '16'"),
            (dict(lora_alpha=math.inf), "lora_alpha must be below 1e6, got inf"),
        ):
            with self.subTest(settings):
                self.set_config(**settings)
                self.assertRefused(f"bad/.*{pattern}")

    def test_intricate_patterns_are_warned_of(self):
        """One may take for ever, as `(a+)+` does."""
        wanted = adapted("mono-transformers", ADAPTERS / "mono")
        self.set_config(target_modules="(a+)+b")
        with self.assertWarnsRegex(UserWarning, "target_modules is too intricate"):
            found = adapted("mono-transformers", self.adapter)
        self.assertSame(found.decoder.linears.weight, wanted.decoder.linears.weight)

    def test_settings_of_three_gigabytes(self):
        """A file of zeros that takes no place on the disk."""
        os.truncate(self.adapter / peft_config.CONFIG, 3 * 2**30)
        self.assertRefused(
            "adapter_config.json does not load: it must be at most 64 MB"
        )
        zeros = self.folder / "config.json"
        zeros.touch()
        os.truncate(zeros, 3 * 2**30)
        readers = (t5_files, mert, encodec_files)
        reads = [module.read_config for module in readers] + [hub.read_small]
        for read in (*reads, checkpoints.read_json, published.read_json):
            with self.assertRaisesRegex(ValueError, "config.json .*must be at most 64"):
                read(zeros)
        self.assertEqual(lines.own_settings(str(self.folder)), {})
        spiece, tokenizer = MONO / "spiece.model", self.folder / "tokenizer.json"
        zeros.rename(tokenizer)
        with self.assertRaisesRegex(ValueError, "tokenizer.json is no tokenizer of T5"):
            t5_files.check_pieces(spiece, tokenizer)
        (self.folder / "a.json").write_text("{}")
        self.assertEqual(strict.small_text(self.folder / "a.json", 2), "{}")
        with self.assertRaisesRegex(ValueError, "must be at most"):
            strict.small_text(self.folder / "a.json", 1)

    def test_base_of_other_sizes(self):
        """The name of a released model tells them, wherever the model lies."""
        decoder = exact("mono-transformers").config.decoder
        here = dict(layers=decoder.num_hidden_layers, width=decoder.hidden_size)
        here |= dict(codebooks=4, channels=1, sampling_rate=32000, follows="")
        self.set_config(base_model_name_or_path="facebook/musicgen-small")
        self.assertRefused(
            "another model, facebook/musicgen-small: layers 24 there, 2 here"
        )
        for name, other in (
            ("layers", 48),
            ("width", 1536),
            ("codebooks", 8),
            ("channels", 2),
            ("sampling_rate", 16000),
            ("follows", "melody"),
        ):
            with patch.object(hub, "shape_of", return_value=here | {name: other}):
                self.assertRefused(f"belongs to another model, .*: {name} '?{other}")
        with patch.object(hub, "shape_of", return_value=here):
            adapted("mono-transformers", self.adapter)

    def test_sizes_of_the_released_models(self):
        for name, layers, width, codebooks, rate, follows in (
            ("small", 24, 1024, 4, 32000, ""),
            ("facebook/musicgen-medium", 48, 1536, 4, 32000, ""),
            ("stereo-large", 48, 2048, 8, 32000, ""),
            ("facebook/musicgen-melody", 48, 1536, 4, 32000, "melody"),
            ("stereo-melody-large", 48, 2048, 8, 32000, "melody"),
            ("style", 48, 1536, 4, 32000, "style"),
            ("facebook/audiogen-medium", 48, 1536, 4, 16000, ""),
        ):
            wanted = dict(layers=layers, width=width, codebooks=codebooks)
            wanted |= dict(channels=codebooks // 4, sampling_rate=rate, follows=follows)
            self.assertEqual(hub.shape_of(name), wanted)
        for name in ("tiny", hub.MODELS["tiny"], "someone/musicgen-small", "not named"):
            self.assertIsNone(hub.shape_of(name))


class TestTensors(TestAdapter):
    def test_given_twice(self):
        key = f"{LAYER}fc1.lora_A.weight"
        a, row = self.tensors[key], mx.ones(32)
        norm = "base_model.model.decoder.model.decoder.layer_norm"
        self.set_config(modules_to_save=["decoder.layer_norm"])
        short = key.removeprefix("base_model.model.")
        bare = key.removeprefix("base_model.model.decoder.")
        other = bare.replace("lora_A", "lora_B")
        b = self.tensors[key.replace("lora_A", "lora_B")]
        spelled = f"{norm}.modules_to_save.weight"
        for tensors, one, two in (
            ({key.replace("A.w", "A.default.w"): a * 0}, "A.default.w", "A.weight"),
            ({short: a * 0}, "base_model.model.", "and decoder.model"),
            ({bare: a, other: b}, "fc1.lora_B.weight", "and model.decoder"),
            ({f"{norm}.weight": row, spelled: row * 0}, "to_save", "norm.weight"),
        ):
            with self.subTest(two):
                self.set_tensors(tensors)
                self.assertRefused(f"bad/.* gives one tensor twice: .*{one}.*{two}")
        self.set_tensors({key.replace("A.w", "A.default.w"): a})  # the same
        adapted("mono-transformers", self.adapter)

    def test_what_peft_does_not_replace(self):
        """It names a whole module beside a low-rank change otherwise."""
        head, norm = (
            mx.ones((64, 32)),
            "base_model.model.decoder.model.decoder.layer_norm",
        )
        for name, tensor, pattern in (
            (
                f"{HEADS}0.weight",
                head,
                "0.weight is of a module with B.weight, where PEFT",
            ),
            (
                f"{norm}.modules_to_save.weight",
                mx.ones(32),
                "modules_to_save in .* None",
            ),
        ):
            self.set_tensors({name: tensor})
            self.assertRefused(f"bad/.*{pattern}.* would not load it")
        self.set_tensors({f"{HEADS}0.base_layer.weight": head})
        change = adapted("mono-transformers", ADAPTERS / "mono").decoder.linears.weight
        change = change - exact("mono-transformers").decoder.linears.weight
        found = adapted("mono-transformers", self.adapter).decoder.linears.weight
        self.assertClose(found[:64], head + change[:64])

    def test_numbers_that_no_module_has(self):
        pair = {"lora_A": mx.ones((2, 32)), "lora_B": mx.ones((64, 2))}
        for number in ("00", "\u0660"):
            names = {f"{HEADS}{number}.{k}.weight": v for k, v in pair.items()}
            self.set_tensors(names)
            self.assertRefused("lm_heads.* has no place in this model")

    def test_sums_that_are_not_finite(self):
        a, b = (f"{LAYER}fc1.lora_{kind}.weight" for kind in "AB")
        large = {k: mx.full(self.tensors[k].shape, 1e38) for k in (a, b)}
        small = {k: mx.full(self.tensors[k].shape, 1e3) for k in (a, b)}
        self.set_tensors(large)
        words = (
            "fc1.lora_B.weight makes weights of decoder.layers.0.linear1.weight NaN or"
        )
        self.assertRefused(f"bad/.*{words} infinite in float32: take a smaller scale")
        model = exact("mono-transformers")
        with self.assertRaisesRegex(ValueError, words):
            peft_files.merge(model, self.adapter)
        self.set_tensors(small)
        adapted("mono-transformers", self.adapter)
        for few in ({}, dict(q_bits=8, q_group_size=32)):
            with self.assertRaisesRegex(ValueError, f"{words} infinite in float16"):
                MusicGen.from_pretrained(MONO, mx.float16, adapter=self.adapter, **few)

    def test_scales_that_are_no_numbers(self):
        model = exact("mono-transformers")
        before = dict(tree_flatten(model.parameters()))
        for scale in (math.nan, math.inf, "1", True):
            with self.assertRaisesRegex(
                ValueError, "scale must be a finite number, got"
            ):
                peft_files.merge(model, self.adapter, scale=scale)
        for name, weight in tree_flatten(model.parameters()):
            self.assertSame(weight, before[name])


class TestOurs(Test):
    path = ADAPTERS / "ours-mono.safetensors"

    def changed(self, factor: float) -> Path:
        arrays, metadata = lora.read_adapter(self.path)
        arrays = {k: mx.full(v.shape, factor) for k, v in arrays.items()}
        path, text = self.folder / "a.safetensors", {"adapter": json.dumps(metadata)}
        mx.save_safetensors(str(path), arrays, text)
        return path

    def test_sums_that_are_not_finite(self):
        few = dict(q_bits=8, q_group_size=32)
        for factor, dtype in ((1e30, mx.float32), (1e3, mx.float16)):
            path = self.changed(factor)
            kind = str(dtype).removeprefix("mlx.core.")
            for options in ({}, few):
                with self.assertRaisesRegex(ValueError, f"a.safe.* infinite in {kind}"):
                    MusicGen.from_pretrained(MONO, dtype, adapter=path, **options)

    def test_scales(self):
        for scales in (np.float32(0.5), np.float64(0.5), mx.array(0.5), np.array(0.5)):
            for asked in (scales, [scales]):
                ((_, scale),) = adapters.weighted(["a"], asked)
                self.assertEqual((type(scale), scale), (float, 0.5))
        for scales in (np.array([0.5, 2]), mx.array([0.5, 2])):
            pairs = adapters.weighted(["a", "b"], scales)
            self.assertEqual(pairs, [("a", 0.5), ("b", 2.0)])
        self.assertEqual(lora.check_scale(np.int64(2)), 2)
        for scale in (True, np.bool_(True), "1", None, mx.array(True), 1j):
            with self.assertRaisesRegex(
                ValueError, "must be a number from -100 to 100"
            ):
                lora.check_scale(scale)
        for scale in (101, np.float32(math.nan), mx.array(math.inf)):
            with self.assertRaisesRegex(ValueError, "must be from -100 to 100, got"):
                lora.check_scale(scale)
        model = adapted("mono-transformers", self.path, np.float32(0.5))
        self.assertEqual(json.dumps(model.adapter["adapter_scale"]), "0.5")
