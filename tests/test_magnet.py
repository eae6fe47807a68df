"""MAGNeT against audiocraft, in the arrangements of its masks; what it draws; its files."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from unittest.mock import patch

import manifests
import mlx.core as mx
import numpy as np
from common import EXPECTED, REFERENCE, Test, expected, last, slow

import audiocraft
import convert
import encodec_files
import hub
import magnet
import t5_files
from checkpoints import read_config
from decoder_names import name_decoder
from encodec import EncodecConfig
from magnet import AnySpans, Forward, MAGNeT, MagnetOptions, Spans
from musicgen import MusicGen, encode_text, sampling_keys
from t5 import T5Config

MUSIC, SOUND = NAMES = ("magnet-audiocraft", "audio-magnet-audiocraft")
OURS = {  # options by audiocraft's names
    "seconds": "duration",
    "temperature": "temp",
    "max_cfg_coef": "max_guidance_coef",
    "min_cfg_coef": "min_guidance_coef",
}


def exact(name: str) -> MAGNeT:
    """In float32, which is not every device's own choice."""
    return MAGNeT.from_pretrained(REFERENCE / name, mx.float32)


def case(name: str, which: str) -> tuple[list[str], dict, mx.array]:
    """Texts, options and codes (B, T, K)."""
    about = dict(EXPECTED[name]["cases"][which])
    texts, _ = about.pop("texts"), about.pop("use_sampling", None)
    options = {OURS.get(key, key): value for key, value in about.items()}
    return texts, options, last(expected(name)[f"{which}_codes"])


