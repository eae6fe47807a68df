"""Every published model loads strictly at full size from its list of tensors."""

import json
import math
import shutil
import struct
import warnings
from pathlib import Path
from unittest.mock import Mock, patch

import manifests
import mlx.core as mx
from common import REFERENCE, ROOT, Test, exact
from mlx.utils import tree_flatten

import audiocraft
import decoder
import demucs
import encodec_files
import published
import t5
import t5_files
from checkpoints import read_config
from decoder import Decoder
from decoder_names import name_decoder
from encodec import Encodec, EncodecConfig
from mert import MERT, MERTConfig
from musicgen import MusicGen
from style import StyleConditioner, StyleConfig
from t5 import T5


class TestPublishedCheckpoints(Test):
    """Strict loads at full size, from lazy arrays that are never computed."""

    def arrays(self, name: str) -> dict[str, mx.array]:
        tensors = manifests.expand(manifests.read()["tensors"][name])
        return {
            name: mx.zeros(shape, getattr(mx, dtype))
            for name, (dtype, shape) in tensors.items()
        }

    def config(self, name: str) -> dict:
        return manifests.read()["configs"][name]

    def test_transformers(self):
        for name in manifests.MUSICGEN + manifests.MELODY:
            with self.subTest(name):
                model = MusicGen(read_config(self.config(name)), tokenizer=None)
                weights = self.arrays(f"{name}.transformers")
                again = {respell(k): v for k, v in weights.items()}
                for spelling in (weights, again):
                    named = published.sanitize(spelling)
                    model.load_weights(list(named.items()))
                ours = published.sanitize(dict(tree_flatten(model.parameters())))
                model.load_weights(list(ours.items()))

    def test_audiocraft(self):
        for name in manifests.MUSICGEN + manifests.MELODY:
            with self.subTest(name):
                weights = self.arrays(f"{name}.audiocraft")
                config = self.decoder_config(weights)
                self.assertEqual(config, read_config(self.config(name)).decoder)
                model = Decoder(config, text_width=768)
                named = name_decoder(weights)
                model.load_weights(list(named.items()))

    @staticmethod
    def decoder_config(weights: dict[str, mx.array]) -> decoder.DecoderConfig:
        settings = audiocraft.decoder_settings(weights, {})
        return decoder.read_config(settings, settings["prefix_width"])

    def test_style(self):
        weights = self.arrays(f"{manifests.STYLE[0]}.audiocraft")
        weights, conditioner = audiocraft.split_conditioner(weights)
        config = self.decoder_config(weights)
        self.assertEqual((config.hidden_size, config.num_hidden_layers), (1536, 48))
        self.assertEqual(config.prefix_width, 512)
        named = name_decoder(weights)
        Decoder(config, text_width=768).load_weights(list(named.items()))
        weights = MERT.sanitize(self.arrays("mert-v1-95m.transformers"))
        again = {
            respell(k): v for k, v in self.arrays("mert-v1-95m.transformers").items()
        }
        for weights in (weights, MERT.sanitize(again)):
            features = MERT(MERTConfig())
            features.load_weights(list(weights.items()))
        package = audiocraft.Package({}, {}, {}, conditioner, None)
        with patch.object(MERT, "from_pretrained", return_value=features):
            settings, weights = published.read_conditioner(package, self.folder)
        config = StyleConfig.from_dict(settings)
        self.assertEqual(config, StyleConfig())
        codec = Encodec(EncodecConfig.from_dict(self.config("encodec_32khz")))
        StyleConditioner(config, codec).load_weights(list(weights.items()))

    def test_codecs(self):
        for name in ("encodec_24khz", "encodec_32khz", "encodec_48khz"):
            config = EncodecConfig.from_dict(self.config(name))
            weights = self.arrays(f"{name}.transformers")
            again = {respell(k): v for k, v in weights.items()}
            for spelling in (weights, again):
                named = encodec_files.sanitize(spelling)
                Encodec(config).load_weights(list(named.items()))
        weights = self.arrays("encodec_32khz.audiocraft")
        found = EncodecConfig.from_dict(audiocraft.codec_settings(weights, {}))
        self.assertEqual(found, EncodecConfig.from_dict(self.config("encodec_32khz")))
        named = encodec_files.sanitize(weights)
        Encodec(found).load_weights(list(named.items()))

    def test_t5(self):
        model = T5(t5.T5Config.from_dict(self.config("t5-base")))
        weights = t5_files.sanitize(self.arrays("t5-base.transformers"))
        model.load_weights(list(weights.items()))

    def test_demucs(self):
        weights = demucs.HTDemucs.sanitize(self.arrays("htdemucs.demucs"))
        model = demucs.HTDemucs(demucs.HTDemucsConfig())
        model.load_weights(list(weights.items()))

    def test_manifests_equal_the_full_ones(self):
        folder = ROOT.parent / "shared" / "checkpoints"
        if not folder.is_dir():
            self.skipTest(f"{folder} is not there")
        for name in manifests.MUSICGEN + manifests.STYLE + manifests.MELODY:
            full = json.loads((folder / f"{name}.audiocraft.json").read_text())
            full = full["state_dict.bin"]["best_state"]
            ours = manifests.expand(manifests.read()["tensors"][f"{name}.audiocraft"])
            self.assertEqual({k: (d, tuple(s)) for k, (d, s) in full.items()}, ours)


