"""A training loop that can be stopped and resumed.

    training = Training(model, loss, args, folder, state={}, settings={"seed": 0})
    training.run(batches, names=("loss",), write=save)

It takes steps of AdamW, prints the losses, and keeps a checkpoint in `folder`, from
which it can be resumed. Needs settings.py beside it.
"""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from safetensors import SafetensorError, safe_open

from settings import save_arrays


class Training:
    """Steps of AdamW on a model's trainable parameters, with a checkpoint.

    loss: takes the model and a batch; returns the loss, the losses to print (n,), and
        new values of `state`.
    args: the flags steps, lr, seconds, seed and resume of train.py.
    folder: where `checkpoint.safetensors` lies.
    state: arrays by name that change in training, but are not parameters.
    settings: what must be the same when the training is resumed.

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
    ):
        self.optimizer = optim.AdamW(args.lr, betas=[0.9, 0.98], weight_decay=0.01)
        self.optimizer.init(model.trainable_parameters())
        self.model, self.state, self.settings = model, state, settings
        self.steps, self.rate, self.seconds = args.steps, args.lr, args.seconds
        self.path = folder / "checkpoint.safetensors"
        self.done, self.passed = 0, 0.0  # steps, seconds
        self.random = np.random.default_rng(args.seed)
        self._gradient = nn.value_and_grad(model, loss)
        if args.resume:
            self.resume()
        arrays = [model.state, self.optimizer.state]
        self._update = mx.compile(self._apply, inputs=arrays, outputs=arrays)

    def _apply(self, gradients: dict) -> None:
        """Update the weights. The gradients' norm is clipped to 1; gradients that are
        not finite count as zero: one bad batch changes little."""
        gradients, norm = optim.clip_grad_norm(gradients, 1.0)
        finite = mx.isfinite(norm)
        gradients = tree_map(lambda g: mx.where(finite, g, 0), gradients)
        self.optimizer.update(self.model, gradients)

    def step(self, batch: tuple[mx.array, ...]) -> mx.array:
        """Take one step on a batch, and return the losses (n,).

        The learning rate rises in the first tenth of the steps, or the first 200, and
        falls along a cosine to a fiftieth at the last step or second.
        """
        progress = min(max(self.done / self.steps, self.passed / self.seconds), 1)
        decay = 0.51 + 0.49 * math.cos(math.pi * progress)
        warmup = min(1, (self.done + 1) / max(1, min(200, self.steps // 10)))
        self.optimizer.learning_rate = self.rate * decay * warmup
        (_, losses, state), gradients = self._gradient(self.model, *batch)
        self._update(gradients)
        self.state.update(state)
        mx.async_eval(losses, self.model, self.optimizer.state, self.state)
        self.done += 1
        return losses

    def save(self) -> None:
        """Write the checkpoint, whole or not at all. Raises OSError."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {"model": self.model.trainable_parameters()}
        arrays["optimizer"] = self.optimizer.state
        arrays = dict(tree_flatten(arrays))
        arrays |= {f"state/{name}": value for name, value in self.state.items()}
        metadata = dict(done=self.done, passed=self.passed, settings=self.settings)
        metadata["random"] = self.random.bit_generator.state
        save_arrays(self.path, arrays, {"training": json.dumps(metadata)})

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
            settings, random = dict(metadata["settings"]), metadata["random"]
            done, passed = int(metadata["done"]), float(metadata["passed"])
        except (
            KeyError,
            RuntimeError,
            SafetensorError,
            TypeError,
            ValueError,
        ) as error:
            raise ValueError(f"{self.path} is damaged: {error!r}") from error
        for name, value in self.settings.items():
            if settings.get(name) != value:
                raise ValueError(
                    f"{name} must be as it was, {settings.get(name)}, to resume from "
                    f"{self.path}, got {value}."
                )
        self.done, self.passed = done, passed
        self.random.bit_generator.state = random
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
        checkpoint is saved, and `write` writes the caller's own files. Ctrl-C saves the
        checkpoint only. Raises ValueError once a loss is not finite, and RuntimeError
        where the GPU fails: then the last checkpoint is kept.
        """
        start = time.perf_counter() - self.passed
        losses, last_print, last_save, failed = [], 0.0, 0.0, False
        try:
            while self.done < self.steps and self.passed < self.seconds:
                losses.append(self.step(batches()))
                self.passed = time.perf_counter() - start
                if self.passed - last_print < 30 and self.done < self.steps:
                    continue
                self.tell(losses, names)  # first: a loss that is not finite ends it
                losses, last_print = [], self.passed
                if self.passed - last_save > 240:
                    self.save()
                    write()
                    last_save = self.passed
        except RuntimeError as error:  # of MLX
            failed = True  # what was to be computed is lost, the weights with it
            raise RuntimeError(self.how_to_go_on(error)) from error
        finally:
            if losses and not failed:
                self.tell(losses, names)
            if not failed:
                self.save()
        write()

    def how_to_go_on(self, error: RuntimeError) -> str:
        """What to do where the GPU failed, in one line."""
        kept = self.path.is_file()
        onward = f"--resume goes on from {self.path}" if kept else "start it again"
        advice = "take a smaller --batch or a shorter --crop"
        if "Interactivity" in str(error):  # macOS's watchdog
            advice = "let the display sleep, or set AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1"
        return f"The GPU stopped in step {self.done}: {error} To go on: {advice}; {onward}."

    def tell(self, losses: list[mx.array], names: tuple[str, ...]) -> None:
        """Print the mean of losses (n,). Raises ValueError where it is not finite."""
        means = mx.stack(losses).mean(axis=0).tolist()
        if not all(map(math.isfinite, means)):
            raise ValueError(
                f"The loss must be finite, but is {means} in step {self.done}. A lower "
                "--lr may help."
            )
        text = ", ".join(f"{name} {mean:.4f}" for name, mean in zip(names, means))
        print(f"{self.passed:.0f} s, step {self.done}: {text}", flush=True)
