"""Settings of audiocraft's that are not ported: refused by name, not passed over."""

import re
import shutil
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from common import REFERENCE, Test

import audiocraft
import ported
from encodec import Encodec
from musicgen import MusicGen

DECODER, CODEC = audiocraft.FILES
# What a released model's settings say -> what the file of another model says, and the
# setting that is named. audiocraft makes other codes or samples of each, or fails.
DECODERS = (
    ("lm_model: transformer_lm\n", "lm_model: transformer_lm_flow\n", "lm_model"),
    (  # a MAGNeT, by its name, whose attention looks back alone
        "lm_model: transformer_lm\n",
        "lm_model: transformer_lm_magnet\n",
        "transformer_lm.causal",
    ),
    ("modeling: delay", "modeling: parallel", "codebooks_pattern.modeling"),
    ("past_context: null", "past_context: 5", "transformer_lm.past_context"),
    ("\n  causal: true", "\n  causal: false", "transformer_lm.causal"),
    ("layer_scale: null", "layer_scale: 0.1", "transformer_lm.layer_scale"),
    ("xpos: false", "max_period: 500", "transformer_lm.max_period"),
    ("xpos: false", "positional_scale: 0.5", "transformer_lm.positional_scale"),
    ("empty_initial: 0", "empty_initial: 2", "codebooks_pattern.delay.empty_initial"),
    ("flatten_first: 0", "flatten_first: 1", "codebooks_pattern.delay.flatten_first"),
    ("flatten_first: 0", "dolays: 1", "codebooks_pattern.delay.dolays"),
    (
        "per_timestep: false",
        "per_timestep: true",
        "interleave_stereo_codebooks.per_timestep",
    ),
    ("model: t5\n", "model: lut\n", "conditioners.description.model"),
    ("model: t5\n", "model: clap\n", "conditioners.description.model"),
    (
        "  description:\n    model",
        "  genre:\n    model: lut\n  description:\n    model",
        "conditioners.genre.model",
    ),
    ("  cross:\n  - description", "  cross: []", "fuser.cross"),
    ("card: 64", "card: 63", "transformer_lm.card"),
    ("dim: 32", "dim: 64", "transformer_lm.dim"),
    ("num_layers: 2", "num_layers: 1", "transformer_lm.num_layers"),
    ("hidden_scale: 1.5", "hidden_scale: 3", "transformer_lm.hidden_scale"),
    ("\n  n_q: 4", "\n  n_q: 3", "transformer_lm.n_q"),
    ("model_n_q: null", "model_n_q: 2", "compression_model_n_q"),
)
CODECS = (
    ("compression_model: encodec", "compression_model: dac", "compression_model"),
    ("autoencoder: seanet", "autoencoder: other", "encodec.autoencoder"),
    ("quantizer: rvq", "quantizer: no_quant", "encodec.quantizer"),
    ("\n  activation: ELU", "\n  activation: ReLU", "seanet.activation"),
    ("alpha: 1.0", "alpha: 0.5", "seanet.activation_params.alpha"),
    ("alpha: 1.0", "inplace: true", "seanet.activation_params.inplace"),
    ("alpha: 1.0", "beta: 1.0", "seanet.activation_params.beta"),
    ("n: null", "n: Tanh", "seanet.decoder.final_activation"),
    ("ratio: 1.0", "ratio: 0.5", "seanet.decoder.trim_right_ratio"),
    ("norm: weight_norm", "norm: none", "seanet.norm"),
    (
        "outer_blocks: 0",
        "outer_blocks: 1",
        "seanet.disable_norm_outer_blocks",
    ),
    ("encoder: {}", "encoder:\n    activation: GELU", "seanet.encoder.activation"),
    ("encoder: {}", "encoder:\n    causal: true", "seanet.encoder.causal"),
    ("encoder: {}", "encoder:\n    dilation_base: 3", "seanet.encoder.dilation_base"),
    ("encoder: {}", "encoder:\n    pad_mode: reflect", "seanet.encoder.pad_mode"),
    ("true_skip: true", "true_skip: false", "seanet.true_skip"),
    ("true_skip: true", "residual_scale: 0.5", "seanet.residual_scale"),
    ("dimension: 16", "dimension: 8", "seanet.dimension"),
    ("n_filters: 2", "n_filters: 4", "seanet.n_filters"),
    ("n_residual_layers: 1", "n_residual_layers: 2", "seanet.n_residual_layers"),
    ("\n  - 8\n", "\n  - 2\n", "seanet.ratios"),
    ("lstm: 2", "lstm: 1", "seanet.lstm"),
    ("bins: 64", "bins: 32", "rvq.bins"),
    ("\n  n_q: 4", "\n  n_q: 3", "rvq.n_q"),
)


