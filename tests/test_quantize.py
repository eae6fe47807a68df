"""Quantized models: each mode loads, is converted, and is what it says."""

import json
import shutil
from pathlib import Path
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from common import REFERENCE, ScriptTest, Test, exact, random_decoder
from mlx.utils import tree_flatten

import convert
import engine
import lines
import lora
import quantize
import settings
from decoder import Decoder, DecoderConfig
from job import plan
from musicgen import MusicGen, PlainStep

SOURCE = str(REFERENCE / "mono-transformers")
CASES = [  # bits, group size, mode; bits a weight in a file of float16
    *((bits, 32, "affine", bits + 1.0) for bits in (2, 3, 4, 5, 6, 8)),
    (4, 32, "mxfp4", 4.25),
    (4, 16, "nvfp4", 4.5),
    (8, 32, "mxfp8", 8.25),
]
FLOATS = (0, 0.5, 1, 1.5, 2, 3, 4, 6)  # of four bits: E2M1, in both signs


def names(settings: dict) -> dict:
    return {f"q_{name}": value for name, value in settings.items()}


class TestModes(Test):
    def test_loaded_converted_and_loaded_back(self):
        """To the same logits, from a file of the size that was to be expected."""
        logits = {}
        for bits, size, mode, per_weight in CASES:
            with self.subTest(mode, bits=bits):
                folder = self.folder / f"{mode}-{bits}"
                asked = dict(q_bits=bits, q_group_size=size, q_mode=mode)
                convert.convert(SOURCE, folder, mx.float16, **asked)
                told = json.loads((folder / "config.json").read_text())["quantization"]
                wanted = {"group_size": size, "bits": bits, "mode": mode}
                self.assertEqual((told, [*told]), (wanted, [*wanted]))
                file = mx.load(str(folder / "model.safetensors"))
                stem = "decoder.layers.1.linear1."
                parts = [file[k] for k in file if k.startswith(stem)]
                self.assertEqual(8 * sum(x.nbytes for x in parts) / 2048, per_weight)
                plain = [k for k in file if ".kv_proj." in k or ".linears." in k]
                for name in plain:
                    self.assertEqual(file[name].dtype, mx.float16, name)
                logits[mode, bits] = self.logits(folder, mx.float16)
                loaded = self.logits(SOURCE, mx.float16, **asked)
                self.assertSame(logits[mode, bits], loaded)
        exact = self.logits(SOURCE, mx.float16)
        away = {k: mx.abs(x - exact).mean().item() for k, x in logits.items()}
        order = [away["affine", bits] for bits in (8, 6, 5, 4, 3, 2)]
        self.assertEqual(order, sorted(order))
        self.assertLess(0, away["affine", 8])
        self.assertLess(away["mxfp8", 8], away["mxfp4", 4])
        self.assertLess(away["mxfp4", 4], away["affine", 2])

    def logits(self, path: Path | str, dtype: mx.Dtype, **asked) -> mx.array:
        """Of a few steps of a text."""
        model = MusicGen.from_pretrained(path, dtype, **asked)
        decoder, past = model.decoder, [None] * len(model.decoder.layers)
        text = model.text_encoder.encode([model.tokenizer.encode("drums")])
        tokens = mx.arange(36).reshape(1, 9, 4)
        _, condition, _ = random_decoder()
        condition = type(condition)(*text)
        logits = decoder(tokens, decoder.text_kv(condition), past)
        return logits.astype(mx.float32)

    def test_what_nobody_gives_is_the_modes_own(self):
        """As mlx-lm has it; `q_bits` alone is affine."""
        for given, wanted in (
            (dict(bits=8), (64, 8, "affine")),
            (dict(mode="affine"), (64, 4, "affine")),
            (dict(mode="mxfp4"), (32, 4, "mxfp4")),
            (dict(mode="nvfp4"), (16, 4, "nvfp4")),
            (dict(mode="mxfp8"), (32, 8, "mxfp8")),
            (dict(bits=5, group_size=128), (128, 5, "affine")),
        ):
            found = quantize.complete(**given)
            self.assertEqual([*found.values()], [*wanted])
            without = {k: v for k, v in found.items() if k != "group_size"}
            wanted = found if "group_size" in given else without
            self.assertEqual(quantize.asked(**given), wanted)
            layer = nn.Linear(128, 8).to_quantized(**given)  # MLX's own
            theirs = (layer.group_size, layer.bits, layer.mode)
            self.assertEqual(theirs, (*found.values(),))
        self.assertEqual(quantize.asked(), {})

    def test_numbers_of_each_mode(self):
        """By the definition of the formats: OCP Microscaling, and NVIDIA's."""
        mx.random.seed(0)
        weight = mx.random.normal((16, 64))
        for mode, size in (("mxfp4", 32), ("nvfp4", 16), ("mxfp8", 32)):
            packed, scales = mx.quantize(weight, mode=mode)
            got = mx.dequantize(packed, scales, mode=mode).astype(mx.float32)
            got = np.array(got, np.float64)
            groups = got.reshape(16, -1, size)
            codes = np.array(scales).astype(np.float64)
            if mode == "nvfp4":  # E4M3
                bits = np.array(scales).astype(np.int64)
                low, high = bits & 7, bits >> 3 & 15
                codes = np.where(high > 0, (8 + low) * 2.0**high / 2**10, low / 2**9)
            else:  # E8M0
                codes = 2.0 ** (codes - 127)
            units = np.abs(groups / codes[..., None])
            if mode.endswith("4"):
                self.assertLessEqual({*units.ravel()}, {*FLOATS})
            else:
                self.assertLessEqual(units.max(), 448)
                fraction = np.frexp(units)[0] * 16  # four bits are significant
                self.assertTrue((fraction == np.round(fraction)).all())
            self.assertLess(np.abs(got - np.array(weight)).max(), 0.6)

    def test_the_engine_gives_the_plain_steps_logits(self):
        for bits, size, mode, _ in CASES:
            config = DecoderConfig(10, 32, 3, 2, 64)
            mx.random.seed(0)
            decoder, (_, text, tokens) = Decoder(config, 12), random_decoder()
            quantize.quantize(decoder, bits, size, mode)
            steps = [make(decoder, text, 2, 9) for make in (PlainStep, engine.Engine)]
            for step in steps:
                step.rewind()
            for i in range(4):
                plain, fast = (step(tokens[:1, i : i + 1]) for step in steps)
                self.assertClose(fast, plain, 1e-5)

    def test_adapters_beside_each_mode(self):
        """They learn, and are added to what the layer gives."""
        for bits, size, mode, _ in CASES:
            config = DecoderConfig(10, 32, 1, 2, 64)
            decoder, x = Decoder(config, 12), mx.random.normal((1, 3, 32))
            quantize.quantize(decoder, bits, size, mode)
            layer = decoder.layers[0].linear1
            lora.add_adapters(decoder, 2, 0.5)
            adapted = decoder.layers[0].linear1
            adapted.b = mx.ones(adapted.b.shape)
            wanted = layer(x) + 0.5 * (x @ adapted.a) @ adapted.b
            self.assertClose(adapted(x), wanted, 1e-5)
            _, text, tokens = random_decoder()

            def loss(decoder):
                logits = decoder(tokens, decoder.text_kv(text), [None])
                return (logits**2).mean()

            decoder.freeze()
            for _, _, module in lora.find(decoder, lora.LoRALinear):
                module.unfreeze(keys=["a", "b"], recurse=False)
            _, gradients = nn.value_and_grad(decoder, loss)(decoder)
            found = dict(tree_flatten(gradients))
            self.assertEqual(len(found), 14, mode)
            for name, gradient in found.items():
                if name.endswith(".b"):
                    self.assertGreater(mx.abs(gradient).max().item(), 0, name)

    def test_gradients_of_each_mode(self):
        """Are those through the matrix that the few bits stand for: what an adapter
        below such a layer learns from."""
        for bits, size, mode, _ in CASES:
            mx.random.seed(0)
            settings = dict(group_size=size, bits=bits, mode=mode)
            layer = nn.Linear(64, 48).to_quantized(**settings)
            stored = layer.weight, layer.scales, layer.get("biases")
            weight = mx.dequantize(*stored, **settings).astype(mx.float32)
            x, way = mx.random.normal((2, 5, 64)), mx.random.normal((2, 5, 48))
            found = mx.grad(lambda x: (layer(x) * way).sum())(x)
            self.assertClose(found, way @ weight, 1e-4)
            self.assertGreater(mx.abs(found).mean().item(), 0.1)


