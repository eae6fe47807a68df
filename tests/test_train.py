"""train.py: two steps of a smaller model."""

import argparse
import dataclasses
import io
import itertools
import math
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from unittest.mock import Mock, patch

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from common import Test, slow

import synth
import train
from encodec import Encodec
from musicgen import MusicGen


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

    @slow(6)
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

    @slow(7)
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
