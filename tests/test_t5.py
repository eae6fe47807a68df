"""The tokenizer and T5. The published ids want the real model of google-t5/t5-base,
looked for in ../shared/t5 and in the Hub's cache."""

import json
import math
import shutil
import subprocess
import sys
import unittest
from pathlib import Path

import mlx.core as mx
from common import REFERENCE, ROOT, Test, expected
from huggingface_hub import try_to_load_from_cache
from mlx.utils import tree_flatten

import t5
import t5_files
from published import T5_REPO
from t5 import T5, Tokenizer


class TestTokenizer(Test):
    def test_published_ids(self):
        cases = ROOT.parent / "shared" / "t5" / "cases.json"
        if not cases.is_file():
            self.skipTest(f"{cases} is not there")
        tokenizer = Tokenizer(real_spiece(self))
        for case in json.loads(cases.read_text())["cases"]:
            self.assertEqual(tokenizer.encode(case["text"]), case["ids"], case)

    def test_known_prompt(self):
        ids = Tokenizer(real_spiece(self)).encode(
            "90s rock song with loud guitars and heavy drums"
        )
        self.assertEqual(
            ids, [2777, 7, 2480, 2324, 28, 8002, 5507, 7, 11, 2437, 5253, 7, 1]
        )

    def test_special_tokens(self):
        tokenizer = Tokenizer(REFERENCE / "mono-transformers" / "spiece.model")
        drums = tokenizer.encode("drums")[:-1]
        size = tokenizer._pieces.vocab_size()
        self.assertEqual(tokenizer.encode(""), [1])
        self.assertEqual(tokenizer.encode("drums"), drums + [1])
        self.assertEqual(tokenizer.encode("\udcff"), tokenizer.encode("?"))
        ids = tokenizer.encode("drums<extra_id_0>drums</s> <pad>\x85<unk><extra_id_99>")
        self.assertEqual(ids, [*drums, size + 99, *drums, 1, 0, 2, size, 1])

    def test_damaged_model(self):
        path = self.folder / "spiece.model"
        for content in (b"", b"not a model"):
            path.write_bytes(content)
            with self.assertRaisesRegex(ValueError, "spiece.model"):
                Tokenizer(path)


def real_spiece(test: unittest.TestCase) -> Path:
    shared = ROOT.parent / "shared" / "t5" / "spiece.model"
    cached = try_to_load_from_cache(T5_REPO, "spiece.model")
    if shared.is_file():
        return shared
    if isinstance(cached, str):
        return Path(cached)
    test.skipTest(f"no spiece.model in {shared.parent} or the Hub's cache")


class TestT5(Test):
    def test_states(self):
        for name in (
            "t5-gated",
            "mono-audiocraft/t5-base",
            "stereo-audiocraft/t5-base",
        ):
            model, _ = T5.from_pretrained(REFERENCE / name)
            want = expected(name)
            mask = want["attention_mask"] == 1
            states = model(want["input_ids"], mask)
            tokens = mask[..., None]  # padding's own states mean nothing
            self.assertClose(states * tokens, want["last_hidden_state"] * tokens)

    def test_batch_equals_alone(self):
        model, tokenizer = T5.from_pretrained(REFERENCE / "t5-gated")
        ids = [tokenizer.encode(text) for text in ("slow", "a slow piano and drums")]
        states, mask = model.encode(ids)
        self.assertSame(mask.sum(axis=1), [len(row) for row in ids])
        for row, own in zip(states, ids):
            self.assertClose(row[: len(own)], model.encode([own])[0][0])

    def test_activations(self):
        # Hugging Face's names: gated-gelu is the tanh form, silu is x * sigmoid(x).
        x = mx.linspace(-3, 3, 8)[None]
        tanh = 0.5 * x * (1 + mx.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))
        for name, activated in (
            ("relu", mx.maximum(x, 0)),
            ("gated-gelu", tanh),
            ("gated-silu", x * mx.sigmoid(x)),
        ):
            config = t5.T5Config(d_model=8, d_ff=8, feed_forward_proj=name)
            layer = t5.FeedForward(config)
            for projection in tree_flatten(layer.parameters()):
                layer.load_weights([(projection[0], mx.eye(8))], strict=False)
            gate = 1 if name == "relu" else x
            self.assertClose(layer(x), activated * gate, 1e-5)

    def test_layer_norm_epsilon(self):
        for epsilon in (1e-6, 0.5):
            config = t5.T5Config(30, 8, 4, 8, 1, 2, layer_norm_epsilon=epsilon)
            block = T5(config).encoder.block[0].layer
            norms = [layer.layer_norm for layer in block]
            norms.append(T5(config).encoder.final_layer_norm)
            x = 0.1 * mx.ones((1, 8))
            for norm in norms:
                self.assertClose(norm(x), x / (0.01 + epsilon) ** 0.5, 1e-5)

    def test_bad_files(self):
        for change, pattern in (
            ({"num_heads": 0}, "num_heads must be from 1"),
            ({"num_heads": "4"}, "num_heads must be"),
            ({"vocab_size": 10**12}, "vocab_size must be"),
            ({"n_positions": 0}, "n_positions must be"),
            ({"layer_norm_epsilon": "x"}, "layer_norm_epsilon must be"),
            ({"relative_attention_num_buckets": 0}, "num_buckets must be"),
            ({"relative_attention_max_distance": 2}, "max_distance must be more"),
            ({"feed_forward_proj": "swish"}, "feed_forward_proj must be one of"),
            ({"feed_forward_proj": []}, "does not load"),
        ):
            with self.subTest(change):
                folder = self.copy("t5-gated")
                path = folder / "config.json"
                path.write_text(json.dumps(json.loads(path.read_text()) | change))
                with self.assertRaisesRegex(ValueError, f"T5 in {folder}.*{pattern}"):
                    T5.from_pretrained(folder)
                shutil.rmtree(folder)
        folder = self.copy("t5-gated")
        for text in ("[]", "{", "[" * 100_000):
            (folder / "config.json").write_text(text)
            with self.assertRaisesRegex(ValueError, "config.json (must|is no JSON)"):
                T5.from_pretrained(folder)

    def test_integers_are_no_weights(self):
        with self.assertRaisesRegex(ValueError, "shared.weight must hold floats"):
            t5_files.sanitize({"shared.weight": mx.zeros((2, 2), mx.int32)})

    def test_missing_file(self):
        with self.assertRaisesRegex(OSError, "config.json is missing"):
            T5.from_pretrained(self.folder)

    def test_float32_always(self):
        weights = t5_files.sanitize({"shared.weight": mx.zeros((2, 2), mx.float16)})
        self.assertEqual(weights["shared.weight"].dtype, mx.float32)

    def test_command_line(self):
        def run(*flags):
            command = [sys.executable, "t5.py", *flags]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            return done.returncode, done.stdout, done.stderr

        status, out, err = run("a piano", "--model", str(REFERENCE / "t5-gated"))
        self.assertEqual((status, err), (0, ""))
        self.assertRegex(out, r"^'a piano': (\d+) tokens, states \(\1, \d+\)\n  ids \[")
        status, _, err = run("--model", str(self.folder))
        self.assertEqual(status, 1)
        self.assertRegex(err, "^t5.py: error: .*config.json.*\n$")
