"""Whole models as transformers 5 saves them: in 16 bits, and without spiece.model."""

import json
import shutil
from pathlib import Path
from unittest.mock import patch

import mlx.core as mx
from common import EXPECTED, REFERENCE, Test, exact, expected, last
from mlx.utils import tree_flatten

import checkpoints
import convert
import published
import t5_files
from musicgen import MusicGen, encode_text
from options import Options

KINDS = {"finetune-bfloat16": mx.bfloat16, "finetune-float16": mx.float16}


class TestAgainstTransformers(Test):
    def test_the_form(self):
        """What makes these files other than those that were published."""
        for name, dtype in KINDS.items():
            folder = REFERENCE / name
            weights = mx.load(str(folder / "model.safetensors"))
            self.assertEqual({w.dtype for w in weights.values()}, {dtype})
            self.assertTrue(any("parametrizations.weight" in k for k in weights))
            config = json.loads((folder / "config.json").read_text())
            self.assertNotIn("n_positions", config["text_encoder"])
            self.assertEqual(config["dtype"], str(dtype).rpartition(".")[2])
            self.assertFalse((folder / "spiece.model").exists())

    def test_greedy_codes(self):
        for name in KINDS:
            model, want = exact(name), expected(name)
            prompts = EXPECTED[name]["prompts"]
            duration = EXPECTED[name]["frames"] / model.frame_rate
            for guidance in EXPECTED[name]["guidance"]:
                options = dict(duration=duration, temp=0, guidance_coef=guidance)
                with self.subTest(name, guidance=guidance):
                    codes = model.generate_codes(prompts, **options)
                    self.assertSame(last(codes), want[f"batch_g{guidance:g}_codes"])
                    alone = model.generate_codes(prompts[0], **options)
                    self.assertSame(last(alone), want[f"one_g{guidance:g}_codes"])
            audio = model.decode(last(want["one_g3_codes"]))
            self.assertClose(last(audio), want["one_g3_audio"])

    def test_text(self):
        for name in KINDS:
            model, want = exact(name), expected(name)
            prompts = EXPECTED[name]["prompts"]
            ids = [model.tokenizer.encode(prompt) for prompt in prompts]
            self.assertEqual(ids, EXPECTED[name]["prompt_ids"])
            text = encode_text(model, prompts, Options(guidance_coef=1))
            projected = model.decoder.output_proj(text.states)
            self.assertClose(projected * text.mask[..., None], want["text_states"])

    def test_types(self):
        """T5 and codec in float32; on a GPU the decoder in what was published."""
        for name, dtype in KINDS.items():
            with patch("musicgen.mx.default_device", return_value=mx.gpu):
                model = MusicGen.from_pretrained(REFERENCE / name, lazy=True)
            self.assertEqual(model.decoder.dtype, dtype)
            for part in (model.text_encoder, model.audio_encoder):
                dtypes = {w.dtype for _, w in tree_flatten(part.parameters())}
                self.assertEqual(dtypes, {mx.float32})
            again = model.read_text_encoder()
            self.assertEqual({w.dtype for w in again.values()}, {mx.float32})

    def test_converted(self):
        name, folder = "finetune-bfloat16", self.folder / "ours"
        convert.convert(str(REFERENCE / name), folder, mx.bfloat16)
        codes = MusicGen.from_pretrained(folder, mx.float32).generate_codes(
            EXPECTED[name]["prompts"], duration=0.3, temp=0
        )
        self.assertSame(last(codes), expected(name)["batch_g3_codes"])


