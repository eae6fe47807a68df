"""audiocraft's files: settings, names, shapes."""

import math
from pathlib import Path
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
from common import AUDIOCRAFT, REFERENCE, Test, exact
from mlx.utils import tree_flatten

import audiocraft
import encodec_files
from encodec import Codebook, Encodec, EncodecConfig, TransposedKernel
from musicgen import MusicGen


class TestAudiocraft(Test):
    def fails(self, pattern: str, folder: Path, error: type = ValueError):
        with self.assertRaisesRegex(error, pattern):
            MusicGen.from_pretrained(folder)

    def test_settings_of_the_codec_are_heeded(self):
        path = REFERENCE / "mono-audiocraft/compression_state_dict.bin"
        weights = audiocraft.load_package(path)["best_state"]
        published = audiocraft.codec_settings(weights, {})
        for name, value, field, found in (
            ("seanet.causal", "true", "use_causal_conv", True),
            ("seanet.dilation_base", "3", "dilation_growth_rate", 3),
            ("seanet.pad_mode", "constant", "pad_mode", "constant"),
            ("encodec.renormalize", "true", "normalize", True),
            ("sample_rate", "16000", "sampling_rate", 16000),
        ):
            settings = audiocraft.codec_settings(weights, {name: value})
            self.assertEqual(settings[field], found)
            self.assertNotEqual(published[field], found)
        for name in ("seanet.causal", "encodec.renormalize"):
            with self.assertRaisesRegex(ValueError, f"{name} must be true or false"):
                audiocraft.codec_settings(weights, {name: "maybe"})

    def test_settings_of_the_codec_are_those_of_transformers(self):
        """For the same sizes: what the shapes under audiocraft's names show."""
        few = dict(num_filters=8, hidden_size=6, codebook_size=12)
        for shape in (
            few,
            few | dict(upsampling_ratios=(5, 3), num_residual_layers=2, compress=4),
            few | dict(audio_channels=2, num_lstm_layers=1, use_conv_shortcut=True),
            few | dict(kernel_size=5, last_kernel_size=3, residual_kernel_size=9),
            few | dict(sampling_rate=24000, use_causal_conv=True, pad_mode="constant"),
            few | dict(normalize=True, dilation_growth_rate=3),
        ):
            config = EncodecConfig(**shape)
            bits = 5 * math.ceil(math.log2(config.codebook_size))
            config.target_bandwidths = (bits * config.frame_rate / 1000,)
            cfg = {
                "sample_rate": str(config.sampling_rate),
                "encodec.renormalize": str(config.normalize).lower(),
                "seanet.causal": str(config.use_causal_conv).lower(),
                "seanet.dilation_base": str(config.dilation_growth_rate),
                "seanet.pad_mode": config.pad_mode,
            }
            codec = Encodec(config)
            weights = audiocraft_codec(codec)
            again = {respell(name): weight for name, weight in weights.items()}
            for spelling in (weights, again):
                with self.subTest(shape):
                    settings = audiocraft.codec_settings(spelling, cfg)
                    self.assertEqual(EncodecConfig.from_dict(settings), config)
                    named = encodec_files.sanitize(spelling)
                    own = dict(tree_flatten(codec.parameters()))
                    self.assertEqual(named.keys(), own.keys())
                    for name, weight in named.items():
                        self.assertClose(weight, own[name], 1e-5)

    def test_codec_that_lacks_something(self):
        path = REFERENCE / "mono-audiocraft/compression_state_dict.bin"
        package = audiocraft.load_package(path)
        for lacking in (
            "encoder.model.0.conv.conv.weight_v",
            "encoder.model.1.block.1.conv.conv.weight_v",
            "quantizer.vq.layers.0._codebook.embed",
        ):
            self.assertIn(lacking, package["best_state"])
            weights = {k: w for k, w in package["best_state"].items() if k != lacking}
            with self.assertRaisesRegex(ValueError, f"{path} lacks "):
                audiocraft.read_codec(path, package | {"best_state": weights})
        for cfg in ("sample_rate: x", "sample_rate: [1]", "seanet:\n  causal: 3"):
            with self.assertRaisesRegex(ValueError, f"{path} does not load"):
                audiocraft.read_codec(path, package | {"xp.cfg": cfg})

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
        values = audiocraft.read_yaml(text)
        self.assertEqual(values["b.d"], "1")
        self.assertEqual(values["b.list"], ["0", "1.5"])
        self.assertEqual(values["b.short"], ["0", "1"])
        self.assertEqual(values["b.list2"], ["x", "y"])
        self.assertEqual(values["b.quoted"], "a # b")
        self.assertNotIn("b.text", values)
        self.assertEqual(
            (values["b.c"], values["f.g.h"], values["i"]), ("x", ".inf", "true")
        )
        self.assertEqual(audiocraft.read_yaml(""), {})
        self.assertEqual(audiocraft.read_yaml("a: b\n- c"), {"a": ["c"]})
        looped = audiocraft.read_yaml("a: ${b}\nb: ${c}\nc: ${b}")
        self.assertEqual(looped, {"a": "", "b": "", "c": ""})

    def test_settings_of_another_architecture(self):
        for name, value in (
            ("transformer_lm.norm_first", "false"),
            ("transformer_lm.activation", "relu"),
            ("transformer_lm.positional_embedding", "rope"),
            ("codebooks_pattern.modeling", "parallel"),
        ):
            with patch.object(audiocraft, "read_yaml", return_value={name: value}):
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
            with patch.object(audiocraft, "read_yaml", return_value=settings):
                self.fails("state_dict.bin", REFERENCE / AUDIOCRAFT[0])

    def test_settings_of_the_bin_are_heeded(self):
        settings = {
            "codebooks_pattern.delay.delays": ["0", "2", "4", "6"],
            "transformer_lm.num_heads": "4",
            "dataset.segment_duration": "12",
        }
        with patch.object(audiocraft, "read_yaml", return_value=settings):
            model = exact("mono-audiocraft")
        self.assertEqual(model.config.decoder.delays, (0, 2, 4, 6))
        self.assertEqual(model.config.decoder.num_attention_heads, 4)
        self.assertEqual(model.config.max_duration, 12)
        self.assertEqual(model.generate_codes("a", duration=0.1).shape, (1, 5, 4))


