"""The tables of evaluate_score.py: who is beside whom, and what is counted."""

import io
from contextlib import redirect_stderr, redirect_stdout
from unittest.mock import patch

import mlx.core as mx
import numpy as np
from common import Test, slow

import evaluate_score
from evaluate import Judge
from evaluate_score import seam, seams, spectral_distance, wrap_jumps, wraps
from musicgen import MusicGen


class TestTables(Test):
    def test_spectral_distance(self):
        noise = np.random.default_rng(0).normal(size=16000)
        self.assertAlmostEqual(spectral_distance(noise, 2 * noise), 6.02, 1)
        self.assertEqual(spectral_distance(noise, noise), 0)
        rows = [spectral_distance(noise, noise + x * noise[::-1]) for x in (0.1, 1, 9)]
        self.assertEqual(rows, sorted(rows))

    def test_seams(self):
        """The winner is the first row, and another is never the winner."""
        fixed = np.array([[1.0, 5.0], [2.0, 4.0], [3.0, 4.0]])
        with patch.object(evaluate_score, "seam", return_value=fixed):
            table = seams(None, 50, 3)
        tempo, spectrum = "onsets a second off", "spectrum off, dB"
        self.assertEqual(table["the winner"], {tempo: "1.00", spectrum: "5.00"})
        self.assertEqual(table["all candidates"], {tempo: "2.00", spectrum: "4.33"})
        other = table["another, by lot"]
        self.assertEqual(other[spectrum], "4.00")
        self.assertTrue(2 < float(other[tempo]) < 3)
        last = table["the winner is nearer (ties: half)"]
        self.assertEqual(last, {tempo: "100%", spectrum: "0%"})

    def test_wraps(self):
        """A sine of whole turns wraps without a jump, one that is cut does not."""
        turns = np.arange(32000) / 32000 * 2 * np.pi
        whole, cut = np.sin(440 * turns), np.sin(440.25 * turns)
        level, spectrum = wrap_jumps(whole)
        self.assertLess(level, 0.1)
        self.assertLess(spectrum, 1)
        self.assertGreater(wrap_jumps(cut)[0], 0.9)
        self.assertGreater(wrap_jumps(cut)[1], 20)

    def test_wraps_of_other_takes(self):
        """Another seed is of other takes. A loop of silence has no jump of the level."""
        model, made = MusicGen.from_pretrained("tiny"), []
        codes = mx.random.randint(0, 512, (1, 500, 4), key=mx.random.key(0))

        def generate_codes(prompt, seconds, seed):
            made.append(seed)
            return codes[:, : model.frames_in(seconds)]

        def silence(model, codes, count):
            return mx.zeros((count, 1))

        with patch.object(model, "generate_codes", generate_codes):
            with patch.object(evaluate_score, "best_cut", return_value=(0, -1.0)):
                with patch.object(evaluate_score, "decode_round", silence):
                    table = wraps(model, 2, cuts=3, seed=7)
        self.assertEqual(made, [7, 8])
        self.assertEqual(table["the loop"]["level"], "0.000")
        self.assertEqual(table["the loop is better than a cut"]["level"], "100%")

    @slow(6)
    def test_a_seam(self):
        """Where all candidates are the take, all distances are none."""
        model = MusicGen.from_pretrained("tiny")
        plain = model.steps

        def same(prompts, *arguments, **options):
            count = 1 if isinstance(prompts, str) else len(prompts)
            options["seed"] = [7] * count
            return plain(prompts, *arguments, **options)

        with patch.object(model, "steps", same):
            found = seam(model, "slow bell", 3, 2)
        self.assertEqual(found.tolist(), [[0, 0], [0, 0]])
        found = seam(model, "slow bell", 3, 2)
        self.assertGreater(found[:, 1].min(), 1)

    @slow(8)
    def test_traits_on_tiny(self):
        model, judge = MusicGen.from_pretrained("tiny"), Judge(60)
        with patch.object(evaluate_score, "Judge", return_value=judge):
            best = evaluate_score.best_of(model, 1, takes=2)
            parts = evaluate_score.sections(model, 1)
        rows = ["the best of 2", "all of them", "the last", "the best by likelihood"]
        self.assertEqual([*best], rows)
        values = [float(row["mean"].rstrip("%")) for row in best.values()]
        self.assertAlmostEqual(values[1], (values[0] + values[2]) / 2, 1)
        self.assertEqual(len(parts), 5)
        self.assertEqual({*parts["the first section"]}, {*judge.name(None), "mean"})

    def test_command_lines(self):
        table = {"a": {"b": "1"}}
        for what, function in (
            ("seams", "seams"),
            ("best-of", "best_of"),
            ("sections", "sections"),
        ):
            argv = ["evaluate_score.py", what]
            with patch.object(evaluate_score, function, return_value=table) as called:
                with patch("sys.argv", argv), redirect_stdout(io.StringIO()) as out:
                    evaluate_score.main()
            self.assertEqual(out.getvalue(), "| | b |\n|---|---|\n| a | 1 |\n")
            self.assertIn(called.call_args.args[1], (100, 200))
        for flags in (
            "",
            "seams --takes 0",
            "best-of --best-of 1",
            "seams --model x/y",
        ):
            argv = ["evaluate_score.py", *flags.split()]
            with patch("sys.argv", argv), redirect_stderr(io.StringIO()) as err:
                with self.assertRaises(SystemExit):
                    evaluate_score.main()
            self.assertRegex(err.getvalue(), "^evaluate_score.py: error: .*\n$")