class TestFolders(Test):
    def converted(self, **asked) -> Path:
        folder = self.folder / "q"
        shutil.rmtree(folder, ignore_errors=True)
        convert.convert(SOURCE, folder, mx.float32, **asked)
        return folder

    def test_an_older_folder_has_no_mode(self):
        folder = self.converted(q_bits=8, q_group_size=32)
        options = dict(duration=0.2, temp=0)
        wanted = MusicGen.from_pretrained(folder).generate_codes("a", **options)
        path = folder / "config.json"
        config = json.loads(path.read_text())
        del config["quantization"]["mode"]
        path.write_text(json.dumps(config))
        for asked in ({}, {"q_bits": 8}, {"q_bits": 8, "q_mode": "affine"}):
            model = MusicGen.from_pretrained(folder, **asked)
            self.assertSame(model.generate_codes("a", **options), wanted)
        for asked in ({"q_mode": "mxfp8"}, {"q_bits": 4}, {"q_mode": "affine"}):
            with self.assertRaisesRegex(ValueError, "has 8 bits a weight already"):
                MusicGen.from_pretrained(folder, **asked)

    def test_another_mode_is_refused(self):
        folder = self.converted(q_mode="mxfp4")
        for asked in (
            {"q_mode": "mxfp4"},
            {"q_mode": "mxfp4", "q_bits": 4, "q_group_size": 32},
        ):
            MusicGen.from_pretrained(folder, **asked)
        pattern = "4 bits a weight already, of the q_mode mxfp4 in groups of 32: leave"
        for asked in ({"q_mode": "nvfp4"}, {"q_bits": 4}, {"q_mode": "affine"}):
            with self.assertRaisesRegex(ValueError, pattern):
                MusicGen.from_pretrained(folder, **asked)
        folder = self.converted(q_bits=8, q_group_size=32)
        with self.assertRaisesRegex(ValueError, "in groups of 32: leave out"):
            MusicGen.from_pretrained(folder, q_bits=8, q_group_size=64)

    def test_arrays_of_another_kind(self):
        """MLX reads bytes as numbers where scales are to be floats, without a word."""
        for asked, kind, words in (
            (dict(q_bits=4, q_group_size=32), mx.uint8, "floats in the q_mode affine"),
            (dict(q_mode="mxfp4"), mx.float16, "uint8 in the q_mode mxfp4"),
        ):
            folder = self.converted(**asked)
            path, name = folder / "model.safetensors", "decoder.layers.0.linear1.scales"
            arrays = mx.load(str(path))
            mx.eval(arrays)
            for part, changed in (
                (name, arrays[name].astype(kind)),
                (name.replace("scales", "weight"), None),
            ):
                if changed is None:
                    changed = arrays[part].astype(mx.float32)
                    words = "uint32 in the q_mode"
                mx.save_safetensors(str(path), arrays | {part: changed})
                with self.assertRaises(ValueError) as raised:
                    MusicGen.from_pretrained(folder)
                self.assertIn(f"{part} must hold {words}", str(raised.exception))
                self.assertLess(len(str(raised.exception)), 400)

    def test_a_config_of_another_mode_than_the_file(self):
        folder = self.converted(q_mode="mxfp4")
        path = folder / "config.json"
        config = json.loads(path.read_text())
        for other in (
            None,
            quantize.complete(4, 32),
            quantize.complete(mode="nvfp4"),
            quantize.complete(mode="mxfp8"),
        ):
            path.write_text(json.dumps(config | {"quantization": other}))
            with self.assertRaisesRegex(ValueError, "q does not load|config.json does"):
                MusicGen.from_pretrained(folder)

    def test_what_mlx_cannot_do(self):
        for given, pattern in (
            (
                dict(bits=7),
                "q_bits must be one of 2, 3, 4, 5, 6, 8 in the q_mode affine",
            ),
            (dict(bits=8, mode="mxfp4"), "q_bits must be 4 in the q_mode mxfp4, got 8"),
            (dict(bits=4, mode="mxfp8"), "q_bits must be 8 in the q_mode mxfp8, got 4"),
            (dict(mode="nvfp4", group_size=32), "must be 16 in the q_mode nvfp4, got"),
            (dict(bits=4, group_size=16), "q_group_size must be one of 32, 64, 128 in"),
            (
                dict(mode="fp4"),
                "q_mode must be one of affine, mxfp4, nvfp4, mxfp8, got",
            ),
            (dict(mode=["mxfp4"]), "q_mode must be one of affine"),
            (dict(bits=True), "q_bits must be one of"),
            (dict(group_size=32), "q_group_size must come with q_bits or q_mode"),
        ):
            asked, read = names(given), patch("musicgen.read", side_effect=KeyError)
            with read, self.assertRaisesRegex(ValueError, pattern) as raised:
                MusicGen.from_pretrained(SOURCE, **asked)
            self.assertNotIn("\n", str(raised.exception))
            with self.assertRaisesRegex(ValueError, pattern):
                convert.convert(SOURCE, self.folder / "x", mx.float32, **asked)
        pattern = (
            "a multiple of 32; got 64. What does: 32 of affine, 32 of mxfp4, 16 of"
        )
        with self.assertRaisesRegex(ValueError, pattern):
            MusicGen.from_pretrained(SOURCE, q_bits=4)
        decoder, *_ = random_decoder()  # 4 is the common width
        wanted = "What does: none of any mode, as none divides 4"
        with self.assertRaisesRegex(ValueError, wanted):
            quantize.quantize(decoder, mode="nvfp4")

    def test_a_quantized_decoder(self):
        """Nothing would be done, in another mode neither."""
        decoder = exact("mono-transformers").decoder
        quantize.quantize(decoder, 8, 32)
        before = dict(tree_flatten(decoder.parameters()))
        for asked in (dict(bits=8, group_size=32), dict(mode="mxfp4")):
            with self.assertRaisesRegex(ValueError, "it is quantized already"):
                quantize.quantize(decoder, **asked)
        for name, value in tree_flatten(decoder.parameters()):
            self.assertSame(value, before[name])


