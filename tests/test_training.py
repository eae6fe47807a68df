"""A training: its rate, what it keeps, and how it goes on."""

import argparse
import io
import itertools
import json
import math
import signal
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from unittest.mock import Mock, patch

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from common import Test
from safetensors import safe_open

from settings import save_arrays
from train_codec import first_codebooks
from training import Training, counted


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Gone(Terminal):
    """A terminal that somebody has closed."""

    def write(self, text: str) -> int:
        raise OSError(5, "Input/output error")

    flush = isatty = lambda self: self.write("")


class Going(Gone):
    """One that is closed after the question whether it is one."""

    def isatty(self) -> bool:
        return True


class TestTraining(Test):
    def training(
        self, model: nn.Module, loss: Callable | None, state: dict = {}, **told
    ) -> Training:
        args = dict(lr=1e-3, steps=9, seconds=1e9, seed=0, resume=False) | told
        args = argparse.Namespace(**args)
        return Training(model, loss, args, self.folder, dict(state), {})

    @staticmethod
    def sum_loss(model: nn.Module, x: mx.array) -> tuple:
        return model(x).sum(), mx.zeros(1), {}

    def test_rate_rises_and_falls(self):
        training = self.training(nn.Linear(2, 1), self.sum_loss, lr=1.0, steps=1000)
        for done, rate in ((0, 0.01), (49, 0.497), (500, 0.51), (999, 0.02)):
            training.done = done
            training.step((mx.ones((1, 2)),))
            self.assertAlmostEqual(training.optimizer.learning_rate.item(), rate, 2)

    def test_keeps_on_the_way(self):
        """Every four minutes, and at the end."""
        training = self.training(nn.Linear(2, 1), self.sum_loss, steps=8)
        kept = []

        def keep():
            self.assertTrue(training.path.is_file())
            kept.append(training.done)

        clock = Mock(side_effect=itertools.count(0, 100))  # seconds
        with patch("training.time.perf_counter", clock), redirect_stdout(io.StringIO()):
            training.run(lambda: (mx.ones((1, 2)),), ("loss",), keep)
        self.assertEqual(kept, [3, 6, 8])

    def run_on(self, terminal: io.StringIO, stdout: io.StringIO, **told) -> Training:
        """A training of which each look at the clock takes ten seconds."""
        training = self.training(nn.Linear(2, 1), self.sum_loss, **told)
        clock = Mock(side_effect=itertools.count(0, 10))
        with patch("training.time.perf_counter", clock), redirect_stdout(stdout):
            with redirect_stderr(terminal):
                training.run(lambda: (mx.ones((1, 2)),), ("loss",), lambda: None)
        return training

    def test_bar_with_the_time_left(self):
        plain, quiet = io.StringIO(), io.StringIO()
        self.run_on(quiet, plain)
        self.assertEqual(quiet.getvalue(), "")  # no terminal, no word
        self.assertEqual(plain.getvalue().count(": loss 0.0000\n"), 3)
        for told, text in (
            ({}, r"training:   0% .* 0.0 of 9.0 steps, \? left"),
            ({"seconds": 80}, r"training:   0% .* 0.0 of 80.0 s, \?"),
        ):
            terminal, lines = Terminal(), io.StringIO()
            self.run_on(terminal, lines, **told)
            self.assertRegex(terminal.getvalue(), text)
            if not told:
                self.assertEqual(lines.getvalue(), plain.getvalue())

    def test_bar_of_a_training_that_goes_on(self):
        self.run_on(Terminal(), io.StringIO(), steps=4)
        terminal = Terminal()
        self.run_on(terminal, io.StringIO(), steps=9, resume=True)
        self.assertRegex(
            terminal.getvalue(), r"training from step 4 on: .* of 5.0 steps"
        )

    def test_lines_and_bar_on_one_terminal(self):
        """A line begins where the bar was wiped away."""
        terminal = Terminal()
        self.run_on(terminal, terminal)
        for text in terminal.getvalue().split("loss 0.0000\n")[:-1]:
            self.assertRegex(text, r"\r\x1b\[K\d+ s, step \d, losses: $")
        last = terminal.getvalue().rpartition("loss 0.0000\n")[2]
        self.assertEqual(last.strip(" \r"), "")

    def test_a_terminal_that_is_gone_costs_nothing(self):
        for terminal in (Gone(), Going(), None):
            lines = io.StringIO()
            self.assertEqual(self.run_on(terminal, lines).done, 9)
            self.assertEqual(lines.getvalue().count("loss 0"), 3)

    def test_what_is_counted(self):
        terminal = Terminal()
        with redirect_stderr(terminal):
            self.assertEqual([*counted("abc", 3, "encoding", "clips")], [*"abc"])
        self.assertRegex(terminal.getvalue(), r"encoding:   0% .* 0.0 of 3.0 clips, \?")
        self.assertEqual(terminal.getvalue().split("\r")[-1], "")

    def test_a_gradient_that_is_no_number_changes_little(self):
        model = nn.Linear(2, 1, bias=False)
        loss = lambda m, x: (m(x).sum() * x.sum(), mx.zeros(1), {})  # noqa: E731
        training = self.training(model, loss)
        for x in (1.0, math.inf, 1.0):
            before = mx.array(model.weight)
            training.step((mx.full((1, 2), x),))
            self.assertTrue(mx.isfinite(model.weight).all())
            moved = mx.abs(model.weight - before)  # by more than the decay of weights
            self.assertGreater(moved.min().item(), 1e-4)

    def test_gpu_that_stops(self):
        """As macOS does where the display is on: what is said, and what is kept."""
        watchdog = "[METAL] Command buffer execution failed: Impacting Interactivity."
        for error, advice in (
            (
                watchdog,
                "let the display sleep, or set AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1",
            ),
            ("[metal::malloc] Out of memory", "take a smaller --batch or a shorter"),
        ):
            training = self.training(nn.Linear(2, 1), self.sum_loss, steps=8)
            batches = [(mx.ones((1, 2)),)] * 3
            for onward in ("start it again", "--resume goes on from"):
                given = iter(batches)

                def batch() -> tuple[mx.array, ...]:
                    for arrays in given:
                        return arrays
                    raise RuntimeError(error)

                with redirect_stdout(io.StringIO()):
                    with self.assertRaises(RuntimeError) as stopped:
                        training.run(batch, ("loss",), lambda: None)
                message = str(stopped.exception)
                self.assertIn(f": {error.rstrip('.')}. To go on: ", message)
                for text in (error, advice, onward, f"in step {training.done}: "):
                    self.assertIn(text, message)
                self.assertNotIn("\n", message)
                if onward == "start it again":
                    self.assertFalse(training.path.exists())
                    training.save()
                    kept = training.path.read_bytes()
            self.assertEqual(training.path.read_bytes(), kept)
            training.path.unlink()

    def test_ctrl_c_loses_nothing(self):
        """Whenever it comes, a training that is resumed ends as it would have ended."""

        def train(press_at: int | None = None, within: str = "", **told) -> list:
            mx.random.seed(0)
            model = nn.Linear(3, 1)

            def loss(model: nn.Module, x: mx.array) -> tuple:
                press("loss")
                return (model(x) ** 2).sum(), mx.ones(1), {}

            def press(place: str) -> None:
                if training.done == press_at and within == place:
                    signal.raise_signal(signal.SIGINT)

            def batches() -> tuple[mx.array]:
                numbers = training.random.random((1, 3))
                press("batch")
                return (mx.array(numbers.astype(np.float32)),)

            training = self.training(model, loss, lr=0.1, **told)
            with redirect_stdout(io.StringIO()):
                training.run(batches, ("loss",), lambda: None)
            return model.weight.tolist()

        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        self.addCleanup(signal.signal, signal.SIGINT, before)
        whole = train()
        for within in ("batch", "loss"):
            for step in (0, 1, 5, 8):
                with self.assertRaises(KeyboardInterrupt):
                    train(step, within)
                self.assertEqual(train(resume=True), whole, (within, step))
        self.assertEqual(signal.getsignal(signal.SIGINT), signal.default_int_handler)

    def test_interrupted_at_once(self):
        """What was drawn for a step that is not made is drawn again."""
        training, drawn = self.training(nn.Linear(2, 1), self.sum_loss), []

        def batches() -> tuple[mx.array]:
            drawn.append(training.random.random())
            raise KeyboardInterrupt

        for _ in range(2):
            with self.assertRaises(KeyboardInterrupt):
                training.run(batches, ("loss",), lambda: None)
            training = self.training(nn.Linear(2, 1), self.sum_loss, resume=True)
        self.assertEqual(drawn[0], drawn[1])

    def test_damaged_checkpoints(self):
        training = self.training(nn.Linear(2, 1), self.sum_loss, {"a": mx.zeros(3)})
        training.save()
        arrays, path = mx.load(str(training.path)), training.path
        mx.eval(arrays)
        with safe_open(path, "numpy") as file:
            metadata = json.loads(file.metadata()["training"])
        random = metadata["random"]
        wrong = [
            metadata | {name: value}
            for name in ("done", "passed", "settings", "random")
            for value in (None, [], "x", -1, math.inf, [1, 2], True)
        ]
        for part in ({"state": 3}, {"state": {"state": "x"}}, {"bit_generator": "MT"}):
            wrong.append(metadata | {"random": random | part})
        wrong += [3, [], None, "x", {}]
        damaged = [(arrays, json.dumps(other)) for other in wrong]
        damaged += [(arrays, "{"), (arrays, "[" * 50_000)]
        for name, array in arrays.items():
            rest = {k: v for k, v in arrays.items() if k != name}
            for change in (
                {},
                {name: mx.zeros((7,), array.dtype)},
                {name: array.astype(mx.int8)},
                {f"{name}.z": array, name: array},
            ):
                damaged.append((rest | change, json.dumps(metadata)))
        for changed, text in damaged:
            save_arrays(path, changed, {"training": text})
            with self.assertRaisesRegex(
                ValueError, "checkpoint.safetensors is damaged"
            ):
                self.training(
                    nn.Linear(2, 1), self.sum_loss, {"a": mx.zeros(3)}, resume=True
                )

    def test_codec_goes_on_with_its_codebooks(self):
        def training(resume: bool, change: int) -> Training:
            state = first_codebooks(mx.random.key(0))
            state = {name: value + change for name, value in state.items()}
            return self.training(nn.Linear(2, 2), None, state, resume=resume)

        first = training(False, 1)
        first.save()
        again = training(True, 0)
        self.assertEqual(again.state.keys(), first.state.keys())
        for name, value in again.state.items():
            self.assertSame(value, first.state[name])
