"""A training loop that can be stopped and resumed.

    training = Training(model, loss, args, folder, state={}, settings={"seed": 0})
    training.run(batches, names=("loss",), write=save)

It takes steps of AdamW, prints the losses, and keeps a checkpoint in `folder`, from
which it can be resumed. On a terminal a bar shows the time left. Needs settings.py,
outputs.py, progress.py, messages.py and strict.py beside it.
"""

import fcntl
import json
import math
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from safetensors import SafetensorError, safe_open

from outputs import is_there
from progress import Progress
from settings import save_arrays
from strict import in_a_line

ENDLESS = 1e9  # seconds that stand for no limit
CHECKPOINT = "checkpoint.safetensors"


def check_new(args: Any, folder: Path, *results: Path) -> None:
    """Raise FileExistsError where a training would be lost to a new one: its
    checkpoint in `folder`, or its results. `args.resume` goes on with it, `args.force`
    lets it go."""
    if args.resume or args.force:
        return
    kept = folder / CHECKPOINT
    onward = "go on with it by --resume, " if is_there(kept) else ""
    for path in (kept, *results):
        if is_there(path):
            raise FileExistsError(
                f"{path} is there already: {onward}choose another "
                "--output, or overwrite it with --force."
            )


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other trainings out of the folder of a checkpoint, which is made for it.

    Raises FileExistsError while another one runs in it.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    place = os.open(folder, os.O_RDONLY)
    try:
        lock(place, folder)
        try:
            yield
        finally:
            with suppress(OSError):  # one holds what was kept
                for path in made or [folder]:
                    path.rmdir()
    finally:
        os.close(place)


def lock(place: int, folder: Path) -> None:
    """Lock an open folder. Raises FileExistsError where another process has."""
    try:
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise FileExistsError(
            f"Another training writes to {folder} now: wait until it ends, or choose "
            "another --output."
        ) from error
    except OSError:
        pass  # a file system without locks


