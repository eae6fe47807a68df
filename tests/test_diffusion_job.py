"""Diffusion as the decoder of takes: generate.py's flags, lines of files, diffusion.py."""

import json
import shutil
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import mlx.core as mx
import numpy as np
import soundfile
from common import REFERENCE, ScriptTest, Test, exact, slow

import diffusion
import jobs
import settings
from diffusion import Decoding, MultiBandDiffusion
from diffusion_job import Decoder, load, make_decoder
from generate import Stop
from job import plan

MODEL, WEIGHTS = REFERENCE / "mono-audiocraft", REFERENCE / "diffusion-audiocraft"
VALUES = dict(seed=5, duration=0.1, fade_out=0, peak=-1, decoder=str(WEIGHTS))


class TestDecoder(Test):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.model = exact("mono-audiocraft")
        mx.random.seed(0)
        cls.codes = mx.random.randint(0, 64, (2, 5, 4)).astype(mx.uint32)

    def test_names(self):
        self.assertEqual([make_decoder(x) for x in (None, "encodec")], [None, None])
        for released in ("diffusion", "musicgen"):
            self.assertEqual(make_decoder(released), "diffusion")
        self.assertEqual(make_decoder("~/a.th"), str(Path.home() / "a.th"))
        for bad in (7, "", "a\0b", ["diffusion"]):
            with self.assertRaisesRegex(ValueError, "decoder must be encodec, diffu"):
                make_decoder(bad)

    def test_what_is_not_there_is_told_before_a_model_is_read(self):
        for name in ("diffusion", "musicgen", "somebody/something", str(WEIGHTS)):
            plan(["a"], VALUES | dict(decoder=name))[0].check(writes=False)
        for name in ("difusion", "/none/at/all.th", "a/b/c", "x" * 5000):
            (job,) = plan(["a"], VALUES | dict(decoder=name))
            with self.assertRaisesRegex(
                ValueError, "file or folder that is there, got"
            ):
                job.check(writes=False)

    def test_the_released_one_is_meant(self):
        load.cache_clear()
        with patch.object(MultiBandDiffusion, "from_pretrained") as read:
            load("diffusion", mx.float32), load("diffusion", mx.float32)
            read.assert_called_once_with("musicgen", dtype=mx.float32)
        load.cache_clear()

    def test_it_decodes(self):
        none = Decoder(self.model, None)(self.codes, [1, 2])
        self.assertSame(none, self.model.decode(self.codes))
        made = Decoder(self.model, str(WEIGHTS))(self.codes, [7, 3])
        own = MultiBandDiffusion.from_pretrained(WEIGHTS, dtype=mx.float32)
        want = own.decode(self.codes, [7, 3], self.model.audio_encoder)
        self.assertSame(made, want)
        self.assertGreater(mx.abs(made - none).max().item(), 1e-2)

    def test_stopped_it_is_the_codec(self):
        def watch(steps):
            for step in steps:
                if step.step == 30:
                    return
                yield step

        decoder = Decoder(self.model, str(WEIGHTS), watch)
        made = decoder(self.codes, [7, 3])
        self.assertSame(made, self.model.decode(self.codes))
        self.assertIsNone(decoder.name)

    def test_steps_are_counted(self):
        own = MultiBandDiffusion.from_pretrained(WEIGHTS)
        steps = Decoding(own, self.codes, [7, 3], self.model.audio_encoder)
        self.assertEqual((steps.total, steps.seconds), (2 * 3 * 20, 0.2))
        self.assertEqual([s.step for s in steps], [*range(1, 121)])
        self.assertEqual(steps.audio.shape, (2, 5 * 640, 1))

    def test_what_does_not_fit(self):
        for name, told in (
            ("audiogen-audiocraft", "32000 Hz made, not one of 16000 Hz"),
            ("mono-transformers", "a codec that is 16 wide, not"),
        ):
            model = exact(name)
            if model.audio_encoder.config.hidden_size == 16:
                model.audio_encoder.config = model.audio_encoder.config.__class__(
                    **vars(model.audio_encoder.config) | dict(hidden_size=12)
                )
            with self.assertRaisesRegex(ValueError, told):
                Decoder(model, str(WEIGHTS)).check()

    def test_what_the_released_one_does_not_fit_downloads_nothing(self):
        """Of the models here each has a codec of its own."""
        told = r"MusicGen's codec \(32000 Hz, 128 wide\), not of this model's \("
        for name in ("audiogen-audiocraft", "mono-audiocraft"):
            for decoder in ("diffusion", "musicgen"):
                with patch.object(MultiBandDiffusion, "from_pretrained") as read:
                    with self.assertRaisesRegex(ValueError, told):
                        Decoder(exact(name), decoder).check()
                read.assert_not_called()

    def test_precision_follows_the_models(self):
        """On a GPU: float32 where the model computes in that, else its own."""
        for dtype, wanted in ((mx.float32, mx.float32), (mx.float16, None)):
            model = exact("mono-audiocraft")
            model.decoder.set_dtype(dtype)
            with patch("diffusion_job.load") as read:
                Decoder(model, "diffusion")._load()
            read.assert_called_once_with("diffusion", wanted)


