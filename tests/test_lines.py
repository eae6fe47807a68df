"""Files of prompts: what is made, made again or left, and lines that cannot be made."""

import json
import os
import time
from contextlib import chdir
from pathlib import Path
from unittest.mock import patch

import mlx.core as mx
import soundfile
from common import REFERENCE, ScriptTest, slow

import arguments
import lines
from audio import save_audio
from job import make_job


class TestLines(ScriptTest):
    model = str(REFERENCE / "stereo-audiocraft")

    def setUp(self):
        super().setUp()
        self.enterContext(chdir(self.folder))

    def script(self, *more: str) -> tuple[int, str, str]:
        flags = ["--prompts", "p.jsonl", "--output", "x.wav", "--duration", "0.1"]
        return self.run_script(*flags, "--model", self.model, *more)

    def write(self, *settings: dict) -> None:
        text = "".join(json.dumps(dict(prompt="a") | line) + "\n" for line in settings)
        Path("p.jsonl").write_text(text)

    def stamps(self) -> dict[str, int]:
        return {p.name: p.stat().st_mtime_ns for p in Path().glob("*.wav")}

    def test_what_is_made_again(self):
        """What other settings were asked of, and nothing else, whatever the seed."""
        save_audio("s.wav", mx.full((1300, 1), 0.1), 32000)
        first = [{}, {"prompt": "b"}, {"audio_prompt": "s.wav"}, {"seed": 5}]
        self.write(*first)
        self.assertEqual(self.script()[0], 0)
        before = self.stamps()
        for change, flags, again, why in (
            ([{}, {}, {}, {}], [], [], ""),
            ([{}, {"temp": 0.5}, {}, {}], [], [2], "temp was 1.0 and is 0.5"),
            ([{}, {}, {}, {"seed": 6}], [], [2, 4], "seed was 5 and is 6"),
            ([{}, {}, {}, {"seed": 6}], [], [], ""),
            (
                [{}, {}, {"prompt_start": 0.01}, {"seed": 6}],
                [],
                [3],
                "prompt_start was",
            ),
            ([{}] * 3 + [{"seed": 6}], ["--dtype", "bfloat16"], [1, 2, 3, 4], "dtype"),
            ([{}] * 3 + [{"seed": 6}], ["--force"], [1, 2, 3, 4], ""),
            ([{"loudness": None}] + [{}] * 2 + [{"seed": 6}], [], [], ""),
        ):
            with self.subTest(change=change, flags=flags):
                self.write(*(a | b for a, b in zip(first, change)))
                status, out, err = self.script(*flags)
                self.assertEqual(status, 0, err)
                changed = [f"x-{number}.wav" for number in again]
                after = self.stamps()
                found = [name for name in after if after[name] != before[name]]
                self.assertEqual(sorted(found), changed)
                self.assertEqual(out.count(" times real time"), len(again))
                self.assertIn(why, err)
                told = 0 if "--force" in flags else 4 - len(again)
                self.assertEqual(err.count("skipped"), told, err)
                before = after

    def test_what_holds_no_settings_is_left(self):
        self.write({}, {})
        save_audio("x-1.wav", mx.full((1300, 1), 0.1), 32000)
        before = Path("x-1.wav").read_bytes()
        status, out, err = self.script()
        self.assertEqual((status, Path("x-1.wav").read_bytes()), (0, before), err)
        self.assertRegex(
            err, "skipped x-1.wav, .* was not made by generate.py: --force"
        )
        self.assertTrue(Path("x-2.wav").exists())
        self.script("--force")
        self.assertNotEqual(Path("x-1.wav").read_bytes(), before)

    def test_a_folder_is_no_output(self):
        os.mkdir("x-1.wav")
        self.write({}, {})
        for flags in ([], ["--force"]):
            status, out, err = self.script(*flags)
            self.assertEqual(status, 1)
            self.assertRegex(err, "line 1: x-1.wav is no ordinary file")
            self.assertTrue(soundfile.info("x-2.wav").frames)

    def test_values_that_cannot_be(self):
        """Each takes one line, and the last line of the file is made."""
        bad = [
            *({"audio_prompt": value} for value in (False, 0, 7, [], {}, ["a"])),
            *({"melody": value} for value in (True, 1, {})),
            *({"output": value} for value in (3, [], "")),
            *({"style": [1]}, {"prompt": None}, {"subtype": []}, {"subtype": 3}),
            *({"duration": "1"}, {"temp": {}}, {"seed": 1.5}),
            *({"peak": "x"}, {"top_k": [1]}, {"output": "a\0.wav"}, {"output": "/"}),
            {"no_separate": 3, "melody": "a"},
        ]
        self.write(*bad, {})
        status, out, err = self.script()
        self.assertEqual((status, out.count(" times real time")), (1, 1))
        errors = [line for line in err.split("\n") if ": error: " in line]
        self.assertEqual(len(errors), len(bad), err)
        for number, error in enumerate(errors, 1):
            self.assertIn(f"p.jsonl, line {number}: ", error)
        self.assertTrue(Path(f"x-{len(bad) + 1}.wav").exists())
        self.assertNotIn("Traceback", err)

    def test_what_a_line_reads_is_not_its_output(self):
        save_audio("s.wav", mx.full((1300, 1), 0.1), 32000)
        before = Path("s.wav").read_bytes()
        os.symlink("s.wav", "link.wav")
        reads = [{name: "s.wav"} for name in ("audio_prompt", "melody", "style")]
        self.write(*(line | {"output": "link.wav"} for line in reads[:1]), *reads, {})
        status, _, err = self.script("--force")
        self.assertEqual((status, Path("s.wav").read_bytes()), (1, before))
        self.assertIn("line 1: its output link.wav is what line 4 reads", err)
        self.assertTrue(Path("x-2.wav").exists() and Path("x-5.wav").exists())

    def test_what_another_line_reads_is_not_overwritten(self):
        save_audio("a.wav", mx.full((1300, 1), 0.1), 32000)
        before = Path("a.wav").read_bytes()
        self.write({"audio_prompt": "a.wav"}, {"output": "a.wav"}, {})
        status, _, err = self.script("--force")
        self.assertEqual((status, Path("a.wav").read_bytes()), (1, before))
        self.assertIn("line 2: its output a.wav is what line 1 reads", err)
        self.assertTrue(Path("x-1.wav").exists() and Path("x-3.wav").exists())

    def test_a_line_goes_on_from_another(self):
        """What is made already may be read: nothing is overwritten."""
        self.write({"output": "a.wav"}, {"audio_prompt": "a.wav", "duration": 0.2})
        self.assertEqual(self.script()[0], 1)  # a.wav is not there yet
        status, _, err = self.script()
        self.assertEqual((status, Path("x-2.wav").exists()), (0, True), err)

    def test_what_the_model_takes_where_nothing_is_given(self):
        """Its own duration and bits, which its config tells before it is loaded."""
        for model, seconds in (
            ("small", 8.0),
            ("facebook/musicgen-large", 8.0),
            ("audiogen-medium", 5.0),
        ):
            own = {"duration": seconds, "q_bits": None}
            self.assertEqual(lines.own_settings(model), own)
        self.assertEqual(lines.own_settings("someone/model"), {})
        folder = str(REFERENCE / "mono-transformers")
        own = {"duration": 8.0, "q_bits": None}
        self.assertEqual(lines.own_settings(folder), own)
        for before, more, why in (
            ({"duration": 5.0}, {}, ["duration was 5.0 and is 8.0"]),
            ({"duration": 8.0, "q_bits": 4}, {}, ["q_bits was 4 and is None"]),
            ({"duration": 8.0}, {"q_bits": 4}, ["q_bits was None and is 4"]),
            ({"duration": 8.0}, {}, []),
        ):
            job = make_job({"prompt": "a", "seed": 0, "output": "x.wav"})
            record = job.record() | {"model": folder} | before
            given = {"model": folder} | more
            self.assertEqual(lines.differences(job, given, own, record), why)
        given, own = {"model": "someone/model"}, {}  # of which nothing is known
        for seconds, why in ((5.0, []), (30.0, ["duration was 30.0 and is None"])):
            record = job.record() | given | {"duration": seconds}
            self.assertEqual(lines.differences(job, given, own, record), why)

    def test_home_folder(self):
        save_audio("a.wav", mx.full((1300, 1), 0.1), 32000)
        self.write({"audio_prompt": "~/a.wav"}, {"audio_prompt": "~/b.wav"})
        with patch.dict(os.environ, HOME=os.getcwd()):
            _, _, err = self.script()
        self.assertTrue(Path("x-1.wav").exists(), err)
        self.assertIn(f"There is no sound file {os.getcwd()}/b.wav", err)

    def test_what_is_no_file_of_prompts(self):
        os.mkdir("folder")
        Path("p.jsonl").write_text('{"prompt": "a"}\n{"prompt": a}\n')
        for name, why in (
            ("no.txt", "no.txt cannot be read: No such file or directory."),
            ("folder", "folder cannot be read: Is a directory."),
            ("in.wav", "--prompts must be a text file, got in.wav"),
            ("p.jsonl", "p.jsonl, line 2 is no JSON: Expecting value at character 12."),
        ):
            err = self.run_script("--prompts", name, "--model", self.model)[2]
            self.assertEqual(err, f"generate.py: error: {why}\n")

    def test_names_that_differ_in_case(self):
        self.write({"output": "Song.wav"}, {"output": "song.wav"})
        with patch("outputs.ignores_case", return_value=True):
            status, _, err = self.script()
            self.assertEqual(status, 1)
            self.assertIn("its output song.wav is that of line 1, too", err)
        self.assertEqual(self.script()[0], 0)

    def test_models_that_follow_nothing_are_told_before_loading(self):
        save_audio("s.wav", mx.full((1300, 1), 0.1), 32000)
        self.write({"melody": "s.wav"}, {"style": "s.wav"})
        with patch("huggingface_hub.hf_hub_download", side_effect=AssertionError):
            for model in ("small", "facebook/musicgen-large"):
                status, _, err = self.script("--model", model)
                self.assertEqual(status, 1)
                for number, kind in ((1, "melody"), (2, "style")):
                    self.assertIn(f"line {number}: {kind} needs a model that", err)

    def test_seeds_of_the_best_of_many(self):
        """No two lines share a seed, and files in which no line tells stay the same."""
        values = dict(seed=3, output="x.wav")
        for own, of_all, seeds in (
            ([{}, {}, {}], None, [3, 4, 5]),
            ([{}, {}, {}], 4, [3, 7, 11]),
            ([{"best_of": 3}, {}, {"best_of": 2}, {}], None, [3, 6, 7, 9]),
            ([{}, {"best_of": 2}, {}], 4, [3, 7, 9]),
            ([{"best_of": 99}, {"seed": 1}, {}], None, [0, 1, 5]),
        ):
            self.write(*own)
            planned = lines.plan_file(Path("p.jsonl"), values | dict(best_of=of_all))
            told = [0 if job.fault else job.seed for job in planned]
            self.assertEqual(told, seeds)

    def test_what_changes_no_line_is_told(self):
        loop = {"loop": True, "bpm": 240}
        for flags, line in (
            (["--bars", "1"], loop),
            (["--section-fade", "0.02"], {"prompt": "0: a | 0.05: b"}),
            (["--section-context", "1"], {"prompt": "0: a | 0.05: b"}),
            (["--keep-all"], {"best_of": 2}),
            (["--rank", "text"], {"best_of": 2}),
        ):
            with self.subTest(flags):
                self.write({}, {})
                status, _, err = self.script(*flags)
                wrong = f"{flags[0]} changes nothing: no line of p.jsonl has"
                self.assertEqual(status, 1)
                self.assertRegex(err, f"^generate.py: error: {wrong} .*\n$")
                self.write({}, line)
                given = vars(
                    arguments.parse_arguments(["--prompts", "p.jsonl", *flags])
                )
                planned = lines.plan_file(Path("p.jsonl"), given | {"seed": 0})
                self.assertEqual([job.fault for job in planned], [None, None])
        self.write({}, {"loop": True})  # without a bpm: that is what is told
        self.assertIn("line 2: loop needs bpm and", self.script("--bars", "1")[2])
        self.assertEqual([*Path().glob("*.wav")], [Path("x-1.wav")])

    @slow(8)
    def test_many_bad_lines(self):
        """Take seconds: the time grows with their number, not with its square."""
        seconds = []
        for count in (5_000, 40_000):
            self.write(*[{"duration": -1}] * count)
            began = time.process_time()
            self.assertEqual(self.script()[0], 1)
            seconds.append(time.process_time() - began)
        self.assertLess(seconds[1], 8 * 2 * seconds[0])

    def test_plain_lines(self):
        Path("p.txt").write_text("drums\n\n  piano\n")
        planned = lines.plan_file(Path("p.txt"), dict(seed=3, output="x.wav"))
        told = [(job.prompt, job.line, job.fault) for job in planned]
        self.assertEqual(told, [("drums", 1, None), ("piano", 3, None)])
