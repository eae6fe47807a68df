"""Configs of absurd sizes, and of what is not ported."""

import math
from dataclasses import replace
from unittest.mock import patch

from common import Test

import limits
from checkpoints import MusicGenConfig, read_config
from decoder import DecoderConfig
from encodec import EncodecConfig
from t5 import T5Config


class TestLimits(Test):
    def refused(self, check, config, cases: list[tuple[dict, str]]) -> None:
        check(config)
        for change, pattern in cases:
            with self.subTest(change):
                with self.assertRaisesRegex(ValueError, f"^{pattern}"):
                    check(replace(config, **change))

    def test_decoder(self):
        cases = [
            (dict(vocab_size=0), "vocab_size must be from 1 to 65536, got 0"),
            (dict(hidden_size="128"), "hidden_size must be"),
            (dict(ffn_dim=True), "ffn_dim must be"),
            (dict(num_hidden_layers=10**6), "num_hidden_layers must be"),
            (dict(num_attention_heads=3), "num_attention_heads must split"),
            (dict(num_codebooks=5), "delays must give 5"),
            (dict(delays=None), "delays must give 4 .* got None"),
            (dict(delays=[1, 2, 3, 4]), "delays must give 4"),
            (dict(delays=[0, 1]), "delays must give 4"),
            (dict(delays="0123"), "delays must give 4"),
            (dict(delays=[0, 1, 2, 101]), "delays must give 4"),
            (dict(delays=[0, 1, 2, -1]), "delays must give 4"),
        ]
        self.refused(limits.check_decoder, DecoderConfig(), cases)
        limits.check_decoder(replace(DecoderConfig(), delays=[0, 100, 0, 1]))

    def test_t5(self):
        cases = [
            (dict(num_layers=201), "num_layers must be from 1 to 200, got 201"),
            (dict(num_heads=1.0), "num_heads must be"),
            (dict(layer_norm_epsilon=math.nan), "layer_norm_epsilon must be"),
            (dict(feed_forward_proj="swish"), "feed_forward_proj must be one of relu,"),
            (dict(feed_forward_proj=[]), "feed_forward_proj must be one of relu,"),
            (dict(relative_attention_max_distance=8), "relative_attention_max_dist"),
        ]
        self.refused(limits.check_t5, T5Config(), cases)
        limits.check_t5(replace(T5Config(), relative_attention_max_distance=9))

    def test_codec(self):
        cases = [
            (dict(upsampling_ratios=[8]), "upsampling_ratios must be a list of 1 to 8"),
            (dict(upsampling_ratios=(2,) * 9), "upsampling_ratios must be a list"),
            (dict(upsampling_ratios=(8, 0)), "upsampling_ratios must be from 1"),
            (dict(target_bandwidths=(math.inf,)), "target_bandwidths must be from"),
            (dict(target_bandwidths=(99.0,)), "target_bandwidths must be those of"),
            (dict(num_lstm_layers=None), "num_lstm_layers must be"),
            (dict(compress=65), "compress must be at most num_filters, 64"),
            (dict(pad_mode="zero"), "pad_mode must be one of reflect, constant"),
            (dict(norm_type=None), "norm_type must be one of"),
            (dict(chunk_length_s=1.0, sampling_rate=1), "target_bandwidths|chunk"),
            (dict(overlap=1.0), "overlap must be from 0.0 to 0.99"),
        ]
        self.refused(limits.check_codec, EncodecConfig(), cases)
        limits.check_codec(replace(EncodecConfig(), chunk_length_s=1, overlap=0.5))

    def test_pair(self):
        config = MusicGenConfig()
        limits.check_parts(config)
        for change, name in (
            (dict(audio_channels=2), "audio_channels"),
            (dict(normalize=True), "normalize"),
            (dict(codebook_size=2047), "codebook_size|target_bandwidths"),
            (dict(target_bandwidths=(1.1,)), "target_bandwidths"),
        ):
            codec = replace(config.audio_encoder, **change)
            with self.assertRaisesRegex(ValueError, f"does not belong .* its ({name})"):
                limits.check_parts(replace(config, audio_encoder=codec))

    def test_every_checkpoint_is_checked(self):
        settings = dict(model_type="musicgen", decoder_dtype="float16")
        with patch("limits.check_parts") as check:
            config = MusicGenConfig()
            for part in ("decoder", "text_encoder", "audio_encoder"):
                settings[part] = dict(vars(getattr(config, part)))
            read_config(settings)
        check.assert_called_once_with(config)
