"""evaluate.py, of models that follow and models that do not."""

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from functools import cache, partial
from types import SimpleNamespace
from unittest.mock import Mock, patch

import mlx.core as mx
import numpy as np
from common import Test, slow

import evaluate
import synth


class Echo:
    """Stands for a model that plays what it is told, as `wrong` makes of it, with a
    codec that keeps all."""

    audio_encoder = Mock(
        encode=lambda audio: [Mock(codes=audio)], decode_chunk=lambda codes: codes
    )

    config = SimpleNamespace(text_encoder="there is one", masking=None)

    def __init__(self, wrong=lambda clip: clip):
        self.wrong, self.calls = wrong, []

    def generate(self, texts: list[str], duration: float, **options) -> mx.array:
        self.calls.append((texts, duration, options))
        random = np.random.default_rng(3)
        clips = [self.wrong(self.told(text)) for text in texts]
        sounds = np.stack([synth.render(clip, random, duration) for clip in clips])
        return mx.array(sounds)[..., None]

    @staticmethod
    def told(text: str) -> synth.Clip:
        """The clip of a caption: of the words for a trait the longest that is there."""
        found = []
        for values in (synth.TRAITS | {"timbre": (*synth.VOICES,)}).values():
            said = [(len(w), v) for v in values for w in synth.WORDS[v] if w in text]
            found.append(max(said)[1] if said else "without")
        return synth.Clip(*found)


