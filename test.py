"""What we promise, checked without network, torch or released weights.

    python test.py [-v] [NAME ...]

`reference/` holds tiny random checkpoints in the published layouts and what the
original implementations compute with them. A few tests want the real tokenizer
model of google-t5/t5-base: they look in ../shared/t5 and in the Hub's cache, and
say so when they skip.
"""

import argparse
import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import re
import shlex
import shutil
import signal as signals
import struct
import subprocess
import sys
import tempfile
import time
import unittest
import warnings
import zipfile
from collections.abc import Callable
from contextlib import chdir, redirect_stderr, redirect_stdout
from functools import cache, partial
from pathlib import Path
from unittest.mock import Mock, patch

os.environ.setdefault("MLX_ENABLE_TF32", "0")  # float32 products are to be exact

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import soundfile
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError
from mlx.utils import tree_flatten
from safetensors import safe_open

import benchmark
import checkpoints
import convert
import demucs
import encodec
import evaluate
import generate
import jobs
import lora
import loudness as loudness_script
import melody
import mert
import musicgen
import settings
import stream
import style
import synth
import t5
import train
from encodec import Encodec, EncodecConfig, load_audio, resample, save_audio
from mert import MERT, MERTConfig
from musicgen import MusicGen, delay_mask, make_sampler, sampling_keys, undelay
from t5 import T5, Tokenizer

HERE = Path(__file__).resolve().parent
REFERENCE = HERE / "reference"
EXPECTED = json.loads((REFERENCE / "expected.json").read_text())
TRANSFORMERS = ("mono-transformers", "stereo-transformers")
AUDIOCRAFT = ("mono-audiocraft", "stereo-audiocraft")

sys.path.insert(0, str(REFERENCE))
import manifests  # noqa: E402
import sounds  # noqa: E402


def expected(name: str) -> dict[str, mx.array]:
    return mx.load(str(REFERENCE / name / "expected.safetensors"))


def last(array: mx.array) -> mx.array:
    """The originals put time last; we put channels, codebooks, vocabulary last."""
    return array.swapaxes(1, 2)


def exact(name: str) -> MusicGen:
    """A model of the reference in float32, which is not every device's own choice."""
    return MusicGen.from_pretrained(REFERENCE / name, mx.float32)


class Test(unittest.TestCase):
    def setUp(self):
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))

    def assertClose(self, got: mx.array, want: mx.array, tolerance: float = 1e-4):
        """Relative to the largest expected value, or to 1 where that is less."""
        self.assertEqual(got.shape, want.shape)
        got, want = np.array(got, np.float64), np.array(want, np.float64)
        scale = max(np.abs(want).max(initial=0), 1)
        self.assertLess(np.abs(got - want).max(initial=0) / scale, tolerance)

    def assertSame(self, got: mx.array, want: mx.array):
        got, want = np.array(got), np.array(want)
        self.assertEqual(got.shape, want.shape)
        different = np.argwhere(got != want)
        self.assertEqual(len(different), 0, f"first at {different[:1]}")

    def copy(self, name: str) -> Path:
        """A copy of a reference checkpoint, to be damaged."""
        return Path(shutil.copytree(REFERENCE / name, self.folder / name))


class TestTokenizer(Test):
    def test_published_ids(self):
        cases = HERE.parent / "shared" / "t5" / "cases.json"
        if not cases.is_file():
            skip(self, f"{cases} is not there")
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
    shared = HERE.parent / "shared" / "t5" / "spiece.model"
    cached = try_to_load_from_cache(checkpoints.T5_REPO, "spiece.model")
    if shared.is_file():
        return shared
    if isinstance(cached, str):
        return Path(cached)
    skip(test, f"no spiece.model in {shared.parent} or the Hub's cache")


def skip(test: unittest.TestCase, reason: str) -> None:
    print(f"\nskipped {test.id()}: {reason}", file=sys.stderr)
    test.skipTest(reason)


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
            T5.sanitize({"shared.weight": mx.zeros((2, 2), mx.int32)})

    def test_missing_file(self):
        with self.assertRaisesRegex(OSError, "config.json is missing"):
            T5.from_pretrained(self.folder)

    def test_float32_always(self):
        weights = T5.sanitize({"shared.weight": mx.zeros((2, 2), mx.float16)})
        self.assertEqual(weights["shared.weight"].dtype, mx.float32)

    def test_demo(self):
        with redirect_stdout(io.StringIO()) as output:
            t5.demo(*T5.from_pretrained(REFERENCE / "t5-gated"), ["a piano"])
        self.assertIn("'a piano': ", output.getvalue())


