"""train.py: two steps of a smaller model."""

import dataclasses
import io
import sys
from contextlib import ExitStack, redirect_stdout
from unittest.mock import Mock, patch

import mlx.core as mx
import numpy as np
from common import Test, slow

import synth
import train
import train_codec
import train_lm
from musicgen import MusicGen


class TestTrain(Test):
    def setUp(self):
        super().setUp()
        self.out = self.folder / "tiny"
        self.codec = self.out / "training" / "codec" / train_codec.CODEC_FILE

    def synth(self, *flags: str, force: bool = True, **patches) -> str:
        """How two steps of a smaller model end: the message, or nothing; with these
        patches of the scripts that train."""
        small = dict(num_filters=4, hidden_size=8, codebook_size=64)
        codec = dataclasses.replace(
            train_codec.CODEC, target_bandwidths=(1.2,), **small
        )
        sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
        decoder = dataclasses.replace(
            train_lm.DECODER, vocab_size=64, ffn_dim=48, **sizes
        )
        text = dataclasses.replace(train_lm.TEXT, d_model=16, d_kv=8, d_ff=16)
        pool = Mock()
        pool.__enter__ = lambda _: Mock(imap=lambda f, x, chunksize: map(f, x))
        pool.__exit__ = lambda *_: None
        one_process = Mock(return_value=Mock(Pool=lambda: pool))
        patches |= dict(CODEC=codec, DECODER=decoder, TEXT=text)
        patches["get_context"] = one_process
        argv = ["train.py", "synth", "--output", str(self.out), "--steps", "2"]
        argv += ["--batch", "2", "--clips", "2", *flags]
        argv += ["--force"] if force and "--resume" not in flags else []
        with ExitStack() as stack:
            for module in (train, train_codec, train_lm):
                own = {k: v for k, v in patches.items() if hasattr(module, k)}
                stack.enter_context(patch.multiple(module, **own))
            stack.enter_context(patch.object(sys, "argv", argv))
            stack.enter_context(redirect_stdout(io.StringIO()))
            try:
                return train.main() or ""
            except SystemExit as error:
                return str(error.code)

    def test_gpu_that_fails_is_one_line(self):
        failure = Mock(side_effect=RuntimeError("The GPU stopped\nin step 3."))
        line = "train.py: error: The GPU stopped in step 3."
        self.assertEqual(self.synth("--codec", run=failure), line)

    def test_codec(self):
        """The codebooks that followed are written, and the start is even."""
        used = {
            name: Mock(wraps=getattr(train_codec, name))
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
        """A model that plays comes of captions that are guessed, or left out, at
        times."""
        self.synth("--codec")
        misheard = Mock(wraps=synth.misheard)
        used = {
            name: Mock(wraps=getattr(module, name))
            for module, name in (
                (train_lm, "start_small"),
                (train_codec, "make_clips"),
                (train_lm, "song_loss"),
            )
        }
        with patch.object(synth, "misheard", misheard):
            self.assertEqual(self.synth("--lm", WITHOUT_TEXT=1.0, **used), "")
        used["start_small"].assert_called_once()
        (made,) = used["make_clips"].mock_calls
        self.assertEqual(made.args[1], synth.KNOWN)
        self.assertEqual(misheard.call_args.args[2], train_lm.MISHEARD)
        *_, told, codes, _ = used["song_loss"].call_args.args
        self.assertFalse(told.any())
        self.assertEqual(codes.shape, (2, 400, 4))
        self.synth("--lm", WITHOUT_TEXT=0.0, **used)
        self.assertTrue(used["song_loss"].call_args.args[3].all())
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

    @slow(6)
    def test_what_is_there_is_not_lost(self):
        """Neither a codec nor a model, and this is told before clips are made."""
        self.assertEqual(self.synth("--codec", force=False), "")
        self.assertEqual(self.synth("--lm", force=False), "")
        before = {p: p.read_bytes() for p in self.out.rglob("*") if p.is_file()}
        self.assertGreater(len(before), 8)
        lm = self.out / "training" / "lm" / "checkpoint.safetensors"
        codec = self.codec.with_name("checkpoint.safetensors")
        made = dict(make_clips=Mock(side_effect=AssertionError("clips are made")))
        for part, there, onward in (
            ("--codec", codec, "go on with it by --resume, "),
            ("--codec", self.codec, ""),
            ("--lm", lm, "go on with it by --resume, "),
            ("--lm", self.out / "config.json", ""),
        ):
            message = self.synth(part, "--seed", "5", force=False, **made)
            wanted = f"{there} is there already: {onward}choose another --output, or ov"
            self.assertIn(wanted, message)
            if onward:
                there.unlink()
                del before[there]
        after = {p: p.read_bytes() for p in self.out.rglob("*") if p.is_file()}
        self.assertEqual(after, before)

    def test_two_at_once(self):
        """The second is refused, whatever its flags."""
        messages = []

        def second(*_):
            for flags in ([], ["--resume"]):
                messages.append(self.synth("--codec", *flags))
            raise KeyboardInterrupt

        self.assertEqual(self.synth("--codec", make_clips=second), "130")
        for message in messages:
            told = f"Another training writes to {self.codec.parent} now: wait"
            self.assertIn(told, message)
        self.assertEqual(len(messages), 2)

    def test_misheard_captions_tell_nothing_held_out(self):
        random = np.random.default_rng(0)
        told = [synth.misheard(clip, random, 0.5) for clip in synth.KNOWN * 5]
        self.assertFalse(any(clip.held_out for clip in told))
        same = [a == b for a, b in zip(told, synth.KNOWN * 5)]
        self.assertTrue(0.05 < np.mean(same) < 0.5)
