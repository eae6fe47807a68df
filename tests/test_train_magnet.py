"""train_magnet.py: what is masked, what counts, and a model that comes of it."""

import argparse
import dataclasses
import io
import json
import math
import shutil
import sys
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from itertools import combinations
from unittest.mock import Mock, patch

import mlx.core as mx
import numpy as np
from common import ROOT, Test

import synth
import train
import train_codec
import train_magnet
from convert import save_model
from decoder import Condition, Decoder, DecoderConfig
from magnet import Forward, load
from train_magnet import (
    Batches,
    Spans,
    Texts,
    covered,
    draw_stages,
    hide,
    magnet_loss,
    stage_shares,
    visible,
)
from training import Training

TINY = ROOT / "tiny"


def spans_in(row: np.ndarray) -> list[int]:
    """How long the stretches of a row that are masked are."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], row, [0]])))
    return [*(edges[1::2] - edges[::2])]


class TestSpans(Test):
    def test_as_much_is_masked_as_asked_for(self):
        """In all rows on average, and in each frame: the first and last ones, too."""
        rows, T = 4000, 100
        for length in (1, 3, 5):
            spans = Spans(T, length)
            for rate in (0.03, 0.3, 0.7, 0.95):
                with self.subTest(length=length, rate=rate):
                    whole = mx.full((rows,), T)
                    masked = spans(
                        mx.full((rows,), rate), 0 * whole, whole, mx.random.key(1)
                    )
                    count = (spans.covered[T] < rate).sum().item()
                    share = covered(T, length)[T, count]
                    self.assertTrue(rate <= share < rate + length / T)
                    masked = np.array(masked)
                    self.assertAlmostEqual(masked.mean(), share, delta=0.005)
                    frames = masked.mean(axis=0)
                    self.assertLess(np.abs(frames - share).max(), 0.04)

    def test_covered_is_what_all_ways_cover_on_average(self):
        """Counted: each set of places at which two spans of 3 can begin."""
        frames, length = 4, 3
        for count in range(7):
            shares = []
            for places in combinations(range(frames + length - 1), count):
                row = np.zeros(frames + 2 * length, bool)
                for place in places:  # where a span begins, 2 before the first frame
                    row[place : place + length] = True
                shares.append(row[length - 1 :][:frames].mean())
            self.assertAlmostEqual(
                covered(frames, length)[frames, count], np.mean(shares)
            )

    def test_spans_are_whole(self):
        """Nothing is masked alone, but where the row's ends cut a span."""
        masked = Spans(60, 3)(
            *map(mx.array, ([0.1] * 500, [0] * 500, [60] * 500)), mx.random.key(0)
        )
        lengths = set()
        for row in np.array(masked):
            inner = row.copy()
            for end in (slice(0, 2), slice(-2, None)):
                inner[end] = False
            if not row[:3].any() and not row[-3:].any():
                lengths |= set(spans_in(row))
        self.assertGreaterEqual(min(lengths), 3)
        self.assertIn(3, lengths)

    def test_only_a_part_is_masked(self):
        firsts, lengths = np.array([0, 10, 57, 59]), np.array([5, 20, 3, 1])
        spans = Spans(60, 3)
        seen = np.zeros((4, 60), bool)
        for key in range(300):
            masked = spans(
                mx.full((4,), 0.5),
                mx.array(firsts),
                mx.array(lengths),
                mx.random.key(key),
            )
            self.assertTrue(masked.any(axis=1).all().item())
            seen |= np.array(masked)
        for row, first, length in zip(seen, firsts, lengths):
            self.assertEqual([*np.flatnonzero(row)], [*range(first, first + length)])

    def test_a_key_draws_the_same_again(self):
        sizes = [mx.array(x) for x in ([0.5] * 8, [0] * 8, [50] * 8)]
        one, again, other = (Spans(50, 3)(*sizes, mx.random.key(k)) for k in (1, 1, 2))
        self.assertSame(one, again)
        self.assertTrue((one != other).any().item())
        self.assertTrue((one[0] != one[1]).any().item())