class TestEncodec(Test):
    def test_encode_and_decode(self):
        for name in ("encodec_24khz", "encodec_32khz", "encodec_48khz"):
            model, want = Encodec.from_pretrained(REFERENCE / name), expected(name)
            for bandwidth in EXPECTED[name]["bandwidths"]:
                with self.subTest(name, bandwidth=bandwidth):
                    chunks = model.encode(last(want["audio"]), bandwidth)
                    codes = want[f"codes_{bandwidth}"]
                    self.assertEqual(len(chunks), len(codes))
                    for i, (got, scale) in enumerate(chunks):
                        self.assertSame(last(got), codes[i, ..., : got.shape[1]])
                        if scale is not None:
                            scales = want[f"scales_{bandwidth}"][i]
                            self.assertClose(scale[..., 0], scales)
                    audio = model.decode(chunks)
                    self.assertClose(last(audio), want[f"decoded_{bandwidth}"])

    def test_audio_shorter_than_its_padding(self):
        for name in ("encodec_24khz", "encodec_32khz", "encodec_48khz"):
            model, want = Encodec.from_pretrained(REFERENCE / name), expected(name)
            bandwidth = model.config.target_bandwidths[-1]
            chunks = model.encode(last(want["short_audio"]), bandwidth)
            self.assertSame(last(chunks[0][0]), want["codes_short"][0])
            self.assertClose(last(model.decode(chunks)), want["decoded_short"])

    def test_audiocraft(self):
        model = Encodec.from_pretrained(REFERENCE / "mono-audiocraft")
        self.assertEqual(model.config.pad_mode, "constant")  # as its xp.cfg says
        want = expected("mono-audiocraft")
        for kind in ("", "short_"):
            ((codes, _),) = model.encode(last(want[f"{kind}audio"]))
            self.assertSame(last(codes), want[f"{kind}codes"])
            self.assertClose(last(model.decode_chunk(codes)), want[f"{kind}decoded"])

    def test_sanitize_twice(self):
        for name in ("encodec_24khz", "encodec_32khz", "encodec_48khz"):
            weights = mx.load(str(REFERENCE / name / "model.safetensors"))
            once = Encodec.sanitize(weights)
            twice = Encodec.sanitize(once)
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
            Encodec.sanitize(dict(tree_flatten(model.parameters()))),
        ):
            tree = spelling if isinstance(spelling, dict) else spelling.parameters()
            self.assertEqual({w.dtype for _, w in tree_flatten(tree)}, {mx.float32})

    def test_strict_where_tensors_are_merged(self):
        gain = "decoder.layers.0.conv.parametrizations.weight.original0"
        bias = "encoder.layers.13.lstm.bias_hh_l0"
        for change, pattern in (
            (lambda w: w.pop(gain), "decoder.layers.0.conv.weight_g must have"),
            (
                lambda w: w.update({gain: w[gain].reshape(1, -1, 1)}),
                "weight_g must have",
            ),
            (lambda w: w.pop(bias), "lstm.bias_hh_l0 must have"),
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

    def test_transposed_convolution(self):
        for causal, out_channels, stride in ((True, 3, 4), (False, 2, 5)):
            config = EncodecConfig(use_causal_conv=causal)
            layer = encodec.ConvTranspose1d(config, 6, out_channels, stride)
            layer.conv.bias = mx.random.normal((out_channels,))
            x = mx.random.normal((2, 7, 6))
            plain = mx.conv_transpose1d(
                x, layer.conv.weight.transpose(1, 0, 2), stride=stride
            )
            right = stride if causal else stride // 2
            plain = plain[:, stride - right : plain.shape[1] - right]
            self.assertClose(layer(x), plain + layer.conv.bias, 1e-5)

    def test_lstm(self):
        mx.random.seed(0)
        layer, x = encodec.LSTMLayer(6, 6), mx.random.normal((2, 9, 6))
        whole = nn.LSTM.__call__(layer, x)[0]
        self.assertClose(layer(x)[0], whole, 1e-6)
        first, state = layer(x[:, :4])
        rest, _ = layer(x[:, 4:], state)
        self.assertClose(mx.concatenate([first, rest], axis=1), whole, 1e-6)

    def test_stream_equals_the_whole(self):
        rng = np.random.default_rng(0)
        for name in ("encodec_24khz", "encodec_32khz"):
            model = Encodec.from_pretrained(REFERENCE / name)
            K = model.config.num_codebooks()
            for T in (1, 2, 4, 7, 23, 60):
                codes = mx.array(rng.integers(0, 64, (5, T, K)))
                whole = model.decoder(model.quantizer.decode(codes))
                for _ in range(4):
                    cuts = sorted(rng.integers(0, T + 1, rng.integers(0, 5)).tolist())
                    stream = model.stream()
                    pieces = [
                        stream.push(codes[:, start:stop], last=stop is None)
                        for start, stop in zip([0, *cuts], [*cuts, None])
                    ]
                    audio = mx.concatenate(pieces, axis=1)
                    self.assertClose(audio, whole, 1e-5)

    def test_upsampling_in_pieces(self):
        for name in ("encodec_24khz", "encodec_32khz"):
            model = Encodec.from_pretrained(REFERENCE / name)
            x = mx.random.normal((2, 23, 32))
            whole = x
            for layer in model.decoder.layers[2:]:
                whole = layer(whole)
            for frames in (1, 3, 4, 22, 100):
                upsample = encodec.make_upsampler(model, 2, 2 * frames)
                self.assertClose(upsample(x, last=True), whole, 1e-5)

    def test_reach_is_exact(self):
        # changing a frame changes no sample out of reach, but the last one within
        for name in ("encodec_24khz", "encodec_32khz"):
            model = Encodec.from_pretrained(REFERENCE / name)
            before, after = encodec.upsampling_reach(model.config)
            hop, x = model.config.hop_length, mx.random.normal((1, 15, 32))
            changed = x + mx.where(mx.arange(15)[:, None] == 7, 1.0, 0.0)

            def decode(x: mx.array) -> mx.array:
                for layer in model.decoder.layers[2:]:
                    x = layer(x)
                return x

            different = np.abs(np.array(decode(x) - decode(changed)))[0, :, 0] > 0
            (places,) = np.nonzero(different)
            self.assertGreaterEqual(places.min(), 7 * hop - after)
            self.assertLess(places.max(), 8 * hop + before)
            self.assertLessEqual(places.min(), 7 * hop - after + 1)
        self.assertEqual(encodec.upsampling_reach(EncodecConfig())[1], 482)

    def test_streams_are_made_once(self):
        first, again = (encodec.parallel_streams() for _ in range(2))
        self.assertEqual(first, again)
        self.assertEqual(len(first), 2 if mx.default_device() == mx.cpu else 1)

    def test_group_norm_cannot_stream(self):
        model = Encodec.from_pretrained(REFERENCE / "encodec_48khz")
        with self.assertRaisesRegex(ValueError, "cannot decode a stream"):
            model.stream()

    def test_settings_of_the_bin_are_heeded(self):
        package = convert.load_torch(
            REFERENCE / "mono-audiocraft/compression_state_dict.bin"
        )
        weights = Encodec.sanitize(package["best_state"])
        for name, value, field, found in (
            ("seanet.causal", "true", "use_causal_conv", True),
            ("seanet.dilation_base", "3", "dilation_growth_rate", 3),
            ("seanet.pad_mode", "constant", "pad_mode", "constant"),
            ("encodec.renormalize", "true", "normalize", True),
            ("sample_rate", "16000", "sampling_rate", 16000),
        ):
            config = encodec.audiocraft_config(weights, {name: value})
            self.assertEqual(getattr(config, field), found)
            published = encodec.audiocraft_config(weights, {})
            self.assertNotEqual(getattr(published, field), found)
        with self.assertRaisesRegex(ValueError, "seanet.causal must be true or false"):
            encodec.audiocraft_config(weights, {"seanet.causal": "maybe"})

    def test_silence(self):
        model = Encodec.from_pretrained(REFERENCE / "encodec_48khz")
        chunk = model.encode(mx.zeros((1, 4000, 2)))[0]
        self.assertClose(1e8 * chunk.scale, mx.ones((1, 1, 1)), 1e-5)
        self.assertLess(mx.abs(model.decode([chunk])).max().item(), 1e-6)

    def test_default_bandwidth_is_the_smallest(self):
        model = Encodec.from_pretrained(REFERENCE / "encodec_24khz")
        audio = mx.random.normal((1, 4000, 1))
        smallest = min(model.config.target_bandwidths)
        self.assertSame(
            model.encode(audio)[0].codes, model.encode(audio, smallest)[0].codes
        )

    def test_bad_config(self):
        for change, pattern in (
            ({"upsampling_ratios": "abc"}, "upsampling_ratios must be a list"),
            ({"upsampling_ratios": [0, 1]}, "upsampling_ratios must be from 1"),
            ({"upsampling_ratios": []}, "upsampling_ratios must have 1"),
            ({"target_bandwidths": []}, "target_bandwidths must have 1"),
            ({"target_bandwidths": [1000]}, "at most 128 codebooks"),
            ({"sampling_rate": 0}, "sampling_rate must be"),
            ({"sampling_rate": "x"}, "sampling_rate must be"),
            ({"codebook_size": 0}, "codebook_size must be"),
            ({"overlap": 1}, "overlap must be"),
            ({"chunk_length_s": 1e-9}, "chunk_length_s must be"),
            ({"num_filters": 10**12}, "num_filters must be"),
            ({"num_filters": None}, "num_filters must be"),
            ({"pad_mode": "edge"}, "pad_mode must be one of"),
            ({"normalize": "yes"}, "normalize must be one of"),
        ):
            with self.subTest(change):
                folder = self.copy("encodec_48khz")
                path = folder / "config.json"
                path.write_text(json.dumps(json.loads(path.read_text()) | change))
                with self.assertRaisesRegex(ValueError, f"Codec {folder}.*{pattern}"):
                    Encodec.from_pretrained(folder)
                shutil.rmtree(folder)
        folder = self.copy("encodec_48khz")
        for text in ("[]", "{", "[" * 100_000):
            (folder / "config.json").write_text(text)
            with self.assertRaisesRegex(ValueError, "config.json (must|is no JSON)"):
                Encodec.from_pretrained(folder)

    def test_bad_input(self):
        model = Encodec.from_pretrained(REFERENCE / "encodec_24khz")
        for shape in ((1, 0, 1), (1, 100, 2), (100, 1)):
            with self.assertRaisesRegex(ValueError, "audio must have the shape"):
                model.encode(mx.zeros(shape))
        with self.assertRaisesRegex(ValueError, "bandwidth must be one of"):
            model.encode(mx.zeros((1, 100, 1)), bandwidth=5)

    def test_script(self):
        source, target = self.folder / "in.wav", self.folder / "out.flac"
        save_audio(source, 0.1 * mx.random.normal((9000, 1)), 44100)
        model = str(REFERENCE / "encodec_48khz")
        arguments = ["encodec.py", str(source), str(target), "--model", model]
        with patch("sys.argv", arguments + ["--bandwidth", "3.6"]):
            with redirect_stdout(io.StringIO()):
                encodec.main()
        audio, rate = soundfile.read(target)
        self.assertEqual((audio.shape, rate), ((9000 * 480 // 441, 2), 48000))
        with patch("sys.argv", arguments + ["--bandwidth", "99"]):
            with self.assertRaisesRegex(SystemExit, "bandwidth must be one of"):
                encodec.main()
        for name, status in (("out.xyz", "2"), ("no/out.wav", "must exist")):
            arguments[2] = str(self.folder / name)
            with patch("sys.argv", arguments), patch("encodec.demo") as demo:
                with redirect_stderr(io.StringIO()) as err:
                    with self.assertRaisesRegex(SystemExit, status):
                        encodec.main()
            demo.assert_not_called()
            self.assertLessEqual(err.getvalue().count("\n"), 1)


class TestAudioFiles(Test):
    def test_resample(self):
        signals = mx.load(str(REFERENCE / "resample.safetensors"))
        rates = [name[: -len("_input")] for name in signals if name.endswith("_input")]
        self.assertEqual(len(rates), 4)
        for name in rates:
            source, target = map(int, name.split("_"))
            got = resample(np.array(signals[f"{name}_input"]).T, source, target)
            self.assertClose(mx.array(got.T), signals[f"{name}_output"])

    def test_resample_in_blocks(self):
        audio = np.random.default_rng(0).normal(size=(150_000, 1)).astype(np.float32)
        whole = resample(audio, 32000, 48000)
        self.assertEqual(whole.shape, (225_000, 1))
        middle = resample(audio[60_000:110_000], 32000, 48000)
        self.assertClose(
            mx.array(middle[300:-300]), mx.array(whole[90_300:164_700]), 1e-6
        )

    def test_minutes_of_ogg(self):
        path = self.folder / "long.ogg"
        save_audio(path, mx.zeros((32000 * 400, 1)), 32000)
        self.assertEqual(soundfile.info(path).frames, 32000 * 400)

    def test_places_that_cannot_be_written(self):
        (self.folder / "dir.wav").mkdir()
        (self.folder / "dangling.wav").symlink_to(self.folder / "no" / "x.wav")
        os.mkfifo(self.folder / "pipe.wav")
        places = ["dir.wav", "dangling.wav", "pipe.wav"]
        if Path("/proc/self").exists():
            (self.folder / "proc").symlink_to("/proc/self")
            places.append("proc/x.wav")
        for name in places:
            with self.assertRaisesRegex(OSError, "choose another place"):
                encodec.check_audio_path(self.folder / name)
        encodec.check_audio_path(self.folder / "new.wav")
        self.assertFalse((self.folder / "new.wav").exists())

    def test_shapes(self):
        path = self.folder / "x.wav"
        save_audio(path, mx.zeros((0, 1)), 32000)
        self.assertEqual(soundfile.info(path).frames, 0)
        for shape in ((2, 3, 1), (), (4, 0), (4, 300)):
            with self.assertRaisesRegex(ValueError, "must have the shape"):
                save_audio(path, mx.zeros(shape), 32000)
        for rate in (0, 10**6):
            with self.assertRaisesRegex(ValueError, "sampling_rate must"):
                save_audio(self.folder / "x.ogg", mx.zeros((9, 1)), rate)

    def test_round_trip(self):
        tone = np.sin(np.arange(32000) * 0.05)[:, None] * [0.5, 0.25]
        for suffix, tolerance in (
            (".wav", 1e-4),
            (".flac", 1e-4),
            (".ogg", 0.05),
            (".mp3", 0.05),
        ):
            path = self.folder / f"tone{suffix}"
            save_audio(path, mx.array(tone), 32000)
            audio = load_audio(path, 32000, 2)
            self.assertEqual(audio.shape[1], 2)
            middle = slice(8000, 24000)
            self.assertClose(audio[middle], mx.array(tone)[middle], tolerance)

    def test_channels(self):
        path = self.folder / "in.wav"
        sound = np.array([[0.5, -0.25, 0.125]] * 100)
        for found, wanted, result in (
            (1, 2, [0.5, 0.5]),
            (2, 1, [0.125]),
            (3, 2, [0.5, -0.25]),
        ):
            soundfile.write(path, sound[:, :found], 32000, subtype="FLOAT")
            self.assertSame(load_audio(path, 32000, wanted)[50], result)
        soundfile.write(path, sound[:, :2], 32000)
        with self.assertRaisesRegex(ValueError, "has 2 channels, but 4"):
            load_audio(path, 32000, 4)

    def test_dither(self):
        quiet = np.full((40_000, 2), 0.3 / 32767, np.float32)  # less than half a step
        found = encodec.to_int16(quiet, np.random.default_rng(1))
        self.assertEqual(found.dtype, np.int16)
        self.assertLess(np.abs(found.mean(axis=0) - 0.3).max(), 0.02)  # it is heard
        # and what is added is the same noise, however loud the sound
        for level in (0.0, 0.5, 0.77):
            audio = np.full((40_000, 1), level / 32767, np.float32)
            error = encodec.to_int16(audio, np.random.default_rng(2)) - level
            self.assertLess(abs(error.var() - 0.25), 0.01)
        ends = encodec.to_int16(np.array([[1.5], [-1.5]]), np.random.default_rng(3))
        self.assertLessEqual(np.abs(ends - [[32766], [-32766]]).max(), 1)  # no clip
        random, noise = np.random.default_rng(0), np.random.default_rng(0)
        parts = [encodec.to_int16(quiet[a:b], random) for a, b in ((0, 7), (7, 99))]
        self.assertSame(np.concatenate(parts), encodec.to_int16(quiet[:99], noise))

    def test_subtypes(self):
        audio = np.random.default_rng(0).uniform(-1.5, 1.5, (999, 2))
        for name, subtype, error in (
            ("x.wav", "PCM_16", 2 / 32767),  # and dither
            ("x.wav", "PCM_24", 1 / 2**23),
            ("x.flac", "PCM_24", 1 / 2**23),
        ):
            path, peak = self.folder / name, np.abs(audio).max()
            with self.assertWarnsRegex(UserWarning, "scaled down"):
                save_audio(path, audio, 32000, "told", subtype)
            self.assertEqual(soundfile.info(path).subtype, subtype)
            found = soundfile.read(path)[0]
            self.assertLess(np.abs(found - audio / peak).max(), 2.5 * error)
            self.assertEqual(soundfile.SoundFile(path).comment, "told")
        path = self.folder / "x.wav"
        save_audio(path, audio, 32000, subtype="FLOAT")  # as it is, without a warning
        self.assertLess(np.abs(soundfile.read(path)[0] - audio).max(), 1e-6)
        for name, subtype in (("x.flac", "FLOAT"), ("x.mp3", "PCM_16"), ("x.wav", "x")):
            with self.assertRaisesRegex(ValueError, f"subtype of a .*{subtype}"):
                save_audio(self.folder / name, audio, 32000, subtype=subtype)

    def test_never_clips_silently(self):
        path = self.folder / "loud.wav"
        with self.assertWarnsRegex(UserWarning, "scaled down: its peak of 4.00"):
            save_audio(path, mx.array([1.0, -4.0, 2.0]), 32000)
        self.assertClose(
            load_audio(path, 32000, 1)[:, 0], mx.array([0.25, -1, 0.5]), 1e-4
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            save_audio(self.folder / "LOUD.WAV", mx.array([0.9, -1.0]), 32000)
        audio = load_audio(self.folder / "LOUD.WAV", 32000, 1)
        self.assertClose(audio[:, 0], mx.array([0.9, -1.0]), 1e-4)

    def test_bad_files(self):
        text = self.folder / "text.wav"
        text.write_text("not sound")
        empty, broken = self.folder / "empty.wav", self.folder / "nan.wav"
        soundfile.write(empty, np.zeros((0, 1)), 32000)
        soundfile.write(broken, np.array([0.0, np.nan]), 32000, subtype="FLOAT")
        for path in (text, empty, broken):
            with self.assertRaisesRegex(ValueError, path.name):
                load_audio(path, 32000, 1)
        with self.assertRaisesRegex(FileNotFoundError, "no sound file"):
            load_audio(self.folder / "none.wav", 32000, 1)
        with self.assertRaisesRegex(ValueError, "must be finite"):
            save_audio(self.folder / "out.wav", mx.array([0.0, math.nan]), 32000)


class TestDecoder(Test):
    def test_text_states_and_logits(self):
        for name in TRANSFORMERS + AUDIOCRAFT:
            with self.subTest(name):
                model, want = exact(name), expected(name)
                decoder, mask = model.decoder, want["text_mask"] == 1
                text = model.text_encoder(want["text_ids"], mask)
                states = decoder.output_proj(text) * mask[..., None]
                self.assertClose(states, want["text_states"])

                tokens = last(want["tokens"])
                B, S, _ = tokens.shape
                conditioning = decoder.condition(text[:B], mask[:B], S)
                logits = decoder(tokens, conditioning, decoder.make_cache(B, S))
                self.assertClose(logits.swapaxes(1, 2), want["logits"])

    def test_step_by_step_equals_one_pass(self):
        decoder, conditioning, tokens = random_decoder()
        whole = decoder(tokens, conditioning, decoder.make_cache(2, 9))
        cache, steps = decoder.make_cache(2, 9), []
        for start, stop in ((0, 4), (4, 5), (5, 9)):
            steps.append(decoder(tokens[:, start:stop], conditioning, cache))
        self.assertClose(mx.concatenate(steps, axis=1), whole, 1e-5)

    def test_compiled_steps_equal_the_plain_ones(self):
        # float16 and bfloat16 round after each operation, and compiled code after
        # fewer: two units in the last place of the largest logits.
        tolerances = {mx.float32: 1e-5, mx.float16: 2e-3, mx.bfloat16: 2e-2}
        for dtype, tolerance in tolerances.items():
            decoder, conditioning, tokens = random_decoder(dtype)
            cache = decoder.make_cache(2, 9)
            lower, upper = decoder.compile(conditioning, decoder.make_cache(2, 9))
            for i in range(9):
                plain = decoder(tokens[:, i : i + 1], conditioning, cache)
                fast = upper(lower(tokens[:, i : i + 1]))
                self.assertClose(
                    fast.astype(mx.float32), plain.astype(mx.float32), tolerance
                )

    def test_products_as_columns(self):
        layer, x = nn.Linear(6, 4, bias=False), mx.random.normal((2, 1, 6))
        plain = layer(x)
        residual = mx.random.normal((2, 1, 4))
        for limit in (0, 8):
            with patch("musicgen.MAX_COLUMNS", limit):
                self.assertClose(musicgen.project(layer, x), plain, 1e-6)
                both = musicgen.project(layer, x, residual)
                self.assertClose(both, plain + residual, 1e-6)

    def test_operations_per_layer(self):
        # Each costs the host some microseconds, whatever its size. On CUDA adding
        # to the residual is apart, see MAX_COLUMNS: two more.
        with patch("musicgen.MAX_COLUMNS", 0):
            counts = [operations_per_step(layers) for layers in (2, 3)]
        self.assertLessEqual(counts[1] - counts[0], 14)

    def test_one_dtype(self):
        for dtype in (mx.float16, mx.bfloat16):
            decoder, conditioning, tokens = random_decoder(dtype)
            cache = decoder.make_cache(2, 9)
            logits = decoder(tokens, conditioning, cache)
            late = cache[-1].update(mx.zeros((2, 4, 0, 8), dtype))
            memory, mask, positions = conditioning
            for array in (logits, *late, *memory[-1], mask, positions):
                self.assertEqual(array.dtype, dtype)

    def test_empty_text_adds_nothing(self):
        decoder, _, tokens = random_decoder()
        empty = decoder.condition(mx.ones((2, 5, 12)), mx.zeros((2, 5), mx.bool_), 9)
        logits = decoder(tokens, empty, decoder.make_cache(2, 9))
        for layer in decoder.layers:
            layer.cross_attention.out_proj.weight *= 0
        without = decoder(tokens, empty, decoder.make_cache(2, 9))
        self.assertSame(logits, without)

    def test_sanitize_twice(self):
        for name in TRANSFORMERS:
            weights = checkpoints.read_weights(REFERENCE / name)
            once = checkpoints.sanitize(weights)
            twice = checkpoints.sanitize(once)
            self.assertEqual(once.keys(), twice.keys())
            self.assertTrue(all(mx.array_equal(once[k], twice[k]) for k in once))


def random_decoder(dtype: mx.Dtype = mx.float32):
    """A tiny decoder, conditioning for two texts of different lengths, tokens."""
    config = musicgen.DecoderConfig(
        vocab_size=10,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        ffn_dim=20,
    )
    mx.random.seed(0)
    decoder = musicgen.Decoder(config, text_width=12)
    decoder.set_dtype(dtype)
    mask = mx.arange(5) < mx.array([[3], [5]])
    conditioning = decoder.condition(mx.random.normal((2, 5, 12)), mask, 9)
    return decoder, conditioning, mx.random.randint(0, 11, (2, 9, 4))


def operations_per_step(layers: int) -> int:
    """Operations, views aside, in the graph of one step of a decoder.

    MLX fuses attention and norm on GPUs only; here one operation stands for each.
    """

    def attention(queries, keys, values, scale, mask):
        return mx.concatenate([queries, keys, values], axis=2)[:, :, :1]

    def norm(x, weight, bias, eps):
        return mx.softmax(x, axis=-1)

    config = musicgen.DecoderConfig(64, 128, layers, 2, 256)
    decoder = musicgen.Decoder(config, text_width=12)
    mx.eval(decoder.parameters())
    fast = dict(scaled_dot_product_attention=attention, layer_norm=norm)
    with patch.multiple("mlx.core.fast", **fast):
        return benchmark.operations_per_step(decoder)


class TestBenchmark(Test):
    def table(self, *arguments: str) -> dict[str, str]:
        with patch("sys.argv", ["benchmark.py", *arguments]):
            with redirect_stdout(io.StringIO()) as out:
                benchmark.main()
        rows = [line.strip("| ").split(" | ") for line in out.getvalue().splitlines()]
        return dict(row for row in rows if len(row) == 2)

    def test_model(self):
        folder = str(REFERENCE / "mono-audiocraft")
        rows = self.table("--model", folder, "--duration", "0.4", "--batch", "2")
        self.assertEqual((rows["model"], rows["takes"]), (folder, "2 of 0.4 s"))
        self.assertRegex(rows["step"], r"^[\d.]+ ms mean, [\d.]+ median, [\d.]+ worst$")
        self.assertRegex(rows["streaming"], "^first sound after .* s, a take in .* s$")
        self.assertGreater(int(rows["operations per step"]), 20)

    def test_separation(self):
        config = demucs.HTDemucs.from_pretrained(REFERENCE / "htdemucs").config
        with patch("benchmark.HTDemucsConfig", return_value=config):
            rows = self.table("--random", "htdemucs", "--duration", "0.5")
        self.assertRegex(rows["separation"], "^.* s for 0.5 s of audio, .* times real")


class TestDelayPattern(Test):
    def test_drawing(self):
        rows = ["0123...", ".0123..", "..0123.", "...0123"]
        drawn = [[cell != "." for cell in row] for row in rows]
        self.assertSame(delay_mask(4, (0, 1, 2, 3)).T, drawn)

    def test_undone_exactly(self):
        for delays in ((0, 1, 2, 3), (0, 0, 1, 1, 2, 2, 3, 3)):
            frames, K = 6, len(delays)
            codes = np.random.default_rng(0).integers(0, 50, (2, frames, K))
            sequence = np.full((2, frames + 3, K), 99)
            for k, delay in enumerate(delays):
                sequence[:, delay : delay + frames, k] = codes[:, :, k]
            self.assertSame(undelay(mx.array(sequence), delays), codes)
            self.assertSame(delay_mask(frames, delays), sequence[0] != 99)

    def test_too_short(self):
        with self.assertRaisesRegex(ValueError, "more than 3 steps"):
            undelay(mx.zeros((1, 3, 4), mx.int32), (0, 1, 2, 3))


class TestSampling(Test):
    logits = mx.array([2.0, 1.0, 0.0, 0.0, -1.0, -3.0])

    def frequencies(self, draws: int = 20000, **options) -> np.ndarray:
        """Share of each token in draws of rows with a key each."""
        logits = mx.broadcast_to(self.logits, (draws, 1, 1, 6))
        keys = sampling_keys(list(range(draws)), 1)[0]
        tokens = make_sampler(**options)(logits, keys)
        return np.bincount(np.array(tokens).ravel(), minlength=6) / draws

    def check(self, kept: list[int], temp: float = 1.0, **options):
        """The shares are the softmax over `kept`, within four deviations."""
        weights = np.exp(np.array(self.logits) / temp) * np.isin(np.arange(6), kept)
        exact = weights / weights.sum()
        got = self.frequencies(temp=temp, **options)
        self.assertTrue((np.abs(got - exact) <= 4 * np.sqrt(exact / 20000)).all(), got)
        self.assertEqual(got[exact == 0].sum(), 0)

    def test_temperature(self):
        self.check([0, 1, 2, 3, 4, 5], temp=1.7, top_k=2048)
        self.check([0, 1, 2, 3, 4, 5], temp=0.6, top_k=6)

    def test_top_k_keeps_ties(self):
        self.check([0, 1], top_k=2)
        self.check([0, 1, 2, 3], top_k=3)  # the third ties with the fourth
        self.check([0], top_k=1)

    def test_top_p(self):
        # Probabilities 0.59, 0.22, 0.08, 0.08, 0.03, 0.004: an entry stays where
        # those before it reach no more than p.
        self.check([0], top_p=0.58)
        self.check([0, 1], top_p=0.6)
        self.check([0, 1], temp=0.5, top_p=0.9, top_k=1)  # and top_k is ignored
        self.check([0, 1, 2, 3, 4, 5], top_p=1.0)

    def test_top_p_reached_exactly(self):
        # audiocraft drops what comes after more than p: here half is no more.
        self.logits = mx.array([0.0, 0.0, -100.0, -100.0, -100.0, -100.0])
        self.check([0, 1], top_p=0.5)
        self.check([0], top_p=0.49)

    def test_greedy(self):
        self.assertEqual(self.frequencies(draws=3, temp=0).tolist(), [1, 0, 0, 0, 0, 0])

    def test_guidance_is_in_float32(self):
        logits = mx.array([[[[1.0, 2049.0]]], [[[1.0, 2048.0]]]]).astype(mx.float16)
        for coefficient in (1, 3):
            options = musicgen.Options(guidance_coef=coefficient)
            guided = musicgen.guide(logits, options)
            self.assertEqual(guided.dtype, mx.float32)

    def test_seeds_of_64_bits_differ(self):
        keys = sampling_keys([5, 5 + 2**32], 1)
        self.assertNotEqual(keys[0, 0].tolist(), keys[0, 1].tolist())

    def test_keys_depend_on_seed_and_step_alone(self):
        several = sampling_keys([5, 7, 2**64 - 1], 9)
        self.assertSame(several[:4, 1:2], sampling_keys([7], 4))
        self.assertEqual(len(np.unique(np.array(several).reshape(-1, 2), axis=0)), 27)


class TestGenerate(Test):
    def test_greedy_codes(self):
        for name in TRANSFORMERS + AUDIOCRAFT:
            model, want = exact(name), expected(name)
            prompts = EXPECTED[name]["prompts"]
            duration = EXPECTED[name]["frames"] / model.frame_rate
            for guidance in (1, 3, 4.5):
                options = dict(duration=duration, temp=0, guidance_coef=guidance)
                with self.subTest(name, guidance=guidance):
                    codes = model.generate_codes(prompts, **options)
                    self.assertSame(last(codes), want[f"batch_g{guidance}_codes"])
                    alone = model.generate_codes(prompts[0], **options)
                    self.assertSame(alone[0], codes[0])
                    if name in TRANSFORMERS:
                        self.assertSame(last(alone), want[f"one_g{guidance}_codes"])

    def test_audio(self):
        for name in TRANSFORMERS + AUDIOCRAFT:
            model, want = exact(name), expected(name)
            codes = want["batch_g3_codes"][:1]
            self.assertClose(last(model.decode(last(codes))), want["one_g3_audio"])

    def test_take_is_the_same_alone_and_in_a_batch(self):
        model = exact("stereo-audiocraft")
        prompts = [
            "slow piano",
            "",
            "808 drums and a very long guitar solo",
            "slow piano",
        ]
        batch = model.generate_codes(prompts, duration=0.4, seed=11)
        for row, prompt in enumerate(prompts):
            alone = model.generate_codes(prompt, duration=0.4, seed=11 + row)
            self.assertSame(alone[0], batch[row])
        listed = model.generate_codes(prompts[:2], duration=0.4, seed=[12, 12])
        self.assertSame(listed[1], batch[1])
        self.assertNotEqual(batch[0].tolist(), batch[3].tolist())

    def test_no_guidance_by_the_text_is_the_null_rows(self):
        model = exact("mono-audiocraft")
        null = model.generate_codes("", duration=0.3, temp=0, guidance_coef=1)
        guided = model.generate_codes("drums", duration=0.3, temp=0, guidance_coef=0)
        self.assertSame(guided, null)
        empty = model.generate_codes("", duration=0.3, temp=0, guidance_coef=3)
        self.assertSame(empty, null)
        _, mask = model.encode_text(["", "drums"], with_null=False)
        self.assertSame(mask.any(axis=1), [False, True])

    def test_text_encoder_is_freed_where_memory_is_short(self):
        for name in ("mono-transformers", "stereo-audiocraft"):
            model = exact(name)
            codes = model.generate_codes("drums", duration=0.1, seed=1)
            self.assertIsNotNone(model.text_encoder)
            with patch("musicgen.mx.get_memory_limit", return_value=10**6):
                for _ in range(2):  # and loaded again for the next text
                    again = model.generate_codes("drums", duration=0.1, seed=1)
                    self.assertIsNone(model.text_encoder)
                    self.assertSame(again, codes)

    def test_columns_hold_the_same_numbers(self):
        decoder, conditioning, tokens = random_decoder()
        before = dict(tree_flatten(decoder.parameters()))
        rows = decoder(tokens, conditioning, decoder.make_cache(2, 9))
        decoder.store_columns()
        after = dict(tree_flatten(decoder.parameters()))
        self.assertTrue(all(mx.array_equal(before[k], after[k]) for k in before))
        columns = decoder(tokens, conditioning, decoder.make_cache(2, 9))
        self.assertClose(columns, rows, 1e-5)

    def test_every_step_draws_anew(self):
        model = exact("mono-audiocraft")
        model.decoder.linears.weight *= 0  # all codes equally likely
        codes = np.array(model.generate_codes("a", duration=1.0, top_k=64, seed=0))
        for k in range(4):
            self.assertGreater(len(np.unique(codes[0, :, k])), 20)

    def test_dtype_on_a_gpu(self):
        with patch("musicgen.mx.default_device", return_value=mx.gpu):
            for name in ("mono-audiocraft", "mono-transformers"):
                model = MusicGen.from_pretrained(REFERENCE / name)
                self.assertEqual(model.decoder.dtype, mx.float16)
                for part in (model.text_encoder, model.audio_encoder):
                    dtypes = {w.dtype for _, w in tree_flatten(part.parameters())}
                    self.assertEqual(dtypes, {mx.float32})

    def test_shapes(self):
        model = exact("stereo-transformers")
        audio = model.generate(["a", "b"], duration=0.239, seed=0)
        self.assertEqual(audio.shape, (2, 11 * 640, 2))
        self.assertEqual(audio.dtype, mx.float32)
        self.assertEqual(model.generate_codes("a", duration=0.02).shape, (1, 1, 8))

    def test_half_precision(self):
        single = exact("mono-transformers")
        for dtype in (mx.float16, mx.bfloat16):
            model = MusicGen.from_pretrained(REFERENCE / "mono-transformers", dtype)
            self.assertEqual(model.decoder.dtype, dtype)
            codes = model.generate_codes("drums", duration=0.1, temp=0)
            want = single.generate_codes("drums", duration=0.1, temp=0)
            self.assertSame(codes[:, 0], want[:, 0])

    def test_long_prompt_is_cut_with_a_warning(self):
        model = exact("mono-transformers")
        prompt = "drums " * 600
        ids = model.tokenizer.encode(prompt)[:511] + [1]
        with self.assertWarnsRegex(UserWarning, "T5 takes 512"):
            text, mask = model.encode_text([prompt], with_null=False)
        self.assertSame(text, model.text_encoder.encode([ids])[0])
        self.assertTrue(mask.all().item())

    def test_bad_options(self):
        model = exact("mono-transformers")
        for name, values in {
            "duration": (0, -1, math.nan, 0.01, math.inf, 10**400),
            "temp": (-0.1, math.nan, "1", None, 1e-39),
            "top_k": (0, 2049, 2.5),
            "top_p": (-0.1, 1.1, math.nan),
            "guidance_coef": (math.nan, math.inf),
            "seed": (-1, 2**64, [1, 2], [0.5], 1.5),
        }.items():
            for value in values:
                with self.subTest(name, value=value):
                    with self.assertRaisesRegex(ValueError, f"^{name} must"):
                        model.generate_codes("a", **{name: value})
        for prompts in ([], [None], ["a", 3], None, 3):
            with self.assertRaisesRegex(ValueError, "must be a prompt"):
                model.generate_codes(prompts)
        codes = model.generate_codes("a", duration=0.1, seed=np.int64(3))
        self.assertSame(codes, model.generate_codes("a", duration=0.1, seed=3))


class TestLongAudio(Test):
    """Windows that slide, and codes that continue an audio prompt."""

    def load(self, name: str) -> MusicGen:
        model = exact(name)
        model.config.max_duration = 15 / 50
        return model

    def test_greedy_codes(self):
        for name in TRANSFORMERS + AUDIOCRAFT:
            model = self.load(name)
            want = mx.load(str(REFERENCE / name / "continued.safetensors"))
            self.assertEqual("extended" in want, name in AUDIOCRAFT)
            sound, prompt = want["audio"][0].T, EXPECTED[name]["prompts"][0]
            self.assertSame(last(model.encode_prompt(sound, 15)), want["codes"])
            for case, audio_prompt in (
                ("continued", sound),
                ("extended", None),
                ("continued_extended", sound),
            ):
                if case not in want:
                    continue
                with self.subTest(name, case=case):
                    codes = model.generate_codes(
                        prompt,
                        duration=want[case].shape[2] / 50,
                        temp=0,
                        audio_prompt=audio_prompt,
                        extend_stride=9 / 50,
                    )
                    self.assertSame(last(codes), want[case])

    def test_windows(self):
        sixty = [(0, 1500), (900, 2400), (1800, 3000)]
        self.assertEqual(musicgen.windows(3000, 1500, 900), sixty)
        self.assertEqual(musicgen.windows(1500, 1500, 900), [(0, 1500)])
        self.assertEqual(musicgen.windows(1501, 1500, 900), [(0, 1500), (900, 1501)])
        self.assertEqual(musicgen.windows(1, 1500, 900), [(0, 1)])

    def test_stride_is_three_fifths_of_the_window(self):
        model = self.load("mono-audiocraft")
        options = dict(prompts="drums", duration=0.8, temp=0)
        codes = model.generate_codes(**options)
        self.assertSame(codes, model.generate_codes(**options, extend_stride=9 / 50))
        other = model.generate_codes(**options, extend_stride=5 / 50)
        self.assertNotEqual(other.tolist(), codes.tolist())
        self.assertSame(other[:, :15], codes[:, :15])

    def test_stopped_and_continued_is_the_same_take(self):
        model = self.load("stereo-audiocraft")

        def codes(known: mx.array) -> mx.array:
            work = (["drums"], [7], [None], known, musicgen.Options(duration=0.8), None)
            pieces = model._codes(*work)
            return mx.concatenate([p for p in pieces if p is not None], axis=1)

        whole = codes(mx.zeros((1, 0, 8), mx.uint32))
        self.assertEqual(whole.shape, (1, 40, 8))
        for T in (1, 14, 15, 16, 30, 39):
            self.assertSame(codes(whole[:, :T]), whole)

    def test_every_row_equals_its_run_alone(self):
        model = self.load("mono-audiocraft")
        rng = np.random.default_rng(0)
        words = "slow happy drums piano 808 loud guitar strings".split()
        sound = mx.array(rng.normal(size=(1000, 1)), mx.float32)
        for trial in range(4):
            B = int(rng.integers(2, 6))
            prompts = [
                " ".join(rng.choice(words, rng.integers(0, 8))) for _ in range(B)
            ]
            seeds = [int(seed) for seed in rng.integers(0, 2**63, B)]
            options = dict(
                duration=float(rng.uniform(0.1, 0.7)),
                guidance_coef=float(rng.choice([1, 3])),
                audio_prompt=sound if trial % 2 else None,
            )
            batch = model.generate_codes(prompts, seed=seeds, **options)
            split = model.generate_codes(prompts, seed=seeds, batch_size=2, **options)
            self.assertSame(split, batch)
            for row in range(B):
                alone = model.generate_codes(prompts[row], seed=seeds[row], **options)
                self.assertSame(alone[0], batch[row])

    def test_windows_draw_anew(self):
        model = self.load("mono-audiocraft")
        model.decoder.linears.weight *= 0  # all codes equally likely
        codes = np.array(model.generate_codes("a", duration=24 / 50, top_k=64, seed=0))
        # had the second window begun its noise again, 15 on would repeat 6 on
        self.assertLess((codes[0, 15:24] == codes[0, 6:15]).mean(), 0.2)

    def test_audio_prompt_ends_a_frame_before_the_end(self):
        model = self.load("mono-audiocraft")
        model.generate_codes("a", duration=0.1, audio_prompt=mx.ones((4 * 640, 1)))
        with self.assertRaisesRegex(ValueError, "a frame shorter"):
            longer = mx.ones((4 * 640 + 1, 1))
            model.generate_codes("a", duration=0.1, audio_prompt=longer)

    def test_negative_prompt(self):
        model = self.load("mono-audiocraft")
        options = dict(duration=0.2, temp=0)
        pulled = model.generate_codes(
            "drums", negative_prompt="piano", guidance_coef=0, **options
        )
        own = model.generate_codes("piano", guidance_coef=1, **options)
        self.assertSame(pulled, own)  # coefficient 0 leaves the null rows alone
        batch = model.generate_codes(["a", "drums"], negative_prompt="piano", **options)
        alone = model.generate_codes("drums", negative_prompt="piano", **options)
        self.assertSame(batch[1], alone[0])
        plain = model.generate_codes("drums", **options)
        self.assertNotEqual(alone.tolist(), plain.tolist())

    def test_memory_is_flat(self):
        if mx.default_device() != mx.cpu:
            skip(self, "a GPU's memory comes in blocks larger than these caches")
        model = self.load("mono-audiocraft")
        peaks = {2: [], 10: []}
        for windows in (2, 10) * 3:  # the least of three: evaluation may lag behind
            mx.clear_cache()
            mx.reset_peak_memory()
            before = mx.get_active_memory()
            model.generate_codes("drums", duration=(15 + 9 * (windows - 1)) / 50)
            peaks[windows].append(mx.get_peak_memory() - before)
        # eight windows more, but not the caches of a single one; codes and keys grow
        caches = 2 * model.decoder.cache_bytes(15 + 3)
        self.assertLess(min(peaks[10]) - min(peaks[2]), caches)

    def test_split_where_memory_is_short(self):
        model, batches = self.load("mono-audiocraft"), []
        prepare = model._prepare

        def count(prompts, *rest):
            batches.append(len(prompts))
            return prepare(prompts, *rest)

        row = 2 * model.decoder.cache_bytes(10)
        room = musicgen.DECODING_MEMORY + 2.5 * row
        with patch("musicgen.memory_size", return_value=room), patch(
            "mlx.core.get_active_memory", return_value=0
        ):
            with patch.object(model, "_prepare", count):
                model.generate_codes(["a"] * 5, duration=0.2)
        self.assertEqual(batches, [2, 2, 1])

    def test_progress(self):
        model, calls = self.load("mono-audiocraft"), []
        for prompts, batch_size in (("a", 1), (["a", "b", "c"], 2)):
            calls.clear()
            model.generate_codes(
                prompts,
                duration=0.8,
                batch_size=batch_size,
                callback=lambda *call: calls.append(call),
            )
            total = calls[0][1]
            self.assertEqual(calls, [(i, total) for i in range(total)])

    def test_channels_of_the_audio_prompt(self):
        rng = np.random.default_rng(0)
        sound = mx.array(rng.normal(size=(1300, 2)), mx.float32)
        mono, stereo = self.load("mono-audiocraft"), self.load("stereo-audiocraft")
        mixed = sound.mean(axis=1, keepdims=True)
        self.assertSame(mono.encode_prompt(sound, 9), mono.encode_prompt(mixed, 9))
        codes = stereo.encode_prompt(mixed, 9)
        self.assertEqual(codes.shape, (1, 3, 8))
        self.assertSame(codes[..., ::2], codes[..., 1::2])
        own = stereo.encode_prompt(sound, 9)
        left = stereo.encode_prompt(sound[:, :1], 9)
        self.assertSame(own[..., ::2], left[..., ::2])
        self.assertNotEqual(own[..., 1::2].tolist(), left[..., 1::2].tolist())

    def test_drop_prompt(self):
        model = self.load("mono-audiocraft")
        sound = 0.1 * mx.random.normal((1300, 1))
        options = dict(prompts="a", duration=0.2, seed=0, audio_prompt=sound)
        whole = model.generate(**options)
        rest = model.generate(**options, drop_prompt=True)
        self.assertSame(rest, whole[:, 3 * 640 :])

    def test_bad_options(self):
        model = self.load("mono-audiocraft")
        for options, pattern in (
            (dict(extend_stride=0), "extend_stride must"),
            (dict(extend_stride=0.3), "extend_stride must"),
            (dict(extend_stride=math.nan), "extend_stride must"),
            (dict(batch_size=0), "batch_size must"),
            (dict(negative_prompt=None), "negative_prompt must"),
            (dict(negative_prompt="a", guidance_coef=1), "negative_prompt must"),
            (dict(audio_prompt=mx.zeros((0, 1))), "audio_prompt must have"),
            (dict(audio_prompt=mx.zeros((9, 3))), "audio_prompt must have"),
            (dict(audio_prompt=mx.zeros(9)), "audio_prompt must have"),
            (dict(audio_prompt=mx.array([[math.nan]])), "audio_prompt must be finite"),
            (
                dict(audio_prompt=mx.ones((6401, 1))),
                "audio_prompt must be a frame shorter",
            ),
        ):
            with self.subTest(pattern):
                with self.assertRaisesRegex(ValueError, pattern):
                    model.generate_codes("a", **(dict(duration=0.2) | options))
        with self.assertWarnsRegex(UserWarning, "silent"):
            model.generate_codes("a", duration=0.2, audio_prompt=mx.zeros((640, 1)))


class TestStream(Test):
    def test_is_what_generate_gives(self):
        sound = mx.array(np.random.default_rng(0).normal(size=(1000, 1)), mx.float32)
        for name in TRANSFORMERS + AUDIOCRAFT:
            model = exact(name)
            model.config.max_duration = 15 / 50
            for duration in (0.02, 0.2, 0.9):
                options = dict(duration=duration, seed=3, negative_prompt="piano")
                if duration > 0.1:
                    options["audio_prompt"] = sound
                whole = model.generate("drums", **options)[0]
                for chunk in (0.02, 0.1, 0.2):
                    if chunk > duration:
                        continue
                    pieces = list(model.stream("drums", chunk=chunk, **options))
                    self.assertTrue(all(piece.shape[0] for piece in pieces))
                    self.assertClose(mx.concatenate(pieces), whole, 1e-5)

    def test_comes_while_it_is_made(self):
        model = exact("mono-audiocraft")
        steps = []
        stream = model.stream(
            "drums", duration=1.0, chunk=0.2, callback=lambda *step: steps.append(step)
        )
        self.assertEqual(steps, [])
        first = next(stream)
        # 10 frames and 3 of delay are made, and some steps more are under way;
        # the codec waits for 3 frames and 482 samples
        self.assertEqual(len(steps), 13 + musicgen.STEPS_AHEAD)
        self.assertEqual(first.shape[0], 7 * 640 - 482)
        sizes = [piece.shape[0] for piece in stream]
        self.assertEqual(sizes[:3], [6400] * 3)
        self.assertEqual(len(steps), 53)

    def test_comes_in_time_for_any_chunk(self):
        model = exact("mono-audiocraft")
        for frames in (1, 2, 3, 5, 7, 25):
            steps, made = [], 0
            count = lambda *step: steps.append(step)  # noqa: E731
            options = dict(duration=1.0, chunk=frames / 50, callback=count)
            for piece in model.stream("drums", **options):
                made += len(piece)
                if len(steps) < 53:  # all but delay, look-ahead and what is under way
                    behind = len(steps) * 640 - made
                    ahead = 3 + 4 + frames + musicgen.STEPS_AHEAD
                    self.assertLessEqual(behind, 640 * ahead)
            self.assertEqual(made, 32000)

    def test_bad_options(self):
        model = exact("mono-audiocraft")
        for options, pattern in (
            (dict(chunk=0), "chunk must"),
            (dict(chunk=math.inf), "chunk must"),
            (dict(chunk=math.nan), "chunk must"),
            (dict(chunk="a"), "chunk must"),
            (dict(temp=-1), "temp must"),
            (dict(seed=-1), "seed must"),
            (dict(codes_prompt=mx.zeros((1, 4))), "codes_prompt must be"),
            (dict(codes_prompt=mx.zeros((2, 4, 4), mx.int32)), "codes_prompt must be"),
            (dict(codes_prompt=mx.zeros((1, 4, 4))), "codes must be"),
            (dict(codes_prompt=mx.zeros((1, 4, 4), mx.int32) - 1), "codes must be"),
        ):
            with self.assertRaisesRegex(ValueError, pattern):
                model.stream("a", duration=1.0, **options)
        with self.assertRaisesRegex(ValueError, "prompt must be one text"):
            model.stream(["a", "b"], duration=1.0)
        both = dict(audio_prompt=mx.ones((640, 1)), codes_prompt=mx.zeros((1, 1, 4)))
        with self.assertRaisesRegex(ValueError, "must not come together"):
            model.generate_codes("a", duration=1.0, **both)

    def test_stopped_among_batches(self):
        model, steps = exact("mono-audiocraft"), []
        options = dict(duration=1.0, seed=3, batch_size=1)
        codes = model.generate_codes(
            ["drums", "piano", "guitar"],
            stop=lambda: len(steps) > 20 or steps.append(0),
            **options,
        )
        self.assertEqual(codes.shape[0], 1)  # the others were not begun
        whole = model.generate_codes("drums", **options)
        self.assertSame(codes, whole[:, : codes.shape[1]])


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
                config = musicgen.MusicGenConfig.from_dict(self.config(name))
                model = MusicGen(config, tokenizer=None)
                weights = self.arrays(f"{name}.transformers")
                again = {respell(k): v for k, v in weights.items()}
                for spelling in (weights, again):
                    found = checkpoints.sanitize(spelling)
                    model.load_weights(list(found.items()))
                ours = checkpoints.sanitize(dict(tree_flatten(model.parameters())))
                model.load_weights(list(ours.items()))

    def test_audiocraft(self):
        for name in manifests.MUSICGEN + manifests.MELODY:
            with self.subTest(name):
                weights = self.arrays(f"{name}.audiocraft")
                config = checkpoints.audiocraft_config(weights, {})
                published = musicgen.MusicGenConfig.from_dict(self.config(name))
                self.assertEqual(config, published.decoder)
                decoder = musicgen.Decoder(config, text_width=768)
                found = musicgen.Decoder.sanitize(weights)
                decoder.load_weights(list(found.items()))

    def test_style(self):
        weights, of_sound = checkpoints.part_sound(
            self.arrays(f"{manifests.STYLE[0]}.audiocraft")
        )
        decoder = checkpoints.audiocraft_config(weights, {})
        self.assertEqual((decoder.hidden_size, decoder.num_hidden_layers), (1536, 48))
        self.assertEqual(decoder.sound_width, 512)
        model = musicgen.Decoder(decoder, text_width=768)
        model.load_weights(list(musicgen.Decoder.sanitize(weights).items()))
        weights = MERT.sanitize(self.arrays("mert-v1-95m.transformers"))
        again = {
            respell(k): v for k, v in self.arrays("mert-v1-95m.transformers").items()
        }
        for weights in (weights, MERT.sanitize(again)):
            features = MERT(MERTConfig())
            features.load_weights(list(weights.items()))
        with patch.object(MERT, "from_pretrained", return_value=features):
            codec = Encodec(EncodecConfig.from_dict(self.config("encodec_32khz")))
            found = style.StyleConditioner.from_audiocraft(
                of_sound, {}, self.folder, codec
            )
        self.assertEqual(found.config, style.StyleConfig())

    def test_codecs(self):
        for name in ("encodec_24khz", "encodec_32khz", "encodec_48khz"):
            config = EncodecConfig.from_dict(self.config(name))
            weights = self.arrays(f"{name}.transformers")
            again = {respell(k): v for k, v in weights.items()}
            for spelling in (weights, again):
                Encodec(config).load_weights(list(Encodec.sanitize(spelling).items()))
        weights = Encodec.sanitize(self.arrays("encodec_32khz.audiocraft"))
        found = encodec.audiocraft_config(weights, {})
        published = EncodecConfig.from_dict(self.config("encodec_32khz"))
        self.assertEqual(found, published)
        Encodec(found).load_weights(list(weights.items()))

    def test_t5(self):
        model = T5(t5.T5Config.from_dict(self.config("t5-base")))
        weights = T5.sanitize(self.arrays("t5-base.transformers"))
        model.load_weights(list(weights.items()))

    def test_demucs(self):
        weights = demucs.HTDemucs.sanitize(self.arrays("htdemucs.demucs"))
        model = demucs.HTDemucs(demucs.HTDemucsConfig())
        model.load_weights(list(weights.items()))

    def test_manifests_equal_the_full_ones(self):
        folder = HERE.parent / "shared" / "checkpoints"
        if not folder.is_dir():
            skip(self, f"{folder} is not there")
        for name in manifests.MUSICGEN + manifests.STYLE + manifests.MELODY:
            full = json.loads((folder / f"{name}.audiocraft.json").read_text())
            full = full["state_dict.bin"]["best_state"]
            ours = manifests.expand(manifests.read()["tensors"][f"{name}.audiocraft"])
            self.assertEqual({k: (d, tuple(s)) for k, (d, s) in full.items()}, ours)


def respell(name: str) -> str:
    """Weight norm as transformers has spelled it since 4.46."""
    name = name.replace(".weight_g", ".parametrizations.weight.original0")
    return name.replace(".weight_v", ".parametrizations.weight.original1")


class TestDemucs(Test):
    folder_of_reference = REFERENCE / "htdemucs"

    def load(self) -> tuple[demucs.HTDemucs, dict[str, mx.array]]:
        model = demucs.HTDemucs.from_pretrained(self.folder_of_reference)
        expected = self.folder_of_reference / "expected" / "expected.safetensors"
        return model, mx.load(str(expected))

    def test_stems(self):
        model, want = self.load()
        self.assertEqual((model.sampling_rate, model.channels), (4000, 2))
        self.assertEqual(model.config.segment_length, 1200)
        steps = []
        stems = model.separate(want["audio"], callback=lambda *s: steps.append(s))
        self.assertClose(stems, want["stems"], 1e-5)
        self.assertEqual(steps, [(i, 4) for i in range(4)])

    def test_spectrogram_and_back(self):
        rates = mx.array([[0.05], [0.3], [1.1]])
        audio = mx.sin(mx.arange(1000) * rates)
        spectrum = demucs.spectrogram(audio, 256)
        self.assertEqual(spectrum.shape, (3, 128, 16))
        back = demucs.waveform(spectrum, 1000)
        # as in the original the frames at the ends are left out, and a frequency
        inner = slice(128, -128)
        self.assertClose(back[:, inner], audio[:, inner], 1e-3)

    def test_shifts(self):
        model, want = self.load()
        once, again = (model.separate(want["audio"], shifts=2) for _ in range(2))
        self.assertEqual(once.shape, want["stems"].shape)
        self.assertSame(once, again)
        self.assertNotEqual(once.tolist(), want["stems"].tolist())

        class Same(demucs.HTDemucs):
            def __call__(self, audio):  # nothing that a shift could change
                return mx.repeat(audio[:, None], 4, axis=1)

        same = Same(model.config)
        for options in (dict(shifts=3), dict(overlap=0.0), dict(overlap=0.9)):
            stems = same.separate(want["audio"], **options)
            self.assertClose(stems, mx.stack([want["audio"]] * 4), 1e-6)

    def test_short_sound(self):
        model, want = self.load()
        for length in (1, 7, 1199, 1200, 1201):
            stems = model.separate(want["audio"][:length])
            self.assertEqual(stems.shape, (4, length, 2))
            self.assertTrue(mx.isfinite(stems).all().item())

    def test_bad_input(self):
        model, want = self.load()
        for audio, options, pattern in (
            (mx.zeros((9,)), {}, "audio must have the shape"),
            (mx.zeros((9, 1)), {}, "audio must have the shape"),
            (mx.zeros((0, 2)), {}, "audio must have the shape"),
            (mx.full((9, 2), math.nan), {}, "must be finite"),
            (want["audio"], dict(overlap=1), "overlap must be"),
            (want["audio"], dict(shifts=-1), "shifts a number from 0"),
            (want["audio"], dict(shifts=1.5), "shifts a number from 0"),
        ):
            with self.assertRaisesRegex(ValueError, pattern):
                model.separate(audio, **options)

    def test_bad_files(self):
        source = self.folder_of_reference / "model.safetensors"
        weights = mx.load(str(source))
        with safe_open(source, "numpy") as file:
            about = file.metadata()
        path = self.folder / "model.safetensors"

        def kwargs(**other) -> dict[str, str]:
            found = json.loads(about["kwargs"]) | other
            return about | {"kwargs": json.dumps(found)}

        some = dict(list(weights.items())[1:])
        for wrong, told, pattern in (
            (weights, {}, "must hold an HTDemucs, but holds none"),
            (weights, {"klass": "demucs.hdemucs.HDemucs"}, "must hold an HTDemucs"),
            (weights, about | {"kwargs": "{"}, "does not load"),
            (weights, about | {"kwargs": "[]"}, "does not load"),
            (weights, kwargs(t_emb="cape"), "t_emb must be 'sin', got 'cape'"),
            (weights, kwargs(nfft=16), "nfft must be a multiple"),
            (weights, kwargs(t_heads=3), "bottom_channels must be a multiple"),
            (weights, kwargs(channels="many"), "does not load"),
            (weights, kwargs(channels=4), "does not load"),
            (weights, kwargs(depth=0), "does not load"),
            (some, about, "does not load: Missing 1 parameters"),
            (weights | {"more": mx.zeros(3)}, about, "does not load: Received 1"),
        ):
            mx.save_safetensors(str(path), wrong, told)
            with self.assertRaisesRegex(ValueError, pattern):
                demucs.HTDemucs.from_pretrained(self.folder)
        path.write_bytes(b"nothing")
        with self.assertRaisesRegex(ValueError, "model.safetensors is damaged"):
            demucs.HTDemucs.from_pretrained(self.folder)
        shutil.copy(source, self.folder / "other.safetensors")
        with self.assertRaisesRegex(FileNotFoundError, "one .safetensors file"):
            demucs.HTDemucs.from_pretrained(self.folder)
        with self.assertRaisesRegex(FileNotFoundError, "must be a folder or a Hub"):
            demucs.HTDemucs.from_pretrained("none")

    def run_script(self, *arguments: str) -> str:
        """What the script prints; SystemExit says what is wrong."""
        model = ["--model", str(self.folder_of_reference)]
        with patch("sys.argv", ["demucs.py", *map(str, arguments), *model]):
            with redirect_stdout(io.StringIO()) as out:
                with redirect_stderr(io.StringIO()) as err:
                    try:
                        demucs.main()
                    except SystemExit as stop:
                        return err.getvalue() if stop.code == 2 else str(stop.code)
        return out.getvalue()

    def test_script(self):
        _, want = self.load()
        source, folder = self.folder / "song.wav", self.folder / "stems"
        save_audio(source, want["audio"], 4000, subtype="FLOAT")
        told = self.run_script(source, "--output-dir", folder)
        names = ["drums", "bass", "other", "vocals"]
        self.assertEqual(told.split(), [str(folder / f"{n}.wav") for n in names])
        for name, stem in zip(names, want["stems"]):
            found = mx.array(soundfile.read(folder / f"{name}.wav")[0])
            self.assertClose(found, stem / max(1, mx.abs(stem).max().item()), 2e-4)
        before = (folder / "bass.wav").read_bytes()
        told = self.run_script(folder / "bass.wav", "--output-dir", folder)
        self.assertRegex(told, "bass.wav must not be the song")
        self.assertEqual((folder / "bass.wav").read_bytes(), before)
        told = self.run_script(source, "--output-dir", folder, "--stems", " bass ")
        self.assertEqual(told.split(), [str(folder / "bass.wav")])
        for flags, pattern in (
            (["--stems", "bass,flute"], "--stems must be of drums, .*'flute'"),
            (["--overlap", "1"], "overlap must be"),
            (["--shifts", "x"], "invalid int"),
        ):
            self.assertRegex(self.run_script(source, *flags), pattern)
        self.assertRegex(self.run_script("none.wav"), "There is no sound file none.wav")


class TestMelodyModels(Test):
    def tune(self, which: int) -> mx.array:
        notes = EXPECTED["melody-transformers"]["tunes"][which]
        return mx.array(sounds.tune(32000, notes))

    def test_greedy_codes(self):
        prompts = EXPECTED["mono-transformers"]["prompts"][:2]
        for name in ("melody-transformers", "stereo-melody-transformers"):
            model, want = exact(name), expected(name)
            for which in (0, 1, "none"):
                with self.subTest(name, which=which):
                    tune = None if which == "none" else self.tune(which)
                    options = dict(duration=0.3, temp=0, melody=tune, separate=False)
                    codes = model.generate_codes(prompts, **options)
                    self.assertSame(last(codes), want[f"tune_{which}_codes"])

    def test_audiocraft(self):
        """One window, and several, through which the melody moves and wraps."""
        model, want = exact("melody-audiocraft"), expected("melody-audiocraft")
        told, prompts = (EXPECTED["melody-audiocraft"], EXPECTED["mono-transformers"])
        self.assertEqual(model.config.conditioner.chroma_length, 8)
        self.assertEqual(model.config.max_duration, 1.0)
        for frames in told["frames"]:
            for which in (0, 1, "none"):
                with self.subTest(frames=frames, which=which):
                    codes = model.generate_codes(
                        prompts["prompts"][:2],
                        duration=(frames + 0.5) / 50,
                        extend_stride=told["stride"] / 50,
                        temp=0,
                        melody=None if which == "none" else self.tune(which),
                        separate=False,
                    )
                    self.assertSame(last(codes), want[f"tune_{which}_{frames}"])

    def test_folders_as_they_were_written_once(self):
        path = self.folder / "out"
        convert.convert(str(REFERENCE / "melody-transformers"), path, mx.float32)
        config = json.loads((path / "config.json").read_text())
        own = config.pop("conditioner")
        del config["decoder"]["sound_width"]
        config["decoder"] |= {k: own[k] for k in ("num_chroma", "chroma_length")}
        (path / "config.json").write_text(json.dumps(config))
        weights = mx.load(str(path / "model.safetensors"))
        weights = {
            k.replace("sound_proj", "melody_proj"): w for k, w in weights.items()
        }
        mx.eval(weights)
        mx.save_safetensors(str(path / "model.safetensors"), weights)
        model = MusicGen.from_pretrained(path)
        self.assertEqual(model.config, exact("melody-transformers").config)

    def test_batch_of_with_and_without(self):
        prompts = EXPECTED["mono-transformers"]["prompts"][:2]
        for name in ("melody-transformers", "stereo-melody-transformers"):
            model, want = exact(name), expected(name)
            for batch in (prompts, prompts[:1] * 3, prompts * 2):
                melodies = [self.tune(0), None, self.tune(1), None][: len(batch)]
                codes = model.generate_codes(
                    batch, duration=0.3, temp=0, melody=melodies, separate=False
                )
                which = ["0", "none", "1", "none"]
                for i, prompt in enumerate(batch):
                    row = prompts.index(prompt)
                    expected_row = want[f"tune_{which[i]}_codes"][row]
                    self.assertSame(last(codes)[i], expected_row)

    def test_samples_alone_and_in_a_batch(self):
        model, prompts = exact("melody-transformers"), ["a", "slow piano", "b", "drums"]
        melodies = [self.tune(0), None, None, self.tune(1)]
        options = dict(duration=0.4, separate=False, negative_prompt="soft strings")
        batch = model.generate_codes(prompts, seed=4, melody=melodies, **options)
        for i, (prompt, tune) in enumerate(zip(prompts, melodies)):
            alone = model.generate_codes(prompt, seed=4 + i, melody=tune, **options)
            self.assertSame(alone[0], batch[i])

    def test_one_dtype(self):
        for dtype in (mx.float16, mx.bfloat16):
            model = MusicGen.from_pretrained(REFERENCE / "melody-transformers", dtype)
            text, mask = model.encode_text(["drums"], with_null=True)
            run = musicgen.Run(model.decoder, text, mask, 1, 40)
            notes = (mx.eye(12)[None, :9], mx.ones((1, 9), mx.bool_))
            run.rewind(notes, notes)
            for _ in range(2):
                logits = run(mx.zeros((1, 1, 4), mx.int32))
                self.assertEqual(logits.dtype, dtype)
            for part in run._parts:
                late = part.cache[-1].update(mx.zeros((1, 1, 0, 16), dtype))
                self.assertEqual({array.dtype for array in late}, {dtype})

    def test_stream(self):
        model = exact("melody-transformers")
        options = dict(duration=0.5, seed=1, melody=self.tune(0), separate=False)
        whole = model.generate("drums", **options)
        pieces = list(model.stream("drums", chunk=0.1, **options))
        self.assertClose(mx.concatenate(pieces), whole[0], 1e-5)

    def test_bad_input(self):
        with self.assertRaisesRegex(ValueError, "must go with a melody model"):
            exact("mono-transformers").generate_codes("a", melody=self.tune(0))
        model = exact("melody-transformers")
        for tune, pattern in (
            ([self.tune(0)], "one for each of 2 prompts, got 1"),
            (mx.zeros((99, 1)), "at least 0.512 s"),
            ([None, mx.zeros((32000, 1))], "must not be silent"),
        ):
            options = dict(melody=tune, separate=False, duration=0.2)
            with self.assertRaisesRegex(ValueError, pattern):
                model.generate_codes(["a", "b"], **options)


class TestMelodyCommands(Test):
    model = str(REFERENCE / "melody-transformers")

    def setUp(self):
        super().setUp()
        self.tune = self.folder / "tune.wav"
        save_audio(self.tune, sounds.tune(44100, [60, 64, 67, 72]), 44100)

    def run_script(self, *arguments: str) -> tuple[int, str, str]:
        common = ["--model", self.model, "--duration", "0.3", "--seed", "3"]
        return TestCommandLine.run_script(self, *arguments, *common)

    def make(self, name: str, *arguments: str) -> np.ndarray:
        output = ["--output", self.folder / name]
        status, _, err = self.run_script(*output, *arguments)
        self.assertEqual(status, 0, err)
        return soundfile.read(self.folder / name)[0]

    def test_melody(self):
        flags = ["-p", "drums", "--melody", self.tune, "--no-separate"]
        audio = self.make("a.wav", *flags)
        model = MusicGen.from_pretrained(self.model)
        sound = load_audio(self.tune, 32000, 1)
        options = dict(duration=0.3, seed=3, melody=sound, separate=False)
        want = model.generate("drums", **options)[0]
        want = want / max(1, mx.abs(want).max().item())
        self.assertClose(mx.array(audio)[:, None], want, 2e-4)
        told = settings.read_settings(self.folder / "a.wav")
        self.assertEqual(told["melody"], str(self.tune))
        self.assertTrue(told["no_separate"])
        self.assertSame(self.make("again.wav", "--again", self.folder / "a.wav"), audio)
        text = self.make("text.wav", "-p", "drums")
        later = self.make("later.wav", *flags, "--melody-start", "1.2")
        self.make("stream.wav", *flags, "--stream")
        for other in (text, later):
            self.assertNotEqual(other.tolist(), audio.tolist())

    def test_separated_first(self):
        tiny = demucs.HTDemucs.from_pretrained(REFERENCE / "htdemucs")
        kept = self.folder / "kept.wav"
        flags = ["-p", "drums", "--melody", self.tune, "--save-melody", kept]
        jobs.load_melody.cache_clear()
        with patch("melody.published_demucs", return_value=tiny) as loaded:
            audio = self.make("a.wav", *flags, "--takes", "1", "--show-melody")
            self.assertEqual(loaded.call_count, 1)  # for all that wants it
            bare = self.make("b.wav", *flags[:4], "--no-separate")
            self.assertEqual(loaded.call_count, 1)
        jobs.load_melody.cache_clear()
        self.assertNotEqual(audio.tolist(), bare.tolist())
        want = melody.take_melody(load_audio(self.tune, 32000, 1), 32000, tiny)
        found = mx.array(soundfile.read(kept)[0])[:, None]
        self.assertClose(found, want / max(1, mx.abs(want).max().item()), 3e-4)

    def test_show(self):
        flags = ["-p", "drums", "--melody", self.tune, "--no-separate"]
        flags += ["--output", self.folder / "a.wav", "--show-melody"]
        _, out, _ = self.run_script(*flags)
        lines = out.splitlines()
        self.assertEqual(
            [line[:2].strip() for line in lines[:12]], [*melody.NOTES[::-1]]
        )
        self.assertIn("█", lines[11])  # C

    def test_silence_in_the_melody(self):
        model = exact("melody-audiocraft")  # whose windows have a second
        gap = np.concatenate([sounds.tune(32000, [60, 64]), np.zeros((96000, 1))])
        options = dict(duration=2.5, extend_stride=0.6, separate=False)
        codes = model.generate_codes("a", melody=mx.array(gap), **options)
        self.assertEqual(codes.shape[1], 125)

    def test_stopped_among_lengths(self):
        model, steps = exact("melody-transformers"), []
        prompts = ["x", "a long slow song with drums", "x"]
        stop = lambda: len(steps) > 30 or steps.append(0)  # noqa: E731
        codes = model.generate_codes(prompts, duration=0.4, seed=1, stop=stop)
        self.assertEqual(len(codes), 1)  # the third is made, but not the second
        alone = model.generate_codes("x", duration=0.4, seed=1)
        self.assertSame(codes, alone)

    def test_nothing_is_overwritten(self):
        before = self.tune.read_bytes()
        flags = ["-p", "a", "--melody", self.tune, "--no-separate"]
        for more in (
            ["--save-melody", self.tune, "--output", self.folder / "x.wav"],
            ["--save-melody", self.folder / "x.wav", "--output", self.folder / "x.wav"],
            ["--output", self.tune],
        ):
            status, _, err = self.run_script(*flags, *more)
            self.assertIn(status, (1, 2))
            self.assertRegex(err, "^generate.py: error: .* must .*\n$")
        self.assertEqual(self.tune.read_bytes(), before)
        self.assertEqual(len(list(self.folder.iterdir())), 1)

    def test_lines_with_melodies(self):
        lines = self.folder / "lines.jsonl"
        lines.write_text(
            json.dumps(dict(prompt="drums", melody=str(self.tune), no_separate=True))
            + "\n"
            + json.dumps(dict(prompt="drums", melody=str(self.tune), melody_start=99))
            + "\n"
            + json.dumps(dict(prompt="drums"))
        )
        output = ["--output", self.folder / "x.wav", "--no-separate"]
        status, _, err = self.run_script("--prompts", lines, *output)
        self.assertEqual(status, 1)
        self.assertIn("line 2: melody_start must be less than the 2 s", err)
        made = sorted(path.name for path in self.folder.glob("x-*.wav"))
        self.assertEqual(made, ["x-1.wav", "x-3.wav"])

    def test_bad_input(self):
        short, silent = self.folder / "short.wav", self.folder / "silent.wav"
        save_audio(short, mx.ones((9, 1)), 32000)
        with patch("encodec.to_int16", lambda x, _: (x * 0).astype(np.int16)):
            save_audio(silent, mx.zeros((44100, 1)), 44100)
        (self.folder / "noise.wav").write_bytes(b"noise")
        for flags, status, pattern in (
            (["--melody", "none.wav"], 1, "no sound file none.wav"),
            (["--melody", short], 1, "at least 0.512 s"),
            (["--melody", silent], 1, "must not be silent"),
            (["--melody", self.folder / "noise.wav"], 1, "not a readable sound file"),
            (["--melody", self.tune, "--melody-start", "2"], 1, "melody_start must"),
            (["--melody-start", "2"], 2, "need a melody"),
            (["--melody", self.tune, "--melody-start", "-1"], 2, "melody_start must"),
            (["--show-melody"], 2, "need a --melody"),
            (["--melody", self.tune, "--save-melody", "x.doc"], 2, "must end in"),
        ):
            with self.subTest(flags=flags):
                output = ["--output", self.folder / "no.wav", "-p", "a"]
                more = ["--no-separate"] if "--melody" in flags else []
                got, _, err = self.run_script(*output, *flags, *more)
                self.assertEqual(got, status, err)
                self.assertRegex(err, f"generate.py: error: .*{pattern}.*\n$")
                self.assertFalse((self.folder / "no.wav").exists())
        flags = ["-p", "a", "--melody", self.tune, "--output", self.folder / "no.wav"]
        with patch.object(self, "model", str(REFERENCE / "mono-transformers")):
            status, _, err = self.run_script(*flags)
        self.assertEqual(status, 1)
        self.assertRegex(err, "must go with a melody model")


class TestStyle(Test):
    name = "style-audiocraft"
    path = str(REFERENCE / name)

    def setUp(self):
        super().setUp()
        # The tiny model's heads show nowhere: it calls itself "default".
        self.enterContext(patch.dict(style.SCALES, default=4))
        self.told = EXPECTED[self.name]
        self.start = self.told["start"] / 32000
        self.tunes = [
            mx.array(sounds.tune(32000, notes)) for notes in self.told["tunes"]
        ]

    def codes(self, model: MusicGen, prompts, **options) -> mx.array:
        frames = options.pop("frames", self.told["frames"])
        return model.generate_codes(
            prompts, duration=(frames + 0.5) / 50, temp=0, **options
        )

    def test_features_and_tokens(self):
        model, want = exact(self.name), expected(self.name)
        hear = model.conditioner
        for i, tune in enumerate(self.tunes):
            start, excerpt = hear.excerpt(tune, 0, self.start)
            self.assertEqual(start, self.start)
            self.assertEqual(excerpt.shape, (96000, 1))
            audio = resample(np.array(excerpt), 32000, 24000)
            features = hear.mert(mx.array(audio).T)[0]
            self.assertClose(features, want[f"mert_{i}"], 1e-4)
            for quantizers in self.told["quantizers"]:
                tokens = want[f"style_{i}_q{quantizers}"]
                self.assertSame(hear(excerpt, quantizers), tokens)
        for length in self.told["lengths"]:
            _, excerpt = hear.excerpt(self.tunes[0], 0, self.start, length)
            tokens = hear(excerpt)
            self.assertSame(tokens, want[f"style_0_len{length}"])
            self.assertLessEqual(len(tokens), hear.longest)

    def test_greedy_codes(self):
        model, want, prompts = (
            exact(self.name),
            expected(self.name),
            self.told["prompts"],
        )
        self.assertSame(last(self.codes(model, prompts)), want["text_only"])
        for i, tune in enumerate(self.tunes):
            options = dict(style=tune, style_start=self.start)
            for name, prompt, more in (
                ("text_style_{}_q1", prompts, dict(style_quantizers=1)),
                ("text_style_{}_q3", prompts, dict()),
                ("text_style_{}_q6", prompts, dict(style_quantizers=6)),
                ("style_only_{}", "", dict()),
                ("beta_{}", prompts, dict(guidance_beta=5)),
                ("unguided_{}", prompts, dict(guidance_coef=1)),
            ):
                with self.subTest(name.format(i)):
                    codes = self.codes(model, prompt, **options, **more)
                    self.assertSame(last(codes), want[name.format(i)])

    def test_long_audio(self):
        """One excerpt for all windows."""
        model, want = exact(self.name), expected(self.name)
        model.config.max_duration = float(self.told["window_seconds"])
        for i, tune in enumerate(self.tunes):
            options = dict(style=tune, style_start=self.start)
            options |= dict(extend_stride=self.told["stride"] / 50)
            options |= dict(frames=self.told["long_frames"])
            codes = self.codes(model, self.told["prompts"], **options)
            self.assertSame(last(codes), want[f"long_{i}"])

    def test_features_of_the_codec(self):
        name = "style-encodec-audiocraft"
        model, want = exact(name), expected(name)
        options = dict(style_start=self.start)
        _, excerpt = model.conditioner.excerpt(self.tunes[0], 0, self.start)
        features = model.conditioner.features(excerpt)[0]
        self.assertClose(features, want["features_0"], 1e-5)
        self.assertSame(model.conditioner(excerpt), want["style_0_q3"])
        codes = self.codes(model, self.told["prompts"], style=self.tunes[0], **options)
        self.assertSame(last(codes), want["text_style_0_q3"])

    def test_alone_and_in_a_batch(self):
        model, prompts = exact(self.name), ["a", "a", "slow piano", "a"]
        sounds = [self.tunes[0], None, self.tunes[1], self.tunes[0]]
        for sounds, more in (
            (sounds, {}),
            ([self.tunes[0]] * 4, dict(guidance_beta=2, negative_prompt="strings")),
        ):
            options = dict(duration=0.4, style_length=1.5, **more)
            batch = model.generate_codes(prompts, seed=4, style=sounds, **options)
            for i, (prompt, sound) in enumerate(zip(prompts, sounds)):
                own = options | dict(style=sound)
                own |= dict(style_length=None) if sound is None else {}
                alone = model.generate_codes(prompt, seed=4 + i, **own)
                self.assertSame(alone[0], batch[i])

    def test_start_is_drawn_from_the_seed(self):
        model = exact(self.name)
        starts = [model.conditioner.excerpt(self.tunes[0], s)[0] for s in range(9)]
        self.assertEqual(len(set(starts)), 9)
        self.assertTrue(all(0 <= start <= 2 for start in starts))
        drawn = model.generate_codes("a", 0.4, seed=3, style=self.tunes[0])
        told = dict(style=self.tunes[0], style_start=starts[3])
        self.assertSame(model.generate_codes("a", 0.4, seed=3, **told), drawn)

    def test_features_of_a_file(self):
        path = self.folder / "x.wav"
        save_audio(path, self.tunes[0], 32000)
        with redirect_stdout(io.StringIO()) as out:
            mert.demo(MERT.from_pretrained(Path(self.path) / "MERT-v1-95M"), path)
        self.assertIn("features (1, 374, 16)", out.getvalue())
        for shape in ((400,), (1, 399), (400, 1)):
            with self.assertRaisesRegex(ValueError, "from 400 on"):
                exact(self.name).conditioner.mert(mx.zeros(shape))

    def test_stream_and_go_on(self):
        model = exact(self.name)
        options = dict(duration=0.6, seed=1, style=self.tunes[0], guidance_beta=3.0)
        whole = model.generate_codes("drums", **options)
        pieces = list(model.stream("drums", chunk=0.1, **options))
        self.assertClose(mx.concatenate(pieces), model.decode(whole)[0], 1e-5)
        begun = whole[:, :11]
        self.assertSame(
            model.generate_codes("drums", codes_prompt=begun, **options), whole
        )

    def test_bad_input(self):
        model, tune = exact(self.name), self.tunes[0]
        for options, pattern in (
            (dict(style=[tune]), "one for each of 2 prompts, got 1"),
            (dict(style=tune[:64000]), "at least the 3 s .* got 2 s"),
            (dict(style=tune, style_length=1.4), "from 1.5 to 4.5 s, got 1.4"),
            (dict(style=tune, style_length=9), "from 1.5 to 4.5 s, got 9"),
            (dict(style=tune, style_start=2.1), "at most 2 s .* got 2.1"),
            (dict(style=tune, style_start=-1), "0 s or more"),
            (dict(style=tune, style_quantizers=0), "from 1 to 6, got 0"),
            (dict(style=tune, style_quantizers=7), "from 1 to 6, got 7"),
            (dict(style=tune, style_quantizers=1.5), "must be whole"),
            (dict(style=tune, guidance_beta=math.nan), "must be a number"),
            (dict(guidance_beta=5), "come with a style"),
            (dict(style_quantizers=3), "style_quantizers must come with a style"),
            (dict(style=[tune, None], guidance_beta=5), "come with a style for each"),
            (dict(style=0 * tune), "must not be silent"),
            (dict(style=tune * math.nan), "must be finite"),
            (dict(style=tune[:, 0]), r"must have the shape \(N, C\)"),
            (dict(style="song.wav"), "must be samples"),
            (dict(melody=tune), "must go with a melody model"),
        ):
            with self.subTest(pattern=pattern):
                with self.assertRaisesRegex(ValueError, pattern):
                    model.generate_codes(["a", "b"], duration=0.2, **options)
        with self.assertRaisesRegex(ValueError, "must go with a style model"):
            exact("melody-transformers").generate_codes("a", style=tune)

    def test_convert(self):
        convert.convert(self.path, self.folder / "out", mx.float32)
        model, again = exact(self.name), MusicGen.from_pretrained(self.folder / "out")
        self.assertEqual(again.config, model.config)
        options = dict(duration=0.3, seed=2, style=self.tunes[0])
        self.assertSame(
            again.generate_codes("a", **options), model.generate_codes("a", **options)
        )

    def test_settings_of_the_checkpoint(self):
        def load(cfg: dict) -> style.StyleConfig:
            with patch.object(convert, "read_yaml", return_value=told | cfg):
                return MusicGen.from_pretrained(self.path).config.conditioner

        package = convert.load_package(Path(self.path) / "state_dict.bin")
        told, own = convert.read_yaml(package["xp.cfg"]), "conditioners.self_wav.style."
        self.assertEqual(load({}).eval_q, 3)
        found = load({own + "eval_q": "2", own + "ds_factor": "5", own + "length": "4"})
        self.assertEqual((found.eval_q, found.ds_factor, found.length), (2, 5, 4.0))
        bare = {k: v for k, v in told.items() if not k.startswith("conditioners.")}
        with patch.object(convert, "read_yaml", return_value=bare):
            found = MusicGen.from_pretrained(self.path).config.conditioner
        self.assertEqual(found, load({}))
        for key, value, pattern in (
            ("use_middle_of_segment", "true", "must be false"),
            ("eval_q", "9", "eval_q be at most"),
            ("length", "x", "length of style must be a number, got x"),
            ("transformer_scale", "huge", "must be xsmall or default or large"),
            ("encodec_checkpoint", "//sig/1", "must be //pretrained/facebook/enc"),
            ("model_name", "encodec", "must be mert, as in the weights"),
            ("n_q_out", "0", "must be 6, as in the weights"),
            ("varying_lengths", ["3", "1"], "the least and the most"),
        ):
            with self.assertRaisesRegex(ValueError, f"state_dict.bin.*{pattern}"):
                load({own + key: value})
        with self.assertRaisesRegex(ValueError, "self_wav must be one of"):
            load({"conditioners.self_wav.model": "clap"})

    def test_damaged_weights(self):
        whole = convert.load_package(Path(self.path) / "state_dict.bin")
        prefix = checkpoints.OF_SOUND

        def fails(pattern: str, change: Callable[[dict], object]) -> None:
            package = {**whole, "best_state": dict(whole["best_state"])}
            change(package["best_state"])
            load = convert.load_package
            replaced = lambda p: package if p.name == "state_dict.bin" else load(p)
            with patch.object(convert, "load_package", replaced):
                with self.assertRaisesRegex(ValueError, f"(?s)state_dict.*{pattern}"):
                    MusicGen.from_pretrained(self.path)

        book = prefix + "rvq.vq.layers.{}._codebook.embed"
        fails("codebook 2 .* missing", lambda w: w.pop(book.format(2)))
        fails("lack it", lambda w: [w.pop(book.format(k)) for k in range(6)])
        fails("must have one shape", lambda w: w.update({book.format(1): mx.ones(3)}))
        fails("twice", lambda w: w.update({prefix + "mean": mx.ones(32)}))
        embed = prefix + "embed.weight"
        fails(
            "must hold floats",
            lambda w: w.update({embed: w[embed].astype(mx.int32)}),
        )

    def test_damaged_mert(self):
        folder = self.copy(self.name)
        config = folder / "MERT-v1-95M" / "config.json"
        told = json.loads(config.read_text())
        for change, pattern in (
            ({"feat_extract_norm": "layer"}, "feat_extract_norm must be 'group'"),
            ({"hidden_size": 18}, "must divide hidden_size|shape"),
            ({"conv_dim": []}, "as many sizes"),
            ({"num_hidden_layers": 3}, "layers.2"),
        ):
            config.write_text(json.dumps(told | change))
            with self.assertRaisesRegex(ValueError, f"(?s)MERT-v1-95M.*{pattern}"):
                MusicGen.from_pretrained(folder)
        config.unlink()
        with self.assertRaisesRegex(OSError, "config.json is missing"):
            MusicGen.from_pretrained(folder)


class TestStyleCommands(Test):
    model = TestStyle.path

    def setUp(self):
        super().setUp()
        self.enterContext(patch.dict(style.SCALES, default=4))
        self.tune = self.folder / "tune.wav"
        notes = EXPECTED["style-audiocraft"]["tunes"][0]
        save_audio(self.tune, sounds.tune(44100, notes), 44100)

    run_script, make = TestMelodyCommands.run_script, TestMelodyCommands.make

    def test_style(self):
        flags = ["-p", "drums", "--style", self.tune]
        audio = self.make("a.wav", *flags)
        model = MusicGen.from_pretrained(self.model)
        sound = load_audio(self.tune, 32000, 1)
        want = model.generate("drums", duration=0.3, seed=3, style=sound)[0]
        want = want / max(1, mx.abs(want).max().item())
        self.assertClose(mx.array(audio)[:, None], want, 2e-4)
        told = settings.read_settings(self.folder / "a.wav")
        start, _ = model.conditioner.excerpt(sound, 3)
        self.assertEqual(told["style"], str(self.tune))
        self.assertEqual(told["style_start"], start)
        self.assertSame(self.make("again.wav", "--again", self.folder / "a.wav"), audio)
        for more in (
            ["--style-start", "0.5"],
            ["--style-length", "1.5"],
            ["--style-quantizers", "6"],
            ["--guidance-beta", "5"],
        ):
            other = self.make("other.wav", *flags, *more)
            self.assertNotEqual(other.tolist(), audio.tolist())
        self.make("stream.wav", *flags, "--stream")
        free = self.make("free.wav", "--style", self.tune)  # the excerpt alone
        self.assertNotEqual(free.tolist(), audio.tolist())

    def test_settings_that_replace_others(self):
        flags = ["-p", "drums", "--style", self.tune, "--guidance-beta", "5"]
        self.make("a.wav", *flags)
        again = ["--again", self.folder / "a.wav"]
        self.make("text.wav", *again, "--style", "")
        told = settings.read_settings(self.folder / "text.wav")
        self.assertNotIn("style", told)
        self.assertIsNone(told["guidance_beta"])
        self.make("long.wav", *again, "--style-length", "4.5")
        told = settings.read_settings(self.folder / "long.wav")
        self.assertEqual((told["style_length"], told["guidance_beta"]), (4.5, 5))

    def test_redecode_needs_no_style(self):
        codes = self.folder / "codes.safetensors"
        flags = ["-p", "a", "--style", self.tune, "--save-codes", codes]
        audio = self.make("a.wav", *flags)
        self.tune.unlink()
        output = ["--output", self.folder / "b.wav"]
        status, _, err = TestCommandLine.run_script(self, "--redecode", codes, *output)
        self.assertEqual(status, 0, err)
        self.assertSame(soundfile.read(self.folder / "b.wav")[0], audio)

    def test_silent_excerpts_fail_alone(self):
        half = self.folder / "half.wav"
        tune = np.array(sounds.tune(32000, [60] * 8))
        save_audio(half, np.concatenate([tune, tune, 0 * tune]), 32000)
        output = ["--output", self.folder / "x.wav", "--takes", "6", "--style", half]
        status, _, err = self.run_script("-p", "a", *output)
        self.assertEqual(status, 1)
        self.assertIn("must not be silent", err)
        made = len(list(self.folder.glob("x-*.wav")))
        self.assertIn(made, range(1, 6), err)

    def test_takes_each_have_their_excerpt(self):
        self.make("a.wav", "-p", "a", "--takes", "1", "--style", self.tune)
        output = ["--output", self.folder / "b.wav"]
        flags = ["-p", "a", "--takes", "2", "--style", self.tune]
        self.assertEqual(self.run_script(*output, *flags)[0], 0)
        paths = [self.folder / name for name in ("a.wav", "b-1.wav", "b-2.wav")]
        starts = [settings.read_settings(path)["style_start"] for path in paths]
        self.assertEqual(starts[0], starts[1])
        self.assertNotEqual(starts[1], starts[2])
        self.assertSame(soundfile.read(paths[0])[0], soundfile.read(paths[1])[0])

    def test_resume(self):
        codes = self.folder / "codes.safetensors"
        flags = ["-p", "a", "--style", self.tune, "--dtype", "float32"]
        self.make("short.wav", *flags, "--save-codes", codes)
        whole = self.folder / "whole.safetensors"
        output = ["--output", self.folder / "long.wav", "--save-codes", whole]
        script = TestCommandLine.run_script
        status, _, err = script(
            self, *output, "--resume", codes, "--duration", "0.6", "--seed", "3"
        )
        self.assertEqual(status, 0, err)
        model = exact("style-audiocraft")
        sound = load_audio(self.tune, 32000, 1)
        want = model.generate_codes("a", duration=0.6, seed=3, style=sound)
        self.assertSame(settings.load_codes(whole)[0], want)

    def test_lines(self):
        lines, none = self.folder / "lines.jsonl", str(self.folder / "none.wav")
        told = [
            dict(prompt="a", style=str(self.tune), guidance_beta=5),
            dict(prompt="a", style=str(self.tune), style_start=99),
            dict(prompt="a"),
            dict(prompt="a", style=none),
        ]
        bad = self.folder / "bad.jsonl"
        bad.write_text(json.dumps(dict(prompt="a", guidance_beta=5)))
        status, _, err = self.run_script("--prompts", bad)
        self.assertEqual(status, 1)
        self.assertRegex(err, "line 1: guidance_beta must come with a style.\n$")
        lines.write_text("\n".join(map(json.dumps, told)))
        output = ["--output", self.folder / "x.wav", "--style-quantizers", "2"]
        status, _, err = self.run_script("--prompts", lines, *output)
        self.assertEqual(status, 1)
        self.assertIn("line 2: style_start must be at most", err)
        self.assertIn("line 4: There is no sound file", err)
        made = sorted(path.name for path in self.folder.glob("x-*.wav"))
        self.assertEqual(made, ["x-1.wav", "x-3.wav"])

    def test_bad_input(self):
        short = self.folder / "short.wav"
        save_audio(short, sounds.tune(32000, [60, 64]), 32000)
        with_style = ["--style", self.tune]
        for flags, status, pattern in (
            (["--style", "none.wav"], 1, "no sound file none.wav"),
            (["--style", short], 1, "at least the 3 s"),
            ([*with_style, "--style-length", "5"], 1, "from 1.5 to 4.5"),
            ([*with_style, "--style-quantizers", "7"], 1, "from 1 to 6"),
            ([*with_style, "--style-start", "3"], 1, "at most 2 s"),
            ([*with_style, "--style-start", "-3"], 2, "0 s or more"),
            ([*with_style, "--guidance-beta", "nan"], 2, "must be a number"),
            (["--guidance-beta", "5"], 2, "come with a style"),
            (["--style-start", "1"], 2, "come with a style"),
            ([*with_style, "--melody", self.tune], 1, "go with a melody model"),
        ):
            with self.subTest(flags=flags):
                output = ["--output", self.folder / "no.wav", "-p", "a"]
                got, _, err = self.run_script(*output, *flags)
                self.assertEqual(got, status, err)
                self.assertRegex(err, f"generate.py: error: .*{pattern}.*\n$")
                self.assertFalse((self.folder / "no.wav").exists())
        output = ["-p", "a", "--output", self.folder / "no.wav", *with_style]
        with patch.object(self, "model", str(REFERENCE / "mono-transformers")):
            status, _, err = self.run_script(*output)
        self.assertEqual(status, 1)
        self.assertRegex(err, "must go with a style model")


class TestMelody(Test):
    def test_notes_are_those_of_transformers(self):
        want = mx.load(str(REFERENCE / "chroma.safetensors"))
        for rate in (32000, 44100):
            for make in (sounds.sweep, sounds.chords, sounds.noise):
                with self.subTest(make=make.__name__, rate=rate):
                    chroma = melody.extract_chroma(make(rate), rate)
                    self.assertSame(chroma.sum(axis=1), mx.ones(len(chroma)))
                    notes = mx.argmax(chroma, axis=1)
                    self.assertSame(notes, want[f"{make.__name__}_{rate}"])

    def test_strengths_are_those_of_librosa(self):
        want = mx.load(str(REFERENCE / "chroma.safetensors"))
        for seed in range(20):
            audio = sounds.noise(32000, seed, seconds=0.6)
            found = melody.note_strengths(audio, 32000)
            self.assertClose(found, want[f"librosa_{seed}"], 1e-5)

    def test_in_parts(self):
        audio = sounds.noise(32000)
        whole = melody.note_strengths(audio, 32000)
        with patch("melody.FRAMES_AT_ONCE", 5):
            self.assertClose(melody.note_strengths(audio, 32000), whole, 1e-5)

    def test_thirty_seconds_are_235_frames(self):
        audio = sounds.noise(32000, seconds=30)
        self.assertEqual(melody.extract_chroma(audio, 32000).shape, (235, 12))

    def test_channels_are_averaged(self):
        left = sounds.tune(32000, [60, 62])
        both = np.concatenate(
            [left, -0.9 * left + 1e-2 * sounds.noise(32000)[:32000]], 1
        )
        mono = both.mean(axis=1, keepdims=True)
        found = [melody.extract_chroma(x, 32000) for x in (both, mono)]
        self.assertSame(*found)

    def test_fit(self):
        chroma = mx.eye(12)[:5]
        self.assertSame(melody.fit(chroma, 3), chroma[:3])
        longer = melody.fit(chroma, 12)
        rows = [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]
        self.assertSame(longer, chroma[mx.array(rows)])

    def test_tune_under_drums_and_bass(self):
        """The notes are those of the tune, once what covers them is taken away."""
        rate, notes = 44100, [60, 64, 67, 72, 71, 67, 65, 62]
        tune = sounds.tune(rate, notes)
        bass = 5 * sounds.tune(rate, [49] * len(notes))
        drums = 0.5 * sounds.noise(rate, seconds=len(tune) / rate)[: len(tune)]

        class Told:  # a separation that knows the parts
            sampling_rate, channels = rate, 2
            config = demucs.HTDemucsConfig()

            def separate(self, audio):
                parts = dict(drums=drums, bass=bass, other=tune, vocals=0 * tune)
                stems = [parts[name] for name in self.config.sources]
                return mx.array(np.stack(stems).repeat(2, axis=-1))

        mix = mx.array(tune + bass + drums)
        covered = melody.extract_chroma(mix, rate)
        clear = melody.extract_chroma(melody.take_melody(mix, rate, Told()), 32000)
        beats = [int((i + 0.5) * 0.5 * 32000 / 4096) for i in range(len(notes))]
        heard = np.array(mx.argmax(clear, axis=1))[beats]
        self.assertEqual(heard.tolist(), [note % 12 for note in notes])
        drowned = np.array(mx.argmax(covered, axis=1))[beats]
        self.assertGreater((drowned == 1).sum(), 4)  # C#, which the bass plays

    def test_take_melody(self):
        model = demucs.HTDemucs.from_pretrained(REFERENCE / "htdemucs")
        audio = mx.array(sounds.noise(32000, seconds=0.75))
        found = melody.take_melody(audio, 32000, model)
        self.assertEqual(found.shape, (24000, 1))
        low = encodec.resample(np.array(audio), 32000, 4000).repeat(2, axis=1)
        stems = model.separate(low)
        both = np.array(stems[2] + stems[3]).mean(axis=1, keepdims=True)
        self.assertClose(found, encodec.resample(both, 4000, 32000))

    def test_bad_input(self):
        for audio, pattern in (
            (mx.zeros(20_000), "must have the shape"),
            (mx.zeros((20_000, 0)), "must have the shape"),
            (mx.ones((16383, 1)), "must have at least 0.512 s, got 0.512 s"),
            (mx.ones((0, 1)), "must have at least 0.512 s, got 0.000 s"),
            (mx.full((20_000, 2), math.nan), "must be finite"),
            (mx.zeros((20_000, 2)), "must not be silent"),
        ):
            with self.assertRaisesRegex(ValueError, f"melody {pattern}"):
                melody.extract_chroma(audio, 32000)
        self.assertEqual(melody.extract_chroma(mx.ones((16384, 1)), 32000).shape[0], 5)

    def test_drawing(self):
        chroma = mx.eye(12)[mx.array([0, 0, 4, 11])]
        lines = melody.draw(chroma).split("\n")
        self.assertEqual([line.split()[0] for line in lines], list(melody.NOTES[::-1]))
        self.assertEqual(lines[-1], "C  ██")
        self.assertEqual((lines[7], lines[0]), ("E    █", "B     █"))
        half = melody.draw(mx.eye(12)[mx.array([0, 4] * 50)], width=50).split("\n")
        self.assertEqual((half[-1], half[7]), ("C  " + "▒" * 50, "E  " + "▒" * 50))

    def test_script(self):
        path = self.folder / "tune.wav"
        save_audio(path, sounds.tune(44100, [60, 67]), 44100)
        command = [sys.executable, str(HERE / "melody.py")]
        drawn = subprocess.run([*command, path], capture_output=True, text=True)
        self.assertEqual(drawn.stdout.count("\n"), 12, drawn.stderr)
        lost = subprocess.run([*command, "none.wav"], capture_output=True, text=True)
        self.assertEqual(lost.returncode, 1)
        self.assertRegex(lost.stderr, "^melody.py: error: There is no .*none.wav.\n$")


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
                command, cwd=HERE, env=offline, capture_output=True, text=True
            )

        for name in ("mono-transformers", "mono-audiocraft"):
            result = run(name)
            self.assertEqual(result.returncode, 0, result.stderr)
        self.assertRegex(run("nothing").stderr, "To work offline, take --model tiny")


class TestTorchFiles(Test):
    def fails(self, pattern: str, content: bytes):
        path = self.folder / "x.bin"
        path.write_bytes(content)
        with self.assertRaisesRegex(
            ValueError, "x.bin is not a checkpoint.*" + pattern
        ):
            convert.load_torch(path)

    def test_round_trip(self):
        numbers = np.arange(12, dtype=np.float32)
        for form in (zip_file, legacy_file):
            path = self.folder / "x.bin"
            path.write_bytes(form(tensor_pickle((2, 3), (3, 1), offset=4), numbers))
            found = convert.load_torch(path)["x"]
            self.assertSame(found, numbers[4:10].reshape(2, 3))
            path.write_bytes(form(tensor_pickle((3, 2), (1, 3)), numbers))
            self.assertSame(convert.load_torch(path)["x"], numbers[:6].reshape(2, 3).T)
            path.write_bytes(form(tensor_pickle((), (), offset=11), numbers))
            self.assertEqual(convert.load_torch(path)["x"].item(), 11)

    def test_bfloat16(self):
        content = tensor_pickle((3,), (1,), kind="BFloat16Storage")
        path = self.folder / "x.bin"
        path.write_bytes(zip_file(content, np.array([0x3F80] * 12, np.uint16)))
        found = convert.load_torch(path)["x"]
        self.assertEqual((found.dtype, found.tolist()), (mx.bfloat16, [1, 1, 1]))

    def test_reads_nothing_out_of_bounds(self):
        numbers = np.arange(12, dtype=np.float32)
        for shape, stride, offset in (
            ((2, 3), (6, 3), 1),  # last element 13
            ((12,), (1,), 1),
            ((2,), (-1,), 3),
            ((2,), (1,), -1),
            ((2, 2), (1,), 0),
            ((10**9, 10**9), (0, 0), 0),
            ((-1,), (1,), 0),
        ):
            content = tensor_pickle(shape, stride, offset)
            for form in (zip_file, legacy_file):
                self.fails("a tensor", form(content, numbers))
        for size in (13, 2**60):
            content = tensor_pickle((1,), (1,), size=size)
            self.fails("storage 0 reaches beyond", zip_file(content, numbers))
        content = tensor_pickle((1,), (1,), size=-1)
        self.fails("a storage has no name or size", zip_file(content, numbers))

    def test_parameter(self):
        tensor = tensor_pickle((2,), (1,))
        start, stop = tensor.index(b"ctorch._utils"), tensor.rindex(b"s.")
        wrapped = b"ctorch._utils\n_rebuild_parameter\n(" + tensor[start:stop]
        content = tensor[:start] + wrapped + b"\x89ccollections\nOrderedDict\n)RtRs."
        path = self.folder / "x.bin"
        path.write_bytes(zip_file(content, np.arange(12, dtype=np.float32)))
        self.assertSame(convert.load_torch(path)["x"], [0, 1])

    def test_refuses_what_torch_does_not_write(self):
        numbers = np.zeros(12, np.float32)
        new = b"\x80\x02ccollections\nOrderedDict\n)\x81."
        self.fails("opcode NEWOBJ", zip_file(new, numbers))
        floats = tensor_pickle((2,), (1,)).replace(
            b"(J\x02\0\0\0t", b"(G" + struct.pack(">d", 2) + b"t"
        )
        self.fails("a tensor has a size", zip_file(floats, numbers))
        content = tensor_pickle((2,), (1,))
        big = zip_file(content, numbers, {"any/byteorder": "big"})
        self.fails("little-endian", big)
        self.fails("neither of torch's", legacy_file(content, numbers, little=False))
        old = legacy_file(content.replace(b"VIEW", b"K\x01"), numbers)
        self.fails("unknown kind of storage", old)

    def test_runs_nothing(self):
        witness = self.folder / "witness"

        class Hostile:
            def __reduce__(self):
                return (os.mkdir, (str(witness),))

        class Building:
            def __reduce__(self):
                return (convert.Dict, (), {"a": 1})

        numbers = np.zeros(12, np.float32)
        for content in (
            pickle.dumps(Hostile(), 2),
            pickle.dumps({"x": [Hostile()]}, 2),
            pickle.dumps(Building(), 2),
            pickle.dumps(Hostile(), 4),
            b"cbuiltins\neval\n(U\x0c__import__('U\x01'tR.",
            b"\x80\x02cos\nsystem\nq\x00.",
            b"\x80\x02ctorch\nload\n.",
            b"\x80\x02cos\nFloatStorage\n.",
            b"\x80\x02ctorch._utils\n_rebuild_tensor_v2.__globals__\n.",
        ):
            refused = "it (names|holds the pickle opcode)"
            self.fails(refused, zip_file(content, numbers))
            self.fails(refused, legacy_file(content, numbers))
            self.fails(refused, content)
        self.assertFalse(witness.exists())

    def test_sets_nothing_on_our_functions(self):
        for name in ("collections\nOrderedDict", "torch._utils\n_rebuild_tensor_v2"):
            content = b"\x80\x02c" + name.encode() + b"\n}X\x01\0\0\0aK\x01sb."
            self.fails("has no attribute '__dict__'", zip_file(content, np.zeros(1)))
            slots = b"\x80\x02c" + name.encode() + b"\n(N}X\x04\0\0\0makeK\x01stb."
            self.fails("can't set attribute", zip_file(slots, np.zeros(1)))
        for maker in convert.KNOWN.values():
            self.assertFalse(hasattr(maker, "a") or hasattr(maker, "__dict__"))

    def test_arguments_of_another_kind(self):
        for name in ("_rebuild_parameter", "_rebuild_tensor_v2"):
            content = b"\x80\x02ctorch._utils\n" + name.encode()
            content += b"\n(X\x03\0\0\0heyK\0))tR."
            self.fails(
                "it makes a (parameter|tensor) of something else",
                zip_file(content, np.zeros(1)),
            )
        content = b"\x80\x02cos\x1b[31m\nsystem\n."
        self.fails(r"it names 'os\\x1b\[31m.system'", zip_file(content, np.zeros(1)))

    def test_what_is_held_often_is_made_once(self):
        laughs = b"\x80\x02]q\0"
        for level in range(60):  # each list holds the one before it ten times
            inner = b"h" + bytes([level])
            laughs += b"](" + 10 * inner + b"eq" + bytes([level + 1])
        path = self.folder / "x.bin"
        path.write_bytes(zip_file(laughs + b".", np.zeros(1)))
        convert.load_torch(path)
        tensor = tensor_pickle((6,), (1,))
        again = tensor.removesuffix(b"s.") + b"q\0sX\x01\0\0\0yh\0s."
        path.write_bytes(zip_file(again, np.arange(12, dtype=np.float32)))
        found = convert.load_torch(path)
        self.assertIs(found["x"], found["y"])

    def test_nests_no_tuples(self):
        bomb = b"\x80\x02}(K\x01t" + b"".join(
            b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60)
        )
        for content in (bomb + b"K\x01s.", bomb + b"."):  # as a key, and alone
            self.fails("holds a tuple twice", zip_file(content, np.zeros(1)))
        with self.assertRaisesRegex(ValueError, "a size, stride"):
            huge = (2**64,) * 3
            convert.make_tensor(convert.Storage("FloatStorage", "0", 1), 0, huge, huge)
        with self.assertRaisesRegex(ValueError, "something else"):
            many = (1,) * 9
            convert.make_tensor(convert.Storage("FloatStorage", "0", 1), 0, many, many)

    def test_state_must_map_names_to_tensors(self):
        folder = self.copy("stereo-transformers")
        path = folder / "pytorch_model-00001-of-00002.bin"
        for content in (
            b"].",
            b"N.",
            b"K\x03.",
            b"}X\x01\0\0\0aK\x01s.",
            b"}K\x01K\x02s.",
        ):
            path.write_bytes(zip_file(b"\x80\x02" + content, np.zeros(1)))
            with self.assertRaisesRegex(ValueError, "00001-of-00002.bin must map"):
                MusicGen.from_pretrained(folder)

    def test_cut_short_says_what_to_do(self):
        content = (REFERENCE / "mono-audiocraft" / "state_dict.bin").read_bytes()
        for size in (0, 1, 2, 100, len(content) // 2, len(content) - 1):
            self.fails("fetch it again", content[:size])

    def test_overlapping_tensors_do_not_multiply(self):
        numbers = np.zeros(1000, np.float32)
        start, stop = b"\x80\x02]", b"."
        body = b"".join(
            tensor_pickle((1000 - i,), (1,), i, size=1000)[2:].removesuffix(b".") + b"a"
            for i in range(20)
        )
        self.fails("far more than the file", zip_file(start + body + stop, numbers))

    def test_memory_is_not_for_the_asking(self):
        bomb = b"\x80\x02}r\xff\xff\xff\xff."  # memo entry 2**32 - 1
        self.fails("numbers more objects", zip_file(bomb, np.zeros(1, np.float32)))
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("x/data.pkl", bytes(10**6))
        self.fails("stored", buffer.getvalue())

    def test_damaged(self):
        content = (REFERENCE / "mono-audiocraft" / "state_dict.bin").read_bytes()
        step = len(content) // 7
        for damaged in (b"", b"PK\x03\x04", *(content[: i * step] for i in range(7))):
            self.fails("", damaged)
        rng = np.random.default_rng(0)
        path = self.folder / "x.bin"
        for _ in range(200):  # flipped bytes: any outcome but a crash
            flipped = bytearray(content[:60000] + content[-40000:])
            for place in rng.integers(0, len(flipped), 20):
                flipped[place] ^= int(rng.integers(1, 256))
            path.write_bytes(flipped)
            try:
                convert.load_torch(path)
            except ValueError:
                pass

    def test_yaml(self):
        text = """
a: 1
b:
  c: 'x'
  d: ${b.e}
  e: ${a}
  list:
  - 0
  - 1.5
  empty: {}
  short: [0, '1'] # two
  quoted: 'a # b'
  text: |
    e: 7
    - 8
  # c: y
  list2:
  - 'x'
  - "y" # z
  loop: ${b.loop}
  null_value: null
f:
  g:
    h: .inf
i: true
"""
        values = convert.read_yaml(text)
        self.assertEqual(values["b.d"], "1")
        self.assertEqual(values["b.list"], ["0", "1.5"])
        self.assertEqual(values["b.short"], ["0", "1"])
        self.assertEqual(values["b.list2"], ["x", "y"])
        self.assertEqual(values["b.quoted"], "a # b")
        self.assertNotIn("b.text", values)
        self.assertEqual(
            (values["b.c"], values["f.g.h"], values["i"]), ("x", ".inf", "true")
        )
        self.assertEqual(convert.read_yaml(""), {})
        looped = convert.read_yaml("a: ${b}\nb: ${c}\nc: ${b}")
        self.assertEqual(looped, {"a": "", "b": "", "c": ""})


def tensor_pickle(shape, stride, offset=0, size=12, kind="FloatStorage") -> bytes:
    """The pickle that torch writes for {"x": tensor}, assembled by hand."""

    def number(n: int) -> bytes:
        if -(2**31) <= n < 2**31:
            return b"J" + struct.pack("<i", n)
        return b"\x8a\x09" + n.to_bytes(9, "little", signed=True)

    def text(string: str) -> bytes:
        return b"X" + struct.pack("<I", len(string)) + string.encode()

    def numbers(values) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    storage = b"(" + text("storage") + b"ctorch\n" + kind.encode() + b"\n"
    storage += text("0") + text("cpu") + number(size)
    return (
        b"\x80\x02}"
        + text("x")
        + b"ctorch._utils\n_rebuild_tensor_v2\n("
        # the legacy form's sixth item, None, is left out of the zip form
        + storage
        + b"VIEW"
        + b"tQ"
        + number(offset)
        + numbers(shape)
        + numbers(stride)
        + b"\x89ccollections\nOrderedDict\n)RtRs."
    )


def zip_file(content: bytes, numbers: np.ndarray, more: dict | None = None) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("any/data.pkl", content.replace(b"VIEW", b""))
        archive.writestr("any/data/0", numbers.tobytes())
        archive.writestr("any/version", "3\n")
        for name, text in (more or {}).items():
            archive.writestr(name, text)
    return buffer.getvalue()


def legacy_file(content: bytes, numbers: np.ndarray, little: bool = True) -> bytes:
    magic = 0x1950A86A20F9469CFC6C
    header = [magic, 1001, {"little_endian": little, "protocol_version": 1001}]
    head = b"".join(pickle.dumps(item, 2) for item in header)
    content = content.replace(b"VIEW", b"N") + pickle.dumps(["0"], 2)
    return head + content + struct.pack("<q", numbers.size) + numbers.tobytes()


class TestConvert(Test):
    def run_script(self, *arguments: str) -> str:
        with patch("sys.argv", ["convert.py", *arguments]):
            with redirect_stdout(io.StringIO()) as output:
                convert.main()
        return output.getvalue()

    def test_round_trip(self):
        for name in TRANSFORMERS + AUDIOCRAFT:
            source, target = REFERENCE / name, self.folder / name
            self.run_script(
                "--hf-path",
                str(source),
                "--mlx-path",
                str(target),
                "--dtype",
                "float32",
            )
            self.assertEqual(
                sorted(path.name for path in target.iterdir()),
                ["config.json", "model.safetensors", "spiece.model"],
            )
            before, after = (
                MusicGen.from_pretrained(p, mx.float32) for p in (source, target)
            )
            options = dict(prompts=["drums", "piano"], duration=0.2, seed=3)
            audio = before.generate(**options)
            self.assertSame(audio, after.generate(**options))

    def test_dtype(self):
        target = self.folder / "half"
        self.run_script(
            "--hf-path",
            str(REFERENCE / "mono-transformers"),
            "--mlx-path",
            str(target),
            "--dtype",
            "bfloat16",
        )
        weights = mx.load(str(target / "model.safetensors"))
        for name, weight in weights.items():
            ours = mx.bfloat16 if name.startswith("decoder.") else mx.float32
            self.assertEqual(weight.dtype, ours, name)
        _, stored = checkpoints.load_transformers(target)
        self.assertEqual(stored, mx.bfloat16)

    def test_quantized(self):
        source = str(REFERENCE / "stereo-transformers")
        for bits in (4, 8):
            target = self.folder / f"q{bits}"
            self.run_script(
                "--hf-path",
                source,
                "--mlx-path",
                str(target),
                "--dtype",
                "float32",
                "-q",
                "--q-bits",
                str(bits),
                "--q-group-size",
                "32",
            )
            stored = MusicGen.from_pretrained(target)
            loaded = MusicGen.from_pretrained(source, mx.float32, bits, 32)
            self.assertEqual(stored.config.quantization["bits"], bits)
            for model in (stored, loaded):
                linear = model.decoder.layers[0].linear1
                self.assertEqual((linear.bits, linear.group_size), (bits, 32))
            options = dict(prompts="drums", duration=0.2, temp=0)
            codes = stored.generate_codes(**options)
            self.assertSame(codes, loaded.generate_codes(**options))
        with self.assertRaisesRegex(SystemExit, "q_group_size must divide"):
            self.run_script(
                "--hf-path", source, "--mlx-path", str(self.folder / "x"), "-q"
            )

    def test_refuses_to_overwrite(self):
        source = str(REFERENCE / "mono-transformers")
        with self.assertRaisesRegex(SystemExit, "exists already"):
            self.run_script("--hf-path", source, "--mlx-path", str(self.folder))
        with self.assertRaisesRegex(SystemExit, "must exist"):
            self.run_script("--hf-path", source, "--mlx-path", str(self.folder / "a/b"))

    def test_interrupted_leaves_nothing(self):
        target = self.folder / "new"
        with patch("convert.json.dumps", side_effect=KeyboardInterrupt):
            with self.assertRaises(KeyboardInterrupt):
                convert.convert(
                    str(REFERENCE / "mono-transformers"), target, mx.float16
                )
        self.assertEqual(list(self.folder.iterdir()), [])

    def test_appears_whole_or_not_at_all(self):
        target, written = self.folder / "new", convert.save

        def save(model: MusicGen, folder: Path) -> None:
            written(model, folder)
            self.assertFalse(target.exists())

        with patch("convert.save", save):
            source = str(REFERENCE / "mono-transformers")
            convert.convert(source, target, mx.float16)
        self.assertTrue((target / "config.json").is_file())
        self.assertEqual(target.stat().st_mode & 0o777, 0o755)

    def test_upload_without_a_network_can_be_repeated(self):
        source, target = str(REFERENCE / "mono-transformers"), self.folder / "new"
        arguments = ["--hf-path", source, "--mlx-path", str(target)]
        arguments += ["--upload-repo", "someone/model"]
        with patch("huggingface_hub.HfApi") as api:
            api().create_repo.side_effect = RuntimeError("no network")
            with self.assertRaisesRegex(SystemExit, "did not take someone/model.*same"):
                self.run_script(*arguments)
            api().create_repo.side_effect = None
            with patch("convert.convert") as again:
                self.assertIn("as it is", self.run_script(*arguments))
        again.assert_not_called()
        api().upload_folder.assert_called_once()

    def test_model_card(self):
        (self.folder / "config.json").write_text('{"decoder_dtype": "float16"}')
        card = convert.model_card(self.folder, "a/b", "small")
        self.assertIn("base_model: facebook/musicgen-small", card)
        card = convert.model_card(self.folder, "a/b", str(self.folder))
        self.assertNotIn("base_model", card)
        self.assertNotIn(str(self.folder), card)
        with patch.dict(checkpoints.MODELS, tiny=str(self.folder)):
            card = convert.model_card(self.folder, "a/b", "tiny")
        self.assertIn("license: mit", card)
        self.assertNotIn("Meta", card)
        self.assertNotIn(str(self.folder), card)

    def test_tiny_by_its_short_name(self):
        folder, target = self.copy("mono-transformers"), self.folder / "x"
        with patch.dict(checkpoints.MODELS, tiny=str(folder)):
            self.run_script("--hf-path", "tiny", "--mlx-path", str(target))
        self.assertTrue(convert.is_converted(target))

    def test_wrong_command_lines(self):
        good = ["--hf-path", "small", "--mlx-path", str(self.folder / "x")]
        for bad, pattern in (
            (["--upload-repo", "nobody"], "must be OWNER/NAME"),
            (["--dtype", "int8"], "invalid choice"),
            (["--q-bits", "8"], "need --quantize"),
            (["-q", "--q-bits", "5"], "invalid choice"),
            (["--hf-path", "smal"], "must be one of small"),
        ):
            with redirect_stderr(io.StringIO()) as err:
                with self.assertRaisesRegex(SystemExit, "2"):
                    self.run_script(*good, *bad)
            self.assertRegex(err.getvalue(), rf"^convert.py: error: .*{pattern}.*\n$")

    def test_target_is_tried_before_the_model_is_loaded(self):
        with patch("tempfile.mkdtemp", side_effect=PermissionError("no")):
            with patch.object(MusicGen, "from_pretrained") as load:
                with self.assertRaises(PermissionError):
                    convert.convert("small", self.folder / "x", mx.float16)
        load.assert_not_called()

    def test_upload(self):
        target = self.folder / "new"
        with patch("huggingface_hub.HfApi") as api:
            self.run_script(
                "--hf-path",
                str(REFERENCE / "mono-transformers"),
                "--mlx-path",
                str(target),
                "--upload-repo",
                "someone/model",
            )
        api().create_repo.assert_called_once_with("someone/model", exist_ok=True)
        card = (target / "README.md").read_text()
        self.assertIn("license: cc-by-nc-4.0", card)
        self.assertIn("--model someone/model", card)


class TestLora(Test):
    path = str(REFERENCE / "mono-transformers")

    def setUp(self):
        super().setUp()
        self.clips = self.folder / "clips"
        self.clips.mkdir()
        for i, notes in enumerate(([60, 64, 67], [69, 65, 62])):
            save_audio(self.clips / f"{i}.wav", sounds.tune(32000, notes), 32000)
            (self.clips / f"{i}.txt").write_text(f"tune number {i}\n")
        self.adapter = self.folder / "adapter.safetensors"

    def train(self, *flags: str) -> tuple[int, str, str]:
        arguments = ["lora", "--model", self.path, "--data", self.clips]
        arguments += ["--output", self.adapter, "--rank", "4", "--dtype", "float32"]
        out, err, status = io.StringIO(), io.StringIO(), 0
        with patch.object(sys, "argv", ["train.py", *map(str, [*arguments, *flags])]):
            with redirect_stdout(out), redirect_stderr(err):
                try:
                    train.main()
                except SystemExit as error:
                    status = error.code
        return status, out.getvalue(), err.getvalue()

    def batch(self, model: MusicGen) -> tuple[mx.array, ...]:
        texts, codes = train.load_clips(model, self.clips)
        ids, mask = train.padded([model.tokenizer.encode(t) for t in texts], 16)
        told = mx.array([True, False])
        return ids, mask, told, mx.stack([c[:20] for c in codes]).astype(mx.int32)

    def test_loss_is_that_of_the_decoder(self):
        """In one pass as step by step."""
        for name in ("mono-transformers", "stereo-transformers", "melody-transformers"):
            model = exact(name)
            ids, mask, told, codes = self.batch(model)
            loss, _, _ = train.lm_loss(model, ids, mask, told, codes)
            config, T = model.config.decoder, codes.shape[1]
            wanted = musicgen.delay(codes, config.delays, T, config.vocab_size)
            text = model.text_encoder(ids, mask)
            attended = mask & told[:, None]
            run = musicgen.Run(model.decoder, text, attended, 2, T + 60)
            run.rewind(*model._states([None, None], 0, T))
            token, total = mx.full((2, 1, wanted.shape[2]), config.vocab_size), 0
            real = delay_mask(T, config.delays)
            for step in range(T):  # before the end, as in audiocraft
                logits = run(token)[:, -1]
                token = wanted[:, step : step + 1]
                chosen = mx.where(real[step], token[:, 0], 0)
                each = nn.losses.cross_entropy(logits, chosen) * real[step]
                total = total + each.sum(axis=0)
            want = (total / (2 * real[:T].sum(axis=0))).mean()
            self.assertAlmostEqual(loss.item(), want.item(), 3)

    def test_gradients(self):
        """Against finite differences."""
        model = exact("mono-transformers")
        model.freeze()
        lora.add_adapters(model.decoder, 2, 1.0)
        layer = model.decoder.layers[0].linear1
        layer.b = 0.1 * mx.random.normal(layer.b.shape, key=mx.random.key(1))
        layer.unfreeze(keys=["a", "b"], recurse=False)
        batch = self.batch(model)
        gradient = nn.value_and_grad(model, train.lm_loss)
        _, found = gradient(model, *batch)
        found = found["decoder"]["layers"][0]["linear1"]
        for name in ("a", "b"):
            way = mx.random.normal(layer[name].shape, key=mx.random.key(2))
            values, start = [], layer[name]
            for step in (1e-2, -1e-2):
                layer[name] = start + step * way
                values.append(train.lm_loss(model, *batch)[0].item())
            layer[name] = start
            slope = (found[name] * way).sum().item()
            self.assertAlmostEqual((values[0] - values[1]) / 2e-2, slope, 3)
            self.assertGreater(abs(slope), 1e-3)

    def test_learns(self):
        before = exact("mono-transformers").generate_codes("a", duration=0.3, temp=0)
        status, out, err = self.train("--steps", "60", "--lr", "0.02", "--batch", "2")
        self.assertEqual((status, err), (0, ""))
        model = exact("mono-transformers")
        batch = self.batch(model)
        first = train.lm_loss(model, *batch)[0].item()
        learned = MusicGen.from_pretrained(self.path, mx.float32, adapter=self.adapter)
        self.assertLess(train.lm_loss(learned, *batch)[0].item(), first - 0.3)
        none = dict(adapter=self.adapter, adapter_scale=0)
        same = MusicGen.from_pretrained(self.path, mx.float32, **none)
        self.assertSame(same.generate_codes("a", duration=0.3, temp=0), before)
        self.assertLess(self.adapter.stat().st_size, 200_000)

        converted = self.folder / "fused"
        convert.convert(self.path, converted, mx.float32, adapter=self.adapter)
        fused = MusicGen.from_pretrained(converted, mx.float32)
        wanted = learned.generate_codes("b", duration=0.3, seed=1)
        self.assertSame(fused.generate_codes("b", duration=0.3, seed=1), wanted)

        flags = ["-p", "b", "--model", self.path, "--seed", "1", "--duration", "0.3"]
        flags += ["--dtype", "float32"]
        for name, more in (("a", ["--adapter", self.adapter]), ("b", [])):
            flags += more if name == "a" else ["--again", self.folder / "a.wav"]
            output = ["--output", self.folder / f"{name}.wav"]
            status, _, err = TestCommandLine.run_script(self, *flags, *output)
            self.assertEqual(status, 0, err)
            told = settings.read_settings(self.folder / f"{name}.wav")
            self.assertEqual(told["adapter"], str(self.adapter))
        self.assertSame(*(soundfile.read(self.folder / f"{n}.wav")[0] for n in "ab"))

    def test_goes_on(self):
        """As if it had never stopped; with a rate that does not depend on the end."""
        flags = ["--lr", "0.01", "--seed", "3", "--batch", "2", "--crop", "0.4"]
        with patch("math.cos", return_value=1.0):
            self.train("--steps", "8", *flags)
            whole = lora.read_adapter(self.adapter)[0]
            self.train("--steps", "3", *flags)
            status, out, err = self.train("--steps", "8", "--resume", *flags)
        self.assertEqual((status, err), (0, ""))
        self.assertIn("step 8", out)
        for name, value in lora.read_adapter(self.adapter)[0].items():
            self.assertClose(value, whole[name], 1e-5)
        self.adapter.unlink()
        self.train("--steps", "8", "--resume", *flags)  # it is done already
        self.assertTrue(self.adapter.is_file())
        status, _, _ = self.train("--resume", *flags, "--rank", "8")
        self.assertRegex(str(status), "rank must be as it was, 4, .* got 8")
        checkpoint = self.folder / "adapter.safetensors.training"
        checkpoint = checkpoint / "checkpoint.safetensors"
        checkpoint.write_bytes(checkpoint.read_bytes()[:999])
        status, _, _ = self.train("--resume", *flags)
        self.assertRegex(str(status), "checkpoint.safetensors is damaged")
        mx.save_safetensors(str(checkpoint), {"a": mx.zeros(1)})
        status, _, _ = self.train("--resume", *flags)
        self.assertRegex(str(status), "checkpoint.safetensors is damaged")

    def test_text_is_left_out_at_times(self):
        for share in (0.0, 1.0):
            loss = Mock(wraps=train.lm_loss)
            with patch.multiple(train, WITHOUT_TEXT=share, lm_loss=loss):
                self.assertEqual(self.train("--steps", "1")[0], 0)
            self.assertEqual(loss.call_args.args[3].tolist(), [share == 0])

    def test_interrupted(self):
        with patch("train.Training.tell", side_effect=KeyboardInterrupt):
            self.assertEqual(self.train("--steps", "2")[0], 130)
        with patch("train.lm_loss", side_effect=KeyboardInterrupt):
            self.assertEqual(self.train("--steps", "2")[0], 130)
        self.assertEqual(self.train("--steps", "2", "--resume")[0], 0)

    def test_loss_that_is_not_finite(self):
        def loss(model: MusicGen, *batch: mx.array) -> tuple:
            total, losses, state = true_loss(model, *batch)
            return total, losses * math.nan, state

        true_loss = train.lm_loss
        with patch("train.lm_loss", loss):
            status, _, _ = self.train("--steps", "3")
        self.assertRegex(str(status), "The loss must be finite.*step 3")
        self.assertFalse(self.adapter.exists())

    def test_kept_codes(self):
        """Are those of the clip as it is, and of this codec."""
        path, model = self.clips / "0.wav", exact("mono-transformers")
        codes = train.clip_codes(model, path)
        with patch.object(MusicGen, "encode_prompt", side_effect=AssertionError):
            self.assertSame(train.clip_codes(model, path), codes)
        (kept,) = self.clips.glob(".*.codes.safetensors")
        kept.write_bytes(b"noise")
        self.assertSame(train.clip_codes(model, path), codes)
        other = exact("mono-audiocraft")
        same = other.encode_prompt(load_audio(path, 32000, 1), 10**6)[0]
        self.assertSame(train.clip_codes(other, path), same)
        shutil.copy2(self.clips / "1.wav", path)
        self.assertNotEqual(train.clip_codes(model, path).tolist(), codes.tolist())
        (self.clips / "._0.wav").touch()
        self.assertEqual(len(train.find_clips(self.clips)), 2)

    def test_beside_quantized_layers(self):
        sizes = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=2)
        config = musicgen.DecoderConfig(ffn_dim=64, **sizes)
        decoder = musicgen.Decoder(config, text_width=16)
        decoder.quantize(8, 32)
        inputs = mx.random.normal((1, 3, 64))
        layer = decoder.layers[0].linear1
        lora.add_adapters(decoder, 2, 0.5)
        adapted = decoder.layers[0].linear1
        adapted.b = mx.ones(adapted.b.shape)
        want = layer(inputs) + 0.5 * (inputs @ adapted.a) @ adapted.b
        self.assertClose(adapted(inputs), want, 1e-5)
        lora.fuse(decoder)
        self.assertIs(decoder.layers[0].linear1, adapted)
        self.assertTrue(lora.has_adapters(decoder))

    def test_bad_clips(self):
        (self.clips / "bad.wav").write_bytes(b"noise")
        (self.clips / "bad.txt").write_text("bad")
        status, _, err = self.train("--steps", "1")
        self.assertEqual(status, 0)
        self.assertRegex(err, "skipped: .*bad.wav is not a readable sound file.*\n$")
        for name in ("0", "1"):
            (self.clips / f"{name}.wav").write_bytes(b"noise")
        status, _, err = self.train("--steps", "1")
        self.assertRegex(str(status), "must hold a sound file that can be read")
        save_audio(self.clips / "0.wav", mx.zeros((32000, 1)), 32000)
        self.assertRegex(self.train("--steps", "1")[2], "skipped: .*0.wav is silent.\n")
        (self.clips / "0.txt").unlink()
        status, _, err = self.train("--steps", "1")
        self.assertRegex(str(status), "0.wav needs a caption in 0.txt")
        (self.clips / "captions.jsonl").write_text('{"file": 3}')
        status, _, err = self.train("--steps", "1")
        self.assertRegex(str(status), "captions.jsonl, line 1 must be")

    def test_bad_flags_and_files(self):
        for flag in ("--lr", "--rank", "--steps", "--crop"):
            status, _, err = self.train(flag, "0")
            self.assertEqual(status, 2)
            self.assertIn(f"{flag} must be above 0, got 0", err)
        status, _, _ = self.train("--rank", "999")
        self.assertRegex(str(status), "rank must be from 1 to 32, got 999")
        status, _, _ = self.train("--resume", "--steps", "2")
        self.assertRegex(str(status), "nothing to resume")
        for flag, value in (("--lr", "inf"), ("--crop", "0.01")):
            self.assertEqual(self.train(flag, value)[0], 2)
        self.assertIn("must be from 0 to 4294967296", self.train("--seed", "-1")[2])
        with patch.object(mx, "save_safetensors", side_effect=RuntimeError("full")):
            status, _, _ = self.train("--steps", "1")
        self.assertRegex(str(status), "could not be written: full")
        self.assertFalse(self.adapter.exists())
        self.train("--steps", "1")
        for name, pattern in (
            ("stereo-transformers", "belongs to another model: its num_hidden"),
            ("mono-transformers", "adapter_scale must be"),
        ):
            options = dict(adapter=self.adapter, adapter_scale=1.0)
            options["adapter_scale"] = math.nan if "scale" in pattern else 1.0
            with self.assertRaisesRegex(ValueError, pattern):
                MusicGen.from_pretrained(REFERENCE / name, **options)
        model = exact("mono-transformers")
        arrays, told = lora.read_adapter(self.adapter)
        name = "layers.0.linear1.a"
        for changed, pattern in (
            ({name: arrays[name][:3]}, "must have layers.0.linear1.a of the shape"),
            ({"layers.9.a": arrays[name]}, "layers.9.a of the shape None"),
        ):
            with self.assertRaisesRegex(ValueError, pattern):
                lora.check_adapter(model.decoder, arrays | changed, told, "x")
        with self.assertRaisesRegex(ValueError, "must tell sizes and a rank"):
            lora.check_adapter(model.decoder, arrays, {"rank": "x"}, "x")
        (self.folder / "x.safetensors").write_bytes(b"noise")
        for path, error in (("x", ValueError), ("none", FileNotFoundError)):
            with self.assertRaises(error):
                lora.read_adapter(self.folder / f"{path}.safetensors")


class TestSynth(Test):
    def test_world(self):
        self.assertEqual((len(synth.KNOWN), len(synth.HELD_OUT)), (144, 36))
        for traits in itertools.combinations((0, 1, 2, 4), 3):  # all but the mode
            known, all_clips = (
                {tuple(clip[i] for i in traits) for clip in clips}
                for clips in (synth.KNOWN, synth.CLIPS)
            )
            self.assertEqual(known, all_clips)
        for i, values in enumerate(synth.TRAITS.values()):  # each is asked for
            self.assertEqual({clip[i] for clip in synth.HELD_OUT}, set(values))
        measured = [
            {c._replace(mode="") for c in x} for x in (synth.KNOWN, synth.HELD_OUT)
        ]
        self.assertFalse(measured[0] & measured[1])

    def test_clips(self):
        again = [synth.make(7) for _ in range(2)]
        self.assertEqual(again[0][:2], again[1][:2])
        self.assertSame(again[0][2], again[1][2])
        for seed in range(8):
            clip, text, sound = synth.make(seed, seconds=2.0)
            self.assertIn(clip, synth.KNOWN)
            self.assertEqual(sound.shape, (64000,))
            self.assertTrue(0.05 < np.abs(sound).max() <= 1)
            self.assertGreater(len(text.split()), 1)
        begun = []
        for share in (0, 1):  # from the first note, or from anywhere
            with patch.object(synth, "EARLY", share):
                begun.append(synth.make(7, seconds=2.0)[2])
        self.assertGreater(np.abs(begun[0] - begun[1]).max(), 0.1)

    def test_words_tell_all_traits(self):
        random = np.random.default_rng(0)
        for clip in synth.CLIPS:
            text = synth.caption(clip, random)
            for name, value in clip._asdict().items():
                said = any(word in text for word in synth.WORDS[value])
                self.assertTrue(said or value == "without", text)

    def test_measures(self):
        """On clips that the timbres were not fitted to."""
        judge = evaluate.Judge(150)
        random = np.random.default_rng(5)
        clips = synth.CLIPS[::4]
        own = [synth.render(clip, random, 4.0) for clip in clips]
        found = evaluate.share(clips, [*map(judge.name, evaluate.measured(own))])
        for name, least in (("register", 0.95), ("tempo", 0.95), ("drums", 0.95)):
            self.assertGreaterEqual(found[name], least, name)
        self.assertGreaterEqual(found["timbre"], 0.95)


class Echo:
    """Stands for a model that plays what it is told, as `wrong` makes of it, with a
    codec that keeps all."""

    audio_encoder = Mock(
        encode=lambda audio: [Mock(codes=audio)], decode_chunk=lambda codes: codes
    )

    def __init__(self, wrong=lambda clip: clip):
        self.wrong, self.calls = wrong, []

    def generate(self, texts: list[str], duration: float, **options) -> mx.array:
        self.calls.append((texts, duration, options))
        random = np.random.default_rng(3)
        clips = [self.wrong(self.told(text)) for text in texts]
        sounds = np.stack([synth.render(clip, random, duration) for clip in clips])
        return mx.array(sounds)[..., None]

    @staticmethod
    def told(text: str) -> synth.Clip:
        """The clip of a caption: of the words for a trait the longest that is there."""
        found = []
        for values in (synth.TRAITS | {"timbre": (*synth.VOICES,)}).values():
            said = [(len(w), v) for v in values for w in synth.WORDS[v] if w in text]
            found.append(max(said)[1] if said else "without")
        return synth.Clip(*found)


class TestEvaluate(Test):
    judge = staticmethod(cache(partial(evaluate.Judge, 60)))

    def table(self, model: Echo, *flags: str) -> dict[str, list[float]]:
        """The rows that the script prints; its messages where it fails."""
        given = patch.object(evaluate.MusicGen, "from_pretrained", return_value=model)
        argv = ["evaluate.py", "--model", "x", *flags]
        with given as self.given, patch.object(evaluate, "Judge", self.judge):
            with redirect_stdout(io.StringIO()) as out, patch.object(sys, "argv", argv):
                evaluate.main()
        head, _, *rows = out.getvalue().splitlines()
        self.assertRegex(head, r"^\| \| register \| tempo \| timbre \| drums \|")
        rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
        return {
            name: [float(cell.rstrip("%")) / 100 for cell in row] for name, *row in rows
        }

    def test_a_model_that_follows(self):
        model = Echo()
        table = self.table(model, "--prompts", "12", "--guidance-coef", "2")
        clips, coded, takes, chance = table.values()
        self.assertEqual(clips, coded)
        for row in (clips, takes):
            self.assertGreaterEqual(min(row), 0.9, table)
        self.assertLess(max(chance), 0.8, table)
        ((texts, duration, options),) = model.calls
        self.assertEqual((len(texts), duration, options["guidance_coef"]), (12, 4, 2))
        self.assertTrue(all(model.told(text).held_out for text in texts), texts)
        self.given.assert_called_once_with("x", adapter=None)

    def test_a_model_that_does_not(self):
        """What is wrong shows in its own column."""
        others = dict(timbre="bell", register="low", tempo="fast", drums="with")
        values = list(others.values())
        for i, name in enumerate(("timbre", "register", "tempo", "drums")):
            wrong = Echo(lambda clip: clip._replace(**{name: values[i]}))  # noqa: B023
            takes = list(self.table(wrong, "--prompts", "12").values())[2]
            found = dict(zip(("register", "tempo", "timbre", "drums"), takes))
            self.assertLess(found.pop(name), 0.7, name)
            self.assertGreaterEqual(min(found.values()), 0.8, (name, found))

    def test_timbre_of_an_adapter(self):
        model = Echo()
        flags = ("--adapter", "a.safetensors", "--timbre", "brass", "--prompts", "12")
        clips, _, takes, _ = self.table(model, *flags).values()
        self.assertGreaterEqual(min(takes[:4]), 0.9)
        far = Echo(lambda clip: clip._replace(timbre="sine"))
        farther = list(self.table(far, *flags).values())[2][4]
        self.assertLess(takes[4], 2 * clips[4])
        self.assertGreater(farther, 100 * takes[4])
        timbres = {model.told(text).timbre for text in model.calls[0][0]}
        self.assertEqual(timbres, {"brass"})
        self.given.assert_called_with("x", adapter="a.safetensors")

    def test_codec(self):
        """Half of the amplitude costs distance, but is the same signal."""
        codec = Mock(encode=lambda audio: [Mock(codes=mx.repeat(audio, 4, 2))])
        codec.decode_chunk = lambda codes: codes.shape[2] / 8 * codes[..., :1]
        model = Mock(audio_encoder=codec)
        given = patch.object(evaluate.MusicGen, "from_pretrained", return_value=model)
        argv = ["evaluate.py", "--codec", "x"]
        with given, redirect_stdout(io.StringIO()) as out:
            with patch.object(sys, "argv", argv):
                evaluate.main()
        rows = [row.strip("|").split("|") for row in out.getvalue().splitlines()]
        self.assertEqual([row[0].split()[0] for row in rows[2:]], ["1", "2", "4"])
        distances = [float(row[1]) for row in rows[2:]]
        self.assertEqual(distances, sorted(distances, reverse=True))
        self.assertGreater(min(float(row[2]) for row in rows[2:]), 60)

    def test_si_sdr(self):
        wanted, noise = np.random.default_rng(0).standard_normal((2, 100_000))
        self.assertAlmostEqual(evaluate.si_sdr(3 * wanted + 0.3 * noise, wanted), 20, 1)
        self.assertAlmostEqual(evaluate.si_sdr(wanted + noise, wanted), 0, 1)

    def test_silence_is_nothing(self):
        judge, found = evaluate.Judge(30), evaluate.measure(
            np.zeros(128_000, np.float32)
        )
        self.assertEqual(set(judge.name(found).values()), {""})
        row = evaluate.cells(judge, [found], [synth.CLIPS[0]], "bell")
        self.assertEqual(list(row.values()), ["0.0%"] * 4 + ["inf"])

    def test_wrong_command_lines(self):
        for flags in (
            "--model x --duration 0.5",
            "--model x --prompts 0",
            "--codec x --timbre brass",
            "",
        ):
            argv = ["evaluate.py", *flags.split()]
            with patch.object(sys, "argv", argv), redirect_stderr(io.StringIO()) as err:
                with self.assertRaises(SystemExit):
                    evaluate.main()
            self.assertRegex(err.getvalue(), "^evaluate.py: error: .*\n$")

    def test_interrupt(self):
        for script, step in ((evaluate, "follow"), (synth, "listen")):
            argv = ["x.py", *(["--model", "x"] if script is evaluate else [])]
            with patch.object(script, step, side_effect=KeyboardInterrupt):
                with patch.object(sys, "argv", argv):
                    with self.assertRaises(SystemExit) as stop:
                        script.main()
            self.assertEqual(stop.exception.code, 130)


class TestTrain(Test):
    def setUp(self):
        super().setUp()
        self.out = self.folder / "tiny"
        self.codec = self.out / "training" / "codec" / train.CODEC_FILE

    def synth(self, *flags: str, **patches) -> str:
        """How two steps of a smaller model end: the message, or nothing; with these
        patches of train.py."""
        small = dict(num_filters=4, hidden_size=8, codebook_size=64)
        codec = dataclasses.replace(train.CODEC, target_bandwidths=(1.2,), **small)
        sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
        decoder = dataclasses.replace(train.DECODER, vocab_size=64, ffn_dim=48, **sizes)
        text = dataclasses.replace(train.TEXT, d_model=16, d_kv=8, d_ff=16)
        pool = Mock()
        pool.__enter__ = lambda _: Mock(imap=lambda f, x, chunksize: map(f, x))
        pool.__exit__ = lambda *_: None
        one_process = Mock(return_value=Mock(Pool=lambda: pool))
        patches |= dict(CODEC=codec, DECODER=decoder, TEXT=text)
        argv = ["train.py", "synth", "--output", str(self.out), "--steps", "2"]
        argv += ["--batch", "2", "--clips", "2", *flags]
        with patch.multiple(train, get_context=one_process, **patches):
            with patch.object(sys, "argv", argv), redirect_stdout(io.StringIO()):
                try:
                    return train.main() or ""
                except SystemExit as error:
                    return str(error.code)

    def test_codec(self):
        """The codebooks that followed are written, and the start is even."""
        used = {
            name: Mock(wraps=getattr(train, name))
            for name in ("start_even", "with_gradients", "make_clips")
        }
        self.assertEqual(self.synth("--codec", **used), "")
        for name in ("start_even", "with_gradients"):
            used[name].assert_called_once()
        (made,) = used["make_clips"].mock_calls
        self.assertEqual(made.args[1], synth.KNOWN + synth.clips_of("any"))
        written = mx.load(str(self.codec))
        followed = mx.load(str(self.codec.with_name("checkpoint.safetensors")))
        for k in range(4):
            entries = written[f"quantizer.layers.{k}.codebook.embed"]
            self.assertSame(entries, followed[f"state/entries.{k}"])
            self.assertGreater(mx.abs(entries).max().item(), 0)

    def test_lm(self):
        """A model that plays comes of captions that are guessed, or left out, at times."""
        self.synth("--codec")
        misheard = Mock(wraps=synth.misheard)
        used = {
            name: Mock(wraps=getattr(train, name))
            for name in ("start_small", "make_clips", "lm_loss")
        }
        with patch.object(synth, "misheard", misheard):
            self.assertEqual(self.synth("--lm", WITHOUT_TEXT=1.0, **used), "")
        used["start_small"].assert_called_once()
        (made,) = used["make_clips"].mock_calls
        self.assertEqual(made.args[1], synth.KNOWN)
        self.assertEqual(misheard.call_args.args[2], train.MISHEARD)
        *_, told, codes = used["lm_loss"].call_args.args
        self.assertFalse(told.any())
        self.assertEqual(codes.shape, (2, 400, 4))
        self.synth("--lm", WITHOUT_TEXT=0.0, **used)
        self.assertTrue(used["lm_loss"].call_args.args[3].all())
        audio = MusicGen.from_pretrained(self.out).generate("slow bell", duration=0.2)
        self.assertEqual(audio.shape, (1, 6400, 1))

    def test_codec_that_is_not_the_one(self):
        self.assertRegex(self.synth("--lm"), "is missing: train the codec first")
        self.synth("--codec")
        self.synth("--lm")
        self.assertEqual(self.synth("--lm", "--resume", "--steps", "3"), "")
        self.synth("--codec", "--seed", "5")
        message = self.synth("--lm", "--resume", "--steps", "4")
        self.assertRegex(message, "codec must be as it was")
        self.codec.write_bytes(self.codec.read_bytes()[:999])
        self.assertRegex(self.synth("--lm"), "codec.safetensors is damaged")

    def training(
        self, model: nn.Module, loss: Callable | None, state: dict = {}, **told
    ) -> train.Training:
        args = dict(lr=1e-3, steps=9, seconds=1e9, seed=0, resume=False) | told
        args = argparse.Namespace(**args)
        return train.Training(model, loss, args, self.folder, dict(state), {})

    @staticmethod
    def sum_loss(model: nn.Module, x: mx.array) -> tuple:
        return model(x).sum(), mx.zeros(1), {}

    def test_rate_rises_and_falls(self):
        training = self.training(nn.Linear(2, 1), self.sum_loss, lr=1.0, steps=1000)
        for done, rate in ((0, 0.01), (49, 0.497), (500, 0.51), (999, 0.02)):
            training.done = done
            training.step((mx.ones((1, 2)),))
            self.assertAlmostEqual(training.optimizer.learning_rate.item(), rate, 2)

    def test_codec_goes_on_with_its_codebooks(self):
        def training(resume: bool, change: int) -> train.Training:
            state = train.first_codebooks(mx.random.key(0))
            state = {name: value + change for name, value in state.items()}
            return self.training(nn.Linear(2, 2), None, state, resume=resume)

        first = training(False, 1)
        first.save()
        again = training(True, 0)
        self.assertEqual(again.state.keys(), first.state.keys())
        for name, value in again.state.items():
            self.assertSame(value, first.state[name])

    def test_keeps_on_the_way(self):
        """Every four minutes, and at the end."""
        training = self.training(nn.Linear(2, 1), self.sum_loss, steps=8)
        kept = []

        def keep():
            self.assertTrue(training.path.is_file())
            kept.append(training.done)

        clock = Mock(side_effect=itertools.count(0, 100))  # seconds
        with patch("train.time.perf_counter", clock), redirect_stdout(io.StringIO()):
            training.run(lambda: (mx.ones((1, 2)),), ("loss",), keep)
        self.assertEqual(kept, [3, 6, 8])

    def test_codebooks_follow(self):
        seen = mx.random.normal((64, 4), key=mx.random.key(0)) + 3
        books = mx.zeros((8, 4))
        state = dict(counts=mx.zeros(8), sums=mx.zeros((8, 4)))
        for _ in range(300):
            _, _, (taken,) = train.quantize(seen, [books])
            key = mx.random.key(1)
            books, state = train.follow(books, state, seen, taken, key)
        _, _, (taken,) = train.quantize(seen, [books])
        self.assertEqual(len(set(taken.tolist())), 8)  # the dead were revived
        for entry in range(8):
            own = seen[mx.array(np.flatnonzero(np.array(taken) == entry))]
            self.assertClose(books[entry], own.mean(axis=0), 0.1)

    def test_elu_can_be_trained(self):
        """Where x is large, too, of which `nn.elu` makes no number."""
        x = mx.array([-50.0, -3.0, -0.5, 0.5, 3.0, 100.0])
        slope = mx.grad(lambda x: train.elu(x).sum())(x)
        self.assertClose(slope, mx.where(x > 0, 1, mx.exp(x)), 1e-6)
        self.assertSame(train.elu(x), nn.elu(x))
        codec = train.with_gradients(Encodec(train.CODEC))
        kinds = {type(m) for _, m in codec.named_modules()}
        self.assertIn(train.ELU, kinds)
        self.assertNotIn(nn.ELU, kinds)

    def test_a_gradient_that_is_no_number_changes_little(self):
        model = nn.Linear(2, 1, bias=False)
        loss = lambda m, x: (m(x).sum() * x.sum(), mx.zeros(1), {})  # noqa: E731
        training = self.training(model, loss)
        for x in (1.0, math.inf, 1.0):
            before = mx.array(model.weight)
            training.step((mx.full((1, 2), x),))
            self.assertTrue(mx.isfinite(model.weight).all())
            moved = mx.abs(model.weight - before)  # by more than the decay of weights
            self.assertGreater(moved.min().item(), 1e-4)

    def test_misheard_captions_tell_nothing_held_out(self):
        random = np.random.default_rng(0)
        told = [synth.misheard(clip, random, 0.5) for clip in synth.KNOWN * 5]
        self.assertFalse(any(clip.held_out for clip in told))
        same = [a == b for a, b in zip(told, synth.KNOWN * 5)]
        self.assertTrue(0.05 < np.mean(same) < 0.5)

    def test_codec_starts_even(self):
        """Sound comes through before any step, quietly."""
        codec = Encodec(train.CODEC)
        train.start_even(codec)
        sound = mx.array(synth.make(1, seconds=1.0)[2])[None, :, None]
        states = codec.encoder(sound)
        self.assertTrue(0.1 < mx.abs(states).mean() < 1)
        self.assertTrue(0.01 < mx.abs(codec.decoder(states)).mean() < 0.2)

    def test_codec_learns_through_its_codes(self):
        """The encoder hears of the sound, not of the codebooks alone."""
        codec = train.with_gradients(Encodec(train.CODEC))
        train.start_even(codec)
        state = train.first_codebooks(mx.random.key(0))
        sound = mx.array(synth.make(1, seconds=0.5)[2])[None]

        def encoder_gradient(part: int) -> float:
            loss = lambda m: train.codec_loss(m, state, sound)[1][part]  # noqa: E731
            gradient = nn.value_and_grad(codec, loss)(codec)[1]
            return mx.abs(gradient["encoder"]["layers"][0]["conv"]["weight"]).max()

        for part in range(3):
            self.assertGreater(encoder_gradient(part).item(), 1e-6)

    def test_stft_distance(self):
        sound = mx.random.normal((1, 8000), key=mx.random.key(0))
        self.assertEqual(train.stft_distance(sound, sound).item(), 0)
        self.assertGreater(train.stft_distance(sound, 0.5 * sound).item(), 0.4)


class TestTiny(Test):
    """What only a trained model can show, with the one in tiny/, on combinations that it
    never heard."""

    @classmethod
    def setUpClass(cls):
        random = np.random.default_rng(0)
        cls.clips = [synth.HELD_OUT[i] for i in random.permutation(36)]
        cls.texts = [synth.caption(clip, random) for clip in cls.clips]
        cls.judge = evaluate.Judge(150)
        cls.model = MusicGen.from_pretrained("tiny", mx.float32)

    def assertFollowed(self, audio: mx.array, least: float, names: str, clips=None):
        """Sounds (B, N, 1) that are like the clips in the traits with these names."""
        found = [*map(self.judge.name, evaluate.measured(np.array(audio[..., 0])))]
        right = evaluate.share((clips or self.clips)[: len(found)], found)
        for name in names.split():
            self.assertGreaterEqual(right[name], least, f"{name}: {right}")

    def test_size(self):
        files = [path for path in (HERE / "tiny").iterdir() if path.is_file()]
        self.assertLessEqual(sum(path.stat().st_size for path in files), 10e6)

    def test_prompts_are_followed(self):
        audio = self.model.generate(self.texts, duration=4.0, seed=0)
        self.assertFollowed(audio, 0.9, "register drums")
        self.assertFollowed(audio, 0.75, "tempo timbre")
        others = self.clips[1:] + self.clips[:1]  # that these measures can fail
        with self.assertRaises(AssertionError):
            self.assertFollowed(audio, 0.75, "timbre", others)

    def test_quantized_prompts_are_followed(self):
        for bits in (8, 4):
            with self.subTest(bits=bits):
                model = MusicGen.from_pretrained("tiny", mx.float32, q_bits=bits)
                audio = model.generate(self.texts[:20], duration=3.0, seed=0)
                self.assertFollowed(audio, 0.85, "register drums")
                self.assertFollowed(audio, 0.75, "tempo timbre")

    def test_stream_resume_and_batch(self):
        options = dict(duration=2.0, seed=5)
        codes = self.model.generate_codes(self.texts[0], **options)
        pieces = list(self.model.stream(self.texts[0], chunk=0.3, **options))
        whole = self.model.decode(codes)[0]
        self.assertClose(mx.concatenate(pieces), whole, 1e-4)
        begun = dict(codes_prompt=codes[:, :37], **options)
        self.assertSame(self.model.generate_codes(self.texts[0], **begun), codes)
        rows = self.model.generate_codes(self.texts[:3], **options)
        self.assertSame(rows[:1], codes)

    def test_long_audio_stays(self):
        """Past the 8 s that it was trained on."""
        audio = self.model.generate(self.texts[:8], duration=14.0, seed=0)
        late = audio[:, -4 * synth.RATE :]
        self.assertFollowed(late, 0.75, "register drums timbre tempo")

    def test_continuation_keeps_tempo_and_timbre(self):
        """Of a sound, with a text that says nothing of them."""
        kept = []
        for clip in self.clips[:12]:
            sound = synth.render(clip, np.random.default_rng(1), 3.5)[:, None]
            options = dict(audio_prompt=mx.array(sound), drop_prompt=True, seed=2)
            audio = self.model.generate("a melody", duration=7.5, **options)
            kept.append(audio)
        self.assertFollowed(mx.concatenate(kept), 0.8, "tempo timbre")


class TestCommandLine(Test):
    model = str(REFERENCE / "stereo-audiocraft")

    def run_script(self, *arguments: str) -> tuple[int, str, str]:
        """Exit status, standard output and standard error."""
        with redirect_stdout(io.StringIO()) as out, redirect_stderr(
            io.StringIO()
        ) as err:
            with patch("sys.argv", ["generate.py", *map(str, arguments)]):
                try:
                    generate.main()
                    status = 0
                except SystemExit as stop:
                    status = stop.code
                    if isinstance(status, str):  # as the interpreter does
                        print(status, file=sys.stderr)
                        status = 1
        return status, out.getvalue(), err.getvalue()

    def test_end_to_end(self):
        output = self.folder / "music.wav"
        command = [sys.executable, "generate.py", "-p", "drums", "--model", self.model]
        command += ["--duration", "0.5", "--seed", "4", "--output", str(output)]
        result = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertRegex(
            result.stdout, r"^.*music.wav: 0.50 s of audio in .* seed 4\n$"
        )
        self.assertIn("28/28", result.stderr)  # 25 frames and 3 steps of delay
        audio, rate = soundfile.read(output)
        self.assertEqual((audio.shape, rate), ((16000, 2), 32000))
        model = MusicGen.from_pretrained(self.model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            save_audio(
                self.folder / "same.wav",
                model.generate("drums", duration=0.5, seed=4)[0],
                32000,
            )
        same, _ = soundfile.read(self.folder / "same.wav")
        self.assertSame(audio, same)
        told = settings.read_settings(output)
        wanted = dict(prompt="drums", seed=4, duration=0.5, model=self.model, top_k=250)
        self.assertEqual({name: told[name] for name in wanted}, wanted)

    def test_flags_reach_the_model(self):
        output = self.folder / "out.wav"
        flags = "--duration 0.1 --temp 0.5 --top-k 9 --top-p 0.7 --guidance-coef 2"
        arguments = ["-p", "a", "--output", output, "--model", self.model]
        seeds = []

        sound = self.folder / "sound.wav"
        save_audio(sound, 0.1 * mx.random.normal((3200, 1)), 16000)
        flags += " --negative-prompt b --extend-stride 7 --prompt-start 0.1"
        flags += " --prompt-length 0.05 --takes 2"
        arguments += ["--audio-prompt", sound]

        def generate_codes(model, prompts, seed, **options):
            seeds.append(seed[0])
            self.assertEqual(seed[1], seed[0] + 1)
            self.assertEqual(model.decoder.dtype, mx.bfloat16)
            self.assertEqual(options.pop("audio_prompt").shape, (1600, 2))
            del options["callback"], options["stop"]
            want = dict(
                melody=None,
                separate=False,
                temp=0.5,
                top_k=9,
                top_p=0.7,
                guidance_coef=2,
            )
            want |= dict(negative_prompt="b", extend_stride=7, batch_size=2)
            want |= dict(duration=0.1, codes_prompt=None, style=None)
            want |= dict.fromkeys(musicgen.STYLE_OPTIONS)
            self.assertEqual((prompts, options), (["a", "a"], want))
            return mx.zeros((2, 5, 8), mx.int32)

        arguments += flags.split() + ["--dtype", "bfloat16"]
        with patch.object(MusicGen, "generate_codes", generate_codes):
            for _ in range(2):
                self.assertEqual(self.run_script(*arguments)[0], 0)
        self.assertNotEqual(*seeds)

    def test_warnings_take_one_line(self):
        loud = mx.full((1, 640, 2), 3.0)
        with patch.object(MusicGen, "decode", return_value=loud):
            output = ["--output", self.folder / "out.wav", "--duration", "0.02"]
            _, _, err = self.run_script("-p", "a", "--model", self.model, *output)
        self.assertRegex(err, r"(?m)^(.*\r)?generate.py: warning: .*scaled down.*$")

    def test_interrupt(self):
        with patch("generate.run", side_effect=KeyboardInterrupt):
            self.assertEqual(self.run_script("-p", "a", "--model", self.model)[0], 130)

    def test_wrong_command_lines(self):
        good = ["--prompt", "a", "--output", self.folder / "out.wav"]
        for bad, pattern in (
            (["--duration", "0"], "duration must"),
            (["--duration", "-3"], "duration must"),
            (["--duration", "nan"], "duration must"),
            (["--duration", "0.001"], "duration must be at least a frame"),
            (["--duration", "x"], "duration: invalid"),
            (["--top-k", "0"], "top_k must"),
            (["--top-k", "2049"], "top_k must"),
            (["--top-p", "1.5"], "top_p must"),
            (["--top-p", "-1"], "top_p must"),
            (["--temp", "-1"], "temp must"),
            (["--guidance-coef", "nan"], "guidance_coef must"),
            (["--seed", "-1"], "seed must"),
            (["--dtype", "int8"], "invalid choice"),
            (["--nonsense"], "unrecognized"),
            (["--model", "smal"], "must be one of small"),
            (["--model", "sm\nal"], "must be one of small"),
            (["--model", ""], "must be one of small"),
            (["--model", "a" * 300], "must be one of small"),
            (["--output", "out.xyz"], "must end in one of"),
        ):
            with self.subTest(bad):
                status, out, err = self.run_script(*good, *bad)
                self.assertEqual((status, out), (2, ""))
                self.assertRegex(err, rf"^generate.py: error: .*{pattern}.*\n$")
        self.assertEqual(self.run_script()[0], 2)

    def test_what_else_goes_wrong(self):
        empty = self.folder / "empty"
        empty.mkdir()
        damaged = self.copy("stereo-audiocraft")
        (damaged / "state_dict.bin").write_bytes(b"PK\x03\x04 and nothing more")
        for arguments, pattern in (
            (["--output", self.folder / "no/out.wav"], "must exist"),
            (["--output", empty / ".wav" / "x.wav"], "must exist"),
            (["--model", empty], "must hold state_dict.bin"),
            (["--model", damaged], "state_dict.bin is not a checkpoint"),
        ):
            with self.subTest(pattern):
                output = ["--output", self.folder / "out.wav", "--prompt", "a"]
                status, out, err = self.run_script(*output, *arguments)
                self.assertEqual((status, out), (1, ""))
                self.assertRegex(err, rf"^generate.py: error: .*{pattern}.*\n$")
        self.assertFalse((self.folder / "out.wav").exists())

    def test_help_names_every_unit(self):
        status, out, _ = self.run_script("--help")
        self.assertEqual(status, 0)
        for flag in (
            "--prompt",
            "--model",
            "--duration",
            "--temp",
            "--top-k",
            "--top-p",
            "--guidance-coef",
            "--seed",
            "--output",
            "--dtype",
        ):
            self.assertIn(flag, out)
        self.assertIn("seconds", out)

    def test_level(self):
        output = self.folder / "out.wav"
        arguments = ["-p", "a", "--model", self.model, "--duration", "1"]
        arguments += ["--output", output]
        self.run_script(*arguments, "--loudness", "-30")
        audio, rate = soundfile.read(output)
        got = loudness_script.integrated_loudness(audio, rate)
        self.assertAlmostEqual(got, -30, delta=0.05)
        self.run_script(*arguments, "--peak", "-6")
        audio, _ = soundfile.read(output)
        self.assertAlmostEqual(np.abs(audio).max(), 10 ** (-6 / 20), 3)
        for bad, pattern in (
            (["--loudness", "3"], "loudness must"),
            (["--peak", "nan"], "peak must"),
            (["--peak", "-1", "--loudness", "-14"], "together"),
        ):
            status, _, err = self.run_script(*arguments, *bad)
            self.assertEqual(status, 2)
            self.assertRegex(err, f"^generate.py: error: .*{pattern}.*\n$")

    def test_report(self):
        job = jobs.make_job(dict(prompt="a", seed=4, output="out.wav"))
        for batch, told in (
            (1, "8.00 s of audio in 4.0 s, 2.00 times real time, seed 4"),
            (3, "8.00 s of audio in 4.0 s (3 at once), 6.00 times"),
        ):
            line = generate.describe(jobs.Made(job, 8.0, 4.0, batch))
            self.assertRegex(line, f"^out.wav: {re.escape(told)}")

    def test_takes_are_numbered(self):
        arguments = ["-p", "drums", "-p", "piano", "--takes", "2", "--seed", "5"]
        arguments += ["--output", self.folder / "out.flac"]
        common = ["--duration", "0.1", "--dtype", "float32", "--model", self.model]
        status, out, err = self.run_script(*arguments, *common)
        self.assertEqual(status, 0, err)
        names = [f"out-{i}.flac" for i in range(1, 5)]
        self.assertEqual(sorted(p.name for p in self.folder.iterdir()), names)
        self.assertEqual(out.count("\n"), 4)
        alone = ["-p", "piano", "--seed", "8"]
        self.run_script(*alone, "--output", self.folder / "alone.flac", *common)
        same = [self.folder / name for name in ("out-4.flac", "alone.flac")]
        sounds = [mx.array(soundfile.read(path)[0]) for path in same]
        self.assertClose(*sounds, 1e-4)  # a GPU rounds otherwise in a batch


class TestJobs(Test):
    model = str(REFERENCE / "stereo-audiocraft")
    run_script = TestCommandLine.run_script
    settings = dict(seed=3, output="out.wav", duration=0.1)

    def lines(self, *lines: str) -> Path:
        path = self.folder / "prompts.txt"
        path.write_text("\n".join(lines) + "\n")
        return path

    def script(self, path: Path, *more: str) -> tuple[int, str, str]:
        arguments = ["--prompts", path, "--output", self.folder / "out.wav"]
        arguments += ["--duration", "0.1", "--seed", "3", "--model", self.model]
        return self.run_script(*arguments, "--dtype", "float32", *more)

    def found(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("*.wav"))

    def contents(self) -> dict[str, str]:
        sounds = {name: self.folder / name for name in self.found()}
        digest = hashlib.sha256
        return {n: digest(p.read_bytes()).hexdigest() for n, p in sounds.items()}

    def test_plain_text(self):
        planned = jobs.plan_file(self.lines("drums", "", "  piano "), self.settings)
        told = [(job.prompt, job.seed, str(job.output), job.line) for job in planned]
        self.assertEqual(
            told, [("drums", 3, "out-1.wav", 1), ("piano", 4, "out-2.wav", 3)]
        )

    def test_json_lines(self):
        path = self.lines(
            '{"prompt": "a", "guidance": 2, "top-k": 9, "seed": 8}',
            '{"prompt": "", "output": "b.flac", "duration": 40, "audio_prompt": "s.wav"}',
        )
        first, second = jobs.plan_file(path, self.settings)
        self.assertEqual((first.seed, str(first.output)), (8, "out-1.wav"))
        want = musicgen.Options(duration=0.1, guidance_coef=2, top_k=9)
        self.assertEqual(first.options, want)
        self.assertEqual((second.seed, str(second.output)), (4, "b.flac"))
        self.assertEqual(second.options.duration, 40)
        self.assertEqual(second.audio_prompt, jobs.AudioPrompt("s.wav"))

    def test_bad_files(self):
        for lines, pattern in (
            ([], "must hold a prompt"),
            (['{"prompt": "a"}', "[]"], "line 2 must be an object"),
            (['{"prompt": "a"}', "b"], "line 2 is no JSON"),
            (["", '{"prompt": "a", "tempo": 3}'], "line 2 has the unknown key 'tempo'"),
            (['{"seed": 1}'], "line 1 must have a prompt"),
            (
                ['{"prompt": "a", "output": "x.wav"}'] * 2,
                "line 2: its output x.wav is that of line 1",
            ),
            (
                ['{"prompt": "a", "audio_prompt": "b", "prompt_start": "c"}'],
                "line 1: prompt_start must",
            ),
        ):
            with self.subTest(pattern):
                status, out, err = self.script(self.lines(*lines))
                self.assertEqual((status, out), (1, ""))
                self.assertRegex(err, f"^generate.py: error: .*{pattern}.*\n$")
        self.assertEqual(self.script(self.folder / "none")[0], 1)

    def test_outputs_are_called_after_the_file(self):
        path = self.lines("a", "b")
        arguments = ["generate.py", "--prompts", str(path), "--model", self.model]
        with patch("sys.argv", [*arguments, "--seed", "1"]):
            planned = generate.make_jobs(generate.parse_arguments())
        self.assertEqual(str(planned[1].output), "prompts-2.wav")

    def test_a_first_line_that_fails(self):
        for bad in (
            '"duration": "x"',
            '"duration": null',
            '"duration": 1e999',
            '"duration": true',
            '"extend_stride": "x"',
            '"prompt_start": 1',
            '"audio_prompt": "s.wav", "drop_prompt": "no"',
            f'"output": "{"x" * 300}.wav"',
            '"output": "a\\u0000b.wav"',
            '"loudness": "x"',
        ):
            with self.subTest(bad):
                path = self.lines(f'{{"prompt": "a", {bad}}}', '{"prompt": "b"}')
                status, out, err = self.script(path)
                self.assertEqual(status, 1)
                self.assertRegex(err, r"(?m)^(.*\r)?generate.py: error: .*line 1: .*$")
                self.assertNotIn("Traceback", err)
                early = "prompt" in bad  # found before any line is made
                self.assertEqual(self.found(), [] if early else ["out-2.wav"])
                for made in self.folder.glob("*.wav"):
                    made.unlink()

    def test_what_is_json_lines(self):
        array = self.lines('["a"]', '{"prompt": "b"}')
        with self.assertRaisesRegex(ValueError, "line 1 must be an object"):
            jobs.plan_file(array, self.settings)
        marked = self.folder / "marked.txt"
        text = '\ufeff{"prompt": "a\u2028b"}\r\n'
        marked.write_bytes(text.encode())
        (job,) = jobs.plan_file(marked, self.settings)
        self.assertEqual(job.prompt, "a\u2028b")
        named = self.folder / "x.jsonl"
        named.write_text("plain\n")
        with self.assertRaisesRegex(ValueError, "line 1 is no JSON"):
            jobs.plan_file(named, self.settings)

    def test_same_file_by_another_name(self):
        (self.folder / "link").symlink_to(self.folder)
        names = [str(self.folder / name) for name in ("x.wav", "link/x.wav")]
        lines = [json.dumps(dict(prompt="a", output=name)) for name in names]
        with self.assertRaisesRegex(ValueError, "is that of line 1, too"):
            jobs.plan_file(self.lines(*lines), self.settings)

    def test_an_empty_file_is_not_done(self):
        path = self.lines("a", "b")
        (self.folder / "out-1.wav").touch()
        self.script(path)
        self.assertGreater((self.folder / "out-1.wav").stat().st_size, 44)

    def test_share_is_of_all_lines(self):
        class Two:
            def size(self):
                return 2

            def rank(self):
                return 1

        planned = jobs.plan_file(self.lines(*"abcde"), self.settings)
        told = [job.prompt for job in jobs.share(planned, Two())]
        self.assertEqual(told, ["b", "d"])

    def test_prompt_that_is_dropped(self):
        path = self.folder / "s.wav"
        save_audio(path, 0.1 * mx.random.normal((1300, 1)), 32000)
        model = MusicGen.from_pretrained(self.model)
        own = dict(self.settings, audio_prompt=str(path))
        whole = jobs.plan(["a"], own)
        rest = jobs.plan(["a"], own | dict(drop_prompt=True))
        sound = whole[0].sound(model)
        codes = jobs.generate(model, whole, sound)
        kept = jobs.decode(model, whole, codes, 3)
        frames = model.prompt_frames(sound)
        self.assertSame(jobs.decode(model, rest, codes, frames), kept[:, 1920:])

    def test_disk_that_fills_up(self):
        info = Mock(frames=8)
        with patch("soundfile.info", return_value=info):
            with self.assertRaisesRegex(OSError, "the disk is full"):
                save_audio(self.folder / "x.wav", mx.zeros((9, 1)), 32000)
        self.assertEqual(list(self.folder.iterdir()), [])

    def test_a_line_that_fails_leaves_the_others_alone(self):
        path = self.lines(
            '{"prompt": "a"}',
            '{"prompt": "b", "duration": -1}',
            '{"prompt": "c", "seed": "x"}',
            '{"prompt": "d", "audio_prompt": "none.wav"}',
            '{"prompt": 5}',
            '{"prompt": "f", "extend_stride": "x"}',
            '{"prompt": "g"}',
        )
        status, out, err = self.script(path)
        self.assertEqual(status, 1)
        self.assertEqual(self.found(), ["out-1.wav", "out-7.wav"])
        reports = [line for line in err.splitlines() if ": error: " in line]
        self.assertEqual(len(reports), 5)
        for number, report in zip((2, 3, 4, 5, 6), reports):
            self.assertIn(f"line {number}: ", report)

    def test_resumes(self):
        path = self.lines("drums", "piano", "guitar")
        self.script(path)
        whole = self.contents()
        self.assertEqual(len(whole), 3)
        (self.folder / "out-2.wav").unlink()
        kept = (self.folder / "out-1.wav").stat().st_mtime_ns
        status, out, _ = self.script(path)
        self.assertEqual((status, out.count("\n")), (0, 1))
        if mx.default_device() == mx.cpu:  # a GPU rounds otherwise in a batch
            self.assertEqual(self.contents(), whole)
        self.assertEqual(self.found(), sorted(whole))
        self.assertEqual((self.folder / "out-1.wav").stat().st_mtime_ns, kept)
        status, out, _ = self.script(path)
        self.assertEqual((status, out), (0, "Nothing is left to make.\n"))

    def test_file_appears_whole_or_not_at_all(self):
        write, seen = soundfile.SoundFile.write, []

        def spy(file, data):
            write(file, data)
            seen.append((self.folder / "x.wav").exists())
            raise KeyboardInterrupt

        with patch.object(soundfile.SoundFile, "write", spy):
            with self.assertRaises(KeyboardInterrupt):
                save_audio(self.folder / "x.wav", mx.zeros((9, 1)), 32000)
        self.assertEqual((seen, list(self.folder.iterdir())), ([False], []))

    def test_folder_that_vanishes(self):
        folder = self.folder / "there"
        folder.mkdir()
        path = self.lines(
            '{"prompt": "a"}', json.dumps(dict(prompt="b", output=f"{folder}/b.wav"))
        )
        generate_batch = jobs.generate

        def vanish(*arguments):
            shutil.rmtree(folder, ignore_errors=True)
            return generate_batch(*arguments)

        with patch("jobs.generate", vanish):
            status, _, err = self.script(path)
        self.assertEqual((status, self.found()), (1, ["out-1.wav"]))
        self.assertRegex(err, "line 2: The folder .*there of b.wav must exist")

    def test_batches(self):
        path = self.lines(*(f'{{"prompt": "a", "temp": {t}}}' for t in (1, 1, 1, 2, 1)))
        planned = jobs.plan_file(path, self.settings)
        sizes = [len(batch) for batch in jobs.batches(planned, lambda job: 2)]
        self.assertEqual(sizes, [2, 1, 1, 1])
        sound = [jobs.AudioPrompt(name) for name in ("a.wav", "b.wav", "b.wav")]
        own = [dataclasses.replace(planned[0], audio_prompt=each) for each in sound]
        sizes = [len(batch) for batch in jobs.batches(own, lambda job: 3)]
        self.assertEqual(sizes, [1, 2])

    def test_batch_is_what_memory_holds_for_its_own_length(self):
        path = self.lines(
            '{"prompt": "a", "duration": 0.1}',
            *['{"prompt": "b", "duration": 0.5}'] * 4,
        )
        model, sizes = MusicGen.from_pretrained(self.model), []
        own = dict(self.settings, output=str(self.folder / "x.wav"))

        def generate_rows(model, batch, *rest):
            sizes.append(len(batch))
            return mx.zeros((len(batch), 5, 8), mx.uint32)

        with patch.object(model, "rows_that_fit", lambda o: round(1 / o.duration)):
            with patch("jobs.generate", generate_rows), patch("jobs.save"):
                jobs.run(model, jobs.plan_file(path, own), 8)
                self.assertEqual(sizes, [1, 2, 2])
                jobs.run(model, jobs.plan_file(path, own), 1)
                self.assertEqual(sizes[3:], [1] * 5)

    def test_batch_that_does_not_fit_after_all(self):
        model = MusicGen.from_pretrained(self.model)
        planned = jobs.plan(["a", "b", "c"], self.settings)
        whole, tried = jobs.generate(model, planned), []
        generate_rows = model.generate_codes

        def out_of_memory(prompts, **options):
            tried.append(len(prompts))
            if len(prompts) > 1:
                raise RuntimeError("[malloc] Unable to allocate")
            return generate_rows(prompts, **options)

        with patch.object(model, "generate_codes", out_of_memory):
            self.assertSame(jobs.generate(model, planned), whole)
        self.assertEqual(tried, [3, 1, 2, 1, 1])

    def test_part_of_the_audio_prompt(self):
        model = MusicGen.from_pretrained(self.model)
        path = self.folder / "ramp.wav"
        ramp = np.linspace(0, 0.5, 3200)
        soundfile.write(path, ramp, 32000, subtype="FLOAT")
        part = jobs.AudioPrompt(str(path), 0.02, 0.05).load(model)
        self.assertClose(part[:, 1], mx.array(ramp)[640:2240], 1e-6)
        for sound, pattern in (
            (jobs.AudioPrompt(str(path), 0.1), "prompt_start must"),
            (jobs.AudioPrompt(str(path), -1.0), "prompt_start must"),
            (jobs.AudioPrompt(str(path), 0.0, 0.0), "prompt_length must"),
        ):
            with self.assertRaisesRegex(ValueError, pattern):
                sound.load(model)

    def test_wrong_command_lines(self):
        for arguments, pattern in (
            ([], "either --prompt or --prompts"),
            (["-p", "a", "--prompts", "b"], "either --prompt or --prompts"),
            (["-p", "a", "--takes", "0"], "takes must be from 1"),
            (["-p", "a", "--takes", "1000000000"], "takes must be from 1"),
            (["-p", "a", "--batch-size", "0"], "batch_size must be from 1"),
            (["--prompts", "b", "--takes", "2"], "--takes goes with --prompt"),
            (["-p", "a", "--drop-prompt"], "need an audio_prompt"),
            (["-p", "a", "--prompt-start", "0"], "need an audio_prompt"),
            (["-p", "a", "--prompt-start", "inf"], "prompt_start must"),
            (["-p", "a", "--prompt-length", "nan"], "prompt_length must"),
            (["-p", "a", "--extend-stride", "0"], "extend_stride must"),
        ):
            with self.subTest(pattern):
                status, out, err = self.run_script(*arguments, "--model", self.model)
                self.assertEqual((status, out), (2, ""))
                self.assertRegex(err, f"^generate.py: error: .*{pattern}.*\n$")


class TestSettings(Test):
    wanted = dict(model="small", prompt='häppy "rock" \\ 🎸', seed=2**63, temp=0.7)

    def test_round_trip_in_every_container(self):
        for prompt in (self.wanted["prompt"], "long " * 4000):
            wanted = self.wanted | {"prompt": prompt}
            comment = settings.to_comment(wanted)
            for suffix in (".wav", ".flac", ".ogg", ".mp3"):
                path = self.folder / f"x{suffix}"
                save_audio(path, mx.zeros((32001, 2)), 32000, comment)
                self.assertEqual(settings.read_settings(path), wanted)
                self.assertEqual(soundfile.info(path).frames, 32001)

    def test_codes(self):
        path = self.folder / "x.safetensors"
        codes = mx.array(np.random.default_rng(0).integers(0, 2048, (1, 9, 8)))
        settings.save_codes(path, codes, self.wanted)
        found, told = settings.load_codes(path)
        self.assertSame(found, codes)
        self.assertEqual((told, settings.read_settings(path)), (self.wanted,) * 2)
        self.assertEqual([p.name for p in self.folder.iterdir()], ["x.safetensors"])

    model = str(REFERENCE / "stereo-audiocraft")
    run_script = TestCommandLine.run_script

    def make(self, name: str, *more: str) -> np.ndarray:
        """The samples of a file that the script makes with the flags."""
        output = self.folder / name
        status, _, err = self.run_script("--output", output, *more)
        self.assertEqual(status, 0, err)
        return soundfile.read(output)[0]

    def test_again(self):
        first = ["-p", "drums", "--model", self.model, "--duration", "0.3"]
        first += ["--temp", "0.7", "--top-k", "20", "--negative-prompt", "piano"]
        for suffix in (".wav", ".flac"):
            take = self.make(f"first{suffix}", *first)
            source = self.folder / f"first{suffix}"
            again = self.make(f"again{suffix}", "--again", source)
            self.assertSame(again, take)
            longer = self.make("longer.wav", "--again", source, "--duration", "0.4")
            self.assertEqual(longer.shape, (12800, 2))
            other = self.make("other.wav", "--again", source, "-p", "piano")
            self.assertNotEqual(other.tolist(), take.tolist())
            told = settings.read_settings(self.folder / "other.wav")
            self.assertEqual((told["prompt"], told["temp"]), ("piano", 0.7))
        save_audio(self.folder / "bare.wav", mx.zeros((9, 1)), 32000)
        status, _, err = self.run_script("--again", self.folder / "bare.wav")
        self.assertEqual(status, 1)
        self.assertRegex(err, "^generate.py: error: .*bare.wav holds no settings.*\n$")

    def test_codes_of_tiny(self):
        for name in ("tiny", "here/tiny"):
            (self.folder / name).mkdir(parents=True)
        tiny = str(self.folder / "tiny")
        self.enterContext(patch.dict(checkpoints.MODELS, tiny=tiny))
        self.enterContext(chdir(self.folder / "here"))
        source, told = Path("x.safetensors"), {"model": "tiny"}
        model = Mock(revision=None)
        for model.name in ("tiny", "../tiny", tiny):
            generate.check_source(source, told, model)
        for model.name in ("./tiny", "small"):
            with self.assertRaisesRegex(ValueError, "holds codes of tiny, not of"):
                generate.check_source(source, told, model)

    def test_resume(self):
        path, longer = (self.folder / f"{n}.safetensors" for n in ("codes", "longer"))
        flags = ["-p", "drums", "--model", self.model, "--seed", "9"]
        whole = self.make("whole.wav", *flags, "--duration", "0.8", "--peak", "-3")
        self.make("short.wav", *flags, "--duration", "0.3", "--save-codes", path)
        self.assertEqual(settings.load_codes(path)[0].shape, (1, 15, 8))
        more = ["--duration", "0.8", "--peak", "-3", "--save-codes", longer]
        resumed = self.make("resumed.wav", "--resume", path, *more)
        self.assertSame(resumed, whole)
        self.assertEqual(settings.load_codes(longer)[0].shape, (1, 40, 8))
        level = ["--peak", "-3"]
        again = self.make("redecoded.wav", "--redecode", longer, *level)
        self.assertSame(again, whole)
        output = self.folder / "none.wav"
        for flags, pattern in (
            (["--duration", "0.2"], "0.3 s long already"),
            (["--model", str(REFERENCE / "mono-audiocraft")], "holds codes of"),
        ):
            status, _, err = self.run_script(
                "--resume", path, "--output", output, *flags
            )
            self.assertEqual(status, 1)
            self.assertRegex(err, f"generate.py: error: .*{pattern}.*\n$")
            self.assertFalse(output.exists())
        codes, told = settings.load_codes(path)
        settings.save_codes(self.folder / "bad.safetensors", codes + 999, told)
        for flag, *more in (["--redecode"], ["--resume", "--duration", "0.8"]):
            status, _, err = self.run_script(
                flag, self.folder / "bad.safetensors", "--output", output, *more
            )
            self.assertEqual(status, 1)
            self.assertRegex(err, "generate.py: error: The codes must be of 8.*\n$")
        for flags in (["--takes", "2"], ["--save-codes", "x.npz"]):
            status, _, err = self.run_script("--resume", path, *flags)
            self.assertEqual(status, 2)
            self.assertRegex(err, "^generate.py: error: .*--save-codes.*\n$")
        status, _, err = self.run_script("--redecode", path, "--stream")
        self.assertEqual(status, 2)
        self.assertRegex(err, "^generate.py: error: --redecode has the whole.*\n$")

    def refused(self, *flags: str, status: int, pattern: str) -> None:
        """The flags get one line, and leave no file."""
        before = sorted(self.folder.iterdir())
        got, _, err = self.run_script("--output", self.folder / "no.wav", *flags)
        self.assertEqual(got, status, err)
        self.assertRegex(err, f"^(0step.*\r?)*generate.py: error: .*{pattern}.*\n$")
        self.assertEqual(sorted(self.folder.iterdir()), before)

    def test_only_settings_are_recalled(self):
        path, other = self.folder / "x.safetensors", self.folder / "other.safetensors"
        told = dict(model=self.model, prompt="drums", seed=3, duration=0.2)
        codes = mx.zeros((1, 9, 8), mx.uint32)
        hostile = dict(save_codes=str(other), takes=3, stream=True, redecode="x")
        settings.save_codes(path, codes, told | hostile)
        self.make("again.wav", "--again", path)
        names = sorted(p.name for p in self.folder.iterdir())
        self.assertEqual(names, ["again.wav", "x.safetensors"])
        for wrong in (
            dict(seed=[1]),
            dict(seed=1.5),
            dict(dtype="nonsense"),
            dict(dtype=3),
            dict(model=5),
            dict(temp="hot"),
            dict(temp={}),
            dict(top_k=None, temp=-1),
            dict(duration=[2]),
            dict(audio_prompt=7),
        ):
            settings.save_codes(path, codes, told | wrong)
            status, _, err = self.run_script("--again", path, "--output", other)
            self.assertIn(status, (1, 2), wrong)
            self.assertRegex(err, "^generate.py: error: .*\n$")

    def test_flags_replace_settings(self):
        first = ["-p", "drums", "--model", self.model, "--duration", "0.5"]
        self.make("loud.wav", *first, "--loudness", "-20")
        loud = ["--again", self.folder / "loud.wav"]
        self.assertLess(np.abs(self.make("x.wav", *loud, "--peak", "-6")).max(), 0.51)
        self.make("x.wav", *loud, "--stream")
        self.make("float.wav", *first, "--subtype", "float")
        self.make("x.flac", "--again", self.folder / "float.wav")
        lines = self.folder / "lines.txt"
        lines.write_text("piano\n")
        more = ["--prompts", lines, "--duration", "0.6"]
        self.run_script("--output", self.folder / "line.wav", *loud, *more)
        told = settings.read_settings(self.folder / "line-1.wav")
        self.assertEqual((told["prompt"], told["loudness"]), ("piano", -20))

    def test_what_does_not_go_together(self):
        path = self.folder / "c.safetensors"
        flags = ["-p", "drums", "--model", self.model, "--duration", "0.4"]
        self.make("x.wav", *flags, "--save-codes", path)
        for more, pattern in (
            (["--redecode", path, "--temp", "0.1"], "--redecode makes the sound"),
            (["--redecode", path, "--again", path], "must not come together"),
            (["--resume", path, "--audio-prompt", "a.wav"], "goes on from codes"),
        ):
            self.refused(*more, status=2, pattern=pattern)
        for more, pattern in (
            (["--save-codes", "/none/x.safetensors"], "folder /none"),
            (["--loudness", "-14", "--duration", "0.3"], "loudness is measured"),
        ):
            self.refused(*flags, *more, status=1, pattern=pattern)
        spelled = os.path.relpath(self.model)
        self.make("y.wav", "--redecode", path, "--model", f"./{spelled}/")

    def test_resume_needs_no_audio_prompt(self):
        sound, path = self.folder / "s.wav", self.folder / "c.safetensors"
        save_audio(sound, 0.1 * mx.random.normal((6400, 1)), 32000)
        flags = ["-p", "drums", "--model", self.model, "--seed", "9"]
        flags += ["--audio-prompt", sound, "--drop-prompt", "--dtype", "float32"]
        whole = self.make("whole.wav", *flags, "--duration", "0.8")
        model = exact("stereo-audiocraft")
        known = model.encode_prompt(load_audio(sound, 32000, 2), 40)
        told = settings.read_settings(self.folder / "whole.wav")
        self.assertEqual(told["prompt_frames"], 10)
        settings.save_codes(path, known, told)  # stopped after the prompt
        sound.unlink()
        longer = ["--duration", "0.8", "--save-codes", path]
        self.assertSame(self.make("resumed.wav", "--resume", path, *longer), whole)
        self.assertSame(self.make("again.wav", "--redecode", path), whole)

    def test_bad_files(self):
        sound, codes = self.folder / "x.wav", self.folder / "x.safetensors"
        for comment in ("", "[]", "{}", "3", '"a"', "{", '{"other": 1}', "[" * 100_000):
            save_audio(sound, mx.zeros((9, 1)), 32000, comment)
            with self.assertRaisesRegex(ValueError, "x.wav holds no settings"):
                settings.read_settings(sound)
        for version in (99, "1", None):
            save_audio(
                sound, mx.zeros((9, 1)), 32000, json.dumps(dict(musicgen=version))
            )
            with self.assertRaisesRegex(ValueError, "x.wav is of a later version"):
                settings.read_settings(sound)
        sound.write_text("no sound")
        with self.assertRaisesRegex(ValueError, "x.wav is not a readable sound file"):
            settings.read_settings(sound)
        for content in (b"", b"junk" * 99):
            codes.write_bytes(content)
            with self.assertRaisesRegex(ValueError, "x.safetensors is damaged"):
                settings.load_codes(codes)
        for array in (mx.zeros((1, 2)), mx.zeros((1, 2, 3)), mx.zeros((2, 2, 3))):
            mx.save_safetensors(str(codes), {"codes": array})
            with self.assertRaisesRegex(ValueError, "must hold codes"):
                settings.load_codes(codes)
        mx.save_safetensors(str(codes), {"codes": mx.zeros((1, 2, 3), mx.uint16)})
        with self.assertRaisesRegex(ValueError, "holds no settings"):
            settings.load_codes(codes)
        with self.assertRaisesRegex(FileNotFoundError, "no file"):
            settings.read_settings(self.folder / "none.wav")


class TestLoudness(Test):
    def tones(self, *parts: tuple[float, float], rate: int = 48000) -> np.ndarray:
        """Stereo tones of 1 kHz: peak in dB of full scale, seconds."""
        levels = [np.full(round(s * rate), 10 ** (level / 20)) for level, s in parts]
        level = np.concatenate(levels)
        tone = level * np.sin(2 * np.pi * 1000 * np.arange(len(level)) / rate)
        return np.stack([tone, tone], axis=1)

    def test_ebu_tech_3341_cases_1_to_5(self):
        for parts, loudness in (
            ([(-23, 20)], -23),
            ([(-33, 20)], -33),
            ([(-36, 10), (-23, 60), (-36, 10)], -23),
            ([(-72, 10), (-36, 10), (-23, 60), (-36, 10), (-72, 10)], -23),
            ([(-26, 20), (-20, 20.1), (-26, 20)], -23),
        ):
            for rate in (48000, 32000):
                tones = self.tones(*parts, rate=rate)
                got = loudness_script.integrated_loudness(tones, rate)
                self.assertAlmostEqual(got, loudness, delta=0.1)

    def test_filters_are_those_of_the_recommendation(self):
        # BS.1770-4, tables 1 and 2, for 48 kHz
        frequencies = np.array([20.0, 100, 1000, 4000, 15000])
        shelf = (1.53512485958697, -2.69169618940638, 1.19839281085285)
        poles = (1.0, -1.69065929318241, 0.73248077421585)
        want = loudness_script.biquad(shelf, poles, frequencies, 48000)
        poles = (1.0, -1.99004745483398, 0.99007225036621)
        want *= loudness_script.biquad((1.0, -2.0, 1.0), poles, frequencies, 48000)
        got = loudness_script.k_weighting(frequencies, 48000)
        self.assertClose(mx.array(np.abs(got - want)), mx.zeros(5), 1e-6)

    def test_pieces_join(self):
        rng = np.random.default_rng(0)
        noise = rng.normal(size=(25 * 8000, 1))
        whole = loudness_script.weigh(noise, 8000)
        again = loudness_script.weigh(
            np.concatenate([np.zeros((9000, 1)), noise]), 8000
        )
        self.assertClose(mx.array(again[9000:]), mx.array(whole), 1e-5)

    def test_sets_loudness_and_never_clips(self):
        quiet = self.tones((-40, 2))
        louder = loudness_script.to_loudness(quiet, 48000, -20)
        got = loudness_script.integrated_loudness(louder, 48000)
        self.assertAlmostEqual(got, -20, delta=0.01)
        peaky = quiet.copy()
        peaky[100] = 0.5
        with self.assertWarnsRegex(UserWarning, "would clip"):
            louder = loudness_script.to_loudness(peaky, 48000, -10)
        self.assertAlmostEqual(np.abs(louder).max(), 1)
        with self.assertWarnsRegex(UserWarning, "silent"):
            loudness_script.to_loudness(np.zeros((48000, 1)), 48000, -10)
        self.assertAlmostEqual(
            np.abs(loudness_script.to_peak(quiet, -6)).max(), 0.5012, 3
        )

    def test_script(self):
        source, target = self.folder / "in.wav", self.folder / "out.wav"
        save_audio(source, mx.array(self.tones((-30, 2))), 48000)
        arguments = ["loudness.py", str(source)]
        for more, told in (([], "-30.0"), (["--loudness", "-14", "--output"], "-30.0")):
            more = [*more, str(target)] if more else more
            with patch("sys.argv", arguments + more):
                with redirect_stdout(io.StringIO()) as out:
                    loudness_script.main()
            self.assertEqual(out.getvalue(), f"{source}: {told} LUFS\n")
        audio, _ = soundfile.read(target)
        got = loudness_script.integrated_loudness(audio, 48000)
        self.assertAlmostEqual(got, -14, delta=0.05)
        with patch("sys.argv", ["loudness.py", str(self.folder / "none.wav")]):
            with self.assertRaisesRegex(SystemExit, "loudness.py: error: .*none.wav"):
                loudness_script.main()


class TestStreamedFile(Test):
    model = str(REFERENCE / "stereo-audiocraft")
    run_script = TestCommandLine.run_script

    def command(self, output: str, duration: str = "1") -> list[str]:
        command = [sys.executable, str(HERE / "generate.py"), "-p", "drums"]
        command += ["--model", self.model, "--seed", "3", "--duration", duration]
        return command + ["--stream", "--chunk", "0.1", "--output", output]

    def samples(self) -> np.ndarray:
        model = MusicGen.from_pretrained(self.model)
        audio = np.array(model.generate("drums", duration=1.0, seed=3)[0])
        return np.clip(audio, -1, 1)

    def test_file_and_pipe(self):
        path = self.folder / "out.wav"
        result = subprocess.run(self.command(str(path)), capture_output=True, text=True)
        self.assertRegex(result.stdout, r"^.*out.wav: 1.00 s of audio in .* seed 3\n$")
        audio, rate = soundfile.read(path)
        self.assertEqual(rate, 32000)
        self.assertClose(mx.array(audio), mx.array(self.samples()), 1e-4)
        piped = subprocess.run(self.command("-"), capture_output=True)
        sounds = (soundfile.read(f)[0] for f in (io.BytesIO(piped.stdout), path))
        self.assertSame(*sounds)
        again = self.folder / "again.wav"
        self.run_script("--again", path, "--stream", "--output", again)
        self.assertEqual(*(settings.read_settings(p) for p in (path, again)))
        self.assertClose(mx.array(soundfile.read(again)[0]), mx.array(audio), 1e-4)
        self.assertIn(b"-: 1.00 s of audio", piped.stderr)

    def test_closed_pipe_ends_the_run(self):
        process = subprocess.Popen(
            self.command("-", "1000"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        process.stdout.read(100)
        process.stdout.close()
        message = process.stderr.read().decode()
        process.stderr.close()
        self.assertEqual(process.wait(), 0, message)
        self.assertNotIn("Traceback", message)

    def test_pipes_and_redirections(self):
        command = " ".join(map(shlex.quote, self.command("-", "0.3")))
        for line, status in (
            (f"{command} | true; exit ${{PIPESTATUS[0]}}", 0),
            (f"{command} >&-", 1),
        ):
            result = subprocess.run(
                ["bash", "-c", line], capture_output=True, text=True
            )
            self.assertEqual(result.returncode, status, result.stderr)
            self.assertNotIn("Traceback", result.stderr)
        path = self.folder / "both.bin"
        subprocess.run(["bash", "-c", f"(echo hello; {command}) >> {path}"], check=True)
        head, _, rest = path.read_bytes().partition(b"\n")
        self.assertEqual((head, rest.count(b"RIFF")), (b"hello", 1))
        self.assertEqual(soundfile.info(io.BytesIO(rest)).frames, 9600)

    def kill(self, signal: str, wait: float) -> int:
        """Exit status of a run of 35 s that gets a signal on its way."""
        path, codes = self.folder / f"{signal}.wav", self.folder / signal
        command = self.command(str(path), "35")
        process = subprocess.Popen(
            [*command, "--save-codes", f"{codes}.safetensors"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while not path.exists() or path.stat().st_size < 50_000:
            self.assertIsNone(process.poll())
            time.sleep(0.01)
        time.sleep(wait)
        process.send_signal(getattr(signals, signal))
        return process.wait()

    def test_killed_and_resumed(self):
        model = MusicGen.from_pretrained(self.model)
        codes = model.generate_codes("drums", duration=35, seed=3)
        sound = np.clip(np.array(model.decode(codes)[0]), -1, 1)
        rng = np.random.default_rng()
        for signal, status in (("SIGKILL", -9), ("SIGTERM", 143), ("SIGINT", 130)):
            self.assertEqual(self.kill(signal, rng.uniform(0, 0.5)), status)
            path, kept = (
                self.folder / f"{signal}{end}" for end in (".wav", ".safetensors")
            )
            made, _ = soundfile.read(path)
            self.assertGreater(len(made), 0.3 * 32000)
            self.assertLess(len(made), 20 * 32000)  # far from the first window's end
            self.assertLessEqual(4 * len(made), path.stat().st_size - 44)
            sure = len(made) - (4 * 640 if signal == "SIGINT" else 0)  # else an end
            steps = 4 / 32768  # dither, rounding, and full scale being 32766
            self.assertClose(mx.array(made[:sure]), mx.array(sound[:sure]), steps)
            frames = settings.load_codes(kept)[0].shape[1]
            self.assertGreaterEqual(640 * frames, len(made))
            longer, whole = self.folder / "x.safetensors", self.folder / "whole.wav"
            command = ["--resume", kept, "--duration", "35", "--save-codes", longer]
            command += ["--stream", "--chunk", "3", "--output", whole]
            self.assertEqual(self.run_script(*command)[0], 0)
            self.assertSame(settings.load_codes(longer)[0], codes)
            resumed, _ = soundfile.read(whole)
            self.assertClose(mx.array(resumed), mx.array(sound), steps)
        left = [path.name for path in self.folder.iterdir() if "part" in path.name]
        self.assertEqual(left, [])

    def stopped(self, *more: str, times: int = 1) -> tuple[int, str]:
        """Exit status and messages of a run that is interrupted on its way."""
        command = self.command(str(self.folder / "stopped.wav"), "60")
        command = [
            part for part in command if part not in ("--stream", "--chunk", "0.1")
        ]
        process = subprocess.Popen(
            [*command, *more], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        told = b""
        while not re.search(rb" [1-9]\d?%", told):
            more = process.stderr.read1(100)
            self.assertTrue(more, told)
            told += more
        for _ in range(times):
            process.send_signal(signals.SIGINT)
            time.sleep(0.02)
        told += process.stderr.read()
        process.stderr.close()
        return process.wait(), told.decode()

    def test_stop_and_keep(self):
        codes = self.folder / "codes.safetensors"
        status, told = self.stopped("--save-codes", str(codes))
        self.assertEqual(status, 130, told)
        self.assertIn(f"To go on: --resume {codes} --duration 60", told)
        kept, _ = settings.load_codes(codes)
        frames = soundfile.info(self.folder / "stopped.wav").frames
        self.assertEqual(frames, kept.shape[1] * 640)
        self.assertGreater(kept.shape[1], 20)
        model = MusicGen.from_pretrained(self.model)
        T = kept.shape[1]
        known = kept[:, : T - 2]
        duration = (T + 10) / 50
        whole = model.generate_codes("drums", duration=duration, seed=3)
        options = dict(duration=duration, seed=3, codes_prompt=known)
        self.assertSame(model.generate_codes("drums", **options), whole)
        self.assertSame(kept, whole[:, :T])

    def test_stop_of_a_stream(self):
        status, told = self.stopped("--stream", "--chunk", "0.1")
        self.assertEqual(status, 130, told)
        self.assertGreater(soundfile.info(self.folder / "stopped.wav").frames, 640)

    def test_stop_while_decoding_changes_nothing(self):
        decode, flags = jobs.decode, ["--output", self.folder / "x.wav"]

        def press(*arguments):
            os.kill(os.getpid(), signals.SIGINT)
            return decode(*arguments)

        with patch("jobs.decode", press):
            flags += ["-p", "drums", "--duration", "0.2", "--model", self.model]
            status, out, err = self.run_script(*flags)
        signals.signal(signals.SIGINT, signals.default_int_handler)
        self.assertEqual(status, 0, err)
        self.assertIn("x.wav: 0.20 s of audio", out)

    def test_stop_at_once(self):
        status, told = self.stopped(times=2)
        self.assertEqual(status, 130, told)
        self.assertNotIn("Traceback", told)
        self.assertEqual([p.name for p in self.folder.iterdir()], [])

    def test_header_is_right_after_every_write(self):
        path = self.folder / "x.wav"
        with open(path, "wb") as file:
            wav = stream.WavStream(file, 2, 32000)
            for n in range(1, 4):
                self.assertEqual(soundfile.info(path).frames, 100 * (n - 1))
                wav.write(mx.full((100, 2), 0.25))
                self.assertEqual(soundfile.info(path).frames, 100 * n)
            with self.assertWarnsRegex(UserWarning, "clipped"):
                wav.write(mx.full((100, 2), 2.0))
        audio, _ = soundfile.read(path)
        self.assertEqual((audio[0, 0], round(audio[-1, 0], 3)), (0.25, 1.0))

    def test_wrong_command_lines(self):
        for arguments, pattern in (
            (["--output", "a.flac"], "--stream writes .wav or -"),
            (["--takes", "2"], "--stream makes one take"),
            (["--chunk", "0"], "--chunk must"),
            (["--chunk", "nan"], "--chunk must"),
            (["--subtype", "float"], "--stream writes pcm_16"),
        ):
            command = ["-p", "a", "--stream", "--model", self.model, *arguments]
            status, _, err = self.run_script(*command)
            self.assertEqual(status, 2)
            self.assertRegex(err, f"^generate.py: error: .*{pattern}.*\n$")


class TestDistributed(Test):
    """Two processes on the loopback ring, started by MLX's own launcher."""

    model = str(REFERENCE / "stereo-audiocraft")

    def setUp(self):
        super().setUp()
        if not mx.distributed.is_available("ring"):
            skip(self, "MLX was built without its ring backend")
        if not Path(sys.executable).with_name("mlx.launch").exists():
            skip(self, "mlx.launch does not lie beside this Python")

    def launch(self, *arguments: str, name: str, port: int) -> str:
        """What two processes print; their files are NAME-1.wav and so on."""
        launcher = Path(sys.executable).with_name("mlx.launch")
        command = [str(launcher), "-n", "2", "--backend", "ring", "-p", str(port)]
        command += ["--", *self.command(*arguments, name=name)]
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        result = subprocess.run(
            command, cwd=HERE, env=environment, capture_output=True, text=True
        )
        return result.stdout + result.stderr

    def command(self, *arguments: str, name: str) -> list[str]:
        prompts, output = self.folder / "prompts.txt", self.folder / f"{name}.wav"
        if not prompts.exists():
            prompts.write_text("drums\nslow piano\nguitar\n")
        command = [sys.executable, str(HERE / "generate.py"), *arguments]
        command += ["--prompts", str(prompts), "--output", str(output)]
        return command + ["--model", self.model, "--seed", "3", "--duration", "0.3"]

    def sounds(self, name: str) -> list[str]:
        paths = sorted(self.folder.glob(f"{name}-*.wav"))
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]

    def test_file_of_prompts(self):
        subprocess.run(self.command(name="one"), capture_output=True, check=True)
        told = self.launch(name="two", port=32423)
        self.assertEqual(len(self.sounds("one")), 3, told)
        self.assertEqual(self.sounds("two"), self.sounds("one"), told)

    def test_tensor_parallel(self):
        greedy = ("--temp", "0")
        one = self.command(*greedy, name="one")
        subprocess.run(one, capture_output=True, check=True)
        told = self.launch(*greedy, "--tensor-parallel", name="two", port=32433)
        self.assertEqual(told.count("seed"), 3, told)  # by one of the processes
        self.assertEqual(len(self.sounds("one")), 3, told)
        self.assertEqual(self.sounds("two"), self.sounds("one"), told)

    def test_a_process_that_fails_leaves_the_other_its_lines(self):
        lines = ['{"prompt": "a", "audio_prompt": "none.wav"}', '{"prompt": "b"}'] * 4
        (self.folder / "prompts.txt").write_text("\n".join(lines))
        told = self.launch("--batch-size", "1", name="two", port=32453)
        self.assertEqual(len(self.sounds("two")), 4, told)
        self.assertEqual(told.count("no sound file none.wav"), 4, told)

    def test_takes_are_shared(self):
        (self.folder / "prompts.txt").touch()
        launcher = Path(sys.executable).with_name("mlx.launch")
        command = [str(launcher), "-n", "2", "--backend", "ring", "-p", "32463", "--"]
        command += [sys.executable, str(HERE / "generate.py"), "--prompt", "a"]
        command += ["--takes", "3", "--duration", "0.1", "--model", self.model]
        output = ["--output", str(self.folder / "x.wav")]
        result = subprocess.run(
            command + output, cwd=HERE, capture_output=True, text=True
        )
        self.assertEqual(result.stdout.count(" seed "), 3, result.stdout)
        seeds = {
            line.split()[-1] for line in result.stdout.splitlines() if "seed" in line
        }
        first = min(map(int, seeds))
        self.assertEqual(seeds, {str(first + i) for i in range(3)}, result.stdout)
        self.assertEqual(len(self.sounds("x")), 3)

    def test_tensor_parallel_needs_processes(self):
        command = self.command("--tensor-parallel", name="one")
        result = subprocess.run(command, capture_output=True, text=True)
        self.assertEqual(result.returncode, 1)
        self.assertRegex(result.stderr, "^generate.py: error: .*needs mlx.launch.*\n$")

    def test_killed_and_repeated(self):
        one = self.command("--batch-size", "1", name="one")
        process = subprocess.Popen(one, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        process.stdout.readline()  # the first file is there
        process.kill()
        process.communicate()
        made = {path: path.stat().st_mtime_ns for path in self.folder.glob("one-*.wav")}
        self.assertIn(len(made), (1, 2))
        told = self.launch("--batch-size", "1", name="one", port=32443)
        self.assertEqual(told.count(" seed "), 3 - len(made), told)
        for path, stamp in made.items():
            self.assertEqual(path.stat().st_mtime_ns, stamp)
        subprocess.run(self.command(name="two"), capture_output=True, check=True)
        self.assertEqual(self.sounds("two"), self.sounds("one"), told)

    def test_processes_that_do_not_divide_the_heads(self):
        class Three:
            def size(self):
                return 3

        model = MusicGen.from_pretrained(self.model)
        with self.assertRaisesRegex(ValueError, "must divide num_attention_heads"):
            model.decoder.shard(Three())


if __name__ == "__main__":
    unittest.main()