class TestAgainstAudiocraft(Test):
    """Nothing but prompts is given to either; no choice is a close call."""

    def check(self, *cases: str):
        """Those of `annealed` draw, too, but of one token: with all temperatures."""
        for name in NAMES:
            model = exact(name)
            for which in cases:
                with self.subTest(name=name, which=which):
                    texts, options, want = case(name, which)
                    codes = model.generate_codes(texts, seed=3, **options)
                    self.assertSame(codes, want)

    def test_spans_side_by_side(self):
        self.check("alone_0", "alone_1", "alone_2", "batch", "annealed")

    def test_spans_anywhere(self):
        self.check("stride1", "stride1_annealed")

    def test_after_a_prompt(self):
        """Of seven frames: the third span is a part of it."""
        for name in NAMES:
            model, prompts = exact(name), last(expected(name)["prompt"])
            for which in ("prompted", "stride1_prompted"):
                texts, options, want = case(name, which)
                for text, prompt, row in zip(texts, prompts, want):
                    prompt = dict(codes_prompt=prompt[None])
                    codes = model.generate_codes(text, **prompt, **options)
                    self.assertSame(codes[0], row)
                    self.assertSame(codes[:, :7], prompt["codes_prompt"])

    def test_texts_of_any_length_together(self):
        """audiocraft attends to the padding; here each is as if it were alone."""
        for name in NAMES:
            several = [case(name, f"alone_{i}") for i in range(3)]
            texts = [text for texts, _, _ in several for text in texts]
            codes = exact(name).generate_codes(texts, **several[0][1])
            self.assertSame(codes, mx.concatenate([want for _, _, want in several]))

    def test_logits_of_each_stage(self):
        for name in NAMES:
            model, want = exact(name), expected(name)
            text = encode_text(model, case(name, "batch")[0][:1])
            forward = Forward(model.decoder, text, model.masking.subcodes_context)
            wide = Forward(model.decoder, text, 6)
            for stage in range(4):
                tokens = last(want[f"stage_{stage}_tokens"])
                logits = want[f"stage_{stage}_logits"]
                got = forward(tokens, stage)[:1]
                self.assertClose(got, logits, tolerance=1e-6)  # of at most 0.016
                apart = mx.abs(wide(tokens, stage)[:1] - logits).max().item()
                self.assertEqual(apart > 1e-3, stage > 0)  # a frame more is seen

    def test_sound(self):
        for name, rate in zip(NAMES, (32000, 16000)):
            model, want = exact(name), expected(name)
            self.assertEqual((model.sampling_rate, model.frame_rate), (rate, 50))
            self.assertEqual((model.channels, model.config.max_duration), (1, 10))
            texts, options, codes = case(name, "alone_0")
            audio = model.decode(codes[:, :15])
            self.assertClose(last(audio), want["audio"])
            whole = model.generate(texts, **options)
            self.assertEqual(whole.shape, (1, 51 * rate // 50, 1))
            self.assertClose(whole, model.decode(codes), tolerance=1e-6)


class Counting:
    """In place of a decoder: remembers how much is masked."""

    blank = 2

    def __init__(self):
        self.counts = []

    def __call__(self, codes: mx.array, stage: int) -> mx.array:
        self.counts.append((codes[..., stage] == self.blank).sum().item())
        return mx.zeros((2, codes.shape[1], 2))


class TestMasks(Test):
    def test_how_many_spans(self):
        """Also of 4, 7 and 13 passes, where a rounding decides."""
        for name, want in expected(MUSIC).items():
            kind, arrangement, frames, steps, *_ = *name.split("_"), "", "", ""
            if kind != "counts":
                continue
            options = MagnetOptions(temp=0, decoding_steps=[int(steps)])
            if arrangement == "stride1":  # where spans overlap, more or less
                got = magnet.shares(int(steps)) * np.float32(frames)
                self.assertEqual([max(int(n), 1) for n in got], want.tolist(), name)
                continue
            forward, spans = Counting(), Spans(mx.ones(int(frames), mx.bool_), 3)
            codes = mx.full((1, int(frames), 1), forward.blank)
            keys = iter(sampling_keys([0], int(steps)))
            passes = magnet.stage_passes(forward, codes, 0, spans, keys, options)
            self.assertEqual(len(list(passes)), int(steps))
            self.assertEqual(forward.counts, [3 * n for n in want.tolist()], name)

    def test_of_scores(self):
        """The tokens that audiocraft drew, and what it masked then."""
        for name in NAMES:
            want, free = expected(name), mx.ones(24, mx.bool_)
            for rule in ("all", "top_k", "top_p", "both"):
                for kind, spans in (("nonoverlap", Spans), ("stride1", AnySpans)):
                    start = f"draws_{rule}_{kind}"
                    tokens = want[f"{start}_tokens"][:, None]
                    probs = want[f"draws_{rule}_probs"]
                    probs = mx.take_along_axis(probs, tokens, axis=-1)[:, 0]
                    spans = spans(free, 3)
                    scores = spans.scores(probs[None], free[None])
                    count = int(magnet.shares(3)[1] * spans.count)
                    mask = spans.worst(scores, count)[0]
                    self.assertSame(mask, want[f"{start}_mask"] == 1)


def chi_square(counts: np.ndarray, exact: np.ndarray) -> float:
    """How many deviations Pearson's sum is above its mean, of draws (..., V) that fall
    as `exact` says; entries that none are expected of must be empty."""
    assert counts[exact == 0].sum() == 0, "what cannot be was drawn"
    often = exact >= 5
    terms = (counts[often] - exact[often]) ** 2 / exact[often]
    free = often.sum() - exact.shape[:-1][0]
    return (terms.sum() - free) / np.sqrt(2 * free)


def count_tokens(tokens: mx.array, V: int) -> np.ndarray:
    """(N, T) -> (T, V)"""
    return np.stack([np.bincount(row, minlength=V) for row in np.array(tokens).T])


class TestDraws(Test):
    RULES = {
        "all": dict(top_p=0),
        "top_k": dict(top_k=5, top_p=0),
        "top_p": dict(top_p=0.8),
        "both": dict(top_k=5, top_p=0.6),
    }

    def test_by_every_rule(self):
        """Draws fall as audiocraft's probabilities, and scores are of those it has."""
        rows = 3000
        for rule, options in self.RULES.items():
            want = expected(MUSIC)
            logits = mx.repeat(want["draws_logits"][None], rows, axis=0)
            keys = sampling_keys([*range(rows)], 1)[0]
            options = MagnetOptions(**options)
            tokens, probs = magnet.sample(logits, 2.0, keys, options)
            exact = np.array(want[f"draws_{rule}_draws"], np.float64) * rows
            self.assertLess(chi_square(count_tokens(tokens, 16), exact), 4, rule)
            all_probs = mx.repeat(want[f"draws_{rule}_probs"][None], rows, axis=0)
            theirs = mx.take_along_axis(all_probs, tokens[..., None], axis=-1)
            self.assertClose(probs, theirs[..., 0], tolerance=1e-6)

    @slow(2)
    def test_every_pass(self):
        """Up to the last one of each codebook, tokens fall as guided logits say at that
        pass's temperature, given what was seen."""
        model, rows, sample, drawn, used = exact(MUSIC), 800, magnet.sample, [], []

        class Recording(Forward):
            def __call__(self, codes: mx.array, stage: int) -> mx.array:
                logits = super().__call__(codes, stage)
                drawn.append([np.array(part, np.float64) for part in logits.split(2)])
                return logits

        def recording(logits, temp, keys, *how):
            tokens, probs = sample(logits, temp, keys, *how)
            drawn[-1].append(tokens)
            used.extend(keys.tolist())
            return tokens, probs

        options = dict(decoding_steps=[3] * 4, duration=0.12, temp=0.045, top_p=0)
        with patch("magnet.Forward", Recording), patch("magnet.sample", recording):
            model.generate_codes(["drums"] * rows, seed=5, **options)
        self.assertEqual(len(drawn), 12)
        self.assertEqual(len({tuple(key) for key in used}), 12 * rows)
        for step, (text, null, tokens) in enumerate(drawn):
            share = (1, np.sqrt(0.5), 0)[step % 3]  # of what is masked
            guided = null + (text - null) * (1 + 9 * share)
            logits = guided / (0.03, 0.015, 0.01)[step % 3]
            probs = np.exp(logits - logits.max(-1, keepdims=True))
            falls = (probs / probs.sum(-1, keepdims=True)).sum(axis=0)
            counts = count_tokens(tokens, 64)
            self.assertLess(abs(chi_square(counts, falls)), 4, step)
            self.assertGreater(chi_square(counts, np.roll(falls, 1, axis=-1)), 8)

    def test_seeds(self):
        model, texts = exact(MUSIC), ["drums", "slow piano", "drums"]
        for spans in ("nonoverlap", "stride1"):
            options = dict(duration=0.6, temp=0.05, span_arrangement=spans)
            codes = model.generate_codes(texts, seed=7, **options)
            for row, text in enumerate(texts):
                alone = model.generate_codes(text, seed=7 + row, **options)
                self.assertSame(alone[0], codes[row])
            few = model.generate_codes(texts, seed=[7, 8, 9], batch_size=2, **options)
            self.assertSame(few, codes)
            self.assertNotEqual(codes[0].tolist(), codes[2].tolist())


class TestFilling(Test):
    def test_the_end_is_a_continuation(self):
        for name in NAMES:
            model, prompt = exact(name), last(expected(name)["prompt"])[:1]
            texts, options, want = case(name, "prompted")
            del options["duration"]
            given = mx.pad(prompt, [(0, 0), (0, 44), (0, 0)])
            how = dict(codes_prompt=given, free=mx.arange(51) >= 7)
            codes = model.generate_codes(texts[:1], **how, **options)
            self.assertSame(codes, want[:1])

    def test_what_is_outside_stays_and_counts(self):
        model = exact(MUSIC)
        texts, options, given = case(MUSIC, "alone_0")
        place = mx.arange(51)
        free = ((place >= 13) & (place < 23)) | ((place >= 30) & (place < 32))
        for spans in ("nonoverlap", "stride1"):
            filled = []
            for after in (given, mx.where(place[:, None] < 40, given, 1)):
                how = dict(codes_prompt=after, free=free, span_arrangement=spans)
                codes = model.generate_codes(["drums"], temp=0, **how)
                kept = mx.where(free[:, None], 64, after)
                self.assertSame(mx.where(free[:, None], 64, codes), kept)
                self.assertLess(codes.max().item(), 64)
                filled.append(codes[:, 13:23].tolist())
            self.assertNotEqual(*filled)  # what comes later is heard


class TestFiles(Test):
    def test_kind_is_told_by_settings(self):
        for path, kind in ((MUSIC, MAGNeT), ("mono-audiocraft", MusicGen)):
            model = magnet.load(REFERENCE / path)
            self.assertIs(type(model), kind)
            self.assertTrue(repr(model).startswith(f"{kind.__name__}("))
        for path, kind, pattern in (
            (MUSIC, MusicGen, "it is a MAGNeT, not a MusicGen: magnet.load"),
            ("mono-audiocraft", MAGNeT, "it is a MusicGen, which musicgen.py loads"),
        ):
            with self.assertRaisesRegex(ValueError, f"{path}.* {pattern}"):
                kind.from_pretrained(REFERENCE / path)

    def test_saved(self):
        for name in NAMES:
            (self.folder / name).mkdir()
            convert.save(exact(name), self.folder / name)
            model = MAGNeT.from_pretrained(self.folder / name)
            texts, options, want = case(name, "annealed")
            self.assertSame(model.generate_codes(texts, seed=1, **options), want)
            self.assertEqual(model.config.default_duration, 10)

    def test_length_is_the_models_own(self):
        model = exact(SOUND)
        how = dict(temp=0, decoding_steps=[1, 1, 1, 1])
        self.assertEqual(model.generate_codes("wind", **how).shape, (1, 498, 4))
        how |= dict(span_arrangement="stride1")
        self.assertEqual(model.generate_codes("wind", **how).shape, (1, 500, 4))
        self.assertEqual(model.steps("wind").total, 50)
        with self.assertRaisesRegex(ValueError, "the model's own 10 s, got 10.1"):
            model.generate_codes("wind", duration=10.1)
        with self.assertRaisesRegex(ValueError, "a span of 3 frames or more .* got 2"):
            model.generate_codes("wind", duration=0.04)


class TestPublished(Test):
    """Strict loads at full size, from lazy arrays that are never computed."""

    def arrays(self, name: str) -> dict[str, mx.array]:
        tensors = manifests.expand(manifests.read()["tensors"][name])
        return {
            name: mx.zeros(shape, getattr(mx, dtype))
            for name, (dtype, shape) in tensors.items()
        }

    def parts(self, name: str) -> tuple[dict, dict]:
        """Settings and weights of one of the six, T5 and codec included."""
        sound, stored = name.startswith("audio"), manifests.read()
        weights = self.arrays(f"{name}.audiocraft")
        cfg = dict(lm_model="transformer_lm_magnet")
        cfg |= {"masking.span_len": "3", "codebooks_pattern.delay.delays": [0, 1, 2, 3]}
        decoder = audiocraft.decoder_settings(weights, cfg)
        source = stored["compression"][name]["best_state"]
        codec = self.arrays(source.removeprefix("see ").removesuffix(".json"))
        rates = dict(sample_rate="16000" if sound else "32000")
        codec_settings = audiocraft.codec_settings(codec, rates)
        t5 = "t5-large" if sound else "t5-base"
        settings = dict(model_type="musicgen", decoder=decoder)
        settings |= dict(text_encoder=stored["configs"][t5])
        settings |= dict(audio_encoder=asdict(EncodecConfig.from_dict(codec_settings)))
        settings |= dict(masking=audiocraft.masking_settings(cfg))
        parts = {
            "decoder": name_decoder(weights),
            "text_encoder": t5_files.sanitize(self.arrays(f"{t5}.transformers")),
            "audio_encoder": encodec_files.sanitize(codec),
        }
        named = {f"{p}.{k}": v for p, part in parts.items() for k, v in part.items()}
        return settings | {"max_duration": 30.0 if "30" in name else 10.0}, named

    def test_all_six(self):
        self.assertEqual({*manifests.MAGNET}, {*hub.MAGNETS})
        for name in manifests.MAGNET:
            with self.subTest(name):
                settings, weights = self.parts(name)
                model = MAGNeT(read_config(settings), None)
                model.load_weights(list(weights.items()))
                sizes = model.config.decoder
                wanted = (1536, 48) if "medium" in name else (1024, 24)
                found = (sizes.hidden_size, sizes.num_hidden_layers)
                self.assertEqual(found, wanted)
                self.assertEqual(sizes.delays, (0, 0, 0, 0))
                rate = 16000 if name.startswith("audio") else 32000
                self.assertEqual(model.sampling_rate, rate)

    def test_a_tensor_too_few_or_too_many(self):
        settings, weights = self.parts("audio-magnet-small")
        del weights["decoder.linears.weight"]
        with self.assertRaises(ValueError):
            MAGNeT(read_config(settings), None).load_weights(list(weights.items()))

    def test_manifests_equal_the_full_ones(self):
        folder = REFERENCE.parent.parent / "shared" / "checkpoints"
        if not folder.is_dir():
            self.skipTest(f"{folder} is not there")
        for name in manifests.MAGNET:
            full = json.loads((folder / f"{name}.audiocraft.json").read_text())
            full = full["state_dict.bin"]["best_state"]
            ours = manifests.expand(manifests.read()["tensors"][f"{name}.audiocraft"])
            self.assertEqual({k: (d, tuple(s)) for k, (d, s) in full.items()}, ours)

    def test_short_names_fetch_exactly_what_they_need(self):
        for name, source, t5 in (
            ("magnet-small-10secs", MUSIC, "t5-base"),
            ("audio-magnet-medium", SOUND, "t5-large"),
        ):
            own = f"facebook/{name}"
            folders = {own: REFERENCE / source}
            folders |= {f"google-t5/{t5}": REFERENCE / source / t5}
            fetched, cache = [], self.folder / "hub"

            def download(repo: str, file: str, **options) -> str:
                fetched.append((repo, file))
                (cache / repo).mkdir(parents=True, exist_ok=True)
                return shutil.copy(folders[repo] / file, cache / repo / file)

            with patch("huggingface_hub.hf_hub_download", download):
                model = MAGNeT.from_pretrained(name)
            self.assertEqual(model.masking.span_len, 3)
            files = zip(folders, (hub.AUDIOCRAFT_FILES, t5_files.FILES))
            wanted = [(repo, file) for repo, own in files for file in own]
            self.assertEqual(sorted(fetched), sorted(wanted))
            self.assertEqual(Path(hub.MODELS[name]).name, name)
