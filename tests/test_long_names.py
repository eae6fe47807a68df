"""Names in strangers' files: of any length, of several lines, and with what a terminal
would obey. Each message is one line of at most 400 characters, from Python, too."""

import json
import shutil
from pathlib import Path
from unittest.mock import patch

import mlx.core as mx
from common import REFERENCE, ROOT, Test, slow
from test_strict import LONGEST, changed

import adapters
import audiocraft
import demucs
import encodec
import lines
import lora
import mert
import peft_files
import published
import settings
import strict
import t5
import torch_file
import train
from job import ALL_KEYS
from musicgen import MusicGen

HOSTILE = ("x" * 5000, "first\nsecond\r\n\x1b[2J\x07" * 9, "\u202e\u2028\n" * 999)
LAYER = "base_model.model.decoder.model.decoder.layers.0."
PLACES = {  # how a model is loaded -> folder, and file with tensors in it
    "transformers": (MusicGen, "mono-transformers", "model.safetensors"),
    "melody": (MusicGen, "melody-transformers", "model.safetensors"),
    "audiocraft": (MusicGen, "mono-audiocraft", "state_dict.bin"),
    "codec of it": (MusicGen, "mono-audiocraft", "compression_state_dict.bin"),
    "T5 beside it": (MusicGen, "stereo-audiocraft", "t5-base/model.safetensors"),
    "style": (MusicGen, "style-audiocraft", "state_dict.bin"),
    "MERT beside it": (MusicGen, "style-audiocraft", "MERT-v1-95M/pytorch_model.bin"),
    "training": (MusicGen, "solver", "checkpoint.th"),
    "ours": (MusicGen, "tiny", "model.safetensors"),
    "codec": (encodec.Encodec, "encodec_48khz", "model.safetensors"),
    "T5": (t5.T5, "t5-gated", "model.safetensors"),
    "MERT": (mert.MERT, "style-audiocraft/MERT-v1-95M", "pytorch_model.bin"),
    "Demucs": (demucs.HTDemucs, "htdemucs", "model.safetensors"),
}


class LongNamesTest(Test):
    def assertTold(self, ask, *arguments) -> str:
        """It fails, with a line that can be shown."""
        with self.assertRaises((OSError, TypeError, ValueError)) as caught:
            ask(*arguments)
        told = str(caught.exception)
        self.assertLessEqual(len(told), LONGEST)
        self.assertTrue(told.isprintable(), ascii(told))
        return told

    def source(self, name: str) -> Path:
        if name != "solver":
            return ROOT / name if name == "tiny" else REFERENCE / name
        folder = self.folder / name
        if not folder.is_dir():
            shutil.copytree(REFERENCE / "mono-audiocraft", folder)
            (folder / "state_dict.bin").unlink()
            shutil.copy(REFERENCE / "solver-audiocraft" / "checkpoint.th", folder)
        return folder


class TestTensors(LongNamesTest):
    @slow(20)
    def test_of_every_kind_of_file(self):
        """Beside the right ones, in floats and in integers, and below one's name."""
        for place, (kind, folder, file) in PLACES.items():
            folder = self.source(folder)
            for hostile in HOSTILE:
                for name in (hostile, f"decoder.{hostile}", f"{hostile}.weight_v"):
                    for tensor in (mx.zeros(7), mx.zeros(7, mx.int32)):
                        with self.subTest(place, name=name[:20], dtype=tensor.dtype):
                            self.check(kind, folder, folder / file, {name: tensor})

    def check(self, kind, folder: Path, path: Path, more: dict) -> None:
        state = torch_file.load_state

        def load_state(other):
            weights = state(other)
            return weights | more if Path(other) == path else weights

        add = lambda w: w.get("model", w).update(more)  # noqa: E731
        with changed(path, add), patch.object(torch_file, "load_state", load_state):
            if path.parent.name in ("t5-gated", "t5-base") and "decoder." in str(more):
                kind.from_pretrained(folder)  # T5's decoder is not looked at
            else:
                self.assertTold(kind.from_pretrained, folder)