class Training:
    """Steps of AdamW on a model's trainable parameters, with a checkpoint.

    loss: takes the model and a batch; returns the loss, the losses to print (n,), and
        new values of `state`.
    args: the flags steps, lr, seconds, seed and resume of train.py.
    folder: where CHECKPOINT lies.
    state: arrays by name that change in training, but are not parameters.
    settings: what must be the same when the training is resumed.
    compiled: whether the gradient is compiled, too: for batches of one shape.

    With `args.resume` it goes on from the checkpoint, and raises what `resume` does.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable,
        args: Any,
        folder: Path,
        state: dict[str, mx.array],
        settings: dict[str, Any],
        compiled: bool = False,
    ):
        self.optimizer = optim.AdamW(args.lr, betas=[0.9, 0.98], weight_decay=0.01)
        self.optimizer.init(model.trainable_parameters())
        self.model, self.state, self.settings = model, state, settings
        self.steps, self.rate, self.seconds = args.steps, args.lr, args.seconds
        self.path = folder / CHECKPOINT
        self.done, self.passed = 0, 0.0  # steps, seconds
        self.random = np.random.default_rng(args.seed)
        self._gradient = nn.value_and_grad(model, loss)
        self._updating = False
        if args.resume:
            self.resume()
        arrays = [model.state, self.optimizer.state]
        compile = partial(mx.compile, inputs=arrays, outputs=arrays)
        self._update = self._apply if compiled else compile(self._apply)
        self._learn_from = compile(self._learn) if compiled else self._learn
        self._at_once = compiled  # gradient and update

    def _apply(self, gradients: dict) -> None:
        """Update the weights. The gradients' norm is clipped to 1; gradients that are
        not finite count as zero: one bad batch changes little."""
        gradients, norm = optim.clip_grad_norm(gradients, 1.0)
        finite = mx.isfinite(norm)
        gradients = tree_map(lambda g: mx.where(finite, g, 0), gradients)
        self.optimizer.update(self.model, gradients)

    def _learn(self, *batch: mx.array) -> tuple[mx.array, dict[str, mx.array]]:
        """Update the weights by a batch; its losses (n,), and the new state."""
        (_, losses, state), gradients = self._gradient(self.model, *batch)
        self._updating = True
        self._update(gradients)
        return losses, state

    def step(self, batch: tuple[mx.array, ...]) -> mx.array:
        """Take one step on a batch, and return the losses (n,).

        The learning rate rises in the first tenth of the steps, or the first 200, and
        falls along a cosine to a fiftieth at the last step or second.
        """
        progress = min(max(self.done / self.steps, self.passed / self.seconds), 1)
        decay = 0.51 + 0.49 * math.cos(math.pi * progress)
        warmup = min(1, (self.done + 1) / max(1, min(200, self.steps // 10)))
        self.optimizer.learning_rate = self.rate * decay * warmup
        self._updating = self._at_once
        losses, state = self._learn_from(*batch)
        self.state.update(state)
        mx.async_eval(losses, self.model, self.optimizer.state, self.state)
        self.done += 1
        self._updating = False
        return losses

    def save(self) -> None:
        """Write the checkpoint, whole or not at all. Raises OSError."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        metadata = dict(done=self.done, passed=self.passed, settings=self.settings)
        metadata["random"] = self.random.bit_generator.state
        save_arrays(self.path, self.arrays(), {"training": json.dumps(metadata)})

    def arrays(self) -> dict[str, mx.array]:
        """All that changes in training, by the names in the checkpoint."""
        arrays = {"model": self.model.trainable_parameters()}
        arrays["optimizer"] = self.optimizer.state
        arrays = dict(tree_flatten(arrays))
        return arrays | {f"state/{name}": value for name, value in self.state.items()}

    @in_a_line
    def resume(self) -> None:
        """Go on from the checkpoint.

        Raises FileNotFoundError where there is none, or ValueError for one that is
        damaged or was made with other settings.
        """
        if not self.path.is_file():
            raise FileNotFoundError(
                f"There is nothing to resume: {self.path} is missing. Train without "
                "--resume first."
            )
        try:
            with safe_open(self.path, "numpy") as file:
                metadata = json.loads((file.metadata() or {})["training"])
            arrays = mx.load(str(self.path))
            mx.eval(arrays)
            settings, done, passed = read_progress(metadata)
            random = np.random.default_rng(0)  # tries the state
            random.bit_generator.state = metadata["random"]
        except (
            KeyError,
            OverflowError,
            RecursionError,
            RuntimeError,
            SafetensorError,
            TypeError,
            ValueError,
        ) as error:
            raise ValueError(f"{self.path} is damaged: {error!r:.300}") from error
        check_settings(self.path, settings, self.settings)
        check_arrays(self.path, arrays, self.arrays())
        self.done, self.passed = done, passed
        self.random.bit_generator.state = random.bit_generator.state
        state = {k: arrays.pop(k) for k in list(arrays) if k.startswith("state/")}
        self.state.update({k.removeprefix("state/"): v for k, v in state.items()})
        arrays = tree_unflatten(list(arrays.items()))
        self.model.update(arrays["model"])
        self.optimizer.state = arrays["optimizer"]

    def run(
        self,
        batches: Callable[[], tuple[mx.array, ...]],
        names: tuple[str, ...],
        write: Callable[[], None],
    ) -> None:
        """Train to the last step, or for `args.seconds`.

        `batches` gives the next batch, and `names` are those of the losses. The mean
        losses are printed every half minute. Every four minutes and at the end the
        checkpoint is saved, and `write` writes the caller's own files. Ctrl-C and SIGTERM
        end it after the step, and save the checkpoint only; pressed again, Ctrl-C ends
        it at once. Raises ValueError once a loss is not finite, and RuntimeError where
        the GPU fails: then the last checkpoint is kept.
        """
        with between_steps() as asked:
            try:
                with self._bar() as show:
                    self._train(batches, names, write, asked, show)
            except RuntimeError as error:  # of MLX: what was to be computed is lost
                raise RuntimeError(self.how_to_go_on(error)) from error
        if signal.SIGINT in asked:
            raise KeyboardInterrupt
        if asked:
            raise SystemExit(128 + asked[0])
        write()

    def _train(
        self,
        batches: Callable[[], tuple[mx.array, ...]],
        names: tuple[str, ...],
        write: Callable[[], None],
        asked: list[int],
        show: Callable[[], None],
    ) -> None:
        """Take the steps of `run`, until a signal is `asked`, and save the checkpoint.
        `show` is called after each."""
        start = time.perf_counter() - self.passed
        losses, last_print, last_save = [], 0.0, 0.0
        while self.done < self.steps and self.passed < self.seconds and not asked:
            losses.append(self.draw_and_step(batches))
            self.passed = time.perf_counter() - start
            show()
            if self.passed - last_print < 30 and self.done < self.steps:
                continue
            self.tell(losses, names)  # first: a loss that is not finite ends it
            losses, last_print = [], self.passed
            if self.passed - last_save > 240:
                self.save()
                write()
                last_save = self.passed
        if losses:
            self.tell(losses, names)
        self.save()

    @contextmanager
    def _bar(self) -> Iterator[Callable[[], None]]:
        """A bar of what is left: of the seconds where these are limited, else of the
        steps. Gives what moves it."""
        timed = self.seconds < ENDLESS
        place = lambda: self.passed if timed else self.done  # noqa: E731
        first, last = place(), self.seconds if timed else self.steps
        text = f"training from step {self.done} on" if self.done else "training"
        with bar(text, last - first, "s" if timed else "steps") as to:
            yield lambda: to(place() - first)

    def draw_and_step(self, batches: Callable[[], tuple[mx.array, ...]]) -> mx.array:
        """Take a step on the next batch. One that is interrupted is saved as it was
        before, or not at all: a resumed training draws the same batch again."""
        random = self.random.bit_generator.state
        try:
            return self.step(batches())
        except KeyboardInterrupt:
            if not self._updating:
                self.random.bit_generator.state = random
                self.save()
            raise

    def how_to_go_on(self, error: RuntimeError) -> str:
        """What to do where the GPU failed, in one line."""
        kept = self.path.is_file()
        onward = f"--resume goes on from {self.path}" if kept else "start it again"
        advice = "take a smaller --batch or a shorter --crop"
        if "Interactivity" in str(error):  # macOS's watchdog
            advice = "let the display sleep, or set AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1"
        why = str(error).rstrip(". \n")
        return (
            f"The GPU stopped in step {self.done}: {why}. To go on: {advice}; {onward}."
        )

    def tell(self, losses: list[mx.array], names: tuple[str, ...]) -> None:
        """Print the mean of losses (n,). Raises ValueError where it is not finite."""
        means = mx.stack(losses).mean(axis=0).tolist()
        if not all(map(math.isfinite, means)):
            raise ValueError(
                f"The loss must be finite, but is {means} in step {self.done}. A lower "
                "--lr may help."
            )
        text = ", ".join(f"{name} {mean:.4f}" for name, mean in zip(names, means))
        wipe()
        print(f"{self.passed:.0f} s, step {self.done}, losses: {text}", flush=True)