class TestPublishedFolders(Test):
    """Both layouts, whole and damaged."""

    def fails(self, pattern: str, folder: Path, error: type = ValueError):
        with self.assertRaisesRegex(error, pattern):
            MusicGen.from_pretrained(folder)

    def change(self, folder: Path, change) -> None:
        """Rewrite a folder's safetensors with changed tensors."""
        path = str(folder / "model.safetensors")
        weights = mx.load(path)
        mx.eval(weights)
        change(weights)
        mx.save_safetensors(path, weights)

    def test_missing_left_over_or_misshapen_tensor(self):
        head = "decoder.lm_heads.2.weight"
        bias = "enc_to_dec_proj.bias"
        for change, pattern in (
            (lambda w: w.pop(head), f"{head} of model.safetensors is missing"),
            (lambda w: w.pop(bias), f"{bias} of model.safetensors is missing"),
            (
                lambda w: w.update(stray=mx.zeros(1)),
                "stray of model.safetensors has no place",
            ),
            (
                lambda w: w.update({bias: mx.zeros(7)}),
                f"{bias} of .* must have the shape",
            ),
            (
                lambda w: w.update({head: w[head].astype(mx.int32)}),
                f"{head} of model.safetensors must hold floats",
            ),
        ):
            with self.subTest(pattern):
                folder = self.copy("mono-transformers")
                self.change(folder, change)
                self.fails(pattern, folder)
                shutil.rmtree(folder)

    def test_two_spellings_or_shapes_of_one_tensor(self):
        emb, q = "decoder.model.decoder.embed_tokens", "decoder.model.decoder.layers.0"
        q, k = (f"{q}.self_attn.{x}_proj.weight" for x in "qk")
        cross = "decoder.model.decoder.layers.0.encoder_attn.in_proj_weight"
        conv = "audio_encoder.encoder.layers.0.conv"

        def swap_rows(w: dict, a: str, b: str) -> None:
            w[a], w[b] = mx.concatenate([w[a], w[a][:1]]), w[b][:-1]

        for change, pattern in (
            (
                lambda w: swap_rows(w, f"{emb}.0.weight", f"{emb}.1.weight"),
                f"{emb}.0.weight of .* must have the shape of its like",
            ),
            (
                lambda w: swap_rows(w, q, k),
                f"{k} of .* must have the shape of its like",
            ),
            (
                lambda w: w.update({f"{emb}.weight": mx.zeros(3)}),
                "emb.weight is there twice",
            ),
            (
                lambda w: w.update({f"{emb}.00.weight": mx.zeros(3)}),
                "embed_tokens.00.weight",
            ),
            (
                lambda w: w.update({f"{emb}.99999999999.weight": mx.zeros(3)}),
                "embed_tokens.99999999999.weight",
            ),
            (
                lambda w: w.update({cross: mx.zeros((96, 32))}),
                "cross_attention.q_proj.weight is there twice",
            ),
            (lambda w: w.update({cross: mx.array(1.0)}), "must hold 3 matrices"),
            (
                lambda w: w.update({f"{conv}.weight": mx.zeros((2, 1, 7))}),
                "conv.weight is there twice",
            ),
            (
                lambda w: w.update({f"{conv}.weight_v": mx.array(1.0)}),
                "weight_v of .* must have 3 dimensions",
            ),
            (
                lambda w: w.update({"audio_encoder.nonsense.inited": mx.zeros(1)}),
                "nonsense.inited",
            ),
        ):
            with self.subTest(pattern):
                folder = self.copy("mono-transformers")
                self.change(folder, change)
                self.fails(pattern, folder)
                shutil.rmtree(folder)

    def test_header_whose_offsets_wrap(self):
        folder = self.copy("mono-transformers")
        path = folder / "model.safetensors"
        content = path.read_bytes()
        size = struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8 : 8 + size])
        name = next(k for k in header if k.endswith("out_proj.weight"))
        start, stop = header[name]["data_offsets"]
        header[name]["data_offsets"] = [start + 2**64, stop + 2**64]
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])
        self.fails("model.safetensors is damaged", folder)

    def test_says_which_folder_is_missing(self):
        folder = self.copy("stereo-audiocraft")
        with patch("huggingface_hub.hf_hub_download", side_effect=OSError("offline")):
            shutil.rmtree(folder / "t5-base")
            self.fails(f"{folder} needs T5 in t5-base/", folder, OSError)
        shutil.copytree(REFERENCE / "stereo-audiocraft/t5-base", folder / "t5-base")
        with patch("huggingface_hub.hf_hub_download", side_effect=OSError("offline")):
            shutil.rmtree(folder / "encodec_32khz")
            pattern = (
                f"{folder} needs the codec .* in encodec_32khz/ .*(offline|OFFLINE)"
            )
            self.fails(pattern, folder, OSError)

    def test_damaged_safetensors(self):
        folder = self.copy("mono-transformers")
        path = folder / "model.safetensors"
        content = path.read_bytes()
        header = b'{"x":{"dtype":"F32","shape":[99],"data_offsets":[0,4]}}'
        hostile = struct.pack("<Q", len(header)) + header + bytes(4)
        for damaged in (content[:5000], content[:3], b"", b"junk" * 100, hostile):
            path.write_bytes(damaged)
            self.fails("model.safetensors is damaged", folder)

    def test_an_adapter_is_no_model(self):
        adapter = REFERENCE / "peft" / "mono"
        pattern = (
            f"{adapter} holds an adapter of PEFT, .* --model, and this as --adapter"
        )
        self.fails(pattern, adapter, FileNotFoundError)
        pattern = r"state_dict.bin and compression_state_dict.bin \(checkpoint.th may"
        self.fails(pattern, self.folder, FileNotFoundError)

    def test_missing_files(self):
        self.fails(
            "state_dict.bin and .*or config.json", self.folder, FileNotFoundError
        )
        folder = self.copy("mono-transformers")
        (folder / "spiece.model").unlink()
        self.fails("must hold spiece.model", folder, FileNotFoundError)
        folder = self.copy("stereo-transformers")
        (folder / "pytorch_model-00001-of-00002.bin").unlink()
        self.fails("00001-of-00002.bin is missing", folder, FileNotFoundError)
        (folder / "pytorch_model.bin.index.json").unlink()
        self.fails("must hold model.safetensors or", folder, FileNotFoundError)

    def test_warns_of_unusual_heads(self):
        config = {"hidden_size": 1024, "num_hidden_layers": 1, "ffn_dim": 8}
        config |= {"vocab_size": 8, "num_codebooks": 4, "num_attention_heads": 24}
        path = Path("config.json")
        with self.assertNoLogs(), warnings.catch_warnings():
            warnings.simplefilter("error")
            published.warn_of_heads(path, {"decoder": config | {"hidden_size": 1536}})
        few = {"decoder": config | {"num_attention_heads": 8}}
        with self.assertWarnsRegex(UserWarning, "config.json gives 8 .* have 16"):
            published.warn_of_heads(path, few)
        del config["num_attention_heads"]
        config["hidden_size"] = 2048
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            published.warn_of_heads(path, {"decoder": config})
        self.assertEqual(decoder.read_config(config, 0).num_attention_heads, 32)

    def test_warns_while_loading(self):
        folder = self.copy("mono-transformers")
        path = folder / "config.json"
        settings = json.loads(path.read_text())
        sizes = {"hidden_size": 1024, "num_attention_heads": 8}
        settings["decoder"] |= sizes  # which then do not fit the weights
        path.write_text(json.dumps(settings))
        with self.assertWarnsRegex(UserWarning, f"{path} gives 8 .* have 16"):
            self.fails(f"{folder} does not load", folder)

    def test_sizes_of_a_melody_that_cannot_be(self):
        """Told of by config.json alone, or beside a feature extractor."""
        folder = self.copy("melody-transformers")
        path, extractor = folder / "config.json", folder / "preprocessor_config.json"
        settings = json.loads(path.read_text())
        for beside in (None, "{}", '{"chunk_length": 30}'):
            if beside:
                extractor.write_text(beside)
            for change in (
                {"chroma_length": 10**12},
                {"chroma_length": math.inf},
                {"chroma_length": None},
                {"num_chroma": math.nan},
                {"num_chroma": []},
            ):
                (name,) = change
                path.write_text(json.dumps(settings | change))
                self.fails(f"{folder} does not load: {name} must be from", folder)
        extractor.write_text('{"chunk_length": "x"}')
        path.write_text(json.dumps(settings))
        self.fails(f"{folder} does not load", folder)
        path.write_text(json.dumps(settings | {"chroma_length": 800}))
        extractor.write_text('{"n_fft": 16384}')  # and so chunk_length is 30
        self.fails("chunk_length .* must be 102.4 s, .* got 30", folder)
        extractor.unlink()
        model = MusicGen.from_pretrained(folder)
        self.assertEqual(model.config.conditioner.chroma_length, 800)

    def test_a_clone_with_both_layouts_needs_no_hub(self):
        folder = self.copy("mono-transformers")
        shutil.copy(REFERENCE / "mono-audiocraft" / "state_dict.bin", folder)
        layouts = ("audiocraft", "transformers")
        readers = {f"read_{name}": Mock(return_value=name) for name in layouts}
        self.enterContext(patch.multiple(published, **readers))
        self.assertEqual(published.read(folder), "transformers")
        (folder / "t5-base").mkdir()
        self.assertEqual(published.read(folder), "audiocraft")
        (folder / "t5-base").rmdir()
        (folder / "model.safetensors").unlink()
        self.assertEqual(published.read(folder), "audiocraft")
        (folder / "state_dict.bin").unlink()
        self.assertEqual(published.read(folder), "transformers")

    def test_safetensors_before_bin(self):
        for name in reversed(published.WEIGHTS):
            (self.folder / name).touch()
            self.assertEqual(published.find_weights(self.folder).name, name)

    def test_text_encoder_that_the_bin_names(self):
        settings = {
            "conditioners.description.t5.name": "someone/other-t5",
            "transformer_lm.num_heads": "4",
        }
        with patch.object(audiocraft, "read_yaml", return_value=settings):
            with patch("t5_files.read", side_effect=OSError) as load:
                with self.assertRaises(OSError):
                    exact("mono-audiocraft")
        load.assert_called_once_with("someone/other-t5")

    def test_bin_or_index_of_another_shape(self):
        for name, load in (
            ("state_dict.bin", MusicGen.from_pretrained),
            ("compression_state_dict.bin", Encodec.from_pretrained),
        ):
            (self.folder / name).touch()
            for package in ([], None, 3, {}, {"best_state": []}, {"best_state": {}}):
                with patch.object(audiocraft, "load_torch", return_value=package):
                    with self.assertRaisesRegex(ValueError, name):
                        load(self.folder)
            (self.folder / name).unlink()
        (self.folder / "compression_state_dict.bin").touch()
        for pointer in ("", ".", "..", "a/b/c", "../b", "a/..", "a/b\n", 3, None):
            package = {"pretrained": pointer, "best_state": {}}
            with patch.object(audiocraft, "load_torch", return_value=package):
                with self.assertRaisesRegex(ValueError, "must name a Hub repository"):
                    Encodec.from_pretrained(self.folder)
        folder = self.copy("stereo-transformers")
        for text in ("[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": "../b"}}'):
            (folder / "pytorch_model.bin.index.json").write_text(text)
            self.fails("index.json is damaged", folder)


def respell(name: str) -> str:
    """Weight norm as transformers has spelled it since 4.46."""
    name = name.replace(".weight_g", ".parametrizations.weight.original0")
    return name.replace(".weight_v", ".parametrizations.weight.original1")
