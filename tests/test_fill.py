"""Parts filled in: what stays, in codes and in the sound, in takes of any length."""

import signal
from unittest.mock import patch

import mlx.core as mx
import numpy as np
import soundfile
from common import Test, exact, random_magnet
from test_magnet_cli import SHORT, MagnetTest

import fill as script
import magnet
from audio import save_audio
from edit import split
from fill import Filling, fill, frames_of_parts, free_frames, join_parts, windows
from regenerate import REACH, join
from settings import load_codes, read_settings

PASSES = dict(decoding_steps=(2, 1, 1, 1))
FREE = PASSES | dict(temp=50.0)  # of a random model, whose likeliest code is far ahead


class TestFilling(Test):
    def setUp(self):
        super().setUp()
        self.model = random_magnet()

    def codes(self, frames: int) -> mx.array:
        mx.random.seed(0)
        vocabulary = self.model.config.decoder.vocab_size
        return mx.random.randint(0, vocabulary, (1, frames, 4)).astype(mx.uint32)

    def test_codes_outside_are_identical(self):
        """Whatever the spans, in a take of frames that three does not divide."""
        codes, parts = self.codes(50), [(0.16, 0.4), (0.7, 1.0)]
        for spans in ("nonoverlap", "stride1"):
            made = []
            how = dict(parts=parts, takes=2, seed=3, span_arrangement=spans, **FREE)
            filling = Filling(self.model, codes, "drums", **how)
            for step in filling:
                made.append(step.step)
            self.assertEqual(made, [*range(1, 6)])
            self.assertEqual(filling.total, 5)
            self.assertEqual(filling.codes.shape, (2, 50, 4))
            free = free_frames(50, [(8, 20), (35, 50)])
            kept = [i for i in range(50) if not free[i].item()]
            for row in filling.codes:
                self.assertSame(row[mx.array(kept)], codes[0, mx.array(kept)])
            inside = filling.codes[:, 8:20]
            self.assertTrue((inside != codes[:, 8:20]).any(axis=(0, 1)).all())
            self.assertTrue((inside[0] != inside[1]).any())

    def test_a_take_is_that_of_its_seed(self):
        codes, parts = self.codes(30), [(0.2, 0.4)]
        how = dict(parts=parts, **FREE)
        three = fill(self.model, codes, "a", takes=3, seed=4, **how)
        self.assertEqual(len({str(row.tolist()) for row in three}), 3)
        alone = fill(self.model, codes, "a", seed=5, **how)
        self.assertSame(three[1:2], alone)
        small = fill(self.model, codes, "a", takes=3, seed=4, batch_size=2, **how)
        self.assertSame(small, three)
        listed = fill(self.model, codes, "a", takes=2, seed=[5, 4], **how)
        self.assertSame(listed, mx.stack([three[1], three[0]]))

    def test_what_comes_after_is_heard(self):
        """As no take that is gone on from hears it."""
        codes, how = self.codes(30), dict(parts=[(0.2, 0.4)], temp=0, **PASSES)
        other = mx.where(mx.arange(30)[:, None] < 20, codes, (codes + 7) % 64)
        first, second = (fill(self.model, c, "a", **how) for c in (codes, other))
        self.assertTrue((first[:, 10:20] != second[:, 10:20]).any())

    def test_what_masks_is_only_the_part(self):
        """Every pass is given the codes that stay, in every codebook."""
        seen, forward = [], magnet.Forward.__call__

        def record(own, codes, stage):
            seen.append((codes, stage))
            return forward(own, codes, stage)

        codes = self.codes(30)
        with patch.object(magnet.Forward, "__call__", record):
            fill(self.model, codes, "a", [(0.2, 0.4)], seed=0, **FREE)
        self.assertEqual([stage for _, stage in seen], [0, 0, 1, 2, 3])
        for given, stage in seen:
            self.assertSame(given[:, :10], codes[:, :10])
            self.assertSame(given[:, 20:], codes[:, 20:])
            blank = (given[0, 10:20] == self.model.config.decoder.vocab_size).all(
                axis=0
            )
            self.assertEqual(blank[stage + 1 :].tolist(), [True] * (3 - stage))

    def test_longer_than_the_model_knows(self):
        """Windows of its own length, one after the other, each of the one before."""
        codes, parts = self.codes(170), [(0.2, 0.4), (1.5, 2.0), (2.1, 2.3), (3.2, 3.4)]
        how = dict(seed=3, takes=2, **FREE)
        filling = Filling(self.model, codes, "a", parts, **how)
        self.assertEqual(filling.total, 2 * 3 * 5)
        self.assertEqual([step.step for step in filling], [*range(1, 31)])
        free = free_frames(170, [(10, 20), (75, 100), (105, 115), (160, 170)])
        for row in filling.codes:
            self.assertSame(
                mx.where(free[:, None], 0, row), mx.where(free[:, None], 0, codes[0])
            )
        for first, end in filling.frames:
            self.assertTrue((filling.codes[:, first:end] != codes[:, first:end]).any())
        window = free_frames(50, [(10, 20)])
        take = self.model.steps(
            "a", seed=3, codes_prompt=codes[:, :50], free=window, **FREE
        )
        for _ in take:
            pass
        self.assertSame(filling.codes[0, :50], take.codes[0])

    def test_a_window_hears_what_the_one_before_it_filled_in(self):
        codes, parts = self.codes(100), [(0.2, 0.4), (0.44, 1.0), (1.04, 1.2)]
        row = fill(self.model, codes, "a", parts, seed=3, **FREE)
        start, end = 31, 81  # of the second, see test_windows
        between = mx.where(mx.arange(100)[:, None] < 52, row, codes)
        free = free_frames(50, [(52 - start, 60 - start)])
        how = dict(seed=3, free=free, **FREE)
        for given, same in ((between, True), (codes, False)):
            take = self.model.steps("a", codes_prompt=given[:, start:end], **how)
            for _ in take:
                pass
            made = (take.codes[:, 21:29] == row[:, 52:60]).all().item()
            self.assertEqual(made, same)

    def test_windows(self):
        for frames, count, want in (
            ([(10, 20)], 40, [(0, 40, [(10, 20)])]),
            ([(0, 40)], 50, [(0, 50, [(0, 40)])]),
            ([(10, 20)], 100, [(0, 50, [(10, 20)])]),
            ([(60, 70)], 100, [(40, 90, [(60, 70)])]),
            ([(95, 100)], 100, [(50, 100, [(95, 100)])]),
            (
                [(10, 20), (22, 50), (52, 60)],
                100,
                [(5, 55, [(10, 20), (22, 50)]), (31, 81, [(52, 60)])],
            ),
            ([(60, 70), (99, 100)], 100, [(50, 100, [(60, 70), (99, 100)])]),
        ):
            found = windows(frames, count, 50)
            self.assertEqual(found, want)
            for start, end, inside in found:
                for first, last in inside:
                    self.assertTrue(start <= first < last <= end)

    def test_every_part_is_in_one_window_with_something_beside_it(self):
        random = np.random.default_rng(0)
        for _ in range(300):
            count = int(random.integers(51, 400))
            cuts = np.sort(random.choice(count + 1, size=8, replace=False))
            parts = [*zip(cuts[::2].tolist(), cuts[1::2].tolist())]
            parts = [(a, min(b, a + 40)) for a, b in parts]
            found = windows(parts, count, 50)
            self.assertEqual([p for _, _, inside in found for p in inside], parts)
            for start, end, inside in found:
                self.assertEqual(end - start, 50)
                self.assertTrue(0 <= start and end <= count)
                before, after = inside[0][0] - start, end - inside[-1][1]
                self.assertGreaterEqual(before, min(5, inside[0][0]))
                self.assertGreaterEqual(after, min(5, count - inside[-1][1]))

    def test_parts(self):
        model = self.model
        for parts, want in (
            ([(0.2, 0.4)], [(10, 20)]),
            ([(0.6, 0.8), (0, 0.2)], [(0, 10), (30, 40)]),
            ([(0.2, 0.4), (0.4, 0.5), (0.3, 0.35)], [(10, 25)]),
        ):
            self.assertEqual(frames_of_parts(model, parts, 50), want)
        for message, parts, count in (
            ("The take is 0.8 s long; the part 0.5:0.9", [(0.1, 0.2), (0.5, 0.9)], 40),
            ("part 0.5:0.5 is empty", [(0.5, 0.5)], 40),
            ("two numbers", [(0.5, float("nan"))], 40),
            ("two numbers of seconds, got 0.2", (0.2, 0.4), 40),
            ("There must be a part", [], 40),
            ("part 0.2:1.1 is too long: .* own 1 s .* at most 0.8 s", [(0.2, 1.1)], 60),
            ("part 0.2:1.1 is too long", [(0.2, 0.7), (0.7, 1.1)], 60),
        ):
            with self.assertRaisesRegex(ValueError, message):
                frames_of_parts(model, parts, count)
        self.assertEqual(frames_of_parts(model, [(0, 1)], 50), [(0, 50)])

    def test_errors(self):
        codes = self.codes(40)
        for message, changes in (
            ("one take", dict(codes=mx.concatenate([codes, codes]))),
            ("codebooks", dict(codes=codes[..., :2])),
            ("takes must be 1 or more", dict(takes=0)),
            ("seed must be", dict(seed=-1)),
            ("batch_size must be", dict(batch_size=0)),
            ("decoding_steps must be", dict(decoding_steps=(1, 1))),
            ("Only a MAGNeT", dict(model=exact("mono-transformers"))),
        ):
            how = dict(model=self.model, codes=codes, parts=[(0.2, 0.4)]) | changes
            with self.subTest(message), self.assertRaisesRegex(ValueError, message):
                fill(prompt="a", **how)

    def test_join_parts(self):
        mx.random.seed(0)
        old, new = mx.random.normal((3900, 2)), mx.random.normal((3, 4000, 2))
        frames = [(0, 5), (10, 20), (25, 39)]
        joined = join_parts(old, new, frames, 100)
        self.assertEqual(joined.shape, (3, 3900, 2))
        for i, row in enumerate(joined):
            for first, end in ((0, 8), (10, 20), (25, 39)):
                where = slice(first * 100, end * 100)
                self.assertSame(row[where], new[i, where])
        self.assertSame(
            join_parts(old, new, [(10, 20)], 100), join(old, new, (10, 20), 100)
        )
        far = [(0, 5), (30, 32)]
        joined = join_parts(old, new, far, 100)
        kept = slice(int(500 + REACH * 100), int(3000 - REACH * 100))
        for row in joined:
            self.assertSame(row[kept], old[kept])

    def test_words_of_the_flag(self):
        self.assertEqual(split(["2:4", "8:12.5", "a"]), ([(2, 4), (8, 12.5)], ["a"]))
        self.assertEqual(split(["a", "2:4"]), ([], ["a", "2:4"]))
        self.assertEqual(split(["2:4"]), ([(2, 4)], []))