def on_terminal() -> bool:
    """Whether stderr is a terminal."""
    with suppress(AttributeError, OSError, ValueError):  # it is gone, or closed
        return sys.stderr.isatty()
    return False


@contextmanager
def bar(text: str, total: float, unit: str) -> Iterator[Callable[[float], None]]:
    """A bar with the time left, where stderr is a terminal. Gives what moves it to an
    amount."""
    with Progress(on_terminal()) as shows:
        shows.begin(text, total, unit)
        yield shows.to


def counted(items: Iterable, total: int, text: str, unit: str) -> Iterator:
    """The items, under a bar that counts those that are done."""
    with bar(text, total, unit) as to:
        for done, item in enumerate(items, 1):
            yield item
            to(done)


def wipe() -> None:
    """Empty the line that a bar stands in, so that another can be printed there. The
    bar comes back below it."""
    if on_terminal():
        with suppress(OSError, ValueError):
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def read_progress(metadata: Any) -> tuple[dict[str, Any], int, float]:
    """Settings, steps and seconds of a checkpoint. Raises ValueError, TypeError or
    KeyError for what cannot be."""
    settings, done, passed = (metadata[k] for k in ("settings", "done", "passed"))
    if type(settings) is not dict or type(done) is not int or done < 0:
        raise ValueError("its settings or steps are wrong")
    if type(passed) not in (int, float) or not 0 <= passed < 1e12:
        raise ValueError("its seconds are wrong")
    return settings, done, passed


def check_settings(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise ValueError unless the settings are those of the checkpoint. Other `data` is
    warned of: clips may be added on the way. Older checkpoints do not tell it."""
    for name, value in now.items():
        was = before.get(name)
        if name == "data" and was not in (None, value):
            warnings.warn(
                f"--data holds {value}, but {path} was trained on {was!s:.80}: it goes on "
                "with what is there now."
            )
        elif name != "data" and was != value:
            was, value = (in_words(name, x) for x in (was, value))
            raise ValueError(
                f"{name} must be as it was, {was:.80}, to resume from {path}, got "
                f"{value:.80}."
            )


def in_words(name: str, value: Any) -> str:
    """A setting as it is given."""
    if value is None:
        return "layers" if name == "targets" else "not given"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def check_arrays(
    path: Path, arrays: dict[str, mx.array], wanted: dict[str, mx.array]
) -> None:
    """Raise ValueError unless both have the same names, shapes and types."""
    forms, wanted_forms = (
        {name: (array.shape, array.dtype) for name, array in named.items()}
        for named in (arrays, wanted)
    )
    if wrong := sorted(forms.items() ^ wanted_forms.items(), key=str):
        raise ValueError(f"{path} is damaged: {wrong[0][0]} must be another array.")


@contextmanager
def between_steps() -> Iterator[list[int]]:
    """Signals that end the training are listed; the same one again is obeyed at once."""
    asked: list[int] = []

    def ask(number: int, frame: Any) -> None:
        if number in asked:
            raise KeyboardInterrupt
        asked.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield asked  # Python handles signals in the main thread only
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, ask)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