class TestJobs(Test):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.model = exact("mono-audiocraft")

    def make(self, planned, **how) -> list[jobs.Result]:
        (batch,) = jobs.run(self.model, planned, 8)
        for _ in batch:
            pass
        return [*batch.save(**how)]

    def test_takes_of_a_batch_are_those_made_alone(self):
        values = VALUES | dict(output=self.folder / "a.wav")
        together = self.make(plan(["rock"], values, takes=2))
        self.assertEqual([r.error for r in together], [None, None])
        (other,) = self.make(
            plan(["rock"], values | dict(seed=6, output=self.folder / "b.wav"))
        )
        first, second = (r.job.output.read_bytes() for r in together)
        self.assertEqual(other.job.output.read_bytes(), second)
        self.assertNotEqual(first, second)

    def test_decoders_do_not_share_a_batch(self):
        values = VALUES | dict(output=self.folder / "a.wav")
        planned = plan(["rock"], values) + plan(["rock"], values | dict(decoder=None))
        self.assertEqual(len([*jobs.run(self.model, planned, 8)]), 2)

    def test_stopped_the_record_names_the_codec(self):
        planned = plan(["rock"], VALUES | dict(output=self.folder / "a.wav"))
        told = "a.wav: the diffusion was stopped, and the sound is the codec's own"
        with self.assertWarnsRegex(UserWarning, told):
            (result,) = self.make(planned, watch=lambda steps: iter(()), beside=True)
        record = settings.read_settings(result.job.output)
        self.assertNotIn("decoder", record)
        _, beside = settings.load_codes(self.folder / "a.safetensors")
        self.assertNotIn("decoder", beside)

    @slow(10)
    def test_a_loop_is_decoded_once_and_round_the_corner(self):
        """What follows its end sounds as its beginning: the noise is of the whole turn."""
        values = VALUES | dict(output=self.folder / "a.wav", duration=None)
        values |= dict(bpm=400, loop=True, bars=0.5, fade_out=None)
        planned = [job.timed(self.model) for job in plan(["rock"], values)]
        decoded, decode = [], Decoding.__iter__

        def counted(self):
            decoded.append(self._rows.shape)
            return decode(self)

        with patch.object(Decoding, "__iter__", counted):
            (result,) = self.make(planned)
        self.assertIsNone(result.error)
        self.assertEqual(len(decoded), 1)
        sound, rate = soundfile.read(result.job.output)
        self.assertEqual(len(sound), round(0.5 * 4 * 60 / 400 * rate))
        record = settings.read_settings(result.job.output)
        self.assertEqual(record["decoder"], str(WEIGHTS))


class Pressed(Stop):
    """Ctrl-C after it was asked for so many times."""

    def __init__(self, times: int):
        super().__init__()
        self._left = times

    def arm(self) -> None:
        pass

    def __call__(self) -> bool:
        self._left -= 1
        self._asked = self._left < 0
        return super().__call__()