class TestBatches(Test):
    def batches(self, size: int, frames: int = 90) -> Batches:
        """Of clips whose codes are their places, under texts that are their places."""
        kinds, random = synth.KNOWN[:5], np.random.default_rng(0)
        clips = [kinds[i] for i in (3, 1, 4, 1)]
        codes = mx.broadcast_to(mx.arange(4)[:, None, None], (4, frames, 4))
        states = mx.broadcast_to(mx.arange(5.0)[:, None, None, None], (5, 7, 6, 8))
        texts = Texts(kinds, states, mx.ones((5, 7, 6), mx.bool_))
        with patch.object(train_magnet, "TEXTS", 7):
            return Batches(clips, codes.astype(mx.uint16), texts, size, 0.3, random)

    def test_each_row_has_its_text(self):
        with patch.object(train_magnet, "TEXTS", 7):
            states, attended, codes, masked, inside, stages = self.batches(400)()
        self.assertEqual(states.shape, (400, 6, 8))
        rows = np.array(codes[:, 0, 0])
        self.assertEqual({*rows}, {0, 1, 2, 3})
        self.assertSame(states[:, 0, 0], np.array([3, 1, 4, 1])[rows])
        self.assertSame(attended.any(axis=1), attended.all(axis=1))
        self.assertAlmostEqual(1 - attended[:, 0].mean().item(), 0.15, delta=0.06)
        self.assertEqual((codes.shape, codes.dtype), ((400, 90, 4), mx.int32))
        for frames in (masked, inside):
            self.assertEqual((frames.shape, frames.dtype), ((400, 90), mx.bool_))
        self.assertFalse((masked & ~inside).any())
        self.assertAlmostEqual(inside.all(axis=1).mean().item(), 0.7, delta=0.06)

    def test_rates_are_those_of_a_cosine(self):
        """A mean of 2 / pi, a quarter below cos(3/8 pi), in whole rows and in parts."""
        batches = self.batches(8000)
        rates, firsts, lengths = map(np.array, batches.parts())
        for rows in (lengths == 90, lengths < 90):
            self.assertAlmostEqual(rates[rows].mean(), 2 / math.pi, delta=0.03)
            low = (rates[rows] < math.cos(3 / 8 * math.pi)).mean()
            self.assertAlmostEqual(low, 0.25, delta=0.04)
        self.assertAlmostEqual((lengths < 90).mean(), 0.3 * 89 / 90, delta=0.02)
        self.assertTrue(((firsts >= 0) & (firsts + lengths <= 90)).all())
        self.assertEqual({0, 90} & {*(firsts + lengths)[lengths < 90]}, {90})

    def test_stages(self):
        """As often as their shares say; in each batch there is each."""
        random, shares = np.random.default_rng(0), stage_shares(4)
        self.assertEqual(shares, [0.6, *[0.4 / 3] * 3])
        self.assertEqual(stage_shares(1), [1.0])
        drawn = np.array([draw_stages(shares, 8, random) for _ in range(3000)])
        for row in drawn:
            self.assertEqual({*row}, {0, 1, 2, 3})
        means = [(drawn == k).mean() for k in range(4)]
        self.assertLess(np.abs(np.array(means) - shares).max(), 0.01)