@contextmanager
def saying(file: str, text: str, other: str):
    """While a file's settings say something else than they do."""
    load = audiocraft.load_package

    def load_other(path: Path) -> dict:
        package = load(path)
        if path.name != file:
            return package
        assert package["xp.cfg"].count(text) == 1, text
        return package | {"xp.cfg": package["xp.cfg"].replace(text, other)}

    with patch.object(audiocraft, "load_package", load_other):
        yield


class TestPorted(Test):
    def refused(self, file: str, text: str, other: str, told: str):
        with self.subTest(other), saying(file, text, other):
            with self.assertRaisesRegex(ValueError, told) as caught:
                MusicGen.from_pretrained(REFERENCE / "mono-audiocraft", lazy=True)
            self.assertLess(len(str(caught.exception)), 400)

    def test_settings_of_the_decoder(self):
        for text, other, name in DECODERS:
            told = rf"{DECODER} does not load: {re.escape(name)} (must|is) "
            self.refused(DECODER, text, other, told)

    def test_settings_of_the_codec(self):
        with saying("none", "", ""):
            package = audiocraft.load_package(REFERENCE / "mono-audiocraft" / CODEC)
        for text, other, name in CODECS:
            changed = package | {"xp.cfg": package["xp.cfg"].replace(text, other, 1)}
            self.assertNotEqual(changed["xp.cfg"], package["xp.cfg"], text)
            told = rf"^x does not load: {re.escape(name)} (must|is) "
            with self.subTest(other), self.assertRaisesRegex(ValueError, told):
                audiocraft.read_codec(Path("x"), changed)
        self.refused(CODEC, "lstm: 2", "lstm: 1", f"{CODEC} does not load: seanet.lstm")

    def test_magnet_is_told_by_its_settings(self):
        """By one of them, and then the others must be its own, too."""
        self.assertTrue(ported.is_magnet(ported.MAGNET))
        ported.check_decoder(ported.MAGNET)
        ported.check_decoder({"lm_model": "transformer_lm_magnet"})
        self.assertFalse(ported.is_magnet({"codebooks_pattern.modeling": "parallel"}))
        for name in ported.MAGNET.keys() - {"lm_model"}:
            other = ported.MAGNET | {name: ported.SETTINGS[name]}
            with self.assertRaisesRegex(ValueError, f"{name} must be "):
                ported.check_decoder(other)

    def test_the_same_in_other_words(self):
        """Numbers and truths may be spelled in several ways, as YAML and Python do."""
        for name, value in (
            ("seanet.activation_params.alpha", "1"),
            ("seanet.disable_norm_outer_blocks", "0.0"),
            ("seanet.activation_params.inplace", "False"),
            ("seanet.decoder.final_activation", ""),
        ):
            ported.check_codec({name: value})
        ported.check_decoder({"transformer_lm.max_period": "1e4"})
        sizes = dict(num_codebooks=8, hidden_size=6, num_hidden_layers=1, vocab_size=3)
        sizes |= dict(ffn_dim=15, audio_channels=2)
        for name, value in (
            ("transformer_lm.hidden_scale", "2.6"),  # 15.6, of which 15 are there
            ("transformer_lm.n_q", "8"),
            ("compression_model_n_q", "4"),  # of each channel
            ("compression_model_n_q", "8"),
        ):
            cfg = {name: value}
            ported.check_sizes(cfg, ported.decoder_sizes(sizes, cfg))

    def test_a_coder_of_its_own_settings(self):
        """Which stand before those of both, and may say what is ported."""
        same = {"seanet.activation": "ReLU"}
        same |= {f"seanet.{part}.activation": "ELU" for part in ported.CODERS}
        ported.check_codec(same)
        del same["seanet.encoder.activation"]
        with self.assertRaisesRegex(ValueError, "^seanet.activation must be ELU, got"):
            ported.check_codec(same)

    def test_delays_that_are_not_given(self):
        """audiocraft's own are then a step for each codebook, in stereo, too."""
        path = REFERENCE / "stereo-audiocraft" / DECODER
        text = audiocraft.load_package(path)["xp.cfg"]
        delays = re.search(r"    delays:\n(    - \d\n)*", text)[0]
        with saying(DECODER, f"  delay:\n{delays}", "  delay:\n    delays: null\n"):
            package = audiocraft.read_decoder(path)
        self.assertEqual(package.config["delays"], list(range(8)))

    def test_no_settings(self):
        folder = self.copy("mono-audiocraft")
        load = audiocraft.load_package
        for file in audiocraft.FILES:
            for cfg in ("", "# nothing\n", {}):

                def load_empty(path: Path) -> dict:
                    package = load(path)
                    return package | ({"xp.cfg": cfg} if path.name == file else {})

                with patch.object(audiocraft, "load_package", load_empty):
                    with self.assertRaisesRegex(
                        ValueError, f"{file} .*its xp.cfg is empty: take"
                    ):
                        MusicGen.from_pretrained(folder)

    def test_codec_of_another_rate(self):
        """As beside a training's checkpoint.th, which does not say where it lies."""
        folder = self.copy("mono-audiocraft")
        shutil.copy(REFERENCE / "audiogen-audiocraft" / CODEC, folder)
        told = f"{DECODER} .*one of 32000 Hz, but .*{CODEC} is one of 16000 Hz: put"
        with self.assertRaisesRegex(ValueError, told):
            MusicGen.from_pretrained(folder)
        (folder / DECODER).unlink()
        solver = REFERENCE / "solver-audiocraft" / "checkpoint.th"
        shutil.copy(solver, folder)
        with self.assertRaisesRegex(
            ValueError, told.replace(DECODER, "checkpoint.th", 1)
        ):
            MusicGen.from_pretrained(folder)
        with saying(CODEC, "sample_rate: 16000", "sample_rate: 32000"):
            MusicGen.from_pretrained(folder, lazy=True)

    def test_rate_of_the_codec_itself(self):
        """Which audiocraft reads below `encodec`."""
        path = REFERENCE / "mono-audiocraft" / CODEC
        with saying(CODEC, "sample_rate: ${sample_rate}", "sample_rate: 24000"):
            settings, _ = audiocraft.read_codec(path, audiocraft.load_package(path))
        self.assertEqual(settings["sampling_rate"], 24000)

    def test_length_that_is_no_number(self):
        for text in (".nan", ".inf", "long", "null"):
            self.refused(
                DECODER,
                "segment_duration: 30",
                f"segment_duration: {text}",
                f"{DECODER} .*dataset.segment_duration must be a number, got {text}",
            )

    def test_a_decoder_in_place_of_the_codec(self):
        folder = self.copy("mono-audiocraft")
        for source in ("solver-audiocraft/checkpoint.th", f"mono-audiocraft/{DECODER}"):
            shutil.copy(REFERENCE / source, folder / CODEC)
            told = f"{CODEC} lacks 'encoder.model.0.conv.conv.weight_v'"
            with self.assertRaisesRegex(ValueError, told):
                MusicGen.from_pretrained(folder)

    def test_a_codec_without_its_decoder(self):
        path = REFERENCE / "mono-audiocraft" / CODEC
        package = audiocraft.load_package(path)
        for beginning in ("decoder.", "decoder.model.3", "decoder.model.1"):
            weights = {
                k: w
                for k, w in package["best_state"].items()
                if not k.startswith(beginning)
            }
            damaged = package | {"best_state": weights}
            with patch("audiocraft.load_package", return_value=damaged):
                with self.assertRaisesRegex(
                    ValueError, f"{CODEC} (lacks|does not load)"
                ):
                    Encodec.from_pretrained(path.parent)