class TestCommand(MagnetTest):
    def setUp(self):
        super().setUp()
        self.sound, self.codes = self.folder / "a.wav", self.folder / "a.safetensors"
        how = ["--seed", 3, "--subtype", "float", "--fade-out", 0]
        self.make("bell", "-o", self.sound, "--save-codes", self.codes, *how)

    def fill(self, *arguments: str) -> dict:
        """The settings of what is made."""
        output = self.folder / "f.wav"
        self.make(*arguments, "-o", output, "--force")
        return read_settings(output)

    def test_codes_of_a_take(self):
        made, common = self.folder / "f.safetensors", ["--seed", 9, "--force"]
        for flag in ("--fill", "--regenerate"):
            told = self.fill(flag, "0.2:0.4", self.codes, *common, "--save-codes", made)
            want = dict(prompt="bell", seed=9, part="0.2:0.4", duration=0.96)
            want |= dict(regenerated=str(self.codes), decoding_steps="2,1,1,1")
            self.assertEqual({name: told[name] for name in want}, want)
            self.assertNotIn("candidates", told)
            filled, before = load_codes(made)[0], load_codes(self.codes)[0]
            self.assertSame(filled[:, :10], before[:, :10])
            self.assertSame(filled[:, 20:], before[:, 20:])
            model = magnet.load(self.model)
            want = fill(model, before, "bell", [(0.2, 0.4)], seed=9, **PASSES)
            self.assertSame(filled, want)

    def test_the_sound_outside_is_bit_for_bit(self):
        """Farther than the codec reaches."""
        old = soundfile.read(self.sound, dtype="float32")[0]
        for source in (self.codes, self.sound):
            more = [source, "--seed", 9, "--subtype", "float"]
            told = self.fill("--fill", "0.2:0.3", "0.6:0.7", *more)
            self.assertEqual(told["part"], "0.2:0.3 0.6:0.7")
            new = soundfile.read(self.folder / "f.wav", dtype="float32")[0]
            self.assertEqual(len(new), len(old))
            reach = int(REACH * 640)
            edges = [0, 6400, 9600, 19200, 22400, len(old)]
            for first, end in zip(edges[::2], edges[1::2]):
                kept = slice(
                    first + reach * (first > 0), end - reach * (end < len(old))
                )
                self.assertTrue((new[kept] == old[kept]).all())
            for first, end in ((6400, 9600), (19200, 22400)):
                self.assertTrue((new[first:end] != old[first:end]).mean() > 0.9)

    def test_the_flag_given_twice(self):
        """No part is lost."""
        told = self.fill("--fill", "0.6:0.7", "--fill", "0.2:0.3", self.codes)
        self.assertEqual(told["part"], "0.6:0.7 0.2:0.3")

    def test_another_sound(self):
        song = self.folder / "song.wav"
        save_audio(
            song, mx.random.normal((70000, 1)) / 50, 32000
        )  # longer than a window
        out = self.make(
            *("--audio-prompt", song, "--fill", "0.5:0.7", "1.5:1.7", "-p", "a"),
            *("--takes", 2, "--seed", 5, "-o", self.folder / "t.wav"),
        )
        self.assertEqual(out.count("2.19 s of audio"), 2)
        first, second = (read_settings(self.folder / f"t-{i}.wav") for i in (1, 2))
        self.assertEqual((first["seed"], second["seed"]), (5, 6))
        self.assertEqual(first["regenerated"], str(song))
        part = ["--prompt-start", 1, "--prompt-length", 0.8, "--prompt", "a"]
        self.fill("--audio-prompt", song, "--fill", "0.5:0.7", *part)
        self.assertEqual(soundfile.info(self.folder / "f.wav").frames, 0.8 * 32000)

    def test_again(self):
        """A take that was filled in is filled in again as it was, or with other flags."""
        self.fill("--fill", "0.2:0.4", self.sound, "--seed", 9, "--temp", 20)
        sound, path = self.folder / "f.wav", self.folder / "g.wav"
        for flags, same in ((), True), (("--seed", 8), False):
            self.make("--again", sound, *flags, "-o", path, "--force")
            self.assertEqual(path.read_bytes() == sound.read_bytes(), same)
            self.assertEqual(read_settings(path)["part"], "0.2:0.4")

    def test_errors(self):
        long, codes = self.folder / "long.wav", self.codes
        save_audio(long, mx.random.normal((70000, 1)) / 50, 32000)
        for message, *flags in (
            ("a.wav is 0.96 s long; the part 0.5:2", "0.5:2", self.sound),
            ("is empty", "0.5:0.5", codes),
            ("the part first", codes, "0.2:0.4"),
            ("needs one take", "0.2:0.4"),
            ("names no prompt", "0.2:0.4", long),
            ("is too long", "0.2:1.2", long, "-p", "a"),
            (
                "candidates does not apply to MAGNeT",
                "0.2:0.4",
                codes,
                "--candidates",
                3,
            ),
            ("leave out --duration", "0.2:0.4", codes, "--duration", 1),
            ("stream does not apply", "0.2:0.4", codes, "--stream"),
            ("There is no file", "0.2:0.4", self.folder / "x.wav"),
            ("leave out --model, or give the sound", "0.2:0.4", self.other_codes()),
        ):
            with self.subTest(message):
                self.refused(message, "--fill", *flags, "-o", self.folder / "x.wav")

    def other_codes(self):
        path = self.folder / "tiny.safetensors"
        flags = ["-p", "a", "--model", "tiny", "--duration", 0.4, "--save-codes", path]
        super(MagnetTest, self).run_script(*flags, "-o", self.folder / "tiny.wav")
        return path

    def test_of_a_musicgen(self):
        """`--fill` is the same flag, for one part."""
        path, output = self.other_codes(), self.folder / "m.wav"
        run = super(MagnetTest, self).run_script
        flags = [path, "--candidates", 1, "-o", output]
        status, out, err = run("--fill", "0.1:0.2", *flags)
        self.assertEqual((status, err), (0, ""))
        self.assertEqual(read_settings(output)["candidates"], 1)
        status, out, err = run("--fill", "0.1:0.2", "0.3:0.35", *flags, "--force")
        self.assertEqual(status, 1)
        self.assertIn("one part again, got 0.1:0.2 0.3:0.35: give one, or fill", err)
        self.assertEqual(err.count("\n"), 1)

    def test_ctrl_c_leaves_nothing(self):
        before, steps = {*self.folder.iterdir()}, script.Filling.__iter__

        def interrupt(filling):
            for step in steps(filling):
                signal.raise_signal(signal.SIGINT)
                yield step

        with patch.object(script.Filling, "__iter__", interrupt):
            status, out, err = self.run_script(
                *("--fill", "0.2:0.4", self.codes, "-o", self.folder / "x.wav", *SHORT)
            )
        self.assertEqual((status, out), (130, ""))
        self.assertEqual(err, "generate.py: stopped before anything was made.\n")
        self.assertEqual({*self.folder.iterdir()}, before)