class TestLoss(Test):
    def setUp(self):
        super().setUp()
        mx.random.seed(0)
        sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
        config = DecoderConfig(vocab_size=11, ffn_dim=24, delays=(0,) * 4, **sizes)
        self.decoder = Decoder(config, 6)
        self.decoder.set_dtype(mx.float32)
        self.states = mx.random.normal((3, 5, 6))
        lengths = mx.array([5, 2, 0])
        self.attended = mx.arange(5) < lengths[:, None]
        self.codes = mx.random.randint(0, 11, (3, 20, 4))
        self.inside = mx.arange(20) < mx.array([20, 12, 20])[:, None]  # a part in one
        self.masked = (mx.random.uniform(shape=(3, 20)) < 0.4) & self.inside
        self.stages = mx.array([0, 2, 3])

    def loss(self, **other) -> tuple[float, np.ndarray]:
        names = ("states", "attended", "codes", "masked", "inside", "stages")
        batch = [other.get(name, getattr(self, name)) for name in names]
        loss, losses, state = magnet_loss(self.decoder, *batch)
        self.assertEqual(state, {})
        return loss.item(), np.array(losses)

    def test_against_a_loop(self):
        """Over rows and frames, with the pass that makes music in place of the batch's."""
        sums, cells = np.zeros(4), np.zeros(4)
        for row, stage in enumerate(self.stages.tolist()):
            codes = np.array(self.codes[row])
            seen = codes.copy()
            seen[np.array(self.inside[row]), stage + 1 :] = 11
            seen[np.array(self.masked[row]), stage] = 11
            text = Condition(self.states[row, None], self.attended[row, None])
            null = Condition(*map(mx.zeros_like, text))
            both = Condition(*(mx.concatenate(pair) for pair in zip(text, null)))
            logits = Forward(self.decoder, both, 5)(mx.array(seen)[None], stage)
            for frame in np.flatnonzero(np.array(self.masked[row])):
                scores = np.array(logits[0, frame], np.float64)
                chance = np.exp(scores[codes[frame, stage]]) / np.exp(scores).sum()
                sums[stage] -= math.log(chance)
                cells[stage] += 1
        loss, losses = self.loss()
        self.assertAlmostEqual(loss, sums.sum() / cells.sum(), 5)
        self.assertClose(mx.array(losses), mx.array(sums / np.maximum(cells, 1)), 1e-5)
        self.assertEqual(losses[1], 0)  # no row has this stage

    def test_what_is_hidden(self):
        tokens, own = hide(self.codes, self.masked, self.inside, self.stages, 11)
        for row, frame, k in np.ndindex(3, 20, 4):
            stage = self.stages[row].item()
            hidden = k > stage and self.inside[row, frame].item()
            hidden = hidden or k == stage and self.masked[row, frame].item()
            wanted = 11 if hidden else self.codes[row, frame, k].item()
            self.assertEqual(tokens[row, frame, k].item(), wanted)
            self.assertEqual(own[row, k].item(), k == stage)

    def test_nothing_else_counts(self):
        """Neither later codebooks, nor T5's states of what is no text."""
        before = self.loss()[0]
        later = mx.arange(4) > self.stages[:, None, None]
        around = later & ~self.inside[..., None]  # the part of a row, all is seen
        codes = mx.where(around, (self.codes + 1) % 11, self.codes)
        self.assertNotAlmostEqual(self.loss(codes=codes)[0], before, 3)
        later = later & self.inside[..., None]
        codes = mx.where(later, (self.codes + 1) % 11, self.codes)
        self.assertEqual(self.loss(codes=codes)[0], before)
        states = mx.where(self.attended[..., None], self.states, 9)
        self.assertEqual(self.loss(states=states)[0], before)
        places = self.stages[:, None, None] == mx.arange(4)
        codes = mx.where(places & self.masked[..., None], 0, self.codes)
        self.assertNotAlmostEqual(self.loss(codes=codes)[0], before, 2)
        codes = mx.where(places & ~self.masked[..., None], 0, self.codes)
        self.assertNotAlmostEqual(self.loss(codes=codes)[0], before, 3)  # it is seen

    def test_who_sees_whom(self):
        seen = np.array(visible(20, mx.array([0, 1, 3]), 5))
        self.assertTrue(seen[0].all())
        for row, i, j in np.ndindex(seen.shape):
            self.assertEqual(seen[row, i, j], row == 0 or abs(i - j) <= 5)

    def training(self, steps: int, compiled: bool) -> Training:
        args = dict(lr=5e-3, steps=steps, seconds=1e9, seed=0, resume=False)
        args = argparse.Namespace(**args)
        return Training(
            self.decoder, magnet_loss, args, self.folder, {}, {}, compiled=compiled
        )

    def batch(self) -> tuple[mx.array, ...]:
        seen = (self.codes, self.masked, self.inside, self.stages)
        return self.states, self.attended, *seen

    def test_training_lowers_the_loss(self):
        training, before = self.training(80, True), self.loss()[0]
        for _ in range(80):
            training.step(self.batch())
        self.assertLess(self.loss()[0], before / 3)

    def test_a_compiled_step_is_the_same(self):
        start = dict(self.decoder.parameters())
        found = []
        for compiled in (True, False):
            self.decoder.update(start)
            training = self.training(100, compiled)
            losses = [training.step(self.batch()) for _ in range(4)]
            found.append((mx.stack(losses), self.decoder.linears.weight))
        for one, other in zip(*found):
            self.assertClose(one, other, 1e-5)
        self.assertGreater(
            mx.abs(found[0][1] - start["linears"]["weight"]).max().item(), 1e-5
        )


