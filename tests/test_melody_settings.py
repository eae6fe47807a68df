"""Settings that shape a melody's chroma are followed, or refused by name."""

import json
import math
from dataclasses import asdict
from unittest.mock import patch

import mlx.core as mx
from common import REFERENCE, Test, sounds

import demucs
import melody
from audiocraft import CHROMA, check_conditions, melody_settings
from melody import MelodyConditioner, MelodyConfig, MelodyRequest

SEGMENT = "dataset.segment_duration"
PUBLISHED = {  # as read_yaml gives them
    "sample_rate": "32000",
    "n_chroma": "12",
    "radix2_exp": "14",
    "argmax": "true",
    "match_len_on_eval": "false",
    "eval_wavs": "null",
    "n_eval_wavs": "100",
    "cache_path": "null",
}


def settings(**changes: str) -> dict[str, str]:
    """An `xp.cfg` with some of chroma's settings changed."""
    return {CHROMA + name: value for name, value in (PUBLISHED | changes).items()}


class TestMelodySettings(Test):
    def reference(self) -> tuple[dict[str, mx.array], dict[str, dict]]:
        path = str(REFERENCE / "chroma-audiocraft.safetensors")
        want, about = mx.load(path, return_metadata=True)
        names = ("seconds", "settings", "tunes")
        return want, {name: json.loads(about[name]) for name in names}

    def test_chroma_is_that_of_audiocraft(self):
        want, about = self.reference()
        for name, changes in about["settings"].items():
            texts = {key: str(value).lower() for key, value in changes.items()}
            cfg = settings(**texts) | {SEGMENT: str(about["seconds"])}
            config = MelodyConfig.from_dict(melody_settings(cfg))
            conditioner = MelodyConditioner(config, 32000, about["seconds"])
            for which, tune in (*about["tunes"].items(), ("none", None)):
                with self.subTest(name, which=which):
                    audio = tune and mx.array(sounds.tune(32000, *tune))
                    with patch("melody.check_melody", lambda audio, *_: audio):
                        request = tune and MelodyRequest(audio, separate=False)
                        prepared = conditioner.prepare(request, 0, about["seconds"])
                    values, mask = conditioner.states([prepared, None], None)
                    self.assertTrue(mask.all().item())
                    self.assertEqual(values.shape[1], conditioner.frames(prepared))
                    chroma = want[f"{name}_{which}"]
                    if config.argmax:
                        self.assertSame(values[0], chroma)
                    else:
                        self.assertClose(values[0], chroma, 1e-5)
                    self.assertSame(values[1], want[f"{name}_none"])
                    null, mask = conditioner.null_states(values.shape)
                    self.assertSame(null[1], want[f"{name}_none"])
                    self.assertTrue(mask.all().item())

    def test_defaults_are_those_of_the_published_models(self):
        published = MelodyConfig()
        self.assertEqual(MelodyConfig(**melody_settings({})), published)
        self.assertEqual(MelodyConfig(**melody_settings(settings())), published)
        old = {"kind": "melody", "num_chroma": 12, "chroma_length": 235}
        self.assertEqual(MelodyConfig.from_dict(old), published)
        soft = MelodyConfig(argmax=False, n_fft=4096, num_chroma=24, chroma_length=938)
        self.assertEqual(
            MelodyConfig.from_dict(json.loads(json.dumps(asdict(soft)))), soft
        )
        cfg = settings(argmax="false", radix2_exp="12", n_chroma="24")
        self.assertEqual(MelodyConfig(**melody_settings(cfg)), soft)

    def test_what_is_silent(self):
        """audiocraft keeps all notes unless it is told otherwise; only a checkpoint
        without any settings is taken for a published one."""
        cfg = settings()
        del cfg[CHROMA + "argmax"]
        self.assertFalse(melody_settings(cfg)["argmax"])
        self.assertEqual(melody_settings({}, window=4096)["n_fft"], 4096)
        self.assertEqual(melody_settings(settings(), window=16384)["n_fft"], 16384)
        for window in (4096, 16000, 0):
            with self.assertRaisesRegex(
                ValueError, "radix2_exp must be that .* weights"
            ):
                melody_settings(settings(), window)

    def test_of_the_training_alone(self):
        passed = dict(match_len_on_eval="true", n_eval_wavs="3", cache_path="/tmp/x")
        cfg = settings(**passed, winlen="null", nfft="16384", norm=".inf")
        self.assertEqual(melody_settings(cfg), asdict(MelodyConfig()))

    def test_others_are_refused_by_name(self):
        for name, value, pattern in (
            ("sample_rate", "16000", "must be 32000, got 16000"),
            ("eval_wavs", "eval.jsonl", "must be null, got eval.jsonl"),
            ("winhop", "2048", "must be 4096, got 2048"),
            ("winlen", "8192", "must be 16384, got 8192"),
            ("nfft", "32768", "must be 16384, got 32768"),
            ("norm", "2", "must be .inf or inf, got 2"),
            ("duration", "30", "is set to .* in chroma_stem, which"),
            ("radix2_exp", "99999999999", "must be from 6 to 17, got 99999999999"),
            ("radix2_exp", "x", "must be a number, got x"),
            ("n_chroma", "12.5", "must be a number, got 12.5"),
            ("argmax", "perhaps", "must be true or false, got perhaps"),
        ):
            with self.assertRaisesRegex(ValueError, f"{name} {pattern}"):
                melody_settings(settings(**{name: value}))
        for seconds in ("inf", "nan", "-1", "x", "1e9"):
            with self.assertRaisesRegex(ValueError, "segment_duration must be"):
                melody_settings({SEGMENT: seconds})

    def test_absurd_config(self):
        for change, pattern in (
            ({"num_chroma": 0}, "num_chroma must be from 1 to 256, got 0"),
            ({"num_chroma": "12"}, "num_chroma must be"),
            ({"chroma_length": 10**9}, "chroma_length must be"),
            ({"n_fft": 2**40}, "n_fft must be from 64"),
            ({"n_fft": 16000}, "n_fft must be a power of two, got 16000"),
            ({"argmax": 1}, "argmax must be true or false, got 1"),
        ):
            with self.assertRaisesRegex(ValueError, pattern):
                MelodyConfig.from_dict(change)

    def test_the_extractor_of_transformers(self):
        published = {"n_fft": 16384, "hop_length": 4096, "chunk_length": 30}
        published |= {"sampling_rate": 32000, "feature_size": 12, "num_chroma": 12}
        published |= {"stem_indices": [3, 2], "n_samples": 960000}
        config = {"num_chroma": 12, "chroma_length": 235}
        self.assertEqual(melody.extractor_settings(published, config), {"n_fft": 16384})
        self.assertEqual(melody.extractor_settings({}, config), {"n_fft": 16384})
        half = published | {"n_fft": 8192, "hop_length": 2048}
        self.assertEqual(melody.extractor_settings(half, config), {"n_fft": 8192})
        for change, pattern in (
            ({"hop_length": 2048}, "hop_length .* must be 4096, got 2048"),
            ({"sampling_rate": 16000}, "sampling_rate .* must be 32000"),
            ({"num_chroma": 24}, "num_chroma .* must be 12, got 24"),
            ({"stem_indices": [2]}, "stem_indices .* must be"),
            ({"n_fft": "x"}, "n_fft must be a whole number"),
            ({"chunk_length": 10}, "chunk_length .* must be 30"),
        ):
            with self.assertRaisesRegex(ValueError, pattern):
                melody.extractor_settings(published | change, config)

    def test_windows_of_a_long_take(self):
        """In each the melody goes on where the last began, and goes round."""
        conditioner = MelodyConditioner(MelodyConfig(chroma_length=8), 32000, 1.0)
        audio = mx.array(sounds.tune(32000, [60, 64, 67]))
        prepared = conditioner.prepare(MelodyRequest(audio, separate=False), 0, 3.0)
        around = mx.concatenate([audio, audio])[40000:72000]
        values, _ = conditioner.states([prepared], 40000)
        self.assertSame(values[0], melody.extract_chroma(around, 32000)[:8])

    def test_separated_first(self):
        """At the model's rate, whatever Demucs has, and only as far as it matters."""
        conditioner = MelodyConditioner(MelodyConfig(), 16000, 1.0)
        audio = mx.array(sounds.noise(16000, seconds=20))
        model = demucs.HTDemucs.from_pretrained(REFERENCE / "htdemucs")
        with patch("melody.published_demucs", return_value=model):
            prepared = conditioner.prepare(MelodyRequest(audio), 0, duration=0.5)
            self.assertSame(
                conditioner.prepare(MelodyRequest(audio[:176000]), 0, 0.5), prepared
            )
        self.assertEqual(prepared.shape, (11 * 16000, 1))
        plain = conditioner.prepare(MelodyRequest(audio, separate=False), 0, 2.0)
        self.assertSame(plain, audio[: 13 * 16000])
        self.assertIsNone(conditioner.prepare(None, 0, 2.0))

    def test_bad_requests(self):
        conditioner = MelodyConditioner(MelodyConfig(n_fft=32768), 32000, 30.0)
        for audio, pattern in (
            (mx.ones((32767, 1)), "at least 1.024 s, got 1.024 s"),
            (mx.zeros((40000, 1)), "must not be silent"),
            (mx.full((40000, 2), math.nan), "must be finite"),
            (mx.ones((2, 40000)), "1 to 8 channels, got .*audio.T"),
            ({}, "must be samples .* got dict"),
        ):
            with self.assertRaisesRegex(ValueError, f"melody .*{pattern}"):
                conditioner.prepare(MelodyRequest(audio, separate=False), 0, 8.0)

    def test_how_text_and_sound_reach_the_decoder(self):
        fuser = {"fuser.prepend": ["self_wav", "description"]}
        check_conditions(fuser, has_sound=True)
        check_conditions({"fuser.cross": ["description"]}, has_sound=False)
        check_conditions({}, has_sound=True)
        for cfg, pattern in (
            (
                {"fuser.prepend": ["self_wav"]},
                "fuser.prepend must list description, se",
            ),
            (fuser | {"fuser.sum": ["x"]}, "fuser.sum must list nothing, got x"),
            ({"fuser.cross_attention_pos_emb": "true"}, "pos_emb must be false"),
            ({"conditioners.description.t5.normalize_text": "true"}, "normalize_text"),
        ):
            with self.assertRaisesRegex(ValueError, pattern):
                check_conditions(cfg, has_sound=True)
