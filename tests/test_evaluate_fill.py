"""evaluate_fill.py: what is beside what, and what is counted."""

import io
import signal
from contextlib import redirect_stderr, redirect_stdout
from types import SimpleNamespace
from unittest.mock import patch

import mlx.core as mx
import numpy as np
from common import ROOT, Test, slow

import evaluate_fill
import magnet
import synth
from evaluate import Judge
from evaluate_fill import Found, cells, check_pair, fills, find, put_part_in, versions

QUICK = dict(decoding_steps=(1, 1, 1, 1))
SETTINGS = [
    dict(temp=1.0, max_guidance_coef=3.0),
    dict(temp=3.0, max_guidance_coef=9.0),
]


class TestMeasures(Test):
    def test_a_seam_is_heard(self):
        """A tone that goes on has none; where another one comes, it is far from it."""
        t = np.arange(8 * synth.RATE) / synth.RATE
        low, high = np.sin(2 * np.pi * 220 * t), np.sin(2 * np.pi * 880 * t)
        seam = int(evaluate_fill.PART[1] * synth.RATE)
        after = np.where(np.arange(len(t)) < seam, low, high)
        early = np.where(np.arange(len(t)) < seam - 6000, low, high)
        self.assertLess(find(low).jump, 1)
        self.assertGreater(find(after).jump, 20)
        self.assertLess(find(early).jump, 1)

    def test_onsets_are_those_around_the_seam(self):
        """From 3 to 7 s of clips that change their pace there."""
        random = np.random.default_rng(0)
        clips = [
            synth.Clip("bell", "high", pace, "major", "without")
            for pace in ("slow", "fast")
        ]
        slow_one, fast_one = (synth.render(clip, random) for clip in clips)
        mixed = fast_one.copy()
        mixed[3 * synth.RATE : 7 * synth.RATE] = slow_one[
            3 * synth.RATE : 7 * synth.RATE
        ]
        self.assertLess(find(mixed).onsets, 1.5)
        self.assertGreater(find(fast_one).onsets, 3)

    def test_cells(self):
        """Kept is what is judged as it was; both, in the same take."""
        names = {
            "a": dict(tempo="slow", timbre="bell"),
            "b": dict(tempo="slow", timbre="sine"),
            "c": dict(tempo="fast", timbre="bell"),
        }
        judge = SimpleNamespace(name=names.get)
        whole = [Found("a", 4.0, 1.0)] * 4
        found = [Found(n, 5.0 + i, 1.5 - i) for i, n in enumerate("aabc")]
        row = cells(judge, found, whole)
        self.assertEqual(
            [*row.values()], ["75.0%", "75.0%", "50.0%", "6.50", "2.50", "1.25"]
        )
        itself = [*cells(judge, whole, whole).values()]
        self.assertEqual(itself, ["100.0%"] * 3 + ["4.00", "0.00", "0.00"])


class TestFills(Test):
    @classmethod
    def setUpClass(cls):
        cls.model, cls.beside = magnet.load("tiny-magnet"), magnet.load("tiny")

    @slow(20)
    def test_versions(self):
        """All differ within the part, and nowhere else but for what the codec hears."""
        made = []
        with patch.object(evaluate_fill, "fill", wraps=evaluate_fill.fill) as filling:
            made += versions(self.model, self.beside, 2, 5, SETTINGS, **QUICK)
        self.assertEqual(len(made), 2)
        texts = [call.args[2] for call in filling.call_args_list]
        self.assertEqual(texts[::2], evaluate_fill.prompts(2)[1])
        temps = [call.kwargs["temp"] for call in filling.call_args_list]
        self.assertEqual(temps, [1.0, 3.0] * 2)
        hop, edge = 640, 4
        for sounds in made:
            self.assertEqual(len(sounds), 5)
            whole = sounds.pop(evaluate_fill.WHOLE)
            self.assertEqual(whole.shape, (8 * synth.RATE,))
            for name, sound in sounds.items():
                with self.subTest(name):
                    self.assertGreater(np.abs(sound - whole).max(), 0.1)
                    for part in (
                        slice((150 - edge) * hop),
                        slice((250 + edge) * hop, None),
                    ):
                        self.assertSame(sound[part], whole[part])

    def test_the_part_of_another(self):
        codes, other = (mx.full((1, 400, 4), x) for x in (1, 2))
        new = np.array(put_part_in(self.model, codes, other))
        self.assertEqual({*new[0, 150:250].ravel()}, {2})
        self.assertEqual({*new[0, :150].ravel(), *new[0, 250:].ravel()}, {1})

    @slow(30)
    def test_the_table(self):
        """One take of each kind; in the second model's place the take itself."""

        made = []

        class Pool:
            __init__ = lambda self, *given: made.append(given)
            __enter__ = lambda self: self
            __exit__ = lambda *_: None

            def apply_async(self, function, arguments=()):
                return SimpleNamespace(get=lambda: function(*arguments))

        context = SimpleNamespace(Pool=Pool)
        same = lambda model, codes, *_, **__: SimpleNamespace(codes=codes)  # noqa: E731
        with (
            patch.object(evaluate_fill, "get_context", lambda _: context),
            patch.object(evaluate_fill, "regenerate", same),
            patch.object(evaluate_fill, "Judge", lambda: Judge(60)),
        ):
            table = fills(self.model, self.beside, 2, 0, SETTINGS[:1], **QUICK)
        self.assertEqual(
            [*table],
            [
                "the takes as they were",
                "filled in from both sides, temp 1, guidance 3 to 1",
                "continued from the left side",
                "the part of another take",
            ],
        )
        deaf = (signal.signal, (signal.SIGINT, signal.SIG_IGN))  # Ctrl-C is heard once
        self.assertEqual(made, [(None, *deaf)])
        first, filled, continued, other = table.values()
        self.assertEqual(first["... more than it was"], "0.00")
        self.assertEqual(continued, first)
        self.assertNotEqual(filled, first)
        self.assertNotEqual(other, first)

    def test_models_that_do_not_go_together(self):
        check_pair(self.model, self.beside)
        for pair in ((self.beside, self.beside), (self.model, self.model)):
            with self.assertRaisesRegex(ValueError, "--model must be a MAGNeT, and"):
                check_pair(*pair)
        other = magnet.load(ROOT / "reference" / "mono-transformers")
        with self.assertRaisesRegex(ValueError, "Both must have one codec"):
            check_pair(self.model, other)

    def test_command_lines(self):
        for flags, told in (
            (["--takes", "1"], "--takes must be 2 or more, got 1"),
            (["--model", "tiny"], "error: --model must be a MAGNeT"),
        ):
            argv = ["evaluate_fill.py", *flags]
            errors, output = io.StringIO(), io.StringIO()
            with (
                patch("sys.argv", argv),
                redirect_stderr(errors),
                redirect_stdout(output),
                self.assertRaises(SystemExit),
            ):
                evaluate_fill.main()
            self.assertIn(told, errors.getvalue())
            self.assertEqual(output.getvalue(), "")
