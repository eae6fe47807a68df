"""fidelity.py measures what it says."""

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from common import REFERENCE, Test, exact
from mlx.utils import tree_unflatten

import fidelity
from musicgen import MusicGen, Take, encode_text


class TestFidelity(Test):
    path = str(REFERENCE / "mono-transformers")

    def table(self, *flags: str) -> dict[str, list[str]]:
        """Cells by the names of the rows."""
        argv = ["fidelity.py", "--duration", "0.3", *flags]
        with patch.object(sys, "argv", argv):
            with redirect_stdout(io.StringIO()) as out:
                fidelity.main()
        head, rule, *rows = out.getvalue().splitlines()
        self.assertEqual(rule, "|---|" + "---|" * len(fidelity.COLUMNS))
        cells = [row.strip("| ").split(" | ") for row in (head, *rows)]
        self.assertEqual([len(row) for row in cells], [6] * len(cells))
        return {name: row for name, *row in cells}

    def test_each_case(self):
        table = self.table("--model", "tiny")
        head, _, *rows = table.items()
        self.assertEqual(head, ("60 choices", [*fidelity.COLUMNS]))
        names = [f"{c['mode']}, {c['bits']} bits" for c in fidelity.CASES]
        self.assertEqual([name for name, _ in rows], names)
        self.assertEqual(table["float16"][0], "16")
        expected = "8.5 6.5 5.5 4.5 3.5 2.5 8.25 4.25 4.5".split()  # in float16
        self.assertEqual([cells[0] for _, cells in rows], expected)
        sizes = [float(cells[1]) for _, cells in rows]
        affine = [float(cells[2].rstrip(" %")) for _, cells in rows[:6]]
        self.assertEqual(sizes[:6], sorted(sizes[:6], reverse=True))
        self.assertEqual(affine, sorted(affine))
        self.assertLess(10 * affine[0], affine[-1])

    def test_one_case(self):
        table = self.table("--model", self.path, "--q-bits", "4", "--q-group-size=32")
        self.assertEqual([*table][1:], ["float16", "affine, 4 bits"])
        self.assertEqual(table["affine, 4 bits"][0], "5")

    def test_what_a_decoder_says_of_its_own_take(self):
        """The likeliest codes of a greedy take are its codes, step by step."""
        model = exact("mono-transformers")
        prompt, options = "drums", dict(duration=0.3, temp=0)
        codes = model.generate_codes(prompt, **options)
        with patch.object(model, "generate_codes", return_value=codes):
            tokens = fidelity.take_tokens(model, prompt, 0.3, seed=0)
        text = encode_text(model, [prompt])
        logits = fidelity.next_logits(model.decoder, text, tokens)
        steps = np.array(logits.argmax(axis=1))
        delayed = [
            codes[0, s - k, k].item()
            for s in range(codes.shape[1] + 3)
            for k in range(4)
            if 0 <= s - k < codes.shape[1]
        ]
        self.assertEqual(steps.tolist(), delayed)

    def test_difference(self):
        logits = mx.array([[1.0, -1.0, 0.0], [0.0, 3.0, -3.0]])  # spread: sqrt(20 / 6)
        same = fidelity.compare(logits + mx.array([[5.0], [-7.0]]), logits)
        self.assertEqual(same, (0, 0, 1))
        other = logits + mx.array([[0.0, 3.0, -3.0], [0.0, 0.0, 0.0]])
        found = fidelity.compare(other, logits)
        spread = (20 / 6) ** 0.5
        self.assertAlmostEqual(found.mean, 1 / spread, 5)
        self.assertAlmostEqual(found.greatest, 3 / spread, 5)
        self.assertEqual(found.same, 0.5)

    def test_the_product_in_few_bits_is_that_of_what_they_stand_for(self):
        """Of every mode of the table, on `tiny`: the same choices, and logits as near
        as GUIDE.md says."""
        model = MusicGen.from_pretrained("tiny", mx.float32)
        tokens = fidelity.take_tokens(model, "fast happy saw melody", 1.0, seed=0)
        text = encode_text(model, ["fast happy saw melody"])
        for settings in fidelity.CASES:
            quantized = fidelity.variant(model, mx.float32, settings)
            plain, count = fidelity.variant(model, mx.float32), 0
            for name, layer in quantized.named_modules():
                if isinstance(layer, nn.QuantizedLinear):
                    stored = layer.weight, layer.scales, layer.get("biases")
                    weight = mx.dequantize(*stored, **settings).astype(mx.float32)
                    plain.update(tree_unflatten([(f"{name}.weight", weight)]))
                    count += 1
            self.assertEqual(count, 24)
            pair = [
                fidelity.next_logits(decoder, text, tokens)
                for decoder in (quantized, plain)
            ]
            found = fidelity.compare(*pair)
            with self.subTest(settings):
                self.assertEqual(found.same, 1)
                self.assertLess(found.mean, 1e-5)
                self.assertLess(found.greatest, 1e-4)
                if settings["mode"] == "affine":
                    self.assertLess(found.greatest, 1e-5)

    def test_the_model_stays_as_it_is(self):
        model = exact("mono-transformers")
        before = model.decoder.layers[0].linear1.weight
        decoder = fidelity.variant(model, mx.float16, {"mode": "mxfp4"})
        self.assertEqual(decoder.layers[0].linear1.mode, "mxfp4")
        self.assertIs(model.decoder.layers[0].linear1.weight, before)
        self.assertEqual(before.dtype, mx.float32)

    def test_what_is_refused(self):
        for flags, pattern in (
            (["--model", str(REFERENCE / "melody-audiocraft")], "a text alone"),
            (["--model", self.path, "--q-group-size", "32"], "must come with q_bits"),
            (["--model", self.path, "--q-bits", "4"], "What does: 32 of affine"),
            (["--model", "tiny", "--q-bits", "8", "--q-mode", "mxfp4"], "must be 4"),
            (["--model", "tiny", "--duration", "9"], "--duration must be from 0.1"),
        ):
            with self.assertRaises(SystemExit) as stop:
                with redirect_stderr(io.StringIO()) as err:
                    self.table(*flags)
            told = err.getvalue() or str(stop.exception.code)
            self.assertRegex(told, f"fidelity.py: error: .*{pattern}")
        quantized = exact("mono-transformers")
        quantized.config.quantization = {"bits": 4, "group_size": 32}
        load = patch.object(
            fidelity.MusicGen, "from_pretrained", return_value=quantized
        )
        with load, patch.object(Take, "__iter__", side_effect=AssertionError):
            with self.assertRaisesRegex(
                SystemExit, "must be a model that is not quant"
            ):
                self.table("--model", "x")
