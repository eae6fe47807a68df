"""What is said of a tensor that is missing, left over or misshapen: its name in its
file, the file, and all in a line."""

import re
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import mlx.core as mx
from common import REFERENCE, Test, slow

import audiocraft
import strict
from encodec import Encodec
from musicgen import MusicGen
from t5 import T5

UNUSED = re.compile(
    r"embed_positions|codebook\.(inited|cluster_size|embed_avg)|spec\.window"
    r"|^decoder\.(block|final_layer_norm)\."  # of T5
)
LONGEST = 400  # characters of a message


@contextmanager
def changed(path: Path, change):
    """Has the tensors of a file come changed."""
    load, load_torch = mx.load, audiocraft.load_torch

    def give(other):
        weights = load(other)
        if Path(other) == path:
            change(weights)
        return weights

    def give_package(other, *args):
        package = load_torch(other, *args)
        if other == path:
            change(package["best_state"])
        return package

    with patch.object(mx, "load", give):
        with patch.object(audiocraft, "load_torch", give_package):
            yield


class TestEveryTensor(Test):
    def message(self, load, source: Path, file: Path, change) -> str:
        with changed(file, change), self.assertRaises(ValueError) as caught:
            load(source)
        message = str(caught.exception)
        self.assertLessEqual(len(message), LONGEST)
        self.assertNotIn("\n", message)
        place = file.name if file.suffix == ".bin" else file.parent.name
        self.assertIn(place, message)
        return message

    def check(self, load, source: Path, file: Path, least: int):
        """Each tensor missing, and some misshapen, or beside another that is none."""
        if file.suffix == ".bin":
            names = audiocraft.load_package(file)["best_state"]
        else:
            names = mx.load(str(file))
        names = [name for name in names if not UNUSED.search(name)]
        self.assertGreaterEqual(len(names), least)
        for i, name in enumerate(names):
            with self.subTest(name):
                message = self.message(load, source, file, lambda w: w.pop(name))
                told = rf"{re.escape(name)}\b.* is missing|lacks '{re.escape(name)}'"
                self.assertRegex(message, told)
            if i % 7 == 0:
                stray = f"{name}x"
                add = lambda w: w.update({stray: mx.zeros(7)})  # noqa: E731
                with self.subTest(stray):
                    message = self.message(load, source, file, add)
                    self.assertRegex(message, rf"{re.escape(stray)}\b.* has no place")

    def misshapen(self, load, source: Path, file: Path, *names: str):
        for name in names:
            with self.subTest(name):
                change = lambda w: w.update({name: mx.zeros((7, 7))})  # noqa: E731
                message = self.message(load, source, file, change)
                self.assertRegex(message, rf"{re.escape(name)}.* must have the shape")

    @slow(6)
    def test_transformers(self):
        folder = REFERENCE / "mono-transformers"
        form = (MusicGen.from_pretrained, folder, folder / "model.safetensors")
        self.check(*form, 140)
        layer = "decoder.model.decoder.layers.1"
        self.misshapen(
            *form,
            "decoder.lm_heads.3.weight",
            "enc_to_dec_proj.weight",
            f"{layer}.self_attn.v_proj.weight",
            f"{layer}.encoder_attn.q_proj.weight",
            f"{layer}.fc1.weight",
            "text_encoder.shared.weight",
            "audio_encoder.quantizer.layers.2.codebook.embed",
        )

    @slow(3)
    def test_audiocraft(self):
        for name in ("mono-audiocraft", "melody-audiocraft"):
            folder = REFERENCE / name
            form = (MusicGen.from_pretrained, folder, folder / "state_dict.bin")
            self.check(*form, 25)
            self.misshapen(*form, "linears.3.weight", "transformer.layers.0.norm1.bias")

    @slow(3)
    def test_t5_and_codec_beside_audiocraft(self):
        folder = REFERENCE / "stereo-audiocraft"
        for part, least in (("t5-base", 15), ("encodec_32khz", 50)):
            file = folder / part / "model.safetensors"
            self.check(MusicGen.from_pretrained, folder, file, least)

    @slow(3)
    def test_codecs(self):
        folder = REFERENCE / "mono-audiocraft"
        file = folder / "compression_state_dict.bin"
        self.check(Encodec.from_pretrained, folder, file, 80)
        for name in ("encodec_32khz", "encodec_48khz"):
            folder = REFERENCE / name
            self.check(
                Encodec.from_pretrained, folder, folder / "model.safetensors", 50
            )

    def test_t5(self):
        folder = REFERENCE / "t5-gated"
        self.check(T5.from_pretrained, folder, folder / "model.safetensors", 15)


class TestStrict(Test):
    def test_messages(self):
        names = ",\n".join(f"layers.{i}.weight" for i in range(300))
        for text, told in (
            (f"Missing 300 parameters: \n{names}.", "is missing, and so are 299 more"),
            (
                f"Received 300 parameters not in model: \n{names}.",
                "has no place in this model, nor have 299 more",
            ),
        ):
            message = strict.misfit(ValueError(text), lambda name: f"<{name}>")
            self.assertEqual(message, f"<layers.0.weight> {told}")
        text = "Expected shape (2, 3) but received shape (4,) for parameter a.b"
        told = "a.b must have the shape (2, 3), as laid out here, got (4,)"
        self.assertEqual(strict.misfit(ValueError(text)), told)
        error = strict.Misfit("a.b", "is missing")
        self.assertEqual((strict.misfit(error), str(error)), ("a.b is missing",) * 2)
        for error in (ValueError("x\n" * 900), strict.Misfit("x" * 900, "y" * 900)):
            message = strict.misfit(error)
            self.assertLessEqual(len(message), 310)
            self.assertNotIn("\n", message)