class TestCommands(ScriptTest):
    """Of the reference's model and decoder; takes last a tenth of a second."""

    common = ["--model", MODEL]

    def make(self, name: str, *arguments: str) -> np.ndarray:
        output = ["--output", self.folder / name, *self.common]
        status, _, err = self.run_script(*output, *arguments)
        self.assertEqual(status, 0, err)
        return soundfile.read(self.folder / name)[0]

    @slow(20)
    def test_a_take_and_its_codes(self):
        codes = self.folder / "a.safetensors"
        take = ["rock", "--duration", "0.1", "--seed", "5", "--fade-out", "0"]
        made = self.make("a.wav", *take, "--decoder", WEIGHTS, "--save-codes", codes)
        record = settings.read_settings(self.folder / "a.wav")
        self.assertEqual(record["decoder"], str(WEIGHTS))
        self.assertEqual(settings.load_codes(codes)[1]["decoder"], str(WEIGHTS))
        own = self.make("b.wav", *take)
        self.assertNotIn("decoder", settings.read_settings(self.folder / "b.wav"))
        self.assertGreater(abs(made - own).max(), 1e-2)
        for name, *flags in (  # the same sound of the same codes
            ("c.wav", "--redecode", codes),
            ("d.wav", "--again", self.folder / "a.wav"),
        ):
            np.testing.assert_array_equal(self.make(name, *flags), made)
        plain = self.make("e.wav", "--redecode", codes, "--decoder", "encodec")
        np.testing.assert_array_equal(plain, own)
        self.assertNotIn("decoder", settings.read_settings(self.folder / "e.wav"))
        with redirect_stdout(StringIO()):
            self.decode(codes, self.folder / "f.wav", "--decoder", WEIGHTS)
        np.testing.assert_array_equal(soundfile.read(self.folder / "f.wav")[0], made)

    def decode(self, *arguments: str) -> None:
        with patch.object(sys, "argv", ["diffusion.py", *map(str, arguments)]):
            with warnings.catch_warnings(), redirect_stderr(StringIO()):
                diffusion.main()

    def test_codes_that_it_cannot_decode_are_kept(self):
        """What is wrong with a later band is found when they are made."""
        sound = self.folder / "a.wav"
        take = ["rock", "--duration", "0.1", "-o", sound, *self.common]
        for error in (ValueError("It is damaged."), FileNotFoundError("It has gone.")):
            codes = self.folder / f"{type(error).__name__}.safetensors"
            flags = ["--decoder", WEIGHTS, "--save-codes", codes]
            with patch("diffusion.Decoding.__iter__", side_effect=error):
                status, _, err = self.run_script(*take, *flags)
            self.assertEqual(status, 1)
            self.assertIn(f"The codes are in {codes}: --redecode decodes", err)
            self.assertIn(f"generate.py: error: {error}", err)
            self.assertFalse(sound.exists())
            self.assertEqual(settings.load_codes(codes)[1]["decoder"], str(WEIGHTS))

    @slow(10)
    def test_stopped_it_tells_how_to_go_on(self):
        """Codes that are whole want to be decoded, others to be gone on from; after the
        last step nothing is stopped."""
        codes = self.folder / "a.safetensors"
        take = ["rock", "--duration", "0.1", "--seed", "5", "--save-codes", codes]
        take += ["-o", self.folder / "a.wav", "--decoder", WEIGHTS, *self.common]
        decoder = f" --decoder {WEIGHTS}"
        asked = 1 + 7  # before the take, and after each of its steps but the last
        for times, told in (
            (asked - 2, f"To go on: --resume {codes} --duration 0.1{decoder}\n"),
            (asked + 9, f"To decode it: --redecode {codes}{decoder}\n"),
            (asked + 59, None),
        ):
            with self.subTest(times), patch("generate.Stop", lambda: Pressed(times)):
                status, _, err = self.run_script(*take, "--force")
                self.assertEqual(status, 130 if told else 0, err)
                self.assertIn(told or "", err)

    def test_a_part_made_again_is_the_codecs(self):
        codes = self.folder / "a.safetensors"
        take = ["rock", "--duration", "0.2", "--seed", "5", "--save-codes", codes]
        self.make("a.wav", *take, "--decoder", WEIGHTS)
        self.make("b.wav", "--regenerate", "0.1:0.2", codes, "--candidates", "1")
        self.assertNotIn("decoder", settings.read_settings(self.folder / "b.wav"))

    @slow(10)
    def test_lines_of_a_file(self):
        lines = [dict(prompt="rock", decoder=str(WEIGHTS)), dict(prompt="rock", seed=0)]
        lines += [dict(prompt="rock", decoder="no/such/file.th"), dict(prompt="rock")]
        path = self.folder / "x.jsonl"
        path.write_text("\n".join(map(json.dumps, lines)))
        flags = ["--prompts", path, "--duration", "0.1", "--seed", "0", *self.common]
        flags += ["--output", self.folder / "x.wav"]
        with patch.dict("os.environ", {"HF_HUB_OFFLINE": "1"}):
            status, _, err = self.run_script(*flags)
        self.assertEqual(status, 1)
        self.assertRegex(
            err, "line 3: decoder must be .* that is there, got 'no/such/file.th'"
        )
        read = [settings.read_settings(self.folder / f"x-{i}.wav") for i in (1, 2, 4)]
        named = [record.get("decoder") for record in read]
        self.assertEqual(named, [str(WEIGHTS), None, None])
        lines[1]["decoder"] = str(WEIGHTS)
        path.write_text("\n".join(map(json.dumps, lines[:2])))
        status, _, err = self.run_script(*flags)
        self.assertEqual(status, 0)
        self.assertRegex(err, "skipped .*x-1.wav: it is there, with these settings")
        self.assertRegex(err, "x-2.wav is made again: decoder was None and is '")

    def test_what_cannot_be(self):
        wav, codes = self.folder / "a.wav", self.folder / "a.safetensors"
        settings.save_codes(codes, mx.zeros((1, 9, 4)), dict(prompt="", model="tiny"))
        before = codes.read_bytes()
        for flags, status, told in (
            (["rock", "--stream"], 2, "needs the whole take: no --stream"),
            (["--regenerate", "1:2", codes], 2, "--regenerate goes without --decoder"),
            (["rock", "--save-codes", WEIGHTS / "mbd_tiny.th"], 2, "safetensors"),
            (["rock", "--duration", "0.1", "--decoder", ""], 2, "must be encodec"),
        ):
            flags = ["--decoder", WEIGHTS, *flags, "--output", wav, *self.common]
            found, _, err = self.run_script(*flags)
            with self.subTest(told):
                self.assertEqual(found, status, err)
                self.assertIn(told, err)
        self.assertEqual(codes.read_bytes(), before)
        self.assertFalse(wav.exists())

    @slow(5)
    def test_what_the_script_does_not_do_is_not_told(self):
        """All codes are decoded, whatever was left out of the take's own sound."""
        codes, sound = self.folder / "a.safetensors", self.folder / "a.wav"
        cuts = dict(ending=True, drop_prompt=True, loop=True, bars=1, loop_start=0.1)
        told = dict(model=str(MODEL), subtype="FLOAT", mp3_bitrate=64, **cuts)
        settings.save_codes(codes, mx.zeros((1, 5, 4), mx.uint32), told | dict(seed=5))
        with redirect_stdout(StringIO()):
            self.decode(codes, sound, "--decoder", WEIGHTS)
        self.assertEqual(soundfile.info(sound).frames, 5 * 640)
        record = settings.read_settings(sound)
        self.assertEqual(record["seed"], 5)
        self.assertEqual(record.keys() & told.keys(), {"model"})

    @slow(2)
    def test_the_script_names_the_released_one_as_jobs_do(self):
        """So that what it wrote is not made again."""
        codes, sound = self.folder / "a.safetensors", self.folder / "a.wav"
        settings.save_codes(codes, mx.zeros((1, 1, 4)), dict(model=str(MODEL)))
        tiny = MultiBandDiffusion.from_pretrained(WEIGHTS)
        with (
            patch.object(MultiBandDiffusion, "from_pretrained", return_value=tiny),
            patch.dict("diffusion.RELEASED", musicgen=(32_000, 16)),
            redirect_stdout(StringIO()),
        ):
            self.decode(codes, sound)
        self.assertEqual(settings.read_settings(sound)["decoder"], "diffusion")

    @slow(2)
    def test_the_script_needs_no_seed(self):
        codes, sounds = self.folder / "a.safetensors", []
        for i, told in enumerate((dict(seed=0), dict(seed=None), {})):
            told |= dict(model=str(MODEL))
            settings.save_codes(codes, mx.zeros((1, 1, 4)), told, overwrite=True)
            path = self.folder / f"{i}.wav"
            with redirect_stdout(StringIO()):
                self.decode(codes, path, "--decoder", WEIGHTS)
            sounds.append(soundfile.read(path)[0].tolist())
        self.assertEqual(sounds[1:], sounds[:1] * 2)

    def test_the_script_never_overwrites_its_decoder(self):
        """Whatever it is called."""
        codes, weights = self.folder / "a.safetensors", self.folder / "a.wav"
        settings.save_codes(codes, mx.zeros((1, 5, 4)), dict(model=str(MODEL)))
        shutil.copy(WEIGHTS / "mbd_tiny.th", weights)
        before, flags = weights.read_bytes(), ("--force", "--decoder", weights)
        with self.assertRaises(SystemExit) as stopped:
            self.decode(codes, weights, *flags)
        self.assertRegex(stopped.exception.code, "it is read as the decoder")
        self.assertEqual(weights.read_bytes(), before)

    def test_what_the_script_refuses(self):
        codes = self.folder / "a.safetensors"
        save = lambda of, **told: settings.save_codes(codes, of, told)  # noqa: E731
        flags = [codes, self.folder / "a.wav", "--decoder", WEIGHTS]
        for of, told, flags, message in (
            (
                mx.zeros((1, 9, 4)),
                dict(model=str(MODEL)),
                [codes, codes],
                "a.safetensors",
            ),
            (mx.zeros((1, 9, 8)), dict(model=str(MODEL)), flags, "in 4 codebooks"),
            (mx.zeros((1, 9, 4)), dict(model=str(MODEL), seed="x"), flags, "seed"),
            (mx.zeros((1, 9, 4)), dict(model="no such model"), flags, "no such model"),
            (mx.zeros((1, 9, 4)), {}, flags, "a.safetensors names no model that made"),
            (mx.full((1, 9, 4), 999), dict(model=str(MODEL)), flags, "from 0 to"),
        ):
            save(of, **told)
            with self.subTest(message), self.assertRaises(SystemExit) as stopped:
                self.decode(*flags)
            self.assertRegex(
                stopped.exception.code, f"^diffusion.py: error: .*{message}"
            )
        self.assertFalse((self.folder / "a.wav").exists())