class TestEvaluate(Test):
    judge = staticmethod(cache(partial(evaluate.Judge, 60)))

    def table(self, model: Echo, *flags: str) -> dict[str, list[float]]:
        """The rows that the script prints; its messages where it fails."""
        given = patch.object(evaluate.magnet, "load", return_value=model)
        argv = ["evaluate.py", "--model", "x", *flags]
        with given as self.given, patch.object(evaluate, "Judge", self.judge):
            with redirect_stdout(io.StringIO()) as out, patch.object(sys, "argv", argv):
                evaluate.main()
        head, _, *rows = out.getvalue().splitlines()
        self.assertRegex(head, r"^\| \| register \| tempo \| timbre \| drums \|")
        rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
        return {
            name: [float(cell.rstrip("%")) / 100 for cell in row] for name, *row in rows
        }

    @slow(3)
    def test_a_model_that_follows(self):
        model = Echo()
        table = self.table(model, "--prompts", "12", "--guidance-coef", "2")
        clips, coded, takes, chance = table.values()
        self.assertEqual(clips, coded)
        for row in (clips, takes):
            self.assertGreaterEqual(min(row), 0.9, table)
        self.assertLess(max(chance), 0.8, table)
        ((texts, duration, options),) = model.calls
        self.assertEqual((len(texts), duration, options["guidance_coef"]), (12, 4, 2))
        self.assertTrue(all(model.told(text).held_out for text in texts), texts)
        self.given.assert_called_once_with("x", adapter=None)

    def test_a_magnet(self):
        """Whose guidance is its own."""
        model = Echo()
        model.config = SimpleNamespace(text_encoder="there is one", masking={})
        table = self.table(model, "--prompts", "2")
        self.assertIn("takes, guidance 10 to 1", table)
        self.assertEqual({*model.calls[0][2]}, {"seed", "batch_size"})
        with self.assertRaisesRegex(SystemExit, "leave out --guidance-coef"):
            self.table(model, "--prompts", "2", "--guidance-coef", "3")

    @slow(6)
    def test_a_model_that_does_not(self):
        """What is wrong shows in its own column."""
        others = dict(timbre="bell", register="low", tempo="fast", drums="with")
        values = list(others.values())
        for i, name in enumerate(("timbre", "register", "tempo", "drums")):
            wrong = Echo(lambda clip: clip._replace(**{name: values[i]}))  # noqa: B023
            takes = list(self.table(wrong, "--prompts", "12").values())[2]
            found = dict(zip(("register", "tempo", "timbre", "drums"), takes))
            self.assertLess(found.pop(name), 0.7, name)
            self.assertGreaterEqual(min(found.values()), 0.8, (name, found))

    @slow(4)
    def test_timbre_of_an_adapter(self):
        model = Echo()
        flags = ("--adapter", "a.safetensors", "--timbre", "brass", "--prompts", "12")
        clips, _, takes, _ = self.table(model, *flags).values()
        self.assertGreaterEqual(min(takes[:4]), 0.9)
        far = Echo(lambda clip: clip._replace(timbre="sine"))
        farther = list(self.table(far, *flags).values())[2][4]
        self.assertLess(takes[4], 2 * clips[4])
        self.assertGreater(farther, 100 * takes[4])
        timbres = {model.told(text).timbre for text in model.calls[0][0]}
        self.assertEqual(timbres, {"brass"})
        self.given.assert_called_with("x", adapter="a.safetensors")

    def test_quantized(self):
        flags = ("--q-mode", "mxfp4", "--q-group-size", "32", "--prompts", "2")
        self.table(Echo(), *flags)
        asked = dict(q_mode="mxfp4", q_group_size=32)
        self.given.assert_called_once_with("x", adapter=None, **asked)

    def test_codec(self):
        """Half of the amplitude costs distance, but is the same signal."""
        codec = Mock(encode=lambda audio: [Mock(codes=mx.repeat(audio, 4, 2))])
        codec.decode_chunk = lambda codes: codes.shape[2] / 8 * codes[..., :1]
        model = Mock(audio_encoder=codec)
        given = patch.object(evaluate.magnet, "load", return_value=model)
        argv = ["evaluate.py", "--codec", "x"]
        make = synth.make
        short = patch.object(synth, "make", lambda *its: make(*its[:2], seconds=1.0))
        with given, short, redirect_stdout(io.StringIO()) as out:
            with patch.object(sys, "argv", argv):
                evaluate.main()
        rows = [row.strip("|").split("|") for row in out.getvalue().splitlines()]
        self.assertEqual([row[0].split()[0] for row in rows[2:]], ["1", "2", "4"])
        distances = [float(row[1]) for row in rows[2:]]
        self.assertEqual(distances, sorted(distances, reverse=True))
        self.assertGreater(min(float(row[2]) for row in rows[2:]), 60)

    def test_si_sdr(self):
        wanted, noise = np.random.default_rng(0).standard_normal((2, 100_000))
        self.assertAlmostEqual(evaluate.si_sdr(3 * wanted + 0.3 * noise, wanted), 20, 1)
        self.assertAlmostEqual(evaluate.si_sdr(wanted + noise, wanted), 0, 1)

    def test_silence_is_nothing(self):
        judge, found = evaluate.Judge(30), evaluate.measure(
            np.zeros(128_000, np.float32)
        )
        self.assertEqual(set(judge.name(found).values()), {""})
        row = evaluate.cells(judge, [found], [synth.CLIPS[0]], "bell")
        self.assertEqual(list(row.values()), ["0.0%"] * 4 + ["inf"])

    def test_wrong_command_lines(self):
        for flags in (
            "--model x --duration 0.5",
            "--model x --prompts 0",
            "--codec x --timbre brass",
            "--codec x --q-mode mxfp4",
            "",
        ):
            argv = ["evaluate.py", *flags.split()]
            with patch.object(sys, "argv", argv), redirect_stderr(io.StringIO()) as err:
                with self.assertRaises(SystemExit):
                    evaluate.main()
            self.assertRegex(err.getvalue(), "^evaluate.py: error: .*\n$")

    def test_a_model_without_text(self):
        """What is wrong is the model, not a prompt that nobody gave."""
        model = Echo()
        model.config = SimpleNamespace(text_encoder=None)
        with self.assertRaisesRegex(SystemExit, "x follows no text, .*--codec"):
            self.table(model)
        self.assertEqual(model.calls, [])

    def test_interrupt(self):
        for script, step in ((evaluate, "follow"), (synth, "listen")):
            argv = ["x.py", *(["--model", "x"] if script is evaluate else [])]
            with patch.object(script, step, side_effect=KeyboardInterrupt):
                with patch.object(sys, "argv", argv):
                    with self.assertRaises(SystemExit) as stop:
                        script.main()
            self.assertEqual(stop.exception.code, 130)