def audiocraft_codec(codec: Encodec) -> dict[str, mx.array]:
    """A codec's weights in audiocraft's form: its names, torch's shapes."""
    weights = {}

    def add(stem: str, kernel: mx.array, bias: mx.array) -> None:
        norm = mx.sqrt((kernel**2).sum(axis=(1, 2), keepdims=True))
        weights[f"{stem}.weight_g"], weights[f"{stem}.weight_v"] = norm, 3 * kernel
        weights[f"{stem}.bias"] = bias

    for name, module in codec.named_modules():
        stem = name.replace(".layers.", ".model.", 1)
        if isinstance(module, TransposedKernel):  # (kernel, out, in)
            add(f"{stem}tr.convtr", module.weight.transpose(2, 1, 0), module.bias)
        elif isinstance(module, nn.Conv1d):  # (out, kernel, in)
            add(f"{stem}.conv", module.weight.swapaxes(1, 2), module.bias)
        elif isinstance(module, nn.LSTM):
            stem, layer = stem.rsplit(".", 1)
            half = module.bias / 2
            for kind, weight in (
                *(("weight_ih", module.Wx), ("weight_hh", module.Wh)),
                *(("bias_ih", half), ("bias_hh", half)),
            ):
                weights[f"{stem}.{kind}_l{layer}"] = weight
        elif isinstance(module, Codebook):
            stem = f"quantizer.vq.layers.{name.split('.')[2]}._codebook"
            for kind in ("inited", "cluster_size", "embed_avg"):  # of the training
                weights[f"{stem}.{kind}"] = mx.ones(1)
            weights[f"{stem}.embed"] = module.embed
    return weights


def respell(name: str) -> str:
    """Weight norm as torch has spelled it since 2.0."""
    name = name.replace(".weight_g", ".parametrizations.weight.original0")
    return name.replace(".weight_v", ".parametrizations.weight.original1")