class TestScripts(ScriptTest):
    def test_again_makes_the_same(self):
        folder, out = self.folder / "q3", self.folder / "x.wav"
        convert.convert(SOURCE, folder, mx.float32, q_bits=3, q_group_size=32)
        common = ["a", "-d", "0.3", "-s", "3", "--temp", "0", "--dtype", "float32"]
        for flags, wanted in (
            (["-m", SOURCE, "--q-mode", "nvfp4"], (4, 16, "nvfp4")),
            (
                ["-m", SOURCE, "--q-bits", "5", "--q-group-size", "32"],
                (5, 32, "affine"),
            ),
            (["-m", folder], (3, 32, "affine")),  # whose bits no flag gives
        ):
            status, _, err = self.run_script(*common, *flags, "-o", out, "--force")
            self.assertEqual(status, 0, err)
            record = settings.read_settings(out)
            told = ("q_bits", "q_group_size", "q_mode")
            self.assertEqual(tuple(record[name] for name in told), wanted)
            other = self.folder / "y.wav"
            again = ["--again", out, "-o", other, "--force"]
            self.assertEqual(self.run_script(*again)[0], 0)
            self.assertEqual(out.read_bytes(), other.read_bytes())
        self.run_script(
            *common, "-m", SOURCE, "--q-mode", "mxfp8", "-o", out, "--force"
        )
        status, _, err = self.run_script(*again, "--q-mode", "mxfp4")
        self.assertEqual(status, 0, err)  # the recalled 8 bits do not count
        self.assertEqual(settings.read_settings(other)["q_bits"], 4)

    def test_a_file_of_prompts_heeds_the_mode(self):
        prompts, out = self.folder / "p.jsonl", self.folder / "x.wav"
        prompts.write_text('{"prompt": "a", "output": "%s"}\n' % out)
        flags = ["--prompts", prompts, "-m", SOURCE, "-d", "0.2"]

        def made(*more: str) -> str:
            status, told, err = self.run_script(*flags, *more)
            self.assertEqual(status, 0, err)
            return told + err

        made("--q-mode", "mxfp8")
        self.assertIn("skipped", made("--q-mode", "mxfp8"))
        told = made("--q-bits", "8", "--q-group-size", "32")
        self.assertIn("q_mode was 'mxfp8' and is 'affine'", told)
        self.assertIn("skipped", made("--q-bits", "8"))
        self.assertIn("q_bits was 8 and is 4", made("--q-mode", "mxfp4"))

    def test_a_file_of_an_older_version_was_affine(self):
        (job,) = plan(["a"], dict(seed=3, output="x.wav"))
        record = job.record() | {"q_bits": 8}
        asked = {"q_bits": 8, "q_mode": "affine"}
        self.assertEqual(lines.differences(job, asked, {}, record), [])
        other = lines.differences(job, asked | {"q_mode": "mxfp8"}, {}, record)
        self.assertEqual(other, ["q_mode was 'affine' and is 'mxfp8'"])
        other = lines.differences(job, asked, {}, job.record())
        self.assertEqual([x.split()[0] for x in other], ["q_bits", "q_mode"])

    def test_what_does_not_go_together(self):
        for flags, pattern in (
            (["--q-mode", "mxfp4", "--q-bits", "8"], "must be 4 in the q_mode mxfp4"),
            (["--q-mode", "nvfp4", "--q-group-size", "32"], "q_group_size must be 16"),
            (["--q-group-size", "32"], "must come with q_bits or q_mode"),
            (["--q-mode", "fp4"], "invalid choice: 'fp4'"),
            (["--q-bits", "7"], "invalid choice: 7"),
        ):
            status, _, err = self.run_script("a", "-m", "tiny", *flags)
            self.assertEqual(status, 2)
            self.assertRegex(err, f"^generate.py: error: .*{pattern}.*\n$")
