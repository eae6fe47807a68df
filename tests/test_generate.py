"""generate.py's command line."""

import json
import os
import re
import signal
import subprocess
import sys
import warnings
from unittest.mock import Mock, patch

import mlx.core as mx
import soundfile
from common import REFERENCE, ROOT, ScriptTest

import generate
import jobs
import loudness as loudness_script
import settings
from audio import save_audio
from endings import FADE, fade
from job import make_job
from musicgen import MusicGen
from options import STYLE_OPTIONS
from resample import true_peak

# Runs generate.py, and then names what was imported.
LISTING = """
import atexit, runpy, sys
atexit.register(lambda: print(*sys.modules))
runpy.run_path("generate.py", run_name="__main__")
"""


class TestCommandLine(ScriptTest):
    model = str(REFERENCE / "stereo-audiocraft")

    def test_end_to_end(self):
        output = self.folder / "music.wav"
        command = [sys.executable, "generate.py", "-p", "drums", "--model", self.model]
        command += ["--duration", "0.5", "--seed", "4", "--output", str(output)]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertRegex(
            result.stdout, r'^.*music.wav: 0.50 s of audio in .* seed 4, "drums"\n$'
        )
        audio, rate = soundfile.read(output)
        self.assertEqual((audio.shape, rate), ((16000, 2), 32000))
        model = MusicGen.from_pretrained(self.model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            faded = fade(
                model.generate("drums", duration=0.5, seed=4)[0], 32000, 0, FADE
            )
            save_audio(self.folder / "same.wav", faded, 32000)
        same, _ = soundfile.read(self.folder / "same.wav")
        self.assertSame(audio, same)
        told = settings.read_settings(output)
        wanted = dict(prompt="drums", seed=4, duration=0.5, model=self.model, top_k=250)
        self.assertEqual({name: told[name] for name in wanted}, wanted)

    def test_a_folder_needs_no_library_of_the_hub(self):
        """Which takes a quarter of the start, where everything is here already."""
        slow = {"huggingface_hub", "tqdm", "requests", "httpx", "urllib.request"}
        slow |= {"torch", "transformers", "unittest", "asyncio"}
        output = self.folder / "x.wav"
        command = [sys.executable, "-c", LISTING, "--prompt", "bell", "--model", "tiny"]
        command += ["--duration", "0.1", "--output", str(output)]
        for more in ([], ["--stream", "--force"], ["--takes", "2"]):
            options = dict(cwd=ROOT, capture_output=True, text=True)
            result = subprocess.run(command + more, **options)
            self.assertEqual((result.returncode, result.stderr), (0, ""))
            *lines, modules = result.stdout.splitlines()
            self.assertIn(" s of audio in ", lines[-1])
            self.assertIn("musicgen", modules.split())
            self.assertEqual(slow & {*modules.split()}, set())

    def test_flags_reach_the_model(self):
        output = self.folder / "out.wav"
        flags = "--duration 0.1 --temp 0.5 --top-k 9 --top-p 0.7 --guidance-coef 2"
        arguments = ["-p", "a", "--output", output, "--force", "--model", self.model]
        seeds = []

        sound = self.folder / "sound.wav"
        save_audio(sound, 0.1 * mx.random.normal((3200, 1)), 16000)
        flags += " --negative-prompt b --extend-stride 7 --prompt-start 0.1"
        flags += " --prompt-length 0.05 --takes 2"
        arguments += ["--audio-prompt", sound]

        make = MusicGen.steps

        def steps(model, prompts, seed, **options):
            take = make(model, prompts, seed=seed, **options)
            seeds.append(seed[0])
            self.assertEqual(seed[1], seed[0] + 1)
            self.assertEqual(model.decoder.dtype, mx.bfloat16)
            self.assertEqual(options.pop("audio_prompt").shape, (1600, 2))
            want = dict(
                melody=None,
                separate=False,
                temp=0.5,
                top_k=9,
                top_p=0.7,
                guidance_coef=2,
            )
            want |= dict(negative_prompt="b", extend_stride=7, batch_size=2)
            want |= dict(duration=0.1, codes_prompt=None, style=None)
            want |= dict.fromkeys(STYLE_OPTIONS)
            self.assertEqual((prompts, options), (["a", "a"], want))
            return take

        arguments += flags.split() + ["--dtype", "bfloat16"]
        with patch.object(MusicGen, "steps", steps):
            for _ in range(2):
                status, _, err = self.run_script(*arguments)
                self.assertEqual(status, 0, err)
        self.assertNotEqual(*seeds)

    def test_stopped_at_the_first_step(self):
        codes, sound = (self.folder / name for name in ("x.safetensors", "x.wav"))
        flags = ["-p", "a", "--model", self.model, "--output", sound]
        flags += ["--duration", "0.5", "--save-codes", codes]
        for more, files in (([], []), (["--stream"], [sound])):
            with patch("generate.Stop", lambda: Mock(return_value=True, heeded=True)):
                status, out, err = self.run_script(*flags, *more)
            self.assertEqual(status, 130, err)
            self.assertIn("stopped before anything was made.", err)
            self.assertEqual([*self.folder.iterdir()], files)
        self.assertEqual(soundfile.info(sound).frames, 0)

    def test_stopped_between_takes(self):
        sound = self.folder / "sound.wav"
        save_audio(sound, 0.1 * mx.random.normal((6400, 2)), 32000)
        flags = ["-p", "a", "--model", self.model, "--audio-prompt", sound]
        flags += ["--output", self.folder / "x.wav", "--force", "--duration", "0.5"]
        flags += ["--takes", "3", "--batch-size", "1"]
        # asked before a take and after each of its 18 steps but the last
        for last, seconds in ((18, [0.5]), (23, [0.5, 0.24])):
            pressed = [False] * last + [True] * 99
            stop = Mock(side_effect=pressed, heeded=True)
            with patch("generate.Stop", lambda: stop):
                status, out, err = self.run_script(*flags)
            self.assertEqual((status, out.count("s of audio")), (130, len(seconds)))
            self.assertRegex(err, r"generate.py: stopped\.\n$")
            made = sorted(self.folder.glob("x-*.wav"))
            self.assertEqual([soundfile.info(p).duration for p in made], seconds)

    def test_after_the_last_step_no_stop_is_asked_for(self):
        flags = ["-p", "a", "--model", self.model, "--duration", "0.2"]
        flags += ["--output", self.folder / "x.wav", "--force"]
        for more, asked in (([], 1 + 12), (["--stream"], 12)):
            stop = Mock(return_value=False, heeded=False)
            with patch("generate.Stop", lambda: stop):
                self.assertEqual(self.run_script(*flags, *more)[0], 0)
            self.assertEqual(stop.call_count, asked)

    def test_ctrl_c_ends_it_at_once_until_codes_are_made(self):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sound, gone_on = self.folder / "tune.wav", []
        save_audio(sound, 0.1 * mx.random.normal((32000, 1)), 32000)
        flags = ["-p", "a", "--model", REFERENCE / "melody-audiocraft"]
        flags += ["--melody", sound, "--output", self.folder / "x.wav"]

        def hear(*_):  # Demucs takes its time
            signal.raise_signal(signal.SIGINT)
            gone_on.append(True)

        with patch("melody.MelodyConditioner.prepare", hear):
            for more in ([], ["--stream"], ["--save-melody", self.folder / "m.wav"]):
                self.assertEqual(self.run_script(*flags, *more)[0], 130)
        self.assertEqual((gone_on, [*self.folder.iterdir()]), ([], [sound]))

    def test_warnings_take_one_line(self):
        loud = mx.full((1, 640, 2), 3.0)
        with patch.object(MusicGen, "decode", return_value=loud):
            output = ["--output", self.folder / "out.wav", "--duration", "0.02"]
            _, _, err = self.run_script("-p", "a", "--model", self.model, *output)
        self.assertRegex(err, r"(?m)^(.*\r)?generate.py: warning: .*scaled down.*$")

    def test_what_is_told_before_a_model_is_fetched(self):
        sound, damaged = self.folder / "s.wav", self.folder / "a.safetensors"
        save_audio(sound, mx.full((32000, 1), 0.1), 32000)
        damaged.write_bytes(b"noise")
        flags = ["-p", "a", "--output", self.folder / "x.wav", "--model"]
        for more, pattern in (
            (["small", "--melody", sound], "--melody needs a model that follows one"),
            (["melody", "--style", sound], "--style needs a model that follows one"),
            (["facebook/musicgen-large", "--style", sound], "--style needs a model"),
            (["small", "--adapter", damaged], "is damaged or no adapter"),
            (["small", "--adapter", self.folder / "no"], "There is no adapter"),
        ):
            with patch(
                "huggingface_hub.hf_hub_download", side_effect=AssertionError
            ) as fetch:
                status, out, err = self.run_script(*flags, *more)
            self.assertIn(status, (1, 2))
            self.assertRegex(err, f"^generate.py: error: .*{pattern}.*\n$")
            fetch.assert_not_called()

    def test_candidates_that_are_all_the_same(self):
        sound = self.folder / "s.wav"
        save_audio(sound, 0.1 * mx.random.normal((16000, 2)), 32000)
        flags = ["--regenerate", "0.1:0.2", sound, "-p", "a", "--model", self.model]
        flags += ["--output", self.folder / "x.wav"]
        for more in (["--temp", "0"], ["--top-k", "1", "--candidates", "2"]):
            status, _, err = self.run_script(*flags, *more)
            self.assertEqual(status, 1)
            self.assertRegex(err, "^generate.py: error: .* give --candidates 1.\n$")
        status, _, err = self.run_script(*flags, "--temp", "0", "--candidates", "1")
        self.assertEqual(status, 0, err)

    def test_ctrl_c_during_the_imports(self):
        """Is no traceback, in any script that people run."""
        numpy = self.folder / "numpy.py"  # comes before the one that is installed
        numpy.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
        environment = os.environ | {"PYTHONPATH": str(self.folder)}
        for script in ("generate.py", "convert.py", "train.py"):
            result = subprocess.run(
                [sys.executable, str(ROOT / script), "--help"],
                env=environment,
                capture_output=True,
                text=True,
            )
            told = (result.returncode, result.stdout, result.stderr)
            self.assertEqual(told, (-signal.SIGINT, "", ""))

    def test_interrupt(self):
        with patch("generate.run", side_effect=KeyboardInterrupt):
            self.assertEqual(self.run_script("-p", "a", "--model", self.model)[0], 130)

    def test_wrong_command_lines(self):
        good = ["--prompt", "a", "--output", self.folder / "out.wav"]
        for bad, pattern in (
            (["--duration", "0"], "duration must"),
            (["--duration", "-3"], "duration must"),
            (["--duration", "nan"], "duration must"),
            (["--duration", "0.001"], "duration must be at least a frame"),
            (["--duration", "x"], "duration/-d: invalid"),
            (["--top-k", "0"], "top_k must"),
            (["--top-k", "2049"], "top_k must"),
            (["--top-p", "1.5"], "top_p must"),
            (["--top-p", "-1"], "top_p must"),
            (["--temp", "-1"], "temp must"),
            (["--guidance-coef", "nan"], "guidance_coef must"),
            (["--seed", "-1"], "seed must"),
            (["--dtype", "int8"], "invalid choice"),
            (["--nonsense"], "unrecognized"),
            (["--model", "smal"], "must be one of small"),
            (["--model", "sm\nal"], "must be one of small"),
            (["--model", ""], "must be one of small"),
            (["--model", "a" * 300], "must be one of small"),
            (["--output", "out.xyz"], "must end in one of"),
        ):
            with self.subTest(bad):
                status, out, err = self.run_script(*good, *bad)
                self.assertEqual((status, out), (2, ""))
                self.assertRegex(err, rf"^generate.py: error: .*{pattern}.*\n$")
        self.assertEqual(self.run_script()[0], 2)

    def test_what_else_goes_wrong(self):
        empty = self.folder / "empty"
        empty.mkdir()
        damaged = self.copy("stereo-audiocraft")
        (damaged / "state_dict.bin").write_bytes(b"PK\x03\x04 and nothing more")
        for arguments, pattern in (
            (["--output", self.folder / "no/out.wav"], "must exist"),
            (["--output", empty / ".wav" / "x.wav"], "must exist"),
            (["--model", empty], "must hold state_dict.bin"),
            (["--model", damaged], "state_dict.bin is not a checkpoint"),
        ):
            with self.subTest(pattern):
                output = ["--output", self.folder / "out.wav", "--prompt", "a"]
                status, out, err = self.run_script(*output, *arguments)
                self.assertEqual((status, out), (1, ""))
                self.assertRegex(err, rf"^generate.py: error: .*{pattern}.*\n$")
        self.assertFalse((self.folder / "out.wav").exists())

    def test_help_names_every_unit(self):
        status, out, _ = self.run_script("--help")
        self.assertEqual(status, 0)
        for flag in (
            "--prompt",
            "--model",
            "--duration",
            "--temp",
            "--top-k",
            "--top-p",
            "--guidance-coef",
            "--seed",
            "--output",
            "--dtype",
        ):
            self.assertIn(flag, out)
        self.assertIn("seconds", out)

    def test_level(self):
        output = self.folder / "out.wav"
        arguments = ["-p", "a", "--model", self.model, "--duration", "1"]
        arguments += ["--output", output, "--force"]
        self.run_script(*arguments, "--loudness", "-30")
        audio, rate = soundfile.read(output)
        got = loudness_script.integrated_loudness(audio, rate)
        self.assertAlmostEqual(got, -30, delta=0.05)
        self.run_script(*arguments, "--peak", "-6")
        audio, _ = soundfile.read(output)
        self.assertAlmostEqual(true_peak(audio), 10 ** (-6 / 20), 3)
        for bad, pattern in (
            (["--loudness", "3"], "loudness must"),
            (["--peak", "nan"], "peak must"),
            (["--peak", "-1", "--loudness", "-14"], "together"),
        ):
            status, _, err = self.run_script(*arguments, *bad)
            self.assertEqual(status, 2)
            self.assertRegex(err, f"^generate.py: error: .*{pattern}.*\n$")

    def test_bit_rate(self):
        lines = self.folder / "lines.jsonl"
        arguments = ["--model", self.model, "--duration", "2"]
        flags = [*arguments, "-p", "a", "--output"]
        for kbit in (320, 64):
            path = self.folder / f"{kbit}.mp3"
            self.assertEqual(self.run_script(*flags, path, "--mp3-bitrate", kbit)[0], 0)
            self.assertAlmostEqual(path.stat().st_size / 250 / kbit, 1, delta=0.1)
            self.assertEqual(settings.read_settings(path)["mp3_bitrate"], kbit)
        again = ["--again", path, "--output", self.folder / "x.flac"]
        self.assertEqual(self.run_script(*again)[0], 0)
        told = [dict(prompt="a", output=str(self.folder / "y.mp3"), mp3_bitrate=64)]
        told += [told[0] | dict(output=str(self.folder / "y.wav"))]
        lines.write_text("\n".join(map(json.dumps, told)))
        _, _, err = self.run_script(*arguments, "--prompts", lines)
        self.assertEqual(err.count("line "), 1, err)
        self.assertIn("line 2: mp3_bitrate must go with an .mp3", err)
        size = (self.folder / "y.mp3").stat().st_size
        self.assertAlmostEqual(size / 250 / 64, 1, delta=0.1)
        for bad, pattern in (
            (["--mp3-bitrate", "7"], "from 8 to 320"),
            (["--mp3-bitrate", "64", "--output", "x.ogg"], "go with an .mp3"),
            (
                ["--mp3-bitrate", "64", "--stream", "--output", "x.wav"],
                "leave out --stream",
            ),
        ):
            status, _, err = self.run_script(*flags, self.folder / "z.mp3", *bad)
            self.assertEqual(status, 2)
            self.assertRegex(err, f"^generate.py: error: .*{pattern}.*\n$")

    def test_report(self):
        job = make_job(dict(prompt="a", seed=4, output="out.wav"))
        for batch, told in (
            (1, "8.00 s of audio in 4.0 s, 2.00 times real time, seed 4"),
            (3, "8.00 s of audio in 4.0 s (3 at once), 6.00 times"),
        ):
            line = generate.describe(jobs.Result(job, None, 8.0, 4.0, batch))
            self.assertRegex(line, f"^out.wav: {re.escape(told)}")

    def test_takes_are_numbered(self):
        arguments = ["-p", "drums", "-p", "piano", "--takes", "2", "--seed", "5"]
        arguments += ["--output", self.folder / "out.flac"]
        common = ["--duration", "0.1", "--dtype", "float32", "--model", self.model]
        status, out, err = self.run_script(*arguments, *common)
        self.assertEqual(status, 0, err)
        names = [f"out-{i}.flac" for i in range(1, 5)]
        self.assertEqual(sorted(p.name for p in self.folder.iterdir()), names)
        self.assertEqual(out.count("\n"), 4)
        alone = ["-p", "piano", "--seed", "8"]
        self.run_script(*alone, "--output", self.folder / "alone.flac", *common)
        same = [self.folder / name for name in ("out-4.flac", "alone.flac")]
        sounds = [mx.array(soundfile.read(path)[0]) for path in same]
        self.assertClose(*sounds, 1e-4)  # a GPU rounds otherwise in a batch
