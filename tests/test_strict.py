"""What is said of a tensor that is missing, left over or misshapen: its name in its
file, the file, and all in a line."""

import re
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import mlx.core as mx
from common import REFERENCE, Test, slow

import audiocraft
import mert
import strict
import torch_file
from demucs import HTDemucs
from encodec import Encodec
from mert import MERT
from musicgen import MusicGen
from t5 import T5

UNUSED = re.compile(
    r"embed_positions|codebook\.(inited|cluster_size|embed_avg)|spec\.window"
    r"|^decoder\.(block|final_layer_norm)\."  # of T5
    r"|num_batches_tracked|masked_spec_embed"
)
LONGEST = 400  # characters of a message
ODD = ((), (7,), (7, 7), (7, 7, 7), (7, 7, 7, 7), (1, 1, 1, 1, 1))  # shapes


@contextmanager
def changed(path: Path, change):
    """Has the tensors of a file come changed."""
    load, load_torch, load_state = mx.load, audiocraft.load_torch, torch_file.load_state

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

    def give_state(other):
        weights = load_state(other)
        if other == path:
            change(weights)
        return weights

    with patch.object(mx, "load", give):
        with patch.object(audiocraft, "load_torch", give_package):
            with patch.object(torch_file, "load_state", give_state):
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

    def check(self, load, source: Path, file: Path, least: int, but: str = "$^"):
        """Each tensor missing, `but` for some, and beside another that is none."""
        if file.name == "pytorch_model.bin":
            names = torch_file.load_state(file)
        elif file.suffix == ".bin":
            names = audiocraft.load_package(file)["best_state"]
        else:
            names = mx.load(str(file))
        names = [n for n in names if not UNUSED.search(n) and not re.search(but, n)]
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

    def misshapen(self, load, source: Path, file: Path, *names: str, shapes=((7, 7),)):
        for name in names:
            for shape in shapes:
                with self.subTest(name, shape=shape):
                    change = lambda w: w.update({name: mx.zeros(shape)})  # noqa: E731
                    message = self.message(load, source, file, change)
                    told = rf"{re.escape(name)}.* must have (the shape|2 dimensions)"
                    self.assertRegex(message, told)

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

    @slow(6)
    def test_demucs(self):
        folder = REFERENCE / "htdemucs"
        form = (HTDemucs.from_pretrained, folder, folder / "model.safetensors")
        self.check(*form, 289)
        layers = "crosstransformer.layers"
        self.misshapen(
            *form,
            "freq_emb.embedding.weight",
            f"{layers}.0.self_attn.in_proj_weight",
            f"{layers}_t.1.cross_attn.out_proj.weight",
            f"{layers}.1.norm2.weight",
            f"{layers}.1.norm3.bias",
            f"{layers}_t.2.norm2.bias",
            "encoder.1.dconv.layers.1.3.weight",
            "tdecoder.0.conv_tr.weight",
            shapes=ODD,
        )

    def test_mert(self):
        folder = REFERENCE / "style-audiocraft" / "MERT-v1-95M"
        form = (MERT.from_pretrained, folder, folder / "pytorch_model.bin")
        self.check(*form, 48)
        conv, layer = "encoder.pos_conv_embed.conv", "encoder.layers.1"
        self.misshapen(
            *form,
            f"{conv}.weight_g",
            f"{conv}.weight_v",
            f"{conv}.bias",
            f"{layer}.attention.q_proj.weight",
            f"{layer}.feed_forward.output_dense.weight",
            f"{layer}.final_layer_norm.bias",
            "feature_extractor.conv_layers.0.layer_norm.weight",
            shapes=ODD,
        )

    def test_mert_since_torch_2_1(self):
        """Which calls the parts of a weight otherwise."""
        weights = torch_file.load_state(
            REFERENCE / "style-audiocraft" / "MERT-v1-95M" / "pytorch_model.bin"
        )
        for older, newer in mert.NEWER:
            (name,) = [name for name in weights if name.endswith(older)]
            weights[name.replace(older, newer)] = weights.pop(name)
        config = REFERENCE / "style-audiocraft" / "MERT-v1-95M" / "config.json"
        files = [config, Path("pytorch_model.bin")]
        for i in (0, 1):
            name = f"encoder.pos_conv_embed.conv.parametrizations.weight.original{i}"
            rest = {k: v for k, v in weights.items() if k != name}
            with patch.object(mert, "locate", return_value=files):
                with patch.object(torch_file, "load_state", return_value=rest):
                    with self.assertRaisesRegex(ValueError, f"{name} is missing"):
                        MERT.from_pretrained("")

    @slow(6)
    def test_styles(self):
        for name in ("style", "style-encodec"):
            folder = REFERENCE / f"{name}-audiocraft"
            form = (MusicGen.from_pretrained, folder, folder / "state_dict.bin")
            last = r"layers\.5\._codebook"  # its number is told
            of_style = r"condition_provider\.conditioners\.self_wav\."
            last += rf"|^(?!{of_style})|{of_style}embed\.2"
            self.check(*form, 20, last)
            prefix = audiocraft.SELF_WAV
            matrix = f"{prefix}transformer.layers.1.self_attn.in_proj_weight"
            add = lambda w: w.update({matrix: mx.zeros((7, 7))})  # noqa: E731
            told = rf"{re.escape(matrix)} must hold 3 matrices, got \(7, 7\)$"
            self.assertRegex(self.message(*form, add), told)
            self.misshapen(
                *form,
                f"{prefix}transformer.layers.1.self_attn.out_proj.weight",
                f"{prefix}batch_norm.running_mean",
                f"{prefix}rvq.vq.layers.0._codebook.embed",
                f"{prefix}rvq.vq.layers.3._codebook.embed",
                f"{prefix}transformer.layers.0.linear1.weight",
                shapes=ODD,
            )
            book = f"{prefix}rvq.vq.layers.5._codebook.embed"
            message = self.message(*form, lambda w: w.pop(book))
            self.assertIn("n_q_out must be 5, as in the weights, got 6", message)


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