class TestTrainMagnet(Test):
    def setUp(self):
        super().setUp()
        self.out = self.folder / "magnet"
        self.checkpoint = self.out / "training" / "magnet" / "checkpoint.safetensors"

    def run_main(self, *flags: str, **patches) -> str:
        """How steps of a smaller model on 2 s of clips end: the message, or nothing."""

        def clips(seeds: range, kinds: list[synth.Clip]):
            for seed in seeds:
                clip, _, sound = synth.make(seed, kinds, seconds=2.0)
                yield clip, (sound * 32767).astype(np.int16)

        sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
        patches = dict(SIZES=sizes | dict(ffn_dim=48), TEXTS=2) | patches
        argv = ["train.py", "synth", "--magnet", "--output", str(self.out)]
        argv += ["--batch", "8", "--clips", "3", *flags]
        with ExitStack() as stack:
            stack.enter_context(patch.multiple(train_magnet, **patches))
            stack.enter_context(patch.object(train_codec, "make_clips", clips))
            stack.enter_context(patch.object(sys, "argv", argv))
            self.printed = stack.enter_context(redirect_stdout(io.StringIO()))
            errors = stack.enter_context(redirect_stderr(io.StringIO()))
            try:
                return train.main() or ""
            except SystemExit as error:
                return errors.getvalue() if error.code == 2 else str(error.code)

    def test_a_model_comes_of_it(self):
        """A MAGNeT whose codec and T5 are tiny's, as they were."""
        misheard = Mock(wraps=synth.misheard)
        with patch.object(synth, "misheard", misheard):
            self.assertEqual(self.run_main("--steps", "2"), "")
        self.assertEqual(misheard.call_count, 2 * len(synth.KNOWN))
        self.assertEqual(misheard.call_args.args[2], train_magnet.MISHEARD)
        self.assertIn("step 2, losses: codebook 0 ", self.printed.getvalue())
        config = json.loads((self.out / "config.json").read_text())
        self.assertEqual(config["masking"], {"span_len": 3, "subcodes_context": 5})
        self.assertEqual(config["max_duration"], 8.0)
        new, old = (
            mx.load(str(folder / "model.safetensors")) for folder in (self.out, TINY)
        )
        for name, weight in old.items():
            if not name.startswith("decoder."):
                self.assertSame(new.pop(name), weight)
        self.assertTrue(all(name.startswith("decoder.") for name in new))
        pieces = [folder / "spiece.model" for folder in (self.out, TINY)]
        self.assertEqual(*(path.read_bytes() for path in pieces))
        model = load(self.out)
        self.assertEqual(type(model).__name__, "MAGNeT")
        audio = model.generate("slow bell", 0.3, seed=0, decoding_steps=(2, 1, 1, 1))
        self.assertEqual(audio.shape, (1, 9600, 1))

    def test_resumed_it_is_the_same(self):
        """And neither the checkpoint nor the model is lost to a new training."""
        self.assertEqual(self.run_main("--steps", "4"), "")
        whole = mx.load(str(self.checkpoint))
        calls, draw = [], Batches.__call__

        def stopped(batches: Batches) -> tuple[mx.array, ...]:
            calls.append(draw(batches))
            if len(calls) == 3:
                raise KeyboardInterrupt
            return calls[-1]

        with patch.object(Batches, "__call__", stopped):
            self.assertEqual(self.run_main("--steps", "4", "--force"), "130")
        self.assertEqual(self.run_main("--steps", "4", "--resume"), "")
        for name, weight in mx.load(str(self.checkpoint)).items():
            self.assertSame(weight, whole[name])
        message = self.run_main("--steps", "4")
        self.assertIn("is there already: go on with it by --resume", message)
        self.checkpoint.unlink()
        self.assertIn("config.json is there already", self.run_main("--steps", "4"))

    def test_only_on_the_same_parts(self):
        self.run_main("--steps", "1")
        other = self.folder / "other"
        shutil.copytree(TINY, other)
        weights = mx.load(str(other / "model.safetensors"))
        name = "text_encoder.encoder.final_layer_norm.weight"
        weights[name] = weights[name] + 1
        mx.save_safetensors(str(other / "model.safetensors"), weights)
        message = self.run_main("--steps", "2", "--resume", "--model", str(other))
        self.assertRegex(message, "model must be as it was")
        message = self.run_main("--steps", "2", "--resume", "--holes", "0.5")
        self.assertRegex(message, "holes must be as it was, 0.2, to resume")
        message = self.run_main("--holes", "2")
        self.assertIn("--holes must be from 0 to 1, got 2.0", message)

    def test_it_goes_on_from_a_magnet(self):
        """Of the same sizes; of others, and of what is none, it takes no decoder."""
        sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
        old = load("tiny-magnet")
        weight = old.decoder.linears.weight
        new = train_magnet.magnet_on(old).decoder.linears.weight
        self.assertEqual(new.dtype, mx.float32)
        self.assertSame(new, weight)
        with patch.object(train_magnet, "SIZES", sizes | dict(ffn_dim=48)):
            other = train_magnet.magnet_on(old)
        self.assertEqual(other.config.decoder.hidden_size, 32)
        whole, part = (train_magnet.content(old), train_magnet.content(load("tiny")))
        self.assertNotEqual(whole, part)
        old.decoder.linears.weight = weight + 1
        self.assertNotEqual(train_magnet.content(old), whole)
        tiny = load("tiny")
        tiny.decoder.linears.weight = tiny.decoder.linears.weight + 1
        self.assertEqual(train_magnet.content(tiny), part)

    def test_what_it_cannot_be_trained_on(self):
        message = self.run_main("--steps", "1", "--batch", "4")
        self.assertIn("--batch must be 8 or more with --magnet, got 4: each", message)
        self.assertFalse(self.out.exists())  # nothing is left behind
        tiny = load("tiny")
        decoder = dataclasses.replace(tiny.config.decoder, audio_channels=2)
        codec = dataclasses.replace(tiny.config.audio_encoder, sampling_rate=16000)
        for change, told in (
            (dict(text_encoder=None), "tiny must follow a text, and nothing else."),
            (dict(conditioner=1), "tiny must follow a text, and nothing else."),
            (dict(decoder=decoder), "tiny must have mono sound at 32000 Hz."),
            (dict(audio_encoder=codec), "tiny must have mono sound at 32000 Hz."),
        ):
            tiny = load("tiny")
            tiny.config = dataclasses.replace(tiny.config, **change)
            tiny.audio_encoder.config = tiny.config.audio_encoder
            with self.subTest(change), patch.object(
                train_magnet, "load", lambda _: tiny
            ):
                self.assertIn(told, self.run_main("--steps", "1"))

    def test_it_is_small_enough(self):
        """6 MB, with README.md and the files beside it."""
        model = train_magnet.magnet_on(load("tiny"))
        save_model(model, self.folder)
        size = sum(path.stat().st_size for path in self.folder.iterdir())
        self.assertLess(size, 6e6 - 10_000)
