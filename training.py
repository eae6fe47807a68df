"""A training: steps over a model's parameters, which can be stopped and gone on with.

    training = Training(model, loss, options, folder, state={}, settings={"seed": 0})
    training.run(batches, names=("loss",), keep=save)

What is needed to go on lies in `folder`. Needs settings.py beside it, to write files.
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
    """Steps over a model's parameters, with what is needed to go on after a stop.

    `state` is all that changes but the parameters: arrays by name. `settings` are
    what must be the same when it goes on.
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
        self.done, self.passed = 0, 0.0
        self.random = np.random.default_rng(args.seed)
        self._gradient = nn.value_and_grad(model, loss)
        if args.resume:
            self.resume()
        moving = [model.state, self.optimizer.state]
        self._update = mx.compile(self._apply, inputs=moving, outputs=moving)

    def _apply(self, gradients: dict) -> None:
        """Move by gradients of a norm of 1 at most; ones that are not finite are none."""
        gradients, norm = optim.clip_grad_norm(gradients, 1.0)
        usable = mx.isfinite(norm)
        gradients = tree_map(lambda g: mx.where(usable, g, 0), gradients)
        self.optimizer.update(self.model, gradients)

    def step(self, batch: tuple[mx.array, ...]) -> mx.array:
        """One step on a batch; returns the losses. The learning rate rises in the first
        tenth, at most 200 steps, and falls to a fiftieth."""
        progress = min(max(self.done / self.steps, self.passed / self.seconds), 1)
        falling = 0.51 + 0.49 * math.cos(math.pi * progress)
        rising = min(1, (self.done + 1) / max(1, min(200, self.steps // 10)))
        self.optimizer.learning_rate = self.rate * falling * rising
        (_, losses, state), gradients = self._gradient(self.model, *batch)
        self._update(gradients)
        self.state.update(state)
        mx.async_eval(losses, self.model, self.optimizer.state, self.state)
        self.done += 1
        return losses

    def save(self) -> None:
        """Keep all to go on from; whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {"model": self.model.trainable_parameters()}
        arrays["optimizer"] = self.optimizer.state
        arrays = dict(tree_flatten(arrays))
        arrays |= {f"state/{name}": value for name, value in self.state.items()}
        told = dict(done=self.done, passed=self.passed, settings=self.settings)
        told["random"] = self.random.bit_generator.state
        save_arrays(self.path, arrays, {"training": json.dumps(told)})

    def resume(self) -> None:
        """Go on from what `save` kept. Raises FileNotFoundError without it, or
        ValueError for one that is damaged or of other settings."""
        if not self.path.is_file():
            raise FileNotFoundError(f"There is nothing to resume: no {self.path}.")
        try:
            with safe_open(self.path, "numpy") as file:
                told = json.loads((file.metadata() or {})["training"])
            arrays = mx.load(str(self.path))
            mx.eval(arrays)
        except (KeyError, RuntimeError, SafetensorError, ValueError) as error:
            raise ValueError(f"{self.path} is damaged: {error}") from error
        for name, value in self.settings.items():
            if told["settings"].get(name) != value:
                raise ValueError(
                    f"{name} must be as it was, {told['settings'].get(name)}, to go on "
                    f"from {self.path}; got {value}."
                )
        self.done, self.passed = told["done"], told["passed"]
        self.random.bit_generator.state = told["random"]
        kept = {k: arrays.pop(k) for k in list(arrays) if k.startswith("state/")}
        self.state.update({k.removeprefix("state/"): v for k, v in kept.items()})
        arrays = tree_unflatten(list(arrays.items()))
        self.model.update(arrays["model"])
        self.optimizer.state = arrays["optimizer"]

    def run(
        self,
        batches: Callable[[], tuple[mx.array, ...]],
        names: tuple[str, ...],
        keep: Callable[[], None],
    ) -> None:
        """Train to the last step, or for so many seconds; tells the losses every half
        minute. Saves what to go on from every four, at the end and at Ctrl-C; each time
        but the last has the caller `keep` what came of it. Raises ValueError once a
        loss is not finite."""
        start, told, said, kept = time.perf_counter() - self.passed, [], 0.0, 0.0
        try:
            while self.done < self.steps and self.passed < self.seconds:
                told.append(self.step(batches()))
                self.passed = time.perf_counter() - start
                if self.passed - said < 30 and self.done < self.steps:
                    continue
                self.tell(told, names)  # which looks whether they are finite
                told, said = [], self.passed
                if self.passed - kept > 240:
                    self.save()
                    keep()
                    kept = self.passed
        finally:
            if told:
                self.tell(told, names)
            self.save()
        keep()

    def tell(self, losses: list[mx.array], names: tuple[str, ...]) -> None:
        means = mx.stack(losses).mean(axis=0).tolist()
        if not all(map(math.isfinite, means)):
            raise ValueError(
                f"The loss must be finite, but is {means} in step {self.done}; a lower "
                "--lr may help."
            )
        found = ", ".join(f"{name} {mean:.4f}" for name, mean in zip(names, means))
        print(f"{self.passed:.0f} s, step {self.done}: {found}", flush=True)