class TestMelody(Test):
    def test_extractor_in_the_processors_file(self):
        """There transformers 5 writes what preprocessor_config.json held."""
        folder = self.copy("melody-transformers")
        path = folder / "processor_config.json"
        kind = "MusicgenMelodyFeatureExtractor"
        extractor = dict(feature_extractor_type=kind, n_fft=4096, hop_length=1024)
        extractor |= dict(chunk_length=30, feature_size=12, sampling_rate=32000)
        path.write_text(json.dumps({"feature_extractor": extractor}))
        config = checkpoints.read(str(folder)).config.conditioner
        self.assertEqual((config.n_fft, config.num_chroma), (4096, 12))
        extractor |= dict(hop_length=999)
        path.write_text(json.dumps({"feature_extractor": extractor}))
        with self.assertRaisesRegex(ValueError, "hop_length of the feature extractor"):
            checkpoints.read(str(folder))
        for text in ('{"feature_extractor": 3}', "[]"):
            path.write_text(text)
            with self.assertRaisesRegex(ValueError, f"{path} must "):
                checkpoints.read(str(folder))
        (folder / "preprocessor_config.json").write_text("{}")  # which comes first
        self.assertEqual(checkpoints.read(str(folder)).config.conditioner.n_fft, 16384)


class TestTokenizer(Test):
    """Of a folder with tokenizer.json alone."""

    def setUp(self):
        super().setUp()
        self.model = self.copy("finetune-bfloat16")
        self.spiece = self.model / "t5-base" / "spiece.model"

    def read(self) -> checkpoints.Checkpoint:
        return checkpoints.read(str(self.model))

    def test_its_own_comes_first(self):
        shutil.move(self.spiece, self.model / "spiece.model")
        with patch("huggingface_hub.hf_hub_download", side_effect=AssertionError):
            self.read()

    def test_from_the_folder_and_then_from_the_hub(self):
        with patch("huggingface_hub.hf_hub_download", side_effect=AssertionError):
            self.read()
        elsewhere = shutil.move(self.spiece, self.folder / "spiece.model")
        with patch("huggingface_hub.hf_hub_download", return_value=elsewhere) as fetch:
            self.read()
        self.assertEqual(fetch.call_args.args, (published.T5_REPO, "spiece.model"))

    def test_no_hub(self):
        self.spiece.unlink()
        failing = patch(
            "huggingface_hub.hf_hub_download", side_effect=OSError("offline")
        )
        with failing, patch("hub.no_network", return_value=""):
            with self.assertRaises(OSError) as caught:
                self.read()
        told = str(caught.exception)
        said = "has tokenizer.json alone, and the Hub did not give spiece.model of "
        said += "google-t5/t5-base: offline. To work offline, put it into"
        self.assertEqual(told, f"{self.model} {said} {self.spiece}.")

    def test_another_vocabulary_is_refused(self):
        path = self.model / "tokenizer.json"
        tokenizer = json.loads(path.read_text())
        vocabulary = tokenizer["model"]["vocab"]
        for change in (
            lambda: vocabulary[7].__setitem__(0, "other"),
            lambda: vocabulary.pop(9),
            lambda: vocabulary.clear(),
        ):
            change()
            path.write_text(json.dumps(tokenizer))
            with self.assertRaisesRegex(
                ValueError, "json has other pieces than .*t5-b"
            ):
                self.read()
        for text in ("", "[]", "{}", '{"model": {"vocab": [3]}}', "[" * 10**5):
            path.write_text(text)
            with self.assertRaisesRegex(ValueError, f"{path} is no tokenizer of T5's"):
                self.read()
        self.spiece.write_bytes(b"junk")
        with self.assertRaisesRegex(ValueError, f"{self.spiece} must be a Sentence"):
            self.read()

    def test_neither(self):
        (self.model / "tokenizer.json").unlink()
        with self.assertRaisesRegex(FileNotFoundError, "must hold spiece.model; take"):
            self.read()

    def test_the_published_one(self):
        """t5-base's own two files, where they are at hand, hold the same pieces."""
        folder = Path(__file__).resolve().parents[2] / "shared" / "t5"
        if not folder.is_dir():
            self.skipTest(f"{folder} is not there")
        t5_files.check_pieces(folder / "spiece.model", folder / "tokenizer.json")
