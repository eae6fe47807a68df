"""Where a model lies, the folders that convert.py wrote, and configs from strangers."""

import json
import shutil
import struct
from contextlib import chdir
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import mlx.core as mx
import sounds
from common import REFERENCE, Test, exact
from mlx.utils import tree_flatten

import checkpoints
import convert
import hub
from musicgen import MusicGen


class TestCheckpoints(Test):
    def fails(self, pattern: str, folder: Path, error: type = ValueError):
        with self.assertRaisesRegex(error, pattern):
            MusicGen.from_pretrained(folder)

    def test_parts_that_do_not_belong_together(self):
        folder = self.copy("mono-transformers")
        path = folder / "config.json"
        config = json.loads(path.read_text())
        for change, pattern in (
            ({"codebook_size": 4}, "its codebook_size must be 64, got 4"),
            ({"audio_channels": 2}, "its audio_channels must be 1"),
            ({"normalize": True}, "its normalize must be False"),
            ({"target_bandwidths": [0.3]}, "enough for 4 codebooks"),
            ({"compress": 64}, "compress must be at most num_filters, 2, got 64"),
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
            self.fails(
                "config.json does not load: (quantization must give|q_.* must be)",
                folder,
            )

    def test_shards(self):
        folder = self.converted("mono-transformers")
        weights = mx.load(str(folder / "model.safetensors"))
        mx.eval(weights)
        names = sorted(weights)
        shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        for shard, own in shards.items():
            mx.save_safetensors(str(folder / shard), {k: weights[k] for k in own})
        index = {name: shard for shard, own in shards.items() for name in own}
        text = json.dumps({"weight_map": index})
        (folder / "model.safetensors.index.json").write_text(text)
        (folder / "model.safetensors").unlink()
        options = dict(prompts="happy rock", duration=0.2, seed=0)
        codes = MusicGen.from_pretrained(folder).generate_codes(**options)
        whole = MusicGen.from_pretrained(REFERENCE / "mono-transformers")
        self.assertTrue(mx.array_equal(codes, whole.generate_codes(**options)))

    def test_each_weight_is_in_memory_once(self):
        small = exact("mono-transformers")
        sizes = dict(hidden_size=256, num_hidden_layers=8, ffn_dim=1024)
        decoder = replace(small.config.decoder, **sizes)
        model = MusicGen(replace(small.config, decoder=decoder), small.tokenizer)
        model.decoder.set_dtype(mx.float16)
        convert.save(model, self.folder)
        del model
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        model = MusicGen.from_pretrained(self.folder, mx.float16)
        peak = mx.get_peak_memory() - before
        weights = tree_flatten(model.parameters())
        size = sum(weight.nbytes for _, weight in weights)
        self.assertLess(peak, 1.2 * size)

    def test_quantized_already(self):
        folder = self.folder / "q8"
        source = str(REFERENCE / "mono-transformers")
        convert.convert(source, folder, mx.float32, 8, 32)
        MusicGen.from_pretrained(folder, q_bits=8)
        with self.assertRaisesRegex(ValueError, "has 8 bits a weight already"):
            MusicGen.from_pretrained(folder, q_bits=4)

    def test_stored_dtype_on_a_gpu(self):
        folder = self.folder / "bf16"
        source = str(REFERENCE / "mono-transformers")
        convert.convert(source, folder, mx.bfloat16)
        with patch("musicgen.mx.default_device", return_value=mx.gpu):
            model = MusicGen.from_pretrained(folder)
        self.assertEqual(model.decoder.dtype, mx.bfloat16)

    def converted(self, name: str, dtype: mx.Dtype = mx.float32) -> Path:
        """A folder that convert.py wrote of a reference checkpoint."""
        folder = self.folder / f"{name}-converted"
        convert.convert(str(REFERENCE / name), folder, dtype)
        return folder

    def test_damaged_folder(self):
        source = self.converted("mono-transformers")
        name = "decoder.layers.0.linear1.weight"
        for change, pattern in (
            (lambda w: w.pop(name), rf"Missing.*\n?{name}"),
            (lambda w: w.update(stray=mx.zeros(1)), r"not in model.*\n?stray"),
            (lambda w: w.update({name: w[name][:3]}), f"shape.*{name}"),
            (
                lambda w: w.update({name: w[name].astype(mx.uint32)}),
                f"model.safetensors: {name} must hold floats",
            ),
            (
                lambda w: w.update({"text_encoder.shared.weight": mx.array([1])}),
                "text_encoder.shared.weight must hold floats",
            ),
        ):
            with self.subTest(pattern):
                folder = Path(shutil.copytree(source, self.folder / "damaged"))
                path = str(folder / "model.safetensors")
                weights = mx.load(path)
                mx.eval(weights)
                change(weights)
                mx.save_safetensors(path, weights)
                self.fails(pattern, folder)
                shutil.rmtree(folder)
        path = source / "model.safetensors"
        content = path.read_bytes()
        header = b'{"x":{"dtype":"F32","shape":[99],"data_offsets":[0,4]}}'
        hostile = struct.pack("<Q", len(header)) + header + bytes(4)
        for damaged in (content[:5000], content[:3], b"", b"junk" * 100, hostile):
            path.write_bytes(damaged)
            self.fails("model.safetensors is damaged", source)
        path.unlink()
        self.fails("must hold model.safetensors", source, FileNotFoundError)
        (source / "spiece.model").unlink()
        with self.assertRaisesRegex(
            FileNotFoundError, f"{source} must hold spiece.model"
        ):
            MusicGen.from_pretrained(source)

    def test_text_encoder_and_codec_are_float32(self):
        folder = self.converted("mono-transformers", mx.float16)
        path = str(folder / "model.safetensors")
        weights = {k: w.astype(mx.float16) for k, w in mx.load(path).items()}
        mx.eval(weights)
        mx.save_safetensors(path, weights)
        for name, weight in checkpoints.read_weights(folder).items():
            own = mx.float16 if name.startswith("decoder.") else mx.float32
            self.assertEqual(weight.dtype, own, name)
        again = checkpoints.read(str(folder)).read_text_encoder()
        self.assertEqual(again["shared.weight"].dtype, mx.float32)
        self.assertFalse(any(name.startswith("text_encoder.") for name in again))

    def test_folders_of_older_versions(self):
        """Of melody models, whose config had other keys."""
        folder = self.converted("melody-audiocraft")
        melody = dict(melody=sounds.tune(32000, [60, 64, 67]), separate=False)
        options = dict(duration=0.3, temp=0, **melody)
        codes = exact("melody-audiocraft").generate_codes("a", **options)
        path = folder / "config.json"
        config = json.loads(path.read_text())
        told = {k: config["conditioner"][k] for k in ("num_chroma", "chroma_length")}
        fixed = dict(activation_function="gelu", scale_embedding=False)
        decoder = config["decoder"] | fixed
        width = decoder.pop("prefix_width")
        for decoder, conditioner in (
            (decoder | {"sound_width": width}, told | {"kind": "melody"}),
            (decoder | told, None),  # before that
        ):
            older = dict(decoder=decoder, conditioner=conditioner)
            path.write_text(json.dumps(config | older))
            model = MusicGen.from_pretrained(folder)
            self.assertEqual(model.config.decoder.prefix_width, width)
            self.assertSame(model.generate_codes("a", **options), codes)

    def test_bad_config(self):
        folder = self.copy("mono-transformers")
        path = folder / "config.json"
        config = json.loads(path.read_text())
        path.write_text("{not json")
        self.fails("config.json does not load", folder)
        path.write_text("[]")
        self.fails("config.json must hold an object", folder)
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
            self.fails(f"{path} does not load: .*(have '?{key}|{key} must be)", folder)
            path.write_text(json.dumps({k: v for k, v in config.items() if k != part}))
            self.fails(f"{path} does not load: It must have '{part}'", folder)

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
            ({"delays": []}, "delays must give"),
            ({"num_codebooks": 5}, "The codec does not .* enough for 5 codebooks"),
            ({"num_codebooks": 10**6}, "num_codebooks must be"),
            ({"audio_channels": 3}, "audio_channels must be"),
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
            ({"quantization": {"bits": 4}}, "quantization must give"),
            *(
                ({"conditioner": bad}, "conditioner must be an object of the kind")
                for bad in (0, "", False, [], {}, {"kind": "x"}, {"kind": []})
            ),
        ):
            with self.subTest(change):
                path.write_text(json.dumps(config | change))
                self.fails(f"{pattern}", folder)
        path.write_text("[" * 100_000)
        self.fails("config.json does not load", folder)
        folder = self.converted("mono-transformers")
        config = json.loads((folder / "config.json").read_text())
        for dtype, pattern in (
            ("load", "decoder_dtype must be one of float16"),
            (3, "decoder_dtype must be one of float16"),
            ([], "config.json does not load"),
        ):
            changed = json.dumps(config | {"decoder_dtype": dtype})
            (folder / "config.json").write_text(changed)
            self.fails(pattern, folder)

    def test_our_own_settings_are_heeded(self):
        folder = self.copy("mono-transformers")
        path = folder / "config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps(config | {"max_duration": 0.5}))
        model = MusicGen.from_pretrained(folder)
        self.assertEqual(model.config.max_duration, 0.5)

    def test_dtype_must_be_a_float(self):
        for dtype in (mx.int32, "float16", mx.complex64):
            with self.assertRaisesRegex(ValueError, "dtype must be mx.float16"):
                MusicGen.from_pretrained(REFERENCE / "mono-transformers", dtype)

    def test_tiny_lies_beside_the_scripts(self):
        tiny = Path(checkpoints.__file__).parent / "tiny"
        self.assertEqual((checkpoints.TINY, hub.MODELS["tiny"]), (tiny, str(tiny)))
        magnet = str(tiny.with_name("tiny-magnet"))
        self.assertEqual(hub.MODELS["tiny-magnet"], magnet)
        self.assertEqual(str(hub.local("tiny-magnet")), magnet)
        folder = self.copy("mono-transformers")
        (self.folder / "elsewhere" / "tiny").mkdir(parents=True)  # is not taken
        self.enterContext(chdir(self.folder / "elsewhere"))
        self.enterContext(patch.object(checkpoints, "TINY", folder))
        network = self.enterContext(patch("socket.create_connection"))
        self.assertEqual(checkpoints.locate("tiny"), folder)
        self.assertEqual(checkpoints.locate("./tiny"), Path("tiny"))
        audio = MusicGen.from_pretrained("tiny").generate("a", duration=0.1, seed=0)
        model = MusicGen.from_pretrained(folder)
        self.assertSame(audio, model.generate("a", duration=0.1, seed=0))
        network.assert_not_called()

    def test_tiny_that_is_not_there(self):
        missing = self.folder / "tiny"
        with patch.object(checkpoints, "TINY", missing):
            with patch("huggingface_hub.hf_hub_download") as fetch:
                for name in hub.BESIDE:
                    pattern = f"{name} must hold .*: copy that folder, too, from where"
                    with self.assertRaisesRegex(FileNotFoundError, pattern):
                        checkpoints.locate(name)
        fetch.assert_not_called()
