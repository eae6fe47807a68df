"""Training an adapter, and using it."""

import io
import json
import math
import os
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from unittest.mock import Mock, patch

import mlx.core as mx
import mlx.nn as nn
import soundfile
import sounds
from common import REFERENCE, ScriptTest, exact
from safetensors import safe_open

import convert
import lora
import quantize
import settings
import train
from audio import load_audio, save_audio
from decoder import Condition, Decoder, DecoderConfig
from musicgen import MusicGen, delay, delay_mask
from prompt import encode_prompt


class TestLora(ScriptTest):
    path = str(REFERENCE / "mono-transformers")

    def setUp(self):
        super().setUp()
        self.clips = self.folder / "clips"
        self.clips.mkdir()
        for i, notes in enumerate(([60, 64, 67], [69, 65, 62])):
            save_audio(self.clips / f"{i}.wav", sounds.tune(32000, notes), 32000)
            (self.clips / f"{i}.txt").write_text(f"tune number {i}\n")
        self.adapter = self.folder / "adapter.safetensors"

    def train(self, *flags: str) -> tuple[int, str, str]:
        """Exit status or message, standard output and standard error."""
        return self.train_new(*flags, *([] if "--resume" in flags else ["--force"]))

    def train_new(self, *flags: str) -> tuple[int, str, str]:
        """The same of a command that overwrites nothing."""
        arguments = ["lora", "--model", self.path, "--data", self.clips]
        arguments += ["--output", self.adapter, "--rank", "4", "--dtype", "float32"]
        out, err, status = io.StringIO(), io.StringIO(), 0
        with patch.object(sys, "argv", ["train.py", *map(str, [*arguments, *flags])]):
            with redirect_stdout(out), redirect_stderr(err):
                try:
                    train.main()
                except SystemExit as error:
                    status = error.code
        return status, out.getvalue(), err.getvalue()

    def batch(self, model: MusicGen) -> tuple[mx.array, ...]:
        texts, codes = train.load_clips(model, self.clips)
        ids, mask = train.padded([model.tokenizer.encode(t) for t in texts], 16)
        told = mx.array([True, False])
        return ids, mask, told, mx.stack([c[:20] for c in codes]).astype(mx.int32)

    def test_loss_is_that_of_the_decoder(self):
        """In one pass as step by step, plain and fast."""
        for name in ("mono-transformers", "stereo-transformers", "melody-transformers"):
            model = exact(name)
            ids, mask, told, codes = self.batch(model)
            loss, _, _ = train.lm_loss(model, ids, mask, told, codes)
            config, T = model.config.decoder, codes.shape[1]
            wanted = delay(codes, config.delays, T, config.vocab_size)
            text = Condition(model.text_encoder(ids, mask), mask & told[:, None])
            sound = None
            if model.conditioner is not None:
                sound = Condition(*model.conditioner.states([None, None], None))
            real = delay_mask(T, config.delays)
            for plain in (True, False):
                model.plain = plain
                forward = model.make_forward(text, copies=1, steps=T + 60)
                forward.rewind(sound)
                token, total = mx.full((2, 1, wanted.shape[2]), config.vocab_size), 0
                for step in range(T):  # before the end, as in audiocraft
                    logits = forward(token)[:, -1]
                    token = wanted[:, step : step + 1]
                    chosen = mx.where(real[step], token[:, 0], 0)
                    each = nn.losses.cross_entropy(logits, chosen) * real[step]
                    total = total + each.sum(axis=0)
                want = (total / (2 * real[:T].sum(axis=0))).mean()
                self.assertAlmostEqual(loss.item(), want.item(), 3)

    def test_gradients(self):
        """Against finite differences."""
        model = exact("mono-transformers")
        model.freeze()
        lora.add_adapters(model.decoder, 2, 1.0)
        layer = model.decoder.layers[0].linear1
        layer.b = 0.1 * mx.random.normal(layer.b.shape, key=mx.random.key(1))
        layer.unfreeze(keys=["a", "b"], recurse=False)
        batch = self.batch(model)
        gradient = nn.value_and_grad(model, train.lm_loss)
        _, found = gradient(model, *batch)
        found = found["decoder"]["layers"][0]["linear1"]
        for name in ("a", "b"):
            way = mx.random.normal(layer[name].shape, key=mx.random.key(2))
            values, start = [], layer[name]
            for step in (1e-2, -1e-2):
                layer[name] = start + step * way
                values.append(train.lm_loss(model, *batch)[0].item())
            layer[name] = start
            slope = (found[name] * way).sum().item()
            self.assertAlmostEqual((values[0] - values[1]) / 2e-2, slope, 3)
            self.assertGreater(abs(slope), 1e-3)

    def test_learns(self):
        before = exact("mono-transformers").generate_codes("a", duration=0.3, temp=0)
        status, out, err = self.train("--steps", "60", "--lr", "0.02", "--batch", "2")
        self.assertEqual((status, err), (0, ""))
        model = exact("mono-transformers")
        batch = self.batch(model)
        first = train.lm_loss(model, *batch)[0].item()
        learned = MusicGen.from_pretrained(self.path, mx.float32, adapter=self.adapter)
        self.assertLess(train.lm_loss(learned, *batch)[0].item(), first - 0.3)
        none = dict(adapter=self.adapter, adapter_scale=0)
        same = MusicGen.from_pretrained(self.path, mx.float32, **none)
        self.assertSame(same.generate_codes("a", duration=0.3, temp=0), before)
        self.assertLess(self.adapter.stat().st_size, 200_000)

        converted = self.folder / "fused"
        convert.convert(self.path, converted, mx.float32, adapter=self.adapter)
        fused = MusicGen.from_pretrained(converted, mx.float32)
        wanted = learned.generate_codes("b", duration=0.3, seed=1)
        self.assertSame(fused.generate_codes("b", duration=0.3, seed=1), wanted)

        flags = ["-p", "b", "--model", self.path, "--seed", "1", "--duration", "0.3"]
        flags += ["--dtype", "float32"]
        for name, more in (("a", ["--adapter", self.adapter]), ("b", [])):
            flags += more if name == "a" else ["--again", self.folder / "a.wav"]
            output = ["--output", self.folder / f"{name}.wav"]
            status, _, err = self.run_script(*flags, *output)
            self.assertEqual(status, 0, err)
            told = settings.read_settings(self.folder / f"{name}.wav")
            self.assertEqual(told["adapter"], str(self.adapter))
        self.assertSame(*(soundfile.read(self.folder / f"{n}.wav")[0] for n in "ab"))

    def test_goes_on(self):
        """As if it had never stopped; with a rate that does not depend on the end."""
        flags = ["--lr", "0.01", "--seed", "3", "--batch", "2", "--crop", "0.4"]
        with patch("math.cos", return_value=1.0):
            self.train("--steps", "8", *flags)
            whole = lora.read_adapter(self.adapter)[0]
            self.train("--steps", "3", *flags)
            status, out, err = self.train("--steps", "8", "--resume", *flags)
        self.assertEqual((status, err), (0, ""))
        self.assertIn("step 8", out)
        for name, value in lora.read_adapter(self.adapter)[0].items():
            self.assertClose(value, whole[name], 1e-5)
        self.adapter.unlink()
        self.train("--steps", "8", "--resume", *flags)  # it is done already
        self.assertTrue(self.adapter.is_file())
        status, _, _ = self.train("--resume", *flags, "--rank", "8")
        self.assertRegex(str(status), "rank must be as it was, 4, .* got 8")
        checkpoint = self.folder / "adapter.safetensors.training"
        checkpoint = checkpoint / "checkpoint.safetensors"
        checkpoint.write_bytes(checkpoint.read_bytes()[:999])
        status, _, _ = self.train("--resume", *flags)
        self.assertRegex(str(status), "checkpoint.safetensors is damaged")
        mx.save_safetensors(str(checkpoint), {"a": mx.zeros(1)})
        status, _, _ = self.train("--resume", *flags)
        self.assertRegex(str(status), "checkpoint.safetensors is damaged")

    def test_what_is_there_is_not_lost(self):
        """Neither an adapter nor a checkpoint, and this is told before the training."""
        with patch("train.lm_loss", side_effect=KeyboardInterrupt):
            self.assertEqual(self.train_new("--steps", "2")[0], 130)
        checkpoint = self.folder / "adapter.safetensors.training/checkpoint.safetensors"
        with patch("train.MusicGen.from_pretrained") as load:
            status, _, _ = self.train_new("--steps", "2")
        wanted = f"{checkpoint} is there already: go on with it by --resume, .* --force"
        self.assertRegex(str(status), f"^train.py: error: {wanted}.$")
        self.assertEqual(self.train_new("--steps", "2", "--resume")[0], 0)
        before = self.adapter.read_bytes()
        for there, onward in ((checkpoint, "go on .*, "), (self.adapter, "")):
            with patch("train.MusicGen.from_pretrained") as load:
                status, _, _ = self.train_new("--steps", "1", "--seed", "9")
            load.assert_not_called()
            wanted = f"{there} is there already: {onward}choose another --output, or "
            self.assertRegex(str(status), wanted)
            self.assertEqual(self.adapter.read_bytes(), before)
            checkpoint.unlink(missing_ok=True)
        self.assertEqual(self.train("--steps", "1", "--seed", "9")[0], 0)
        self.assertNotEqual(self.adapter.read_bytes(), before)

    def test_two_at_once(self):
        """The second is refused, whatever its flags, until the first one ends."""
        folder = self.folder / "adapter.safetensors.training"
        told = f"Another training writes to {folder} now: wait until it ends, or choose"
        messages = []

        def second(*_):
            for flags in ([], ["--force"], ["--resume"]):
                with patch("train.MusicGen.from_pretrained") as load:
                    messages.append(self.train_new("--steps", "1", *flags)[0])
                load.assert_not_called()
            raise KeyboardInterrupt

        with patch("train.load_clips", second):
            self.assertEqual(self.train_new("--steps", "1")[0], 130)
        self.assertEqual(len(messages), 3)
        for message in messages:
            self.assertIn(f"train.py: error: {told}", message)
        self.assertFalse(folder.exists())  # nothing was kept
        self.assertEqual(self.train_new("--steps", "1")[0], 0)
        self.assertEqual(self.train("--steps", "1")[0], 0)

    def test_other_clips_are_told(self):
        """Where a training goes on; one of an older version says nothing of them."""
        self.assertEqual(self.train("--steps", "1")[0], 0)
        self.assertEqual(self.train("--steps", "2", "--resume")[2], "")
        (self.clips / "1.txt").write_text("another caption\n")
        status, _, err = self.train("--steps", "3", "--resume")
        self.assertEqual((status, err.count("\n")), (0, 1))
        told = (
            r"--data holds 2 clips \(\w{8}\), but .*checkpoint.safetensors was trained"
        )
        self.assertRegex(
            err, rf"^train.py: warning: {told} on 2 clips \(\w{{8}}\): it "
        )
        shutil.copy2(self.clips / "1.wav", self.clips / "0.wav")
        self.assertIn("--data holds", self.train("--steps", "4", "--resume")[2])
        self.assertEqual(self.train("--steps", "5", "--resume")[2], "")
        path = self.folder / "adapter.safetensors.training" / train.CHECKPOINT
        with safe_open(path, "numpy") as file:
            metadata = json.loads(file.metadata()["training"])
        del metadata["settings"]["data"]
        arrays = mx.load(str(path))
        settings.save_arrays(path, arrays, {"training": json.dumps(metadata)})
        self.assertEqual(self.train("--steps", "6", "--resume")[::2], (0, ""))

    def test_text_is_left_out_at_times(self):
        for share in (0.0, 1.0):
            loss = Mock(wraps=train.lm_loss)
            with patch.multiple(train, WITHOUT_TEXT=share, lm_loss=loss):
                self.assertEqual(self.train("--steps", "1")[0], 0)
            self.assertEqual(loss.call_args.args[3].tolist(), [share == 0])

    def test_interrupted(self):
        with patch("train.Training.tell", side_effect=KeyboardInterrupt):
            self.assertEqual(self.train("--steps", "2")[0], 130)
        with patch("train.lm_loss", side_effect=KeyboardInterrupt):
            self.assertEqual(self.train("--steps", "2")[0], 130)
        self.assertEqual(self.train("--steps", "2", "--resume")[0], 0)

    def test_what_cannot_be_written_is_told_before_the_training(self):
        """And the model's own weights are never written."""
        model = self.copy("mono-transformers")
        weights = model / "model.safetensors"
        os.link(weights, self.folder / "linked.safetensors")
        folder = self.folder / "folder.safetensors.training"
        folder.write_bytes(b"no folder")
        before = weights.read_bytes()
        for output, pattern in (
            (weights, "must not be written, since it is read as the model"),
            (self.folder / "linked.safetensors", "must not be written"),
            (self.folder / "none" / "x.safetensors", "must exist"),
            (self.folder / "folder.safetensors", "folder.safetensors.training"),
            (self.folder / f"{'x' * 300}.safetensors", "too long"),
        ):
            with patch("train.MusicGen.from_pretrained") as load:
                flags = ["--model", model, "--output", output]
                status, _, _ = self.train("--steps", "1", *flags)
            self.assertRegex(str(status), f"^train.py: error: .*{pattern}")
            load.assert_not_called()
        self.assertEqual(weights.read_bytes(), before)

    def test_loss_that_is_not_finite(self):
        def loss(model: MusicGen, *batch: mx.array) -> tuple:
            total, losses, state = true_loss(model, *batch)
            return total, losses * math.nan, state

        true_loss = train.lm_loss
        with patch("train.lm_loss", loss):
            status, _, _ = self.train("--steps", "3")
        self.assertRegex(str(status), "The loss must be finite.*step 3")
        self.assertFalse(self.adapter.exists())

    def test_kept_codes(self):
        """Are those of the clip as it is, and of this codec."""
        path, model = self.clips / "0.wav", exact("mono-transformers")
        codes = train.clip_codes(model, path)
        with patch("train.encode_prompt", side_effect=AssertionError):
            self.assertSame(train.clip_codes(model, path), codes)
        (kept,) = self.clips.glob(".*.codes.safetensors")
        kept.write_bytes(b"noise")
        self.assertSame(train.clip_codes(model, path), codes)
        other = exact("mono-audiocraft")
        same = encode_prompt(other, load_audio(path, 32000, 1), 10**6)[0]
        self.assertSame(train.clip_codes(other, path), same)
        shutil.copy2(self.clips / "1.wav", path)
        self.assertNotEqual(train.clip_codes(model, path).tolist(), codes.tolist())
        (self.clips / "._0.wav").touch()
        self.assertEqual(len(train.find_clips(self.clips)), 2)

    def test_beside_quantized_layers(self):
        sizes = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=2)
        decoder = Decoder(DecoderConfig(ffn_dim=64, **sizes), text_width=16)
        quantize.quantize(decoder, 8, 32)
        inputs = mx.random.normal((1, 3, 64))
        layer = decoder.layers[0].linear1
        lora.add_adapters(decoder, 2, 0.5)
        adapted = decoder.layers[0].linear1
        adapted.b = mx.ones(adapted.b.shape)
        want = layer(inputs) + 0.5 * (inputs @ adapted.a) @ adapted.b
        self.assertClose(adapted(inputs), want, 1e-5)
        lora.fuse(decoder)
        self.assertIs(decoder.layers[0].linear1, adapted)
        self.assertTrue(lora.has_adapters(decoder))

    def test_files_of_older_versions(self):
        """Which name a size of the decoder as its config did then."""
        model = exact("melody-transformers")
        lora.add_adapters(model.decoder, 2, 1.0)
        for _, _, module in lora.find(model.decoder, lora.LoRALinear):
            module.b = 0.1 * mx.random.normal(module.b.shape)
        lora.save_adapter(self.adapter, model.decoder, 2, {"model": "melody"})
        arrays, told = lora.read_adapter(self.adapter)
        names = ("hidden_size", "num_hidden_layers", "ffn_dim", "num_codebooks")
        config = model.config.decoder
        sizes = {name: getattr(config, name) for name in names}
        sizes["sound_width"] = config.prefix_width
        self.assertEqual(told["sizes"], sizes)  # as an older version reads it, too
        lora.fuse(model.decoder)
        options = dict(duration=0.3, temp=0)
        wanted = model.generate_codes("a", **options)
        unchanged = exact("melody-transformers").generate_codes("a", **options)
        self.assertNotEqual(wanted.tolist(), unchanged.tolist())
        path, adapter = REFERENCE / "melody-transformers", dict(adapter=self.adapter)
        told = dict(musicgen_adapter=1, rank=2, sizes=sizes, model="melody")
        settings.save_arrays(self.adapter, arrays, {"adapter": json.dumps(told)})
        adapted = MusicGen.from_pretrained(path, mx.float32, **adapter)
        self.assertSame(adapted.generate_codes("a", **options), wanted)
        sizes["sound_width"] = 7
        settings.save_arrays(self.adapter, arrays, {"adapter": json.dumps(told)})
        with self.assertRaisesRegex(ValueError, "its sound_width is 7, here it is"):
            MusicGen.from_pretrained(path, mx.float32, **adapter)

    def test_bad_clips(self):
        (self.clips / "bad.wav").write_bytes(b"noise")
        (self.clips / "bad.txt").write_text("bad")
        status, _, err = self.train("--steps", "1")
        self.assertEqual(status, 0)
        self.assertRegex(err, "skipped: .*bad.wav is not a readable sound file.*\n$")
        for name in ("0", "1"):
            (self.clips / f"{name}.wav").write_bytes(b"noise")
        status, _, err = self.train("--steps", "1")
        self.assertRegex(str(status), "must hold a sound file that can be read")
        save_audio(self.clips / "0.wav", mx.zeros((32000, 1)), 32000)
        self.assertRegex(self.train("--steps", "1")[2], "skipped: .*0.wav is silent.\n")

    def left_out(self) -> tuple[list[str], list[str]]:
        """Captions of what is a clip, and what is said of the rest."""
        with redirect_stderr(io.StringIO()) as err:
            clips = train.find_clips(self.clips)
        told = err.getvalue().splitlines()
        start = "train.py: skipped: "
        self.assertTrue(all(line.startswith(start) for line in told), told)
        return [text for _, text in clips], [line.removeprefix(start) for line in told]

    def test_captions_that_cannot_be_read(self):
        """Are named all, and left out."""
        for name in "abc":
            shutil.copy2(self.clips / "0.wav", self.clips / f"{name}.wav")
        (self.clips / "a.txt").write_bytes(b"\xff\xfe")
        (self.clips / "b.txt").write_text(" \n")
        (self.clips / "1.txt").write_text("two\n\n lines \n")
        texts, told = self.left_out()
        self.assertEqual(texts, ["tune number 0", "two lines"])
        for line, pattern in zip(
            told,
            (
                "a.wav: .*a.txt must be a text in UTF-8: ",
                "b.wav needs a caption in b.txt.$",
                "c.wav needs a caption in c.txt.$",
            ),
            strict=True,
        ):
            self.assertRegex(line, pattern)
        for name in "01":
            (self.clips / f"{name}.txt").unlink()
        status, _, err = self.train("--steps", "1")
        self.assertRegex(str(status), "must hold a sound file .* with a caption.$")
        self.assertEqual(len(err.splitlines()), 5)

    def test_lines_of_captions_that_cannot_be_read(self):
        lines = (
            b'{"file": "0.wav", "caption": "two  words"}',
            b'{"file": 3}',
            b'{"file": "1.wav", "caption": "\xff"}',
            b'{"file": "1.wav", "caption": " "}',
            b'{"file": "a\\u0000.wav", "caption": "x"}',
            b"",
            b'{"file": "1.wav", "caption": "x"}',
        )
        (self.clips / "captions.jsonl").write_bytes(b"\n".join(lines))
        texts, told = self.left_out()
        self.assertEqual(texts, ["two  words", "x"])
        for line, pattern in zip(
            told,
            (
                "line 2 must be",
                "line 3 must be a text in UTF-8: ",
                "line 4 must hold .* a caption that is not empty",
                "line 5 names no file: embedded null byte",
            ),
            strict=True,
        ):
            self.assertRegex(line, f"captions.jsonl, {pattern}")

    def test_all_that_is_left_out_is_named(self):
        for name in ("a.opus", "b.m4a", "c.strange"):
            (self.clips / name).write_bytes(b"no sound")
            (self.clips / name).with_suffix(".txt").write_text("a caption")
        (self.clips / "cover.jpg").touch()
        (self.clips / "lone.txt").write_text("a caption")
        (self.clips / "more").mkdir()
        shutil.copy2(self.clips / "0.wav", self.clips / "voice.aac")  # by its content
        (self.clips / "voice.txt").write_text("a caption")
        status, _, err = self.train("--steps", "1")
        self.assertEqual(status, 0)
        lines = err.splitlines()
        self.assertEqual(len(lines), 6, err)
        for pattern in (
            "a.opus is not a readable sound file: ",
            "b.m4a is not a readable sound file: ",
            "c.strange is not a readable sound file: ",
            "cover.jpg has no caption.",
            "lone.txt is the caption of no sound file.",
            "more is a folder.",
        ):
            told = [line for line in lines if pattern in line]
            self.assertEqual(len(told), 1, pattern)
            self.assertTrue(told[0].startswith("train.py: skipped: "))
        with redirect_stderr(io.StringIO()):
            texts, _ = train.load_clips(exact("mono-transformers"), self.clips)
        self.assertEqual(len(texts), 3)
        (self.clips / "captions.jsonl").write_text('{"file": "0.wav", "caption": "x"}')
        _, _, err = self.train("--steps", "1")
        named = ["1.wav", "a.opus", "b.m4a", "voice.aac"]
        told = [
            f"skipped: {self.clips / n} is not named in captions.jsonl" for n in named
        ]
        self.assertEqual(
            [line.split("train.py: ")[1] for line in err.splitlines()],
            [f"{t}." for t in told],
        )

    def test_bad_flags_and_files(self):
        for flag in ("--lr", "--rank", "--steps", "--crop"):
            status, _, err = self.train(flag, "0")
            self.assertEqual(status, 2)
            self.assertIn(f"{flag} must be above 0, got 0", err)
        status, _, _ = self.train("--rank", "999")
        self.assertRegex(str(status), "rank must be from 1 to 32, got 999")
        status, _, _ = self.train("--resume", "--steps", "2")
        self.assertRegex(str(status), "nothing to resume")
        for flag, value in (("--lr", "inf"), ("--crop", "0.01")):
            self.assertEqual(self.train(flag, value)[0], 2)
        self.assertIn("must be from 0 to 4294967296", self.train("--seed", "-1")[2])
        with patch.object(mx, "save_safetensors", side_effect=RuntimeError("full")):
            status, _, _ = self.train("--steps", "1")
        self.assertRegex(str(status), "could not be written: full")
        self.assertFalse(self.adapter.exists())
        self.train("--steps", "1")
        for name, pattern in (
            ("stereo-transformers", "belongs to another model: its num_hidden"),
            ("mono-transformers", "adapter_scale must be"),
        ):
            options = dict(adapter=self.adapter, adapter_scale=1.0)
            options["adapter_scale"] = math.nan if "scale" in pattern else 1.0
            with self.assertRaisesRegex(ValueError, pattern):
                MusicGen.from_pretrained(REFERENCE / name, **options)
        model = exact("mono-transformers")
        arrays, told = lora.read_adapter(self.adapter)
        name = "layers.0.linear1.a"
        for changed, pattern in (
            ({name: arrays[name][:3]}, "must have layers.0.linear1.a of the shape"),
            ({"layers.9.a": arrays[name]}, "layers.9.a of the shape None"),
        ):
            with self.assertRaisesRegex(ValueError, pattern):
                lora.check_adapter(model.decoder, arrays | changed, told, "x")
        with self.assertRaisesRegex(ValueError, "must tell sizes and a rank"):
            lora.check_adapter(model.decoder, arrays, {"rank": "x"}, "x")
        for changed, pattern in (
            ({name: arrays[name] * math.nan}, f"{name} must be finite, but holds NaN"),
            ({name: arrays[name] / 0}, f"{name} must be finite"),
            ({name: arrays[name].astype(mx.int32)}, f"{name} must hold floats, got"),
        ):
            header = {"adapter": json.dumps(told)}
            settings.save_arrays(self.adapter, arrays | changed, header)
            with self.assertRaisesRegex(ValueError, f"adapter.safetensors: {pattern}"):
                MusicGen.from_pretrained(self.path, adapter=self.adapter)
        header = {"adapter": json.dumps(told | {"targets": []})}
        settings.save_arrays(self.adapter, {}, header)
        with self.assertRaisesRegex(ValueError, "adapter.safetensors changes nothing"):
            MusicGen.from_pretrained(self.path, adapter=self.adapter)
        (self.folder / "x.safetensors").write_bytes(b"noise")
        for path, error in (("x", ValueError), ("none", FileNotFoundError)):
            with self.assertRaises(error):
                lora.read_adapter(self.folder / f"{path}.safetensors")