class TestPeft(LongNamesTest):
    def setUp(self):
        super().setUp()
        source = REFERENCE / "peft" / "mono"
        self.adapter = Path(shutil.copytree(source, self.folder / "adapter"))
        self.config = json.loads((source / peft_files.CONFIG).read_text())
        self.tensors = mx.load(str(source / peft_files.WEIGHTS))
        self.model = MusicGen.from_pretrained(REFERENCE / "mono-transformers")

    def told(self, tensors: dict, **config) -> str:
        text = json.dumps(self.config | config)
        (self.adapter / peft_files.CONFIG).write_text(text)
        mx.save_safetensors(str(self.adapter / peft_files.WEIGHTS), tensors)
        return self.assertTold(peft_files.merge, self.model, self.adapter)

    def test_tensors(self):
        narrow = mx.zeros((2, 9))
        for hostile in HOSTILE:
            module = f"base_model.model.text_encoder.{hostile}"
            for tensors, why in (
                ({f"{LAYER}{hostile}.weight": narrow}, "has no place"),
                ({f"{module}.lora_A.weight": narrow}, "partner|no place"),
                ({f"{module}.weight": mx.zeros(2, mx.int32)}, "floats|no place"),
                ({f"{module}.weight": narrow}, "has no place"),
                (
                    {f"{module}.lora_{x}.weight": narrow for x in "AB"},
                    "must be of rank|no place",
                ),
            ):
                for base in ("a/b", hostile):
                    told = self.told(tensors, base_model_name_or_path=base)
                    self.assertRegex(told, f"adapter_model.safetensors.*({why})")

    def test_settings(self):
        for hostile in HOSTILE:
            for config in (
                {"peft_type": hostile},
                {"init_lora_weights": hostile},
                {"use_dora": hostile},
                {"rank_pattern": {hostile: -1}},
                {"alpha_pattern": hostile},
                {"r": hostile},
                {"r": [hostile]},
            ):
                with self.subTest(config=[*config], name=hostile[:9]):
                    self.assertIn("adapter_", self.told(self.tensors, **config))


class TestOwnFiles(LongNamesTest):
    def test_adapters(self):
        path = self.folder / "adapter.safetensors"
        model = MusicGen.from_pretrained("tiny")
        sizes = {k: getattr(model.config.decoder, v) for k, v in lora.SIZES.items()}
        for hostile in HOSTILE:
            for arrays, metadata in (
                ({hostile: mx.zeros(3)}, dict(rank=2, sizes=sizes)),
                ({"a": mx.zeros(3)}, dict(rank=2, sizes={hostile: 3})),
                (
                    {"a": mx.zeros(3)},
                    dict(rank=2, sizes=sizes | {"hidden_size": hostile}),
                ),
                ({"a": mx.zeros(3)}, dict(rank=hostile, sizes=sizes)),
                ({"a": mx.zeros(3)}, dict(rank=2, sizes=sizes, targets=[hostile])),
            ):
                text = json.dumps({"musicgen_adapter": lora.VERSION} | metadata)
                mx.save_safetensors(str(path), arrays, {"adapter": text})
                self.assertTold(lora.load_adapter, model, path)

    def test_settings_of_a_take(self):
        path, codes = self.folder / "codes.safetensors", mx.zeros((1, 9, 4), mx.uint32)
        for hostile in HOSTILE:
            for record in ({hostile: {}}, {"model": [hostile]}, {"seed": [hostile]}):
                settings.save_codes(path, codes, record, True)
                told = self.assertTold(settings.read_settings, path)
                self.assertRegex(told, "codes.safetensors is damaged: its setting")
        comment = json.dumps({"musicgen": int("9" * 4000)})
        self.assertTold(settings.from_comment, comment, path)


class TestSettings(LongNamesTest):
    def test_of_audiocraft(self):
        """Names and values in `xp.cfg`."""
        path = REFERENCE / "style-audiocraft" / "state_dict.bin"
        package = audiocraft.read_decoder(path)
        for hostile in HOSTILE:
            for name, value in (
                ("transformer_lm.activation", hostile),
                (f"{audiocraft.STYLE}{hostile}", "3"),
                (f"{audiocraft.STYLE}eval_q", hostile),
                (f"{audiocraft.STYLE}bins", hostile),
                (f"{audiocraft.STYLE}transformer_scale", hostile),
                ("fuser.prepend", [hostile]),
                (f"{audiocraft.T5_SETTINGS}normalize_text", hostile),
                ("conditioners.self_wav.model", hostile),
                ("conditioners.description.t5.name", hostile),
                ("transformer_lm.num_heads", hostile),
                ("dataset.segment_duration", hostile),
            ):
                cfg = package.cfg | {name: value}
                with self.subTest(name[:40], name=hostile[:9]):
                    with patch.object(audiocraft, "read_settings", return_value=cfg):
                        told = self.assertTold(published.read, path.parent)
                    self.assertIn("style-audiocraft", told)
        for hostile in HOSTILE:
            for name in ("chroma_stem.x", "chroma_stem.argmax"):
                cfg = {f"conditioners.self_wav.{name}": hostile}
                self.assertTold(audiocraft.melody_settings, cfg)
            cfg = {"fuser.cross": [hostile]}
            self.assertTold(audiocraft.check_conditions, cfg, False)

    def test_of_a_config(self):
        for source in ("mono-transformers", "tiny"):
            folder = self.folder / source
            shutil.copytree(self.source(source), folder)
            path = folder / "config.json"
            config = json.loads(path.read_text())
            for hostile in HOSTILE:
                for part, name in (
                    ("decoder", "activation_function"),
                    ("decoder", "hidden_size"),
                    ("decoder", "num_codebooks"),
                    ("text_encoder", "d_model"),
                    ("text_encoder", "feed_forward_proj"),
                    ("audio_encoder", "pad_mode"),
                    ("audio_encoder", "num_filters"),
                ):
                    with self.subTest(source, name=name, value=hostile[:9]):
                        wrong = config | {part: config[part] | {name: hostile}}
                        path.write_text(json.dumps(wrong))
                        told = self.assertTold(MusicGen.from_pretrained, folder)
                        self.assertIn(source, told)


