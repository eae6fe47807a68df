"""Files of prompts."""

import dataclasses
import hashlib
import json
import shutil
import struct
from pathlib import Path
from unittest.mock import Mock, patch

import mlx.core as mx
import numpy as np
import soundfile
from common import REFERENCE, ScriptTest

import generate
import jobs
import lines
from audio import save_audio
from diffusion_job import Decoder
from job import AudioPrompt, Job, plan
from musicgen import MusicGen
from options import Options


def make(model: MusicGen, planned: list[Job]) -> mx.array:
    """Codes (B, T, K) of jobs that run together."""
    (batch,) = jobs.run(model, planned, len(planned))
    for _ in batch:
        pass
    return batch.codes()


class TestJobs(ScriptTest):
    model = str(REFERENCE / "stereo-audiocraft")
    settings = dict(seed=3, output="out.wav", duration=0.1)

    def lines(self, *lines: str) -> Path:
        path = self.folder / "prompts.txt"
        path.write_text("\n".join(lines) + "\n")
        return path

    def script(self, path: Path, *more: str) -> tuple[int, str, str]:
        arguments = ["--prompts", path, "--output", self.folder / "out.wav"]
        arguments += ["--duration", "0.1", "--seed", "3", "--model", self.model]
        return self.run_script(*arguments, "--dtype", "float32", *more)

    def found(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("*.wav"))

    def contents(self) -> dict[str, str]:
        sounds = {name: self.folder / name for name in self.found()}
        digest = hashlib.sha256
        return {n: digest(p.read_bytes()).hexdigest() for n, p in sounds.items()}

    def test_plain_text(self):
        planned = lines.plan_file(self.lines("drums", "", "  piano "), self.settings)
        told = [(job.prompt, job.seed, str(job.output), job.line) for job in planned]
        self.assertEqual(
            told, [("drums", 3, "out-1.wav", 1), ("piano", 4, "out-2.wav", 3)]
        )

    def test_json_lines(self):
        path = self.lines(
            '{"prompt": "a", "guidance": 2, "top-k": 9, "seed": 8}',
            '{"prompt": "", "output": "b.flac", "duration": 40, "audio_prompt": "s.wav"}',
        )
        first, second = lines.plan_file(path, self.settings)
        self.assertEqual((first.seed, str(first.output)), (8, "out-1.wav"))
        want = Options(duration=0.1, guidance_coef=2, top_k=9)
        self.assertEqual(first.options, want)
        self.assertEqual((second.seed, str(second.output)), (4, "b.flac"))
        self.assertEqual(second.options.duration, 40)
        self.assertEqual(second.audio_prompt, AudioPrompt("s.wav"))

    def test_bad_files(self):
        for lines, pattern in (
            ([], "must hold a prompt"),
            (['{"prompt": "a"}', "[]"], "line 2 must be an object"),
            (['{"prompt": "a"}', "b"], "line 2 is no JSON"),
            (["", '{"prompt": "a", "tempo": 3}'], "line 2 has the unknown key 'tempo'"),
            (['{"seed": 1}'], "line 1 must have a prompt"),
            (
                ['{"prompt": "a", "output": "x.wav"}'] * 2,
                "line 2: its output x.wav is that of line 1",
            ),
            (
                ['{"prompt": "a", "audio_prompt": "b", "prompt_start": "c"}'],
                "line 1: prompt_start must",
            ),
        ):
            with self.subTest(pattern):
                status, out, err = self.script(self.lines(*lines))
                self.assertEqual((status, out), (1, ""))
                self.assertRegex(err, f"^generate.py: error: .*{pattern}.*\n$")
        self.assertEqual(self.script(self.folder / "none")[0], 1)

    def test_outputs_are_called_after_the_file(self):
        path = self.lines("a", "b")
        arguments = ["generate.py", "--prompts", str(path), "--model", self.model]
        args = generate.parse_arguments([*arguments[1:], "--seed", "1"])
        planned = generate.make_jobs(args)
        self.assertEqual(str(planned[1].output), "prompts-2.wav")

    def test_a_first_line_that_fails(self):
        for bad in (
            '"duration": "x"',
            '"duration": 1e999',
            '"duration": true',
            '"extend_stride": "x"',
            '"prompt_start": 1',
            '"audio_prompt": "s.wav", "drop_prompt": "no"',
            f'"output": "{"x" * 300}.wav"',
            '"output": "a\\u0000b.wav"',
            '"loudness": "x"',
        ):
            with self.subTest(bad):
                path = self.lines(f'{{"prompt": "a", {bad}}}', '{"prompt": "b"}')
                status, out, err = self.script(path)
                self.assertEqual(status, 1)
                self.assertRegex(err, r"(?m)^(.*\r)?generate.py: error: .*line 1: .*$")
                self.assertNotIn("Traceback", err)
                self.assertEqual(self.found(), ["out-2.wav"])
                for made in self.folder.glob("*.wav"):
                    made.unlink()

    def test_what_is_json_lines(self):
        array = self.lines('["a"]', '{"prompt": "b"}')
        with self.assertRaisesRegex(ValueError, "line 1 must be an object"):
            lines.plan_file(array, self.settings)
        marked = self.folder / "marked.txt"
        text = '\ufeff{"prompt": "a\u2028b"}\r\n'
        marked.write_bytes(text.encode())
        (job,) = lines.plan_file(marked, self.settings)
        self.assertEqual(job.prompt, "a\u2028b")
        named = self.folder / "x.jsonl"
        named.write_text("plain\n")
        with self.assertRaisesRegex(ValueError, "line 1 is no JSON"):
            lines.plan_file(named, self.settings)

    def test_same_file_by_another_name(self):
        (self.folder / "link").symlink_to(self.folder)
        names = [str(self.folder / name) for name in ("x.wav", "link/x.wav")]
        path = self.lines(*(json.dumps(dict(prompt="a", output=n)) for n in names))
        with self.assertRaisesRegex(ValueError, "is that of line 1, too"):
            lines.plan_file(path, self.settings)

    def test_an_empty_file_is_not_done(self):
        path = self.lines("a", "b")
        (self.folder / "out-1.wav").touch()
        self.script(path)
        self.assertGreater((self.folder / "out-1.wav").stat().st_size, 44)

    def test_share_is_of_all_lines(self):
        class Two:
            def size(self):
                return 2

            def rank(self):
                return 1

        planned = lines.plan_file(self.lines(*"abcde"), self.settings)
        told = [job.prompt for job in jobs.share(planned, Two())]
        self.assertEqual(told, ["b", "d"])

    def test_prompt_that_is_dropped(self):
        path = self.folder / "s.wav"
        save_audio(path, 0.1 * mx.random.normal((1300, 1)), 32000)
        model = MusicGen.from_pretrained(self.model)
        own = dict(self.settings, audio_prompt=str(path))
        whole = plan(["a"], own)
        rest = plan(["a"], own | dict(drop_prompt=True))
        sound = jobs.Sounds(model).audio_prompt(whole[0])
        codes = make(model, whole)
        decoder = Decoder(model, None)
        kept = jobs.decode(model, whole, codes, 3, decoder)
        frames = jobs.frames_of_prompt(model, sound, None)
        self.assertEqual(frames, 3)
        dropped = jobs.decode(model, rest, codes, frames, decoder)
        self.assertSame(dropped, kept[:, 1920:])

    def test_disk_that_fills_up(self):
        info = Mock(frames=8)
        with patch("soundfile.info", return_value=info):
            with self.assertRaisesRegex(OSError, "the disk is full"):
                save_audio(self.folder / "x.wav", mx.zeros((9, 1)), 32000)
        self.assertEqual(list(self.folder.iterdir()), [])

    def test_a_line_that_fails_leaves_the_others_alone(self):
        path = self.lines(
            '{"prompt": "a"}',
            '{"prompt": "b", "duration": -1}',
            '{"prompt": "c", "seed": "x"}',
            '{"prompt": "d", "audio_prompt": "none.wav"}',
            '{"prompt": 5}',
            '{"prompt": "f", "extend_stride": "x"}',
            '{"prompt": "g"}',
        )
        status, out, err = self.script(path)
        self.assertEqual(status, 1)
        self.assertEqual(self.found(), ["out-1.wav", "out-7.wav"])
        reports = [line for line in err.splitlines() if ": error: " in line]
        self.assertEqual(len(reports), 5)
        for number, report in zip((2, 3, 4, 5, 6), reports):
            self.assertIn(f"line {number}: ", report)

    def test_resumes(self):
        path = self.lines("drums", "piano", "guitar")
        self.script(path)
        whole = self.contents()
        self.assertEqual(len(whole), 3)
        (self.folder / "out-2.wav").unlink()
        kept = (self.folder / "out-1.wav").stat().st_mtime_ns
        status, out, _ = self.script(path)
        self.assertEqual((status, out.count("\n")), (0, 1))
        if mx.default_device() == mx.cpu:  # a GPU rounds otherwise in a batch
            self.assertEqual(self.contents(), whole)
        self.assertEqual(self.found(), sorted(whole))
        self.assertEqual((self.folder / "out-1.wav").stat().st_mtime_ns, kept)
        status, out, _ = self.script(path)
        self.assertEqual((status, out), (0, "Nothing is left to make.\n"))

    def test_file_appears_whole_or_not_at_all(self):
        write, seen = soundfile.SoundFile.write, []

        def spy(file, data):
            write(file, data)
            seen.append((self.folder / "x.wav").exists())
            raise KeyboardInterrupt

        with patch.object(soundfile.SoundFile, "write", spy):
            with self.assertRaises(KeyboardInterrupt):
                save_audio(self.folder / "x.wav", mx.zeros((9, 1)), 32000)
        self.assertEqual((seen, list(self.folder.iterdir())), ([False], []))

    def test_folder_that_vanishes(self):
        folder = self.folder / "there"
        folder.mkdir()
        path = self.lines(
            '{"prompt": "a"}', json.dumps(dict(prompt="b", output=f"{folder}/b.wav"))
        )
        make_take = jobs.make_take

        def vanish(*arguments):
            shutil.rmtree(folder, ignore_errors=True)
            return make_take(*arguments)

        with patch("jobs.make_take", vanish):
            status, _, err = self.script(path)
        self.assertEqual((status, self.found()), (1, ["out-1.wav"]))
        self.assertRegex(err, "line 2: The folder .*there of b.wav must exist")

    def test_batches(self):
        path = self.lines(*(f'{{"prompt": "a", "temp": {t}}}' for t in (1, 1, 1, 2, 1)))
        planned = lines.plan_file(path, self.settings)
        sizes = [len(batch) for batch in jobs.batches(planned, lambda job: 2)]
        self.assertEqual(sizes, [2, 1, 1, 1])
        sound = [AudioPrompt(name) for name in ("a.wav", "b.wav", "b.wav")]
        own = [dataclasses.replace(planned[0], audio_prompt=each) for each in sound]
        sizes = [len(batch) for batch in jobs.batches(own, lambda job: 3)]
        self.assertEqual(sizes, [1, 2])

    def test_batch_is_what_memory_holds_for_its_own_length(self):
        path = self.lines(
            '{"prompt": "a", "duration": 0.1}',
            *['{"prompt": "b", "duration": 0.5}'] * 4,
        )
        model, sizes = MusicGen.from_pretrained(self.model), []
        own = dict(self.settings, output=str(self.folder / "x.wav"))

        make_take = jobs.make_take

        def count(model, batch, *rest):
            sizes.append(len(batch))
            return make_take(model, batch, *rest)

        def run(size: int) -> None:
            for batch in jobs.run(model, lines.plan_file(path, own), size):
                for _ in batch:
                    pass
                self.assertTrue(all(result.error is None for result in batch.save()))

        fit = lambda model, options: round(1 / options.duration)  # noqa: E731
        with patch.object(MusicGen, "rows_that_fit", fit):
            with patch("jobs.make_take", count), patch("jobs.save"):
                run(8)
                self.assertEqual(sizes, [1, 2, 2])
                run(1)
                self.assertEqual(sizes[3:], [1] * 5)

    def test_batch_that_does_not_fit_after_all(self):
        model = MusicGen.from_pretrained(self.model)
        planned = plan(["a", "b", "c"], self.settings)
        whole, tried = make(model, planned), []
        steps, forward = MusicGen.steps, MusicGen.make_forward

        def count(model, prompts, **options):
            tried.append(len(prompts))
            return steps(model, prompts, **options)

        def out_of_memory(model, text, copies, length):
            run = forward(model, text, copies, length)

            def fail(tokens):
                if len(tokens) > 1:
                    raise RuntimeError("[malloc] Unable to allocate")
                return run(tokens)

            fail.rewind = run.rewind
            return fail

        with patch.object(MusicGen, "steps", count):
            with patch.object(MusicGen, "make_forward", out_of_memory):
                self.assertSame(make(model, planned), whole)
        self.assertEqual(tried, [3, 1, 2, 1, 1])

    def test_left_early(self):
        model = MusicGen.from_pretrained(self.model)
        own = dict(self.settings, duration=0.4, output=str(self.folder / "x.wav"))
        planned = plan(["a", "b"], own | dict(peak=-1.0, force=True))
        whole = make(model, planned)
        for stop, frames in ((3, 0), (4, 1), (20, 17)):
            (batch,) = jobs.run(model, planned, 8)
            for take in batch:
                if take.step == stop:
                    break
            self.assertSame(batch.codes(), whole[:, :frames])
            results = list(batch.save())
            self.assertEqual(len(results), 2 if frames else 0)
            for result in results:
                self.assertAlmostEqual(result.seconds, frames / 50)
                self.assertEqual(soundfile.info(result.job.output).frames, frames * 640)

    def test_part_of_the_audio_prompt(self):
        model = MusicGen.from_pretrained(self.model)
        path = self.folder / "ramp.wav"
        ramp = np.linspace(0, 0.5, 3200)
        soundfile.write(path, ramp, 32000, subtype="FLOAT")

        def load(*prompt) -> mx.array:
            (job,) = plan(["a"], self.settings)
            prompt = AudioPrompt(str(path), *prompt)
            job = dataclasses.replace(job, audio_prompt=prompt)
            return jobs.Sounds(model).audio_prompt(job)

        part = load(0.02, 0.05)
        self.assertClose(part[:, 1], mx.array(ramp)[640:2240], 1e-6)
        for prompt, pattern in (
            ((0.1,), "prompt_start must"),
            ((-1.0,), "prompt_start must"),
            ((0.0, 0.0), "prompt_length must"),
        ):
            with self.assertRaisesRegex(ValueError, pattern):
                load(*prompt)

    def test_no_more_of_an_audio_prompt_is_read_than_needed(self):
        path, read = self.folder / "long.wav", soundfile.SoundFile.read
        soundfile.write(path, 0.1 * np.ones(44100 * 60), 44100)
        lines = [
            dict(prompt="a", prompt_start=50, prompt_length=0.05, duration=0.1),
            dict(prompt="a", prompt_start=59.98, duration=0.1),
            dict(prompt="a", duration=0.1),
        ]
        lines = [json.dumps(line | {"audio_prompt": str(path)}) for line in lines]
        sizes = []

        def spy(file, frames=-1, **options):
            block = read(file, frames, **options)
            sizes.append(len(block))
            return block

        with patch.object(soundfile.SoundFile, "read", spy):
            status, _, err = self.script(self.lines(*lines))
        self.assertEqual(status, 1)
        self.assertIn("line 3: The audio prompt is 60 s long, but a duration of", err)
        self.assertEqual(err.count("line "), 1)
        self.assertLess(sum(sizes), 0.5 * 44100)

    def test_one_bad_sound_file_leaves_the_others_alone(self):
        """Whatever is wrong with it, in a file of prompts."""
        good = self.folder / "good.wav"
        soundfile.write(good, 0.1 * np.ones(2000), 32000)
        content, lines = bytearray(good.read_bytes()), []
        for i, rate in enumerate((0, 1, 2**31 - 1)):
            content[24:28] = struct.pack("<I", rate)
            (self.folder / f"{i}.wav").write_bytes(content)
        (self.folder / "x.raw").write_bytes(bytes(999))
        (self.folder / "none.m4a").write_bytes(b"\0\0\0\x10ftypM4A ")
        for name in ("0.wav", "1.wav", "2.wav", "x.raw", "none.m4a", "good.wav"):
            told = dict(prompt="a", audio_prompt=str(self.folder / name), duration=0.1)
            lines.append(json.dumps(told))
        status, out, err = self.script(self.lines(*lines))
        self.assertEqual(status, 1)
        for number in range(1, 6):
            self.assertEqual(err.count(f"line {number}: "), 1, err)
        self.assertNotIn("line 6", err)
        self.assertNotIn("Traceback", err)

    def test_wrong_command_lines(self):
        for arguments, pattern in (
            ([], "a prompt must be given"),
            (["-p", "a", "--prompts", "b"], "must not be given together"),
            (["-p", "a", "--takes", "0"], "takes must be from 1"),
            (["-p", "a", "--takes", "1000000000"], "takes must be from 1"),
            (["-p", "a", "--batch-size", "0"], "batch_size must be from 1"),
            (["--prompts", "b", "--takes", "2"], "--takes goes with --prompt"),
            (["-p", "a", "--drop-prompt"], "need an audio_prompt"),
            (["-p", "a", "--prompt-start", "0"], "need an audio_prompt"),
            (["-p", "a", "--prompt-start", "inf"], "prompt_start must"),
            (["-p", "a", "--prompt-length", "nan"], "prompt_length must"),
            (["-p", "a", "--extend-stride", "0"], "extend_stride must"),
        ):
            with self.subTest(pattern):
                status, out, err = self.run_script(*arguments, "--model", self.model)
                self.assertEqual((status, out), (2, ""))
                self.assertRegex(err, f"^generate.py: error: .*{pattern}.*\n$")
