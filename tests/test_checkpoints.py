"""Folders, names and settings of checkpoints, whole and damaged."""

import json
import os
import shutil
import struct
import subprocess
import sys
import warnings
from contextlib import chdir
from pathlib import Path
from unittest.mock import patch

import mlx.core as mx
from common import AUDIOCRAFT, REFERENCE, ROOT, Test, exact
from huggingface_hub.errors import EntryNotFoundError

import checkpoints
import convert
import encodec
import musicgen
import t5
from encodec import Encodec
from musicgen import MusicGen
from t5 import T5


class TestLoading(Test):
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
            (lambda w: w.pop(head), "part 2 of linears.weight is missing"),
            (lambda w: w.pop(bias), r"Missing.*\n?decoder.output_proj.bias"),
            (lambda w: w.update(stray=mx.zeros(1)), r"not in model.*\n?decoder.stray"),
            (lambda w: w.update({bias: mx.zeros(7)}), "decoder.output_proj.bias"),
            (
                lambda w: w.update({head: w[head].astype(mx.int32)}),
                "linears.2.weight must hold floats",
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
                "parts of emb.weight must have one shape",
            ),
            (lambda w: swap_rows(w, q, k), "in_proj.weight must have one shape"),
            (
                lambda w: w.update({f"{emb}.weight": mx.zeros(3)}),
                "emb.weight is there twice",
            ),
            (lambda w: w.update({f"{emb}.00.weight": mx.zeros(3)}), "emb.00.weight"),
            (
                lambda w: w.update({f"{emb}.99999999999.weight": mx.zeros(3)}),
                "emb.99999999999.weight",
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
                "weight_v must have 3 dimensions",
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

    def test_parts_that_do_not_belong_together(self):
        folder = self.copy("mono-transformers")
        path = folder / "config.json"
        config = json.loads(path.read_text())
        for change, pattern in (
            ({"codebook_size": 4}, "its codebook_size must be 64, got 4"),
            ({"audio_channels": 2}, "its audio_channels must be 1"),
            ({"normalize": True}, "its normalize must be False"),
            ({"target_bandwidths": [0.3]}, "enough for 4 codebooks"),
            ({"compress": 64}, "compress must be at most"),
        ):
            codec = config["audio_encoder"] | change
            path.write_text(json.dumps(config | {"audio_encoder": codec}))
            self.fails(f"config.json does not load: .*{pattern}", folder)
        text = config["text_encoder"] | {"vocab_size": 100}
        path.write_text(json.dumps(config | {"text_encoder": text}))
        self.fails("do not belong together", folder)
        for wrong in (
            {"bits": 4.0, "group_size": 32},
            {"bits": 4, "group_size": 32.0},
            ["bits", "group_size"],
            {"bits": 4, "group_size": 32, "mode": 1},
        ):
            path.write_text(json.dumps(config | {"quantization": wrong}))
            self.fails("config.json does not load: quantization must give", folder)

    def test_settings_of_another_architecture(self):
        for name, value in (
            ("transformer_lm.norm_first", "false"),
            ("transformer_lm.activation", "relu"),
            ("transformer_lm.positional_embedding", "rope"),
            ("codebooks_pattern.modeling", "parallel"),
        ):
            with patch.object(convert, "read_yaml", return_value={name: value}):
                self.fails(
                    f"state_dict.bin .*{name} must be", REFERENCE / AUDIOCRAFT[0]
                )
        heads = {"transformer_lm.num_heads": "2"}
        for name, value in (
            ("conditioners.description.t5.name", ["a", "b"]),
            ("conditioners.description.t5.name", "/etc"),
            ("conditioners.description.t5.name", ".."),
            ("dataset.segment_duration", ["1"]),
        ):
            settings = heads | {name: value}
            with patch.object(convert, "read_yaml", return_value=settings):
                self.fails("state_dict.bin", REFERENCE / AUDIOCRAFT[0])

    def test_says_which_folder_is_missing(self):
        folder = self.copy("stereo-audiocraft")
        with patch("t5.hf_hub_download", side_effect=OSError("offline")):
            shutil.rmtree(folder / "t5-base")
            self.fails(f"{folder} needs T5 in t5-base/", folder, OSError)
        shutil.copytree(REFERENCE / "stereo-audiocraft/t5-base", folder / "t5-base")
        with patch("encodec.hf_hub_download", side_effect=OSError("offline")):
            shutil.rmtree(folder / "encodec_32khz")
            self.fails("looked for in .*encodec_32khz", folder, OSError)

    def test_quantized_already(self):
        folder = self.folder / "q8"
        source = str(REFERENCE / "mono-transformers")
        convert.convert(source, folder, mx.float32, 8, 32)
        MusicGen.from_pretrained(folder, q_bits=8)
        with self.assertRaisesRegex(ValueError, "is quantized already"):
            MusicGen.from_pretrained(folder, q_bits=4)

    def test_stored_dtype_on_a_gpu(self):
        folder = self.folder / "bf16"
        source = str(REFERENCE / "mono-transformers")
        convert.convert(source, folder, mx.bfloat16)
        with patch("musicgen.mx.default_device", return_value=mx.gpu):
            model = MusicGen.from_pretrained(folder)
        self.assertEqual(model.decoder.dtype, mx.bfloat16)

    def test_damaged_safetensors(self):
        folder = self.copy("mono-transformers")
        path = folder / "model.safetensors"
        content = path.read_bytes()
        header = b'{"x":{"dtype":"F32","shape":[99],"data_offsets":[0,4]}}'
        hostile = struct.pack("<Q", len(header)) + header + bytes(4)
        for damaged in (content[:5000], content[:3], b"", b"junk" * 100, hostile):
            path.write_bytes(damaged)
            self.fails("model.safetensors is damaged", folder)

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

    def test_bad_config(self):
        folder = self.copy("mono-transformers")
        path = folder / "config.json"
        config = json.loads(path.read_text())
        path.write_text("{not json")
        self.fails("config.json does not load", folder)
        path.write_text("[]")
        self.fails("config.json does not load", folder)
        path.write_text(json.dumps(config | {"model_type": "musicgen_style"}))
        self.fails("model_type must be", folder)
        for part, key in (
            ("decoder", "hidden_size"),
            ("decoder", "num_codebooks"),
            ("text_encoder", "num_heads"),
            ("audio_encoder", "upsampling_ratios"),
        ):
            lacking = {k: v for k, v in config[part].items() if k != key}
            path.write_text(json.dumps(config | {part: lacking}))
            self.fails(key, folder)
            path.write_text(json.dumps({k: v for k, v in config.items() if k != part}))
            self.fails(part, folder)

    def test_absurd_config(self):
        folder = self.copy("mono-transformers")
        path = folder / "config.json"
        config = json.loads(path.read_text())
        for change, pattern in (
            ({"num_attention_heads": 0}, "num_attention_heads must be"),
            ({"num_attention_heads": 3}, "num_attention_heads must split"),
            ({"num_attention_heads": "4"}, "num_attention_heads must be"),
            ({"hidden_size": -4}, "hidden_size must be"),
            ({"vocab_size": 10**12}, "vocab_size must be"),
            ({"num_hidden_layers": 10**6}, "num_hidden_layers must be"),
            ({"delays": [0, 1, 2, 10**9]}, "delays must give"),
            ({"delays": [0, 1, 2]}, "delays must give"),
            ({"delays": "0123"}, "delays must give"),
            ({"scale_embedding": True}, "scale_embedding must be False"),
            ({"activation_function": "relu"}, "activation_function must be 'gelu'"),
        ):
            with self.subTest(change):
                changed = config | {"decoder": config["decoder"] | change}
                path.write_text(json.dumps(changed))
                self.fails(f"{path} does not load: {pattern}", folder)
        for change, pattern in (
            ({"decoder": []}, "must have 'decoder'"),
            ({"max_duration": "x"}, "max_duration must be"),
            ({"max_duration": 1e9}, "max_duration must be"),
            ({"decoder_dtype": "load"}, "decoder_dtype in .* must be one of float16"),
            ({"quantization": {"bits": 4}}, "quantization must give"),
        ):
            with self.subTest(change):
                path.write_text(json.dumps(config | change))
                self.fails(f"{pattern}", folder)
        path.write_text("[" * 100_000)
        self.fails("config.json does not load", folder)

    def test_warns_of_unusual_heads(self):
        decoder = {"hidden_size": 1024, "num_hidden_layers": 1, "ffn_dim": 8}
        decoder |= {"vocab_size": 8, "num_codebooks": 4, "num_attention_heads": 24}
        config = musicgen.DecoderConfig.from_dict(decoder | {"hidden_size": 1536})
        with self.assertNoLogs(), warnings.catch_warnings():
            warnings.simplefilter("error")
            checkpoints.warn_of_heads(Path("config.json"), config)
        config = musicgen.DecoderConfig.from_dict(decoder | {"num_attention_heads": 8})
        with self.assertWarnsRegex(UserWarning, "config.json gives 8 .* have 16"):
            checkpoints.warn_of_heads(Path("config.json"), config)
        del decoder["num_attention_heads"]
        config = musicgen.DecoderConfig.from_dict(decoder | {"hidden_size": 2048})
        self.assertEqual(config.num_attention_heads, 32)

    def test_our_own_settings_are_heeded(self):
        folder = self.copy("mono-transformers")
        path = folder / "config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps(config | {"max_duration": 0.5}))
        model = MusicGen.from_pretrained(folder)
        self.assertEqual(model.config.max_duration, 0.5)

    def test_dtype_must_be_a_float(self):
        for dtype in (mx.int32, "float16", mx.complex64):
            with self.assertRaisesRegex(ValueError, "dtype must be one of float16"):
                MusicGen.from_pretrained(REFERENCE / "mono-transformers", dtype)

    def test_a_clone_with_both_layouts_needs_no_hub(self):
        folder = self.copy("mono-transformers")
        shutil.copy(REFERENCE / "mono-audiocraft" / "state_dict.bin", folder)
        self.assertFalse(checkpoints.is_audiocraft(folder))
        (folder / "t5-base").mkdir()
        self.assertTrue(checkpoints.is_audiocraft(folder))
        (folder / "t5-base").rmdir()
        (folder / "model.safetensors").unlink()
        self.assertTrue(checkpoints.is_audiocraft(folder))

    def test_safetensors_before_bin(self):
        for name in reversed(checkpoints.WEIGHTS):
            (self.folder / name).touch()
            self.assertEqual(checkpoints.find_weights(self.folder).name, name)

    def test_text_encoder_that_the_bin_names(self):
        settings = {
            "conditioners.description.t5.name": "someone/other-t5",
            "transformer_lm.num_heads": "4",
        }
        with patch.object(convert, "read_yaml", return_value=settings):
            with patch.object(T5, "from_pretrained", side_effect=OSError) as load:
                with self.assertRaises(OSError):
                    exact("mono-audiocraft")
        load.assert_called_once_with("someone/other-t5")

    def test_what_is_fetched_of_the_transformers_layout(self):
        calls = []

        def snapshot(repo: str, allow_patterns: list[str]) -> str:
            calls.append(allow_patterns)
            return str(self.folder)

        with patch("checkpoints.snapshot_download", snapshot):
            checkpoints.fetch_transformers("a/b")
            (self.folder / "model-00001-of-00002.safetensors").touch()
            checkpoints.fetch_transformers("a/b")
        common = ["config.json", "spiece.model"]
        files = ["model*.safetensors", "model.safetensors.index.json"]
        wanted = [common + files, common + ["pytorch_model*"], common + files]
        self.assertEqual(calls, wanted)

    def test_tiny_lies_beside_the_scripts(self):
        tiny = str(Path(checkpoints.__file__).parent / "tiny")
        self.assertEqual(checkpoints.MODELS["tiny"], tiny)
        folder = self.copy("mono-transformers")
        (self.folder / "elsewhere" / "tiny").mkdir(parents=True)  # is not taken
        self.enterContext(chdir(self.folder / "elsewhere"))
        self.enterContext(patch.dict(checkpoints.MODELS, tiny=str(folder)))
        network = self.enterContext(patch("socket.create_connection"))
        self.assertEqual(checkpoints.locate("tiny"), folder)
        self.assertEqual(checkpoints.locate("./tiny"), Path("tiny"))
        audio = MusicGen.from_pretrained("tiny").generate("a", duration=0.1, seed=0)
        model = MusicGen.from_pretrained(folder)
        self.assertSame(audio, model.generate("a", duration=0.1, seed=0))
        network.assert_not_called()

    def test_tiny_that_is_not_there(self):
        missing = self.folder / "tiny"
        with patch.dict(checkpoints.MODELS, tiny=str(missing)):
            with patch("checkpoints.hf_hub_download") as fetch:
                pattern = f"^{missing} must hold .* synth --codec --output {missing},"
                with self.assertRaisesRegex(FileNotFoundError, pattern):
                    checkpoints.locate("tiny")
        fetch.assert_not_called()

    def test_short_name_does_not_fall_back(self):
        missing = EntryNotFoundError("no such file")
        for name, falls_back in (("small", False), ("someone/model", True)):
            with patch("checkpoints.hf_hub_download", side_effect=missing):
                with patch("checkpoints.fetch_transformers") as fetch:
                    if falls_back:
                        checkpoints.locate(name)
                    else:
                        with self.assertRaisesRegex(
                            OSError, "did not give.*--model tiny"
                        ):
                            checkpoints.locate(name)
            self.assertEqual(fetch.called, falls_back)

    def test_names_that_are_refused_before_the_hub_is_asked(self):
        path = self.folder / "file"
        path.touch()
        for name, pattern in (
            ("", "model must be one of"),
            (str(path), "model must be one of"),
            (f"{self.folder}/nothing", "model must be one of"),
            ("../no-such-folder", "model must be one of"),
            ("a/b/c", "model must be one of"),
        ):
            with self.assertRaisesRegex(ValueError, pattern):
                checkpoints.locate(name)

    def test_settings_of_the_bin_are_heeded(self):
        settings = {
            "codebooks_pattern.delay.delays": ["0", "2", "4", "6"],
            "transformer_lm.num_heads": "4",
            "dataset.segment_duration": "12",
        }
        with patch.object(convert, "read_yaml", return_value=settings):
            model = exact("mono-audiocraft")
        self.assertEqual(model.config.decoder.delays, (0, 2, 4, 6))
        self.assertEqual(model.config.decoder.num_attention_heads, 4)
        self.assertEqual(model.config.max_duration, 12)
        self.assertEqual(model.generate_codes("a", duration=0.1).shape, (1, 5, 4))

    def test_bin_or_index_of_another_shape(self):
        for name, load in (
            ("state_dict.bin", MusicGen.from_pretrained),
            ("compression_state_dict.bin", Encodec.from_pretrained),
        ):
            (self.folder / name).touch()
            for package in ([], None, 3, {}, {"best_state": []}, {"best_state": {}}):
                with patch.object(convert, "load_torch", return_value=package):
                    with self.assertRaisesRegex(ValueError, name):
                        load(self.folder)
            (self.folder / name).unlink()
        (self.folder / "compression_state_dict.bin").touch()
        for pointer in ("", ".", "..", "a/b/c"):
            package = {"pretrained": pointer}
            with patch.object(convert, "load_torch", return_value=package):
                with self.assertRaisesRegex(ValueError, "must name a Hub repository"):
                    Encodec.from_pretrained(self.folder)
        folder = self.copy("stereo-transformers")
        for text in ("[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": "../b"}}'):
            (folder / "pytorch_model.bin.index.json").write_text(text)
            self.fails("index.json is damaged", folder)

    def test_unknown_name(self):
        with self.assertRaisesRegex(ValueError, "one of small, .*, style, tiny, a Hub"):
            MusicGen.from_pretrained("smal")

    def test_short_name_fetches_exactly_what_it_needs(self):
        folders = {
            "facebook/musicgen-stereo-small": REFERENCE / "stereo-audiocraft",
            "facebook/encodec_32khz": REFERENCE / "stereo-audiocraft/encodec_32khz",
            "google-t5/t5-base": REFERENCE / "stereo-audiocraft/t5-base",
        }
        fetched, hub = [], self.folder / "hub"

        def download(repo: str, name: str) -> str:
            fetched.append((repo, name))
            (hub / repo).mkdir(parents=True, exist_ok=True)
            return shutil.copy(folders[repo] / name, hub / repo / name)

        with patch("checkpoints.hf_hub_download", download):
            with patch("t5.hf_hub_download", download):
                with patch("encodec.hf_hub_download", download):
                    MusicGen.from_pretrained("stereo-small")
        names = {
            "facebook/musicgen-stereo-small": checkpoints.AUDIOCRAFT_FILES,
            "facebook/encodec_32khz": encodec.FILES,
            "google-t5/t5-base": t5.FILES,
        }
        wanted = [(repo, name) for repo, files in names.items() for name in files]
        self.assertEqual(sorted(fetched), sorted(wanted))

    def test_hub_id_from_the_cache_without_network(self):
        for name in ("mono-transformers", "mono-audiocraft"):
            repo = self.folder / "hub" / f"models--someone--{name}"
            snapshot = repo / "snapshots" / ("0" * 40)
            shutil.copytree(REFERENCE / name, snapshot)
            (repo / "refs").mkdir()
            (repo / "refs" / "main").write_text("0" * 40)
        script = (
            "import musicgen, sys; "
            "musicgen.MusicGen.from_pretrained(sys.argv[1]).generate('a', duration=0.1)"
        )
        offline = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_CACHE": str(self.folder / "hub"),
        }

        def run(name: str) -> subprocess.CompletedProcess:
            command = [sys.executable, "-c", script, f"someone/{name}"]
            return subprocess.run(
                command, cwd=ROOT, env=offline, capture_output=True, text=True
            )

        for name in ("mono-transformers", "mono-audiocraft"):
            result = run(name)
            self.assertEqual(result.returncode, 0, result.stderr)
        self.assertRegex(run("nothing").stderr, "To work offline, take --model tiny")