class TestLines(LongNamesTest):
    def test_of_a_file_of_prompts(self):
        """Keys are told with their line; of values, the job says what is wrong."""
        path = self.folder / "prompts.jsonl"
        values = dict(seed=3, output=str(self.folder / "a.wav"))
        for hostile in HOSTILE:
            path.write_text(json.dumps({"prompt": "a", hostile: 3}))
            told = self.assertTold(lines.plan_file, path, values)
            self.assertIn("prompts.jsonl, line 1 has the unknown key", told)
            for name in {*ALL_KEYS} - {"prompt", "negative_prompt", "output"}:
                for value in ([hostile], {hostile: 3}, hostile):
                    with self.subTest(name, value=hostile[:9]):
                        path.write_text(json.dumps({"prompt": "a", name: value}))
                        (job,) = lines.plan_file(path, values)
                        self.assertTold(job.check)

    def test_of_captions(self):
        for hostile in HOSTILE:
            for entry in ({hostile: 3}, {"file": [hostile], "caption": "a"}, [hostile]):
                line = json.dumps(entry)
                self.assertTold(train.read_caption, Path("captions.jsonl"), 3, line)
            self.assertTold(train.decode, b"\xff", hostile)


class TestPaths(LongNamesTest):
    def test_deep_folders(self):
        deep = self.folder.joinpath(*("y" * 200,) * 5)
        deep.mkdir(parents=True)
        name = "adapter_model.safetensors"
        for file in (name, "state_dict.bin", "checkpoint.th", "config.json", "a.wav"):
            (deep / file).write_bytes(b"nothing")
        for ask in (
            *(MusicGen.from_pretrained, encodec.Encodec.from_pretrained),
            *(t5.T5.from_pretrained, mert.MERT.from_pretrained),
            *(demucs.HTDemucs.from_pretrained, published.read, peft_files.read),
        ):
            with self.subTest(ask=ask):
                self.assertTold(ask, deep)
        for ask, file in (
            (torch_file.load_torch, "state_dict.bin"),
            (torch_file.load_state, "checkpoint.th"),
            (audiocraft.load_package, "state_dict.bin"),
            (settings.read_settings, "a.wav"),
            (settings.read_settings, "none.wav"),
            (settings.load_codes, name),
            (lora.read_adapter, name),
            (lora.read_adapter, "none.safetensors"),
            (adapters.check_files, name),
        ):
            with self.subTest(ask=ask, file=file):
                self.assertTold(ask, deep / file)


class TestOneLine(LongNamesTest):
    def test_what_is_raised(self):
        @strict.in_a_line
        def fail(error):
            """Fails."""
            raise error

        self.assertEqual((fail.__name__, fail.__doc__), ("fail", "Fails."))
        for hostile in HOSTILE:
            for kind in (ValueError, OSError, FileNotFoundError, strict.Misfit):
                self.assertTold(fail, kind(hostile))
            self.assertTold(fail, strict.Misfit(hostile, "is missing"))
        for error in (OSError(28, "no space", "a file"), ValueError(3), KeyError("a")):
            with self.assertRaises(type(error)) as caught:
                fail(error)
            self.assertIs(caught.exception, error)

    def test_the_limit_holds_after_spelling(self):
        for text in HOSTILE + ("\x1b" * 400, "begin" + "\ud800" * 300 + "end"):
            self.assertLessEqual(len(strict.one_line(text)), strict.LONGEST)
