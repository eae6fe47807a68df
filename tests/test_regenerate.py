"""A part of a take made again: what stays, what is ranked, how it joins."""

from unittest.mock import Mock, patch

import mlx.core as mx
import numpy as np
import soundfile
from common import ROOT, ScriptTest, Test, exact

import edit
import ranking
import regenerate as script
from musicgen import MusicGen
from ranking import log_likelihood
from regenerate import REACH, Candidates, join, regenerate
from sections import Sections
from settings import load_codes, read_settings

FLAGS = "--model tiny --duration 3 --seed 3".split()


class TestRegenerate(Test):
    def take(self, name: str = "mono-transformers", frames: int = 40):
        model = exact(name)
        return model, model.generate_codes("drums", frames / 50, seed=1)

    def test_codes_outside_are_identical(self):
        for name in ("mono-transformers", "stereo-audiocraft", "melody-audiocraft"):
            model, codes = self.take(name)
            made = regenerate(model, codes, "drums", (0.2, 0.4), candidates=3, seed=5)
            self.assertEqual(made.frames, (10, 20))
            self.assertEqual(made.codes.shape, (3, *codes.shape[1:]))
            for row in made.codes:
                self.assertSame(row[:10], codes[0, :10])
                self.assertSame(row[20:], codes[0, 20:])
            parts = {str(row[10:20].tolist()) for row in made.codes}
            self.assertEqual(len(parts), 3)

    def test_the_part_is_drawn_as_if_the_take_went_on(self):
        # The seed of the take itself makes the part that was there, up to its end.
        model, codes = self.take()
        made = regenerate(model, codes, "drums", (0.2, 0.4), candidates=3, seed=0)
        row = made.seeds.index(1)
        self.assertSame(made.codes[row], codes[0])

    def test_in_a_window_that_slides_and_under_sections(self):
        model = exact("stereo-audiocraft")
        model.config.max_duration = 15 / 50
        song = Sections([(0, "drums"), (0.3, "piano"), (0.5, "rain")])
        codes = model.generate_codes(song, 0.8, seed=1)
        for part in ((0.24, 0.36), (0.5, 0.8), (0.3, 0.5), (0.02, 0.04)):
            made = regenerate(model, codes, song, part, candidates=2, seed=0)
            self.assertSame(made.codes[made.seeds.index(1)], codes[0])

    def test_the_winner_has_the_highest_score(self):
        model, codes = self.take()
        how = dict(candidates=5, seed=5, follow=0.3)
        made = regenerate(model, codes, "drums", (0.2, 0.4), **how)
        again = [
            log_likelihood(model, "drums", row[None], 20, 35).item()
            for row in made.codes
        ]
        self.assertEqual(again, sorted(again, reverse=True))
        self.assertGreater(again[0], again[-1] + 1e-3)
        self.assertClose(mx.array(made.scores), mx.array(again), 1e-5)
        self.assertIn("what comes after", made.describe())

    def test_a_part_at_the_end_is_ranked_by_the_text(self):
        model, codes = self.take()
        made = regenerate(model, codes, "drums", (0.4, 0.8), candidates=3, seed=5)
        want = ranking.text_scores(model, "drums", made.codes, 20)
        self.assertClose(mx.array(made.scores), want, 1e-5)
        self.assertIn("nothing comes after", made.describe())

    def test_in_smaller_batches(self):
        model, codes = self.take()
        how = dict(part=(0.2, 0.4), candidates=5, seed=5)
        whole = regenerate(model, codes, "drums", **how)
        small = regenerate(model, codes, "drums", **how, batch_size=2)
        self.assertEqual(small.seeds, whole.seeds)
        self.assertSame(small.codes, whole.codes)

    def test_options_reach_the_take(self):
        model, codes = self.take()
        how = dict(part=(0.2, 0.4), candidates=2, seed=5)
        greedy = regenerate(model, codes, "drums", temp=0, **how)
        self.assertSame(greedy.codes[0], greedy.codes[1])
        other = regenerate(model, codes, "rain", temp=0, **how, guidance_coef=9.0)
        self.assertTrue((other.codes[0] != greedy.codes[0]).any())

    def test_errors(self):
        model, codes = self.take()
        for message, changes in (
            ("0.8 s long; the part 0.5:0.9", dict(part=(0.5, 0.9))),
            ("part 0.5:0.5 is empty", dict(part=(0.5, 0.5))),
            ("part 0.5:0.4 is empty", dict(part=(0.5, 0.4))),
            ("--again", dict(part=(0.0, 0.4))),
            ("two numbers", dict(part=(0.1, float("nan")))),
            ("two numbers", dict(part=(0.1,))),
            ("from 1 to 64", dict(candidates=0)),
            ("from 1 to 64", dict(candidates=65)),
            ("follow", dict(follow=0.0)),
            ("one take", dict(codes=mx.concatenate([codes, codes]))),
            ("codebooks", dict(codes=codes[..., :2])),
            ("top_k", dict(top_k=0)),
        ):
            how = dict(codes=codes, part=(0.2, 0.4)) | changes
            with self.subTest(changes), self.assertRaisesRegex(ValueError, message):
                Candidates(model, prompt="drums", **how)
        self.assertEqual(script.MOST, edit.MOST_CANDIDATES)

    def test_join(self):
        mx.random.seed(0)
        old, new = mx.random.normal((3900, 2)), mx.random.normal((3, 4000, 2))
        joined = join(old, new, (10, 20), 100)
        self.assertEqual(joined.shape, (3, 3900, 2))
        first, end = int(1000 - REACH * 100), int(2000 + REACH * 100)
        for i in range(3):
            self.assertSame(joined[i, : first + 1], old[: first + 1])
            self.assertSame(joined[i, end:], old[end:])
            kept = slice(first + 100, end - 99)  # the fade takes a frame
            self.assertSame(joined[i, kept], new[i, kept])
        half = first + 50
        self.assertClose(joined[1, half], (old[half] + new[1, half]) / 2, 1e-3)
        last = join(old, new, (10, 40), 100)
        self.assertSame(last[0, -100:], new[0, 3800:3900])

    def test_a_join_is_nearer_to_the_take_than_a_decode(self):
        model, codes = self.take("mono-transformers", 80)
        made = regenerate(model, codes, "drums", (0.2, 0.4), candidates=1, seed=5)
        old, new = model.decode(codes)[0], model.decode(made.codes)
        joined, end = join(old, new, made.frames, 640), int((20 + REACH) * 640)
        self.assertSame(joined[0, end:], old[end:])
        self.assertGreater(float(mx.abs(new[0, end:] - old[end:]).max()), 1e-4)


