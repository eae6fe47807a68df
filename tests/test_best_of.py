"""The best of many takes: which one it is, and what its file says of it."""

import mlx.core as mx
import soundfile
from common import ScriptTest, Test, exact

import job
from job import MOST_TAKES
from musicgen import MusicGen
from ranking import MOST, RANKS, best_of, log_likelihood, text_scores
from settings import load_codes, read_settings

FLAGS = "--model tiny --duration 1 --prompt bell".split()


class TestBestOf(Test):
    def test_takes_in_order(self):
        model = exact("mono-transformers")
        best = best_of(model, "drums", 4, 0.4, seed=7)
        plain = model.generate_codes(["drums"] * 4, 0.4, seed=7)
        for row, seed in zip(best.codes, best.seeds):
            self.assertSame(row, plain[seed - 7])
        self.assertEqual(sorted(best.seeds), [7, 8, 9, 10])
        again = text_scores(model, "drums", best.codes)
        self.assertClose(mx.array(best.scores), again, 1e-5)
        self.assertEqual(best.scores, sorted(best.scores, reverse=True))
        self.assertGreater(best.scores[0], best.scores[-1] + 1e-3)

    def test_what_they_start_with_does_not_count(self):
        model = exact("mono-transformers")
        start = model.generate_codes("rain", 0.2, seed=1)
        best = best_of(model, "drums", 3, 0.4, seed=7, codes_prompt=start)
        want = text_scores(model, "drums", best.codes, 10)
        self.assertClose(mx.array(best.scores), want, 1e-5)

    def test_models_that_follow_a_sound(self):
        model = exact("melody-audiocraft")
        melody = mx.sin(mx.arange(32000) / 12)[:, None]
        options = dict(melody=melody, separate=False)
        best = best_of(model, "drums", 3, 0.2, seed=7, **options, guidance_coef=1.0)
        want = text_scores(model, "drums", best.codes, **options)
        self.assertClose(mx.array(best.scores), want, 1e-5)

    def test_by_likelihood(self):
        model = exact("mono-transformers")
        best = best_of(model, "drums", 4, 0.4, seed=7, rank="likelihood")
        want = log_likelihood(model, "drums", best.codes)
        self.assertClose(mx.array(best.scores), want, 1e-5)
        self.assertGreater(best.scores[0], best.scores[-1] + 1e-3)
        self.assertEqual((*RANKS,), job.RANKS)

    def test_errors(self):
        model = exact("mono-transformers")
        with self.assertRaisesRegex(ValueError, "rank must be one of text, likelihood"):
            best_of(model, "drums", 2, 0.4, rank="x")
        for count in (0, 65, 2.0, True):
            with self.assertRaisesRegex(ValueError, "best_of must be from 1 to 64"):
                best_of(model, "drums", count, 0.4)
        self.assertEqual(MOST, MOST_TAKES)


