"""The codec's published files, whole and damaged."""

import shutil
from unittest.mock import patch

import mlx.core as mx
from common import REFERENCE, Test
from mlx.utils import tree_flatten

import encodec_files
from encodec import Encodec
from encodec_files import sanitize


class TestEncodecFiles(Test):
    def test_sanitize_twice(self):
        for name in ("encodec_24khz", "encodec_32khz", "encodec_48khz"):
            weights = mx.load(str(REFERENCE / name / "model.safetensors"))
            once = sanitize(weights)
            twice = sanitize(once)
            self.assertEqual(once.keys(), twice.keys())
            self.assertTrue(all(mx.array_equal(once[k], twice[k]) for k in once))

    def test_float32_always(self):
        folder = self.copy("encodec_32khz")
        path = str(folder / "model.safetensors")
        weights = {k: w.astype(mx.float16) for k, w in mx.load(path).items()}
        mx.eval(weights)
        mx.save_safetensors(path, weights)
        model = Encodec.from_pretrained(folder)
        for spelling in (
            model,
            sanitize(dict(tree_flatten(model.parameters()))),
        ):
            tree = spelling if isinstance(spelling, dict) else spelling.parameters()
            self.assertEqual({w.dtype for _, w in tree_flatten(tree)}, {mx.float32})

    def test_strict_where_tensors_are_merged(self):
        gain = "decoder.layers.0.conv.parametrizations.weight.original0"
        bias = "encoder.layers.13.lstm.bias_hh_l0"
        for change, pattern in (
            (lambda w: w.pop(gain), f"{gain} is missing"),
            (
                lambda w: w.update({gain: w[gain].reshape(1, -1, 1)}),
                f"{gain} must have the shape",
            ),
            (lambda w: w.pop(bias), f"{bias} is missing"),
            (lambda w: w.update({bias: mx.zeros(1)}), "lstm.bias_hh_l0 must have"),
            (
                lambda w: w.update({"encoder.layers.13.lstm.foo_l0": mx.zeros(1)}),
                "foo_l0",
            ),
            (
                lambda w: w.update({bias: w[bias].astype(mx.int32)}),
                "bias_hh_l0 must hold floats",
            ),
        ):
            with self.subTest(pattern):
                folder = self.copy("encodec_32khz")
                path = str(folder / "model.safetensors")
                weights = mx.load(path)
                mx.eval(weights)
                change(weights)
                mx.save_safetensors(path, weights)
                with self.assertRaisesRegex(ValueError, pattern):
                    Encodec.from_pretrained(folder)
                shutil.rmtree(folder)

    def test_missing_and_damaged_files(self):
        folder = self.copy("encodec_32khz")
        content = (folder / "model.safetensors").read_bytes()
        for damaged in (content[:3], content[:5000], b"junk" * 100):
            (folder / "model.safetensors").write_bytes(damaged)
            with self.assertRaisesRegex(ValueError, f"Codec {folder} does not load"):
                Encodec.from_pretrained(folder)
        for name in encodec_files.FILES:
            kept = (folder / name).rename(self.folder / name)
            with self.assertRaisesRegex(FileNotFoundError, f"but {name} is missing"):
                Encodec.from_pretrained(folder)
            kept.rename(folder / name)

    def test_short_names(self):
        """And what is said where the Hub gives nothing."""
        fetched = []

        def download(repo: str, name: str, **options) -> str:
            fetched.append((repo, name))
            return str(REFERENCE / "encodec_24khz" / name)

        with patch("huggingface_hub.hf_hub_download", download):
            self.assertEqual(Encodec.from_pretrained("24khz").sampling_rate, 24000)
        repo = "facebook/encodec_24khz"
        self.assertEqual(fetched, [(repo, name) for name in encodec_files.FILES])
        with patch("huggingface_hub.hf_hub_download", side_effect=OSError("offline")):
            with self.assertRaisesRegex(OSError, "codec a/b, .* offline, .* 24khz,"):
                Encodec.from_pretrained("a/b")
