"""What a take follows besides its text: a conditioner that nobody here knows, and the
settings of those that are."""

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import sounds
from common import EXPECTED, ROOT, Test, exact
from test_torch_file import tensor_pickle, zip_file

import audiocraft
import conditioning
import convert
from checkpoints import MusicGenConfig
from decoder import DecoderConfig
from encodec import Encodec, EncodecConfig
from melody import MelodyConfig, MelodyRequest
from musicgen import MusicGen
from style import StyleRequest
from t5 import T5Config, Tokenizer

RATE = 10  # frames of loudness a second


class LoudnessRequest(NamedTuple):
    """A sound that is as loud as the take is to be."""

    audio: mx.array  # (N, C), going round


@dataclass(frozen=True)
class LoudnessConfig:
    width: int = 3
    kind: str = "loudness"

    def build(self, codec: Encodec, max_duration: float) -> "LoudnessConditioner":
        return LoudnessConditioner(self, codec.sampling_rate, max_duration)


class LoudnessConditioner(nn.Module):
    """Loudness over time, as a line of the file that a reader would write."""

    kind, uses_seed = "loudness", False

    def __init__(self, config: LoudnessConfig, sampling_rate: int, seconds: float):
        super().__init__()
        self.longest = int(seconds * RATE)
        self.embed = nn.Linear(1, config.width)
        self._piece, self._calls = sampling_rate // RATE, []

    def prepare(self, request: LoudnessRequest | None, seed: int, duration: float):
        self._calls.append((request, seed, duration))
        if request is None:
            return None
        audio = request.audio.mean(axis=1)
        audio = audio[: len(audio) // self._piece * self._piece]
        return (audio.reshape(-1, self._piece) ** 2).mean(axis=1) ** 0.5

    def frames(self, prepared: mx.array | None) -> int:
        return self.longest

    def states(self, prepared: list, start: int | None) -> tuple[mx.array, mx.array]:
        self._calls.append(start)
        places = mx.arange(self.longest) + (start or 0) // self._piece
        rows = [mx.zeros(1) if x is None else x for x in prepared]
        values = mx.stack([x[places % len(x)] for x in rows])
        there = mx.array([x is not None for x in prepared])[:, None]
        mask = mx.broadcast_to(there, values.shape)
        return self.embed(values[..., None]), mask

    def null_states(self, shape: tuple[int, ...]) -> tuple[mx.array, mx.array]:
        return mx.zeros(shape), mx.zeros(shape[:2], mx.bool_)


def tiny_model(conditioner: LoudnessConfig | None = LoudnessConfig()) -> MusicGen:
    """A random MusicGen of windows of a second, 50 frames of 16 samples."""
    codec = dict(sampling_rate=800, upsampling_ratios=(4, 4), target_bandwidths=(0.8,))
    codec |= dict(hidden_size=8, num_filters=4, num_lstm_layers=1, codebook_size=16)
    width = conditioner.width if conditioner else 0
    config = MusicGenConfig(
        DecoderConfig(16, 32, 2, 2, 48, prefix_width=width),
        T5Config(300, 12, 6, 24, 1, 2),
        EncodecConfig(**codec),
        max_duration=1.0,
        conditioner=conditioner,
    )
    mx.random.seed(1)
    model = MusicGen(config, Tokenizer(ROOT / "tiny" / "spiece.model"))
    if conditioner:
        model.decoder.sound_proj.weight *= 5  # so that it is heard
    mx.eval(model.parameters())
    return model


class TestNewConditioner(Test):
    def setUp(self):
        super().setUp()
        self.model = tiny_model()
        noise = mx.array(np.random.default_rng(0).normal(size=(1600, 2)), mx.float32)
        louder = mx.linspace(0, 3, 1600)[:, None]
        self.rising = LoudnessRequest(noise * louder)
        self.falling = LoudnessRequest(noise * louder[::-1])

    def codes(self, prompts, condition=None, duration=0.5, **options) -> mx.array:
        """Of the plain step and the engine, which give the same."""
        found = []
        for self.model.plain in (True, False):
            more = dict(condition=condition, duration=duration) | options
            found.append(self.model.generate_codes(prompts, **more))
        self.assertSame(*found)
        return found[0]

    def test_prefix_of_another_width(self):
        config = tiny_model().config
        for width in (0, 4):
            config.decoder.prefix_width = width
            with self.assertRaisesRegex(ValueError, f"width, 3, got {width}"):
                MusicGen(config, None)

    def test_request_of_another_kind(self):
        with patch.dict(audiocraft.SCALES, default=4):
            models = [exact(f"{kind}-audiocraft") for kind in ("melody", "style")]
        sound = mx.ones((32000, 1))
        for model, request, name in (
            (models[0], StyleRequest(sound), "MelodyRequest"),
            (models[0], sound, "MelodyRequest"),
            (models[1], MelodyRequest(sound), "StyleRequest"),
        ):
            with self.assertRaisesRegex(ValueError, f"condition must be a {name}, got"):
                model.generate_codes("a", duration=0.1, condition=request)

    def test_is_followed(self):
        rising, falling, none = [
            self.codes("drums", condition, temp=0)
            for condition in (self.rising, self.falling, None)
        ]
        self.assertEqual(rising.shape, (1, 25, 4))
        for one, other in ((rising, falling), (rising, none), (falling, none)):
            self.assertNotEqual(one.tolist(), other.tolist())
        alone = self.codes("drums", self.rising, temp=0, guidance_coef=1)
        self.assertNotEqual(alone.tolist(), rising.tolist())

    def test_alone_and_in_a_batch(self):
        prompts = ["drums", "bell", "drums", "a slow guitar melody"]
        conditions = [self.rising, None, self.falling, self.rising]
        for more in (
            dict(duration=2.3),
            dict(duration=0.5, negative_prompt="bell"),
            dict(duration=0.5, guidance_coef=1),
        ):
            with self.subTest(**more):
                batch = self.codes(prompts, conditions, seed=4, **more)
                for i, (prompt, one) in enumerate(zip(prompts, conditions)):
                    alone = self.codes(prompt, one, seed=4 + i, **more)
                    self.assertSame(alone[0], batch[i])
        same = self.codes(["a", "b"], self.rising, seed=0)  # for all prompts
        self.assertSame(same, self.codes(["a", "b"], [self.rising] * 2, seed=0))

    def test_windows(self):
        """Each hears the part of the sound that belongs to it."""
        quiet = mx.where(mx.arange(1600)[:, None] < 1000, self.rising.audio, 0)
        found = []
        for sound in (self.rising.audio, quiet):
            self.model.conditioner._calls.clear()
            request = LoudnessRequest(sound)
            options = dict(duration=2.3, extend_stride=0.6, temp=0)
            found.append(self.codes("drums", request, **options))
            once = [(request, calls[1], 2.3) for calls in self.prepared()]
            self.assertEqual(self.prepared(), once)
            self.assertEqual(len(once), 2)  # plain, and with the engine
            starts = [480 * i for i in range(4)]  # 0.6 s each
            self.assertEqual(self.starts(), 2 * starts)
        loud, quiet = found
        self.assertSame(loud[:, :50], quiet[:, :50])  # up to 1 s, none of it is quiet
        self.assertNotEqual(loud.tolist(), quiet.tolist())
        self.model.conditioner._calls.clear()
        self.codes("drums", self.rising, duration=1.0, temp=0)
        self.assertEqual(self.starts(), [None, None])

    def prepared(self) -> list[tuple]:
        return [c for c in self.model.conditioner._calls if isinstance(c, tuple)]

    def starts(self) -> list[int | None]:
        return [c for c in self.model.conditioner._calls if not isinstance(c, tuple)]

    def test_prepared_once_where_it_can_be(self):
        for uses_seed, count in ((False, 2), (True, 3)):
            self.model.conditioner.uses_seed = uses_seed
            self.model.conditioner._calls.clear()
            conditions = [self.rising, self.rising, None]
            self.model.generate_codes(["a"] * 3, 0.1, condition=conditions, seed=7)
            seeds = [seed for _, seed, _ in self.prepared()]
            self.assertEqual(seeds, [7, 8, 9] if uses_seed else [7, 9])
            self.assertEqual(len(seeds), count)

    def test_stream_and_go_on(self):
        for self.model.plain in (True, False):
            options = dict(duration=1.6, seed=1, condition=self.rising)
            codes = self.model.generate_codes("drums", **options)
            whole = self.model.decode(codes)[0]
            pieces = list(self.model.stream("drums", chunk=0.2, **options))
            self.assertClose(mx.concatenate(pieces), whole, 1e-5)
            for frames in (11, 60):
                begun = dict(codes_prompt=codes[:, :frames])
                again = self.model.generate_codes("drums", **begun, **options)
                self.assertSame(again, codes)

    def test_convert(self):
        """A line in `conditioning.read_config`, and a folder holds it, too."""

        def read_config(settings: dict) -> LoudnessConfig:
            section = settings["conditioner"]
            self.assertEqual(section.pop("kind"), "loudness")
            return LoudnessConfig(**section)

        folder = self.folder / "out"
        folder.mkdir()
        convert.save(self.model, folder)
        with self.assertRaisesRegex(ValueError, "conditioner must be .*loudness"):
            MusicGen.from_pretrained(folder)
        options = dict(duration=0.4, seed=2, condition=self.rising)
        want = self.model.generate_codes("drums", **options)
        with patch.object(conditioning, "read_config", read_config):
            model = MusicGen.from_pretrained(folder)
        self.assertEqual(model.config, self.model.config)
        self.assertSame(model.generate_codes("drums", **options), want)

    def test_bad_input(self):
        text, follows = tiny_model(None), exact("melody-transformers")
        tune = mx.array(sounds.tune(32000, [60, 64]))
        for model, options, pattern in (
            (text, dict(condition=self.rising), "^condition must go with a model that"),
            (text, dict(condition=[None, self.rising]), "^condition must go with"),
            (text, dict(melody=self.rising.audio), "^melody must go with a melody mo"),
            (self.model, dict(melody=self.rising.audio), "^melody must go with a melo"),
            (self.model, dict(style=self.rising.audio), "^style must go with a style"),
            (self.model, dict(condition=[self.rising]), "2, one for each .* list of 1"),
            (self.model, dict(style_start=1.0), "^style_start must come with a style"),
            (follows, dict(melody=tune, style=tune), "^style must go with a style mo"),
            (
                follows,
                dict(melody=tune, condition=MelodyRequest(tune)),
                "^melody and condition must not come together",
            ),
        ):
            with self.assertRaisesRegex(ValueError, pattern) as caught:
                model.generate_codes(["a", "b"], duration=0.1, **options)
            self.assertNotIn("\n", str(caught.exception))
        nothing = dict(condition=[None, None]), dict(melody=[None, None])
        want = text.generate_codes(["a", "b"], duration=0.1, seed=0)
        for options in nothing:
            codes = text.generate_codes(["a", "b"], duration=0.1, seed=0, **options)
            self.assertSame(codes, want)


class TestMelodyCheckpoints(Test):
    """Checkpoints whose chroma is made otherwise than the published models'."""

    def setUp(self):
        super().setUp()
        notes = EXPECTED["melody-transformers"]["tunes"][0]
        self.tune = mx.array(sounds.tune(32000, notes))

    def changed(self, window: bool = True, **settings: str) -> Path:
        """The audiocraft checkpoint with other settings of chroma, and weights to fit;
        with an empty setting it is left out."""
        folder, name = self.copy("melody-audiocraft"), audiocraft.SELF_WAV
        package = audiocraft.load_package(folder / "state_dict.bin")
        weights, cfg = dict(package["best_state"]), package["xp.cfg"]
        for key, value in settings.items():
            before, line, after = cfg.rpartition(f"      {key}: ")
            self.assertTrue(line, key)
            line = f"{line}{value}\n" if value else ""
            cfg = before + line + after.partition("\n")[2]
        if settings.get("n_chroma") == "24":
            projection = weights[f"{name}output_proj.weight"]
            weights[f"{name}output_proj.weight"] = mx.tile(projection, (1, 2))
        size = weights.pop(audiocraft.WINDOW).size
        if settings.get("radix2_exp", "14") in ("12", ""):
            size = 4096
        if window:
            weights[audiocraft.WINDOW] = mx.ones(size)
        (folder / "state_dict.bin").write_bytes(torch_package(weights, cfg))
        return folder.rename(self.folder / f"changed-{len(self.made())}")

    def made(self) -> list[Path]:
        return list(self.folder.glob("changed-*"))

    def codes(self, model: MusicGen, melody: mx.array | None) -> list:
        condition = None if melody is None else MelodyRequest(melody, separate=False)
        options = dict(duration=0.3, temp=0, condition=condition)
        return model.generate_codes("drums", **options).tolist()

    def test_the_copy_is_the_checkpoint(self):
        model = exact("melody-audiocraft")
        for window in (True, False):
            again = MusicGen.from_pretrained(self.changed(window))
            self.assertEqual(again.config, model.config)
            for melody in (self.tune, None):
                self.assertEqual(self.codes(again, melody), self.codes(model, melody))

    def test_settings_are_followed(self):
        published = exact("melody-audiocraft")
        codes = [self.codes(published, self.tune)]
        for settings, fields in (
            (dict(radix2_exp="12"), dict(n_fft=4096, chroma_length=32)),
            (dict(radix2_exp=""), dict(n_fft=4096, chroma_length=32)),
            (dict(n_chroma="24"), dict(num_chroma=24)),
            (dict(argmax="false"), dict(argmax=False)),
            (dict(argmax=""), dict(argmax=False)),  # audiocraft's own default
        ):
            with self.subTest(**settings):
                folder = self.changed(**settings)
                model = MusicGen.from_pretrained(folder)
                config = MelodyConfig(**dict(chroma_length=8) | fields)
                self.assertEqual(model.config.conditioner, config)
                self.assertEqual(model.config.decoder.prefix_width, config.num_chroma)
                codes.append(self.codes(model, self.tune))
                self.assertNotEqual(codes[-1], self.codes(model, None))
                self.assertNotIn(codes[-1], codes[:1])
                out = self.folder / f"out-{len(codes)}"
                convert.convert(str(folder), out, mx.float32)
                again = MusicGen.from_pretrained(out)
                self.assertEqual(again.config, model.config)
                self.assertEqual(self.codes(again, self.tune), codes[-1])
        self.assertEqual(codes[1], codes[2])
        self.assertEqual(codes[4], codes[5])
        self.assertEqual(len({str(x) for x in codes}), 4)

    def test_others_are_refused_by_name(self):
        for name, value, pattern in (
            ("sample_rate", "16000", "must be 32000, got 16000"),
            ("eval_wavs", "eval.jsonl", "must be null, got eval.jsonl"),
            ("radix2_exp", "99", "must be from 6 to 17, got 99"),
            ("radix2_exp", "13", "must be that of the 16384 samples of the window"),
            ("n_chroma", "24.5", "must be a number, got 24.5"),
            ("argmax", "perhaps", "must be true or false, got perhaps"),
            ("cache_path", "x\n      winhop: 2048", "winhop must be 4096, got 2048"),
            ("cache_path", "x\n      norm: 2", "norm must be .inf or inf, got 2"),
            (
                "cache_path",
                "x\n      gain: 2",
                "gain is set to .* in chroma_stem, which",
            ),
        ):
            with self.subTest(name, value=value):
                message = pattern if name == "cache_path" else f"{name} {pattern}"
                with self.assertRaisesRegex(ValueError, f"state_dict.bin.*{message}"):
                    MusicGen.from_pretrained(self.changed(**{name: value}))
        folder = self.changed(n_chroma="36")  # whose weights have 12
        with self.assertRaisesRegex(
            ValueError, r"self_wav.output_proj.weight of state_dict.bin .*\(32, 36\)"
        ):
            MusicGen.from_pretrained(folder)

    def test_the_extractor_of_transformers(self):
        folder = self.copy("melody-transformers")
        path = folder / "preprocessor_config.json"
        published = MusicGen.from_pretrained(folder)
        extractor = dict(n_fft=16384, hop_length=4096, chunk_length=30, num_chroma=12)
        extractor |= dict(sampling_rate=32000, stem_indices=[3, 2], feature_size=12)
        path.write_text(json.dumps(extractor))
        self.assertEqual(MusicGen.from_pretrained(folder).config, published.config)
        half = extractor | dict(n_fft=8192, hop_length=2048)
        path.write_text(json.dumps(half))
        model = MusicGen.from_pretrained(folder)
        self.assertEqual(model.config.conditioner.n_fft, 8192)
        codes = self.codes(model, self.tune)
        self.assertNotEqual(codes, self.codes(published, self.tune))
        convert.convert(str(folder), self.folder / "out", mx.float32)
        again = MusicGen.from_pretrained(self.folder / "out")
        self.assertEqual(again.config, model.config)
        self.assertEqual(self.codes(again, self.tune), codes)
        for change, pattern in (
            (dict(hop_length=4096), "hop_length .* must be 2048, got 4096"),
            (dict(n_fft=8000, hop_length=2000), "n_fft must be a power of two"),
            (dict(sampling_rate=16000), "sampling_rate .* must be 32000, got 16000"),
            (dict(stem_indices=[2]), "stem_indices .* must be .3, 2., got .2."),
            (dict(num_chroma=24), "num_chroma .* must be 12, got 24"),
        ):
            path.write_text(json.dumps(half | change))
            with self.assertRaisesRegex(ValueError, f"does not load: {pattern}"):
                MusicGen.from_pretrained(folder)
        path.write_text("[]")
        with self.assertRaisesRegex(ValueError, f"{path} must hold an object"):
            MusicGen.from_pretrained(folder)


def text(string: str) -> bytes:
    """A text in a pickle."""
    content = string.encode()
    return b"X" + struct.pack("<I", len(content)) + content


def torch_package(weights: dict[str, mx.array], cfg: str) -> bytes:
    """A `state_dict.bin` with these weights, all in one storage, and settings."""
    numbers = np.concatenate(
        [np.array(w, np.float32).ravel() for w in weights.values()]
    )
    entries, offset = b"", 0
    for name, weight in weights.items():
        stride = [int(np.prod(weight.shape[i + 1 :])) for i in range(weight.ndim)]
        one = tensor_pickle(weight.shape, stride, offset, numbers.size)
        tensor = one.removeprefix(b"\x80\x02}" + text("x")).removesuffix(b"s.")
        entries += text(name) + tensor + b"s"
        offset += weight.size
    content = b"\x80\x02}" + text("best_state") + b"}" + entries + b"s"
    return zip_file(content + text("xp.cfg") + text(cfg) + b"s.", numbers)