class TestCommand(ScriptTest):
    def make(self, *arguments: str) -> str:
        status, out, err = self.run_script(*arguments)
        self.assertEqual((status, err), (0, ""))
        return out

    def test_the_best_is_written(self):
        output, codes = self.folder / "a.wav", self.folder / "a.safetensors"
        common = [*FLAGS, "--seed", 3, "--best-of", 4, "--output", output]
        self.make(*common, "--save-codes", codes)
        self.assertEqual([*self.folder.glob("*.wav")], [output])
        record = read_settings(output)
        self.assertEqual((record["best_of"], record["first_seed"]), (4, 3))
        self.assertIn(record["seed"], range(3, 7))
        self.assertEqual(len(record["scores"]), 4)
        self.assertEqual(record["score"], max(record["scores"]))
        self.assertEqual(load_codes(codes)[1], record)

        kept = self.folder / "kept.safetensors"
        flags = ["--keep-all", "--force", "--batch-size", 3, "--save-codes", kept]
        self.make(*common, *flags)
        self.assertSame(load_codes(kept)[0], load_codes(codes)[0])
        self.assertEqual(load_codes(kept)[1], record)
        files = [output, *(self.folder / f"a-{i}.wav" for i in (2, 3, 4))]
        records = [read_settings(file) for file in files]
        self.assertEqual(records[0], record)
        self.assertEqual([one["score"] for one in records], record["scores"])
        self.assertEqual({one["seed"] for one in records}, {3, 4, 5, 6})

        again = self.folder / "again.wav"
        self.make("--again", output, "--output", again)
        self.assertTrue((soundfile.read(again)[0] == soundfile.read(output)[0]).all())
        self.assertNotIn("scores", read_settings(again))
        self.make("--again", files[3], "--output", again, "--force")
        self.assertTrue((soundfile.read(again)[0] == soundfile.read(files[3])[0]).all())

    def test_takes_are_the_best_of_other_seeds(self):
        output = ["--output", self.folder / "a.wav"]
        self.make(*FLAGS, "--seed", 3, "--best-of", 2, "--takes", 2, *output)
        firsts = [read_settings(self.folder / f"a-{i}.wav") for i in (1, 2)]
        self.assertEqual([one["first_seed"] for one in firsts], [3, 5])

    def test_resumed(self):
        codes, best = self.folder / "a.safetensors", self.folder / "b.safetensors"
        output = ["--output", self.folder / "a.wav"]
        self.make(*FLAGS, "--seed", 3, "--save-codes", codes, *output)
        flags = ["--resume", codes, "--duration", 2, "--best-of", 3, *output, "--force"]
        self.make(*flags, "--save-codes", best)
        taken, record = load_codes(best)
        self.assertSame(taken[:, :48], load_codes(codes)[0][:, :48])
        model = MusicGen.from_pretrained("tiny", mx.float32)
        score = text_scores(model, "bell", taken, 48).item()
        self.assertAlmostEqual(record["score"], score, places=4)

    def test_in_a_file_of_prompts(self):
        prompts, output = self.folder / "a.jsonl", self.folder / "a.wav"
        lines = (
            '{"prompt": "bell", "best_of": 3, "keep_all": true}\n{"prompt": "saw"}\n'
        )
        prompts.write_text(lines)
        common = ["--model", "tiny", "--duration", 1, "--seed", 5, "--output", output]
        self.make("--prompts", prompts, *common)
        names = {path.name for path in self.folder.glob("*.wav")}
        self.assertEqual(names, {"a-1.wav", "a-1-2.wav", "a-1-3.wav", "a-2.wav"})
        status, _, err = self.run_script("--prompts", prompts, *common)
        self.assertEqual((status, err.count("skipped")), (0, 2), err)
        prompts.write_text(lines.replace("3", "2"))
        _, _, err = self.run_script("--prompts", prompts, *common)
        self.assertIn("best_of was 3 and is 2", err)
        taken = '{"prompt": "saw", "output": "%s"}\n' % (self.folder / "a-1-2.wav")
        prompts.write_text(lines + taken)
        status, _, err = self.run_script("--prompts", prompts, *common)
        self.assertEqual(status, 1)
        self.assertIn("is that of line 1, too", err)

    def test_files_that_are_missing(self):
        """Are made again with the others, and nobody's file is overwritten."""
        prompts, output = self.folder / "a.jsonl", self.folder / "a.wav"
        prompts.write_text('{"prompt": "bell", "best_of": 3, "keep_all": true}\n')
        common = ["--model", "tiny", "--duration", 0.2, "--output", output]
        files = [self.folder / f"a-1{end}.wav" for end in ("", "-2", "-3")]
        command = ["--prompts", prompts, *common, "--seed", 5]
        self.make(*command)
        made = [file.read_bytes() for file in files]
        for i, file in enumerate(files):
            file.unlink()
            status, _, err = self.run_script(*command)
            self.assertEqual(status, 0, err)
            self.assertIn(f"{files[0]} is made again: {file} is missing", err)
            self.assertEqual([file.read_bytes() for file in files], made)
        self.assertIn("skipped", self.run_script(*command)[2])
        for file in files:
            whole = file.read_bytes()
            file.write_bytes(b"mine")
            status, out, err = self.run_script(*command, "--temp", 0.5)
            self.assertIn(f"skipped {file}, which is there but was not made", err)
            self.assertEqual((status, file.read_bytes()), (0, b"mine"))
            file.write_bytes(whole)
        reads = '{"prompt": "saw", "audio_prompt": "%s"}\n' % files[1]
        prompts.write_text(prompts.read_text() + reads)
        status, _, err = self.run_script(*command, "--temp", 0.5)
        self.assertIn(f"its output {files[1]} is what line 2 reads", err)
        self.assertEqual((status, files[1].read_bytes()), (1, made[1]))

    def test_styles_drawn_by_the_seed_differ(self):
        own = dict(prompt="a", seed=0, output="x.wav", style="s.wav", temp=0)
        self.assertFalse(job.make_job(own).certain)
        self.assertTrue(job.make_job(own | dict(style_start=1.0)).certain)
        self.assertFalse(job.make_job(own | dict(temp=1.0, style=None)).certain)

    def test_errors(self):
        (self.folder / "a-2.wav").write_bytes(b"mine")
        output = ["--output", self.folder / "a.wav"]
        for message, flags in (
            ("from 2 to 64", ["--best-of", 1]),
            ("from 2 to 64", ["--best-of", 65]),
            ("leave out --stream", ["--best-of", 2, "--stream"]),
            ("needs a best_of", ["--keep-all"]),
            ("with temp 0, or top_k 1, all seeds", ["--best-of", 2, "--temp", 0]),
            ("with temp 0, or top_k 1, all seeds", ["--best-of", 2, "--top-k", 1]),
            ("a-2.wav", ["--best-of", 2, "--keep-all"]),
        ):
            with self.subTest(flags):
                status, _, err = self.run_script(*FLAGS, *flags, *output)
                self.assertIn(status, (1, 2))
                self.assertIn(message, err)
                self.assertEqual(err.count("\n"), 1, err)
        self.assertFalse((self.folder / "a.wav").exists())
        self.assertEqual((self.folder / "a-2.wav").read_bytes(), b"mine")
