"""The style of a sound, and the models that follow it."""

import io
import json
import math
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from unittest.mock import patch

import mlx.core as mx
import numpy as np
import soundfile
import sounds
from common import EXPECTED, REFERENCE, Test, exact, expected, last
from mlx.utils import tree_flatten

import audiocraft
import convert
import mert
from audio import load_audio, resample, save_audio
from mert import MERT
from musicgen import MusicGen
from style import StyleConfig, StyleRequest


class TestStyle(Test):
    name = "style-audiocraft"
    path = str(REFERENCE / name)

    def setUp(self):
        super().setUp()
        # The tiny model's heads show nowhere: it calls itself "default".
        self.enterContext(patch.dict(audiocraft.SCALES, default=4))
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
            start, excerpt = hear.excerpt(StyleRequest(tune, self.start), 0)
            self.assertEqual(start, self.start)
            self.assertEqual(excerpt.shape, (96000, 1))
            audio = resample(np.array(excerpt), 32000, 24000)
            features = hear.mert(mx.array(audio).T)[0]
            self.assertClose(features, want[f"mert_{i}"], 1e-4)
            for quantizers in self.told["quantizers"]:
                tokens = want[f"style_{i}_q{quantizers}"]
                self.assertSame(hear(excerpt, quantizers), tokens)
        for length in self.told["lengths"]:
            request = StyleRequest(self.tunes[0], self.start, length)
            _, excerpt = hear.excerpt(request, 0)
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
        _, excerpt = model.conditioner.excerpt(
            StyleRequest(self.tunes[0], self.start), 0
        )
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
        model, request = exact(self.name), StyleRequest(self.tunes[0])
        starts = [model.conditioner.excerpt(request, seed)[0] for seed in range(9)]
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

    def test_files(self):
        """Of which no more is resampled than the excerpt."""
        model, path = exact(self.name), self.folder / "x.wav"
        soundfile.write(path, np.array(self.tunes[0])[:, 0], 44100, subtype="FLOAT")
        whole, most = load_audio(path, 32000, 1), []
        for more in ({}, dict(style_start=0.3)):
            options = dict(duration=0.2, seed=3, **more)
            want = model.generate_codes(["a", "b"], style=whole, **options)
            with patch("audio.resample", side_effect=resample) as resampled:
                for given in (path, [str(path), Path(path)]):
                    got = model.generate_codes(["a", "b"], style=given, **options)
                    self.assertSame(got, want)
            most += [len(call.args[0]) for call in resampled.call_args_list]
        self.assertLess(max(most), 3.1 * 44100)
        got = model.generate_codes(["a", "b"], style=[path, None], **options)
        self.assertSame(got[0], want[0])

    def test_bad_input(self):
        model, tune = exact(self.name), self.tunes[0]
        for options, pattern in (
            (dict(style=[tune]), "a list of 2, one for each prompt, got a list of 1"),
            (dict(style=tune[:64000]), "at least the 3 s .* got 2 s"),
            (dict(style=tune, style_length=1.4), "from 1.5 to 4.5 s, got 1.4"),
            (dict(style=tune, style_length=9), "from 1.5 to 4.5 s, got 9"),
            (dict(style=tune, style_start=2.1), "at most 2 s .* got 2.1"),
            (dict(style=tune, style_start=-1), "0 s or more"),
            (dict(style=tune, style_quantizers=0), "from 1 to 6, got 0"),
            (dict(style=tune, style_quantizers=7), "from 1 to 6, got 7"),
            (dict(style=tune, style_quantizers=1.5), "must be whole"),
            (dict(style=tune, guidance_beta=math.nan), "must be a finite number"),
            (dict(guidance_beta=5), "come with a style"),
            (dict(style_quantizers=3), "style_quantizers must come with a style"),
            (dict(style=[tune, None], guidance_beta=5), "come with a style for each"),
            (dict(style=0 * tune), "must not be silent"),
            (dict(style=tune * math.nan), "must be finite"),
            (dict(style=tune[None]), r"must have the shape \(N, C\)"),
            (dict(style={}), "must be samples"),
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

    def test_folder_that_does_not_say_its_dtype(self):
        path = self.folder / "out"
        convert.convert(self.path, path, mx.float32)
        config = json.loads((path / "config.json").read_text())
        del config["decoder_dtype"]
        (path / "config.json").write_text(json.dumps(config))
        model = MusicGen.from_pretrained(path)
        want = tree_flatten(MusicGen.from_pretrained(self.path).parameters())
        for (name, got), (_, right) in zip(tree_flatten(model.parameters()), want):
            self.assertTrue(mx.array_equal(got, right), name)

    def test_settings_of_the_checkpoint(self):
        def load(cfg: dict, name: str = self.name) -> StyleConfig:
            with patch.object(audiocraft, "read_yaml", return_value=told[name] | cfg):
                return MusicGen.from_pretrained(REFERENCE / name).config.conditioner

        told, own, codec = {}, audiocraft.STYLE, "style-encodec-audiocraft"
        for name in (self.name, codec):
            package = audiocraft.load_package(REFERENCE / name / "state_dict.bin")
            told[name] = audiocraft.read_yaml(package["xp.cfg"])
        self.assertEqual(load({}).eval_q, 3)
        found = load({own + "eval_q": "2", own + "ds_factor": "5", own + "length": "4"})
        self.assertEqual((found.eval_q, found.ds_factor, found.length), (2, 5, 4.0))
        kept = lambda name: not name.startswith("conditioners.")  # noqa: E731
        bare = {k: v for k, v in told[self.name].items() if kept(k)}
        with patch.object(audiocraft, "read_yaml", return_value=bare):
            found = MusicGen.from_pretrained(self.path).config.conditioner
        self.assertEqual(found, load({}))
        for key, value, pattern in (
            ("use_middle_of_segment", "true", "must be false"),
            ("eval_q", "9", "eval_q must be at most num_quantizers, 6, got 9"),
            ("length", "x", "length must be a number, got x"),
            ("transformer_scale", "huge", "must be xsmall or default or large"),
            ("model_name", "encodec", "must be mert, as in the weights"),
            ("n_q_out", "0", "must be 6, as in the weights"),
            ("varying_lengths", ["3", "1"], "the least and the most"),
        ):
            with self.assertRaisesRegex(ValueError, f"state_dict.bin.*{pattern}"):
                load({own + key: value})
        pattern = "state_dict.bin.*encodec_checkpoint must be //pretrained/facebook/enc"
        with self.assertRaisesRegex(ValueError, pattern):
            load({own + "encodec_checkpoint": "//sig/1"}, codec)
        with self.assertRaisesRegex(ValueError, "self_wav must be chroma_stem or sty"):
            load({"conditioners.self_wav.model": "clap"})

    def test_damaged_weights(self):
        whole = audiocraft.load_package(Path(self.path) / "state_dict.bin")
        prefix = audiocraft.SELF_WAV

        def fails(pattern: str, change: Callable[[dict], object]) -> None:
            package = {**whole, "best_state": dict(whole["best_state"])}
            change(package["best_state"])
            load = audiocraft.load_package
            replaced = lambda p: package if p.name == "state_dict.bin" else load(p)
            with patch.object(audiocraft, "load_package", replaced):
                with self.assertRaisesRegex(ValueError, f"(?s)state_dict.*{pattern}"):
                    MusicGen.from_pretrained(self.path)

        book = prefix + "rvq.vq.layers.{}._codebook.embed"
        fails("layers.2._codebook.embed is missing", lambda w: w.pop(book.format(2)))
        fails(
            "layers.0._codebook.embed is missing",
            lambda w: [w.pop(book.format(k)) for k in range(6)],
        )
        fails(
            "1._codebook.* must have the shape",
            lambda w: w.update({book.format(1): mx.ones(3)}),
        )
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