class TestCommand(ScriptTest):
    def setUp(self):
        super().setUp()
        self.codes, self.sound = self.folder / "a.safetensors", self.folder / "a.wav"
        flags = [
            "--save-codes",
            self.codes,
            "--output",
            self.sound,
            "--subtype",
            "float",
        ]
        self.make("-p", "slow bell", *FLAGS, *flags)

    def make(self, *arguments: str) -> str:
        status, out, err = self.run_script(*arguments)
        self.assertEqual((status, err), (0, ""))
        return out

    def test_from_codes(self):
        b, codes = self.folder / "b.wav", self.folder / "b.safetensors"
        flags = ["--candidates", 3, "--seed", 10, "--output", b, "--save-codes", codes]
        flags += ["--subtype", "float"]
        out = self.make("--regenerate", "1:2", self.codes, *flags)
        self.assertIn("3 candidates, ranked by what comes after the part", out)
        (old, _), (new, record) = load_codes(self.codes), load_codes(codes)
        self.assertSame(new[:, :50], old[:, :50])
        self.assertSame(new[:, 100:], old[:, 100:])
        self.assertTrue((new[:, 50:100] != old[:, 50:100]).any())
        before, after = soundfile.read(self.sound)[0], soundfile.read(b)[0]
        first, end = int((50 - REACH) * 640), int((100 + REACH) * 640)
        self.assertTrue((before[:first] == after[:first]).all())
        self.assertTrue((before[end:] == after[end:]).all())
        self.assertTrue((before[first:end] != after[first:end]).any())
        self.assertEqual(record, read_settings(b))
        self.assertEqual((record["prompt"], record["part"]), ("slow bell", "1:2"))
        self.assertEqual(record["candidates"], 3)
        self.assertEqual(record["score"], max(record["scores"]))
        self.assertEqual(len(record["scores"]), 3)
        self.assertIn(record["seed"], (10, 11, 12))

        alone = self.folder / "alone.safetensors"
        flags = ["--candidates", 1, "--seed", record["seed"], "--save-codes", alone]
        self.make(
            "--regenerate", "1:2", self.codes, *flags, "-o", self.folder / "c.wav"
        )
        self.assertSame(load_codes(alone)[0], new)
        status, _, err = self.run_script("--again", b)
        self.assertEqual(status, 1)
        self.assertIn(f"--seed {record['seed']} --candidates 1", err)

    def test_a_prompt_without_its_flag(self):
        output = self.folder / "b.wav"
        flags = ["--regenerate", "1:2", self.codes, "--candidates", 1, "-o", output]
        self.make("new words", *flags)
        self.assertEqual(read_settings(output)["prompt"], "new words")
        status, _, err = self.run_script("new words", "-p", "others", *flags)
        self.assertEqual(status, 2)
        self.assertIn("takes one prompt", err)

    def test_fades_of_codes_are_kept(self):
        faded, codes = self.folder / "f.wav", self.folder / "f.safetensors"
        fades = ["--fade-in", 0.5, "--fade-out", 0.75, "--subtype", "float"]
        redecoded = ["--redecode", self.codes, "--save-codes", codes, "-o", faded]
        self.make(*redecoded, *fades)
        b, c, d = (self.folder / f"{name}.wav" for name in "bcd")
        edit = ["--candidates", 1, "--seed", 9, "--subtype", "float", "--output"]
        self.make("--regenerate", "1:2", codes, *edit, b)
        record, before, after = read_settings(b), *map(self.read, (faded, b))
        self.assertEqual((record["fade_in"], record["fade_out"]), (0.5, 0.75))
        self.assertTrue((before[:16000] == after[:16000]).all())
        self.assertTrue((before[-16000:] == after[-16000:]).all())
        self.make("--regenerate", "1:2", codes, "--fade-in", 0.25, *edit, c)
        record = read_settings(c)
        self.assertEqual((record["fade_in"], record["fade_out"]), (0.25, 0.75))
        self.make("--regenerate", "1:2", faded, *edit, d)  # they are in its samples
        self.assertEqual(read_settings(d).keys() & {"fade_in", "fade_out"}, set())
        self.assertTrue((self.read(d)[:16000] == before[:16000]).all())

    def read(self, path) -> np.ndarray:
        return soundfile.read(path)[0]

    def test_loops_and_endings_are_left(self):
        loop, loop_codes = self.folder / "loop.wav", self.folder / "loop.safetensors"
        cut, cut_codes = self.folder / "cut.wav", self.folder / "cut.safetensors"
        common, beat = ["-p", "bell", "--model", "tiny"], ["--bpm", 240, "--bars", 1]
        self.make(*common, *beat, "--loop", "--save-codes", loop_codes, "-o", loop)
        ending = ["--duration", 2, "--ending", "--save-codes", cut_codes, "-o", cut]
        self.make(*common, *ending)
        output, again = self.folder / "b.wav", "--again and another --seed"
        for place, message in (
            ([loop_codes], again),
            ([loop], again),
            (["--audio-prompt", loop], again),
            ([cut_codes], "give the sound file"),
            (["--audio-prompt", cut_codes], "give the sound file"),
        ):
            with self.subTest(place):
                flags = ["-p", "bell", "--model", "tiny", "-o", output]
                status, _, err = self.run_script(
                    "--regenerate", "0.2:0.4", *place, *flags
                )
                self.assertEqual((status, err.count("\n")), (1, 1), err)
                self.assertIn(message, err)
        self.make("--regenerate", "1:1.5", cut, "--candidates", 1, "-o", output)
        self.assertEqual(len(self.read(output)), len(self.read(cut)))

    def test_the_seed_of_the_take_is_left_out(self):
        (old, _), codes = load_codes(self.codes), self.folder / "b.safetensors"
        flags = ["--seed", 3, "--save-codes", codes, "-o", self.folder / "b.wav"]
        flags += ["--regenerate", "1:2", self.codes, "--candidates"]
        with patch("remake.Candidates", wraps=Candidates) as made:
            self.make(*flags, 3)
        self.assertEqual(made.call_args.kwargs["seed"], [4, 5, 6])
        self.assertTrue((load_codes(codes)[0] != old).any())
        self.make(*flags, 1, "--force")  # which asks for it
        self.assertSame(load_codes(codes)[0], old)
        self.assertEqual(edit.seeds(3, 2, 5), 3)
        self.assertEqual(edit.seeds(3, 3, 5), [3, 4, 6])
        self.assertEqual(edit.seeds(3, 3, 3), [4, 5, 6])
        self.assertEqual(edit.seeds(2**64 - 2, 2, None), 2**64 - 2)

    def test_what_is_made_of_an_edit_says_so(self):
        names = "edit", "redecoded", "resumed", "streamed", "twice"
        files = {name: self.folder / f"{name}.safetensors" for name in names}
        output = {name: ["-o", self.folder / f"{name}.wav"] for name in names}
        for name, path in files.items():
            output[name] += ["--save-codes", path]
        how = ["--candidates", 1, "--seed", 9]
        self.make("--regenerate", "1:2", self.codes, *how, *output["edit"])
        longer = ["--resume", files["edit"], "--duration", 3.5, "--seed", 7]
        self.make("--redecode", files["edit"], *output["redecoded"])
        self.make(*longer, *output["resumed"])
        self.make(*longer, "--stream", *output["streamed"])
        self.make("--redecode", files["resumed"], *output["twice"])
        for name in names:
            for path in (files[name], self.folder / f"{name}.wav"):
                with self.subTest(path):
                    status, _, err = self.run_script("--again", path)
                    self.assertEqual(status, 1)
                    told = f"--regenerate 1:2 of {self.codes}: give that again"
                    self.assertIn(told, err)
                    self.assertIn("--seed 9 --candidates 1", err)

    def test_samples_of_files_outside_the_part(self):
        for subtype, most in (("pcm_16", 3), ("pcm_24", 0)):
            take, b, c = (self.folder / f"{x}-{subtype}.wav" for x in "abc")
            self.make("--redecode", self.codes, "--subtype", subtype, "-o", take)
            how = ["--candidates", 1, "--seed", 9, "--subtype", subtype, "--output"]
            self.make("--regenerate", "1:2", self.codes, *how, b)
            self.make("--regenerate", "1:2", take, *how, c)
            old, of_codes, of_sound = (
                soundfile.read(path, dtype="int32")[0].astype(np.int64)
                for path in (take, b, c)
            )
            outside = np.r_[: int(46.25 * 640), int(103.75 * 640) : len(old)]
            unit = 2**16 if subtype == "pcm_16" else 2**8
            self.assertTrue((of_codes == old)[outside].all())
            farthest = np.abs(of_sound - old)[outside].max() // unit
            self.assertLessEqual(farthest, most)
            self.assertEqual(farthest > 0, most > 0)

    def test_several_takes_of_a_sound(self):
        output = ["--output", self.folder / "c.wav", "--candidates", 3, "--takes", 2]
        output += ["--subtype", "float"]
        self.make("--regenerate", "1:2", self.sound, *output, "--seed", 1)
        records = [read_settings(self.folder / f"c-{i}.wav") for i in (1, 2)]
        scores = [record["score"] for record in records]
        self.assertEqual(scores, records[0]["scores"][:2])
        self.assertEqual(scores, sorted(scores, reverse=True))
        before, _ = soundfile.read(self.sound)
        for i in (1, 2):
            after, _ = soundfile.read(self.folder / f"c-{i}.wav")
            self.assertEqual(len(after), len(before))
            self.assertTrue((before[:29000] == after[:29000]).all())
            self.assertTrue((before[67000:] == after[67000:]).all())
            self.assertTrue((before[32000:64000] != after[32000:64000]).any())

    def test_a_sound_of_any_origin(self):
        song, output = self.folder / "song.wav", self.folder / "d.wav"
        noise = np.random.default_rng(0).uniform(-0.1, 0.1, (44100 * 3 + 77, 2))
        soundfile.write(song, noise, 44100)
        common = ["--model", "tiny", "--candidates", 2, "--output", output]
        status, _, err = self.run_script("--regenerate", "1:2", song, *common)
        self.assertEqual(status, 2)
        self.assertIn("names no prompt", err)
        for place in ((song,), ("--audio-prompt", song)):
            flags = ["--force", "--subtype", "float", "-p", "bell"]
            self.make("--regenerate", "1:2", *place, *common, *flags)
            self.assertEqual(soundfile.info(output).frames, 132377 * 32000 // 44100)
            self.assertNotIn("audio_prompt", read_settings(output))

    def test_errors(self):
        common = ["--model", "tiny", "--output", self.folder / "e.wav"]
        for message, arguments in (
            ("a.safetensors is 3 s long; the part 2:4", ("2:4", self.codes)),
            ("is empty", ("2:2", self.codes)),
            ("--again and another --seed", ("0:2", self.codes)),
            ("the part first", (self.codes, "0:2")),
            ("1 to 64", ("1:2", self.codes, "--candidates", 65)),
            ("at most the 2", ("1:2", self.codes, "--candidates", 2, "--takes", 3)),
            ("one take", ("1:2",)),
            ("one take", ("1:2", self.codes, "--audio-prompt", self.sound)),
            ("There is no file", ("1:2", self.folder / "x.wav")),
            ("leave out --duration", ("1:2", self.codes, "--duration", 4)),
            ("without --stream", ("1:2", self.codes, "--stream")),
            ("without --best-of", ("1:2", self.codes, "--best-of", 2)),
            ("must not come together", ("1:2", self.codes, "--again", self.sound)),
            ("need a sound", ("1:2", self.codes, "--prompt-start", 1)),
            ("one prompt", ("1:2", self.codes, "-p", "a", "-p", "b")),
        ):
            with self.subTest(message):
                status, out, err = self.run_script("--regenerate", *arguments, *common)
                self.assertIn(status, (1, 2))
                self.assertIn(message, err)
                self.assertEqual(err.count("\n"), 1, err)
        pair = Mock(size=lambda: 2, rank=lambda: 0)
        with patch("generate.mx.distributed.init", return_value=pair):
            _, _, err = self.run_script("--regenerate", "1:2", self.codes, *common)
        self.assertIn("leave out mlx.launch", err)
        status, _, err = self.run_script("-p", "a", "--candidates", 3, *common)
        self.assertIn("--candidates needs --regenerate", err)
        self.assertFalse((self.folder / "e.wav").exists())
