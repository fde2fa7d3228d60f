# SPDX-License-Identifier: Apache-2.0
"""One training loop for every experiment.

The data order and the learning rate are functions of the iteration alone, so training can start at
any iteration and stop at any, and a run that was killed continues to bitwise the same end (on one
machine's CPU). Under torchrun every process trains on its shard of each batch.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparselt.errors import DataError, OptionError, explain_mismatch
from sparselt.lottery import distributed
from sparselt.lottery.data import Data
from sparselt.lottery.masks import MaskKeeper
from sparselt.lottery.recipe import Recipe
from sparselt.lottery.schedules import learning_rate
from sparselt.lottery.seeds import derived_seed, generator
from sparselt.tickets.file import replace_file

__all__ = ["OPTIMISERS", "Outcome", "Step", "Training", "evaluate", "train"]

Split = tuple[Tensor, Tensor]
_EVALUATION_BATCH = 2000


@dataclass(frozen=True)
class Outcome:
    """What one training led to.

    Attributes:
        train_loss, train_accuracy: At the end, on the training split.
        validation_loss, validation_accuracy: At the end, on the validation split.
        test_loss, test_accuracy: At the end, on the test split.
        early_stop_iteration: Where the validation loss was smallest, found afterwards.
        early_stop_test_accuracy: Test accuracy there.
        history: (iteration, validation loss, validation accuracy) of every look.
        seconds: Wall time; not part of equality.
    """

    train_loss: float
    train_accuracy: float
    validation_loss: float
    validation_accuracy: float
    test_loss: float
    test_accuracy: float
    early_stop_iteration: int
    early_stop_test_accuracy: float
    history: tuple[tuple[int, float, float], ...] = field(repr=False)
    seconds: float = field(compare=False)

    def to_values(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "history": [list(row) for row in self.history]}

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Outcome:
        """The inverse of :meth:`to_values`."""
        rows = tuple((int(row[0]), row[1], row[2]) for row in values["history"])
        return cls(**{**values, "history": rows})


@dataclass(frozen=True)
class Step:
    """Where a training is, for progress bars.

    Attributes:
        iteration: Iterations done.
        iterations: Iterations in all.
        validation_accuracy: At the last look; NaN before the first.
    """

    iteration: int
    iterations: int
    validation_accuracy: float


@dataclass(frozen=True)
class Training:
    """How to train, apart from what.

    Attributes:
        recipe: Optimiser, learning rate, batch, iterations.
        start: First iteration; the learning rate and the data order begin there.
        stop: Iteration to stop before; None means ``recipe.iterations``.
        order_seed: Seed of the data order (and of dropout and augmentation).
        loss: From outputs (n, classes) and labels (n,) to a scalar.
        observe: Called with (iteration, model) before every step and once after the last.
        progress: Called at every look at the validation split.
        checkpoint: File that a killed run continues from; removed when the training ends.
        checkpoint_seconds: Least time between two checkpoints.
    """

    recipe: Recipe
    start: int = 0
    stop: int | None = None
    order_seed: int = 0
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    observe: Callable[[int, nn.Module], None] | None = None
    progress: Callable[[Step], None] | None = None
    checkpoint: Path | None = None
    checkpoint_seconds: float = 30.0


OPTIMISERS: dict[str, Callable[[list[nn.Parameter], Recipe], torch.optim.Optimizer]] = {
    "sgd": lambda parameters, recipe: torch.optim.SGD(
        parameters, recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay, fused=True
    ),
    "adam": lambda parameters, recipe: torch.optim.Adam(
        parameters, recipe.lr, weight_decay=recipe.weight_decay, fused=True
    ),
    "adamw": lambda parameters, recipe: torch.optim.AdamW(
        parameters, recipe.lr, weight_decay=recipe.weight_decay, fused=True
    ),
}


def train(
    model: nn.Module, data: Data, how: Training, masks: Mapping[str, Tensor] | None = None
) -> Outcome:
    """Trains ``model`` in place, pruned weights staying exactly 0.0 after every step.

    Args:
        model: The network, with the weights to start from.
        data: On the model's device.
        how: Everything else.
        masks: By parameter name; without it nothing is pruned.

    Returns:
        The outcome; the model holds the weights of the last iteration.

    Raises:
        DataError: The loss became NaN or infinite.
        OptionError: An unknown optimiser or learning-rate schedule.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(how.order_seed, "training", how.start))
        return _Loop(model, data, how, masks or {}).run()


def evaluate(
    model: nn.Module, split: Split, loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
) -> tuple[float, float]:
    """Mean loss and accuracy of ``model`` on ``split``, in evaluation mode; the mode is put back.

    Returns:
        (loss, accuracy from 0 to 1).
    """
    was_training = model.training
    model.eval()
    total, correct = 0.0, 0
    with torch.no_grad():
        for inputs, labels in zip(
            *(torch.split(part, _EVALUATION_BATCH) for part in split), strict=True
        ):
            outputs = model(inputs)
            total += float(loss(outputs, labels)) * len(labels)
            correct += int((outputs.argmax(1) == labels).sum())
    model.train(was_training)
    return total / len(split[1]), correct / len(split[1])


class _Loop:
    """The state of one training: everything that a checkpoint has to hold."""

    def __init__(
        self, model: nn.Module, data: Data, how: Training, masks: Mapping[str, Tensor]
    ) -> None:
        recipe = how.recipe
        if recipe.optimiser not in OPTIMISERS:
            raise OptionError(
                explain_mismatch("optimiser", f"one of {', '.join(OPTIMISERS)}", recipe.optimiser)
            )
        self.model, self.data, self.how = model, data, how
        self.keeper = MaskKeeper(model, masks)
        self.forward = distributed.wrap(model)
        self.optimiser = OPTIMISERS[recipe.optimiser](list(model.parameters()), recipe)
        self.stop = recipe.iterations if how.stop is None else how.stop
        self.batch = min(recipe.batch, len(data.train[1]))
        self.iteration = how.start
        self.history: list[tuple[int, float, float]] = []
        self.best = (float("inf"), how.start, 0.0)
        self.seconds = 0.0
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def run(self) -> Outcome:
        how, began = self.how, time.perf_counter()
        self._resume()
        earlier, saved = self.seconds, time.perf_counter()
        self.model.train()
        while self.iteration < self.stop:
            if how.observe:
                how.observe(self.iteration, self.model)
            self._step()
            self.iteration += 1
            if self.iteration % how.recipe.evaluate_every == 0 or self.iteration == self.stop:
                self._look()
                self.seconds = earlier + time.perf_counter() - began
                if how.checkpoint and time.perf_counter() - saved >= how.checkpoint_seconds:
                    self._save(how.checkpoint)
                    saved = time.perf_counter()
                if how.progress:
                    how.progress(self._position())
        if how.observe:
            how.observe(self.iteration, self.model)
        outcome = self._outcome(earlier + time.perf_counter() - began)
        if how.checkpoint and distributed.is_leader():
            how.checkpoint.unlink(missing_ok=True)
        return outcome

    def _step(self) -> None:
        rate = learning_rate(self.how.recipe, self.iteration)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        inputs, labels = self._next_batch()
        loss = self.how.loss(self.forward(inputs), labels)
        self.optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.keeper.mask_gradients()
        self.optimiser.step()
        self.keeper.mask_weights()

    def _next_batch(self) -> Split:
        """The batch of this iteration: a slice of this epoch's permutation; a last short batch is
        left out.
        """
        inputs, labels = self.data.train
        epoch, index = divmod(self.iteration, len(labels) // self.batch)
        if self._order[0] != epoch:
            source = generator(self.how.order_seed, "order", epoch)
            self._order = (epoch, torch.randperm(len(labels), generator=source).to(labels.device))
        chosen = self._order[1][index * self.batch : (index + 1) * self.batch]
        chosen = distributed.shard(chosen)
        batch = inputs[chosen]
        return (_augmented(batch) if self.how.recipe.augment else batch), labels[chosen]

    def _look(self) -> None:
        distributed.share_buffers(self.model)
        loss, accuracy = evaluate(self.model, self.data.validation, self.how.loss)
        if not loss < float("inf"):
            raise DataError(
                f"training diverged: validation loss {loss} at iteration {self.iteration}; lower "
                "the "
                "learning rate or warm up"
            )
        self.history.append((self.iteration, loss, accuracy))
        if loss < self.best[0]:
            # Test accuracy is only recorded here, never chosen by.
            test_accuracy = evaluate(self.model, self.data.test, self.how.loss)[1]
            self.best = (loss, self.iteration, test_accuracy)

    def _position(self) -> Step:
        last = self.history[-1][2] if self.history else float("nan")
        return Step(self.iteration - self.how.start, self.stop - self.how.start, last)

    def _outcome(self, seconds: float) -> Outcome:
        if not self.history:
            self._look()
        train_loss, train_accuracy = evaluate(self.model, self.data.train, self.how.loss)
        test_loss, test_accuracy = evaluate(self.model, self.data.test, self.how.loss)
        return Outcome(
            train_loss=train_loss,
            train_accuracy=train_accuracy,
            validation_loss=self.history[-1][1],
            validation_accuracy=self.history[-1][2],
            test_loss=test_loss,
            test_accuracy=test_accuracy,
            early_stop_iteration=self.best[1],
            early_stop_test_accuracy=self.best[2],
            history=tuple(self.history),
            seconds=seconds,
        )

    def _save(self, path: Path) -> None:
        if not distributed.is_leader():
            return
        buffer = io.BytesIO()
        state = {
            "iteration": self.iteration,
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "history": self.history,
            "best": self.best,
            "seconds": self.seconds,
            "random": torch.get_rng_state(),
        }
        torch.save(state, buffer)
        replace_file(path, buffer.getvalue())

    def _resume(self) -> None:
        path = self.how.checkpoint
        if path is None or not path.exists():
            return
        try:
            state = torch.load(path, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimiser.load_state_dict(state["optimiser"])
        except Exception as error:
            raise DataError(
                f"{path}: not a checkpoint of this training ({type(error).__name__}); delete it to "
                "train from the start"
            ) from error
        self.iteration = state["iteration"]
        self.history = [tuple(row) for row in state["history"]]
        self.best = tuple(state["best"])
        self.seconds = state["seconds"]
        torch.set_rng_state(state["random"])


def _augmented(images: Tensor) -> Tensor:
    """Each image flipped left to right with probability 1/2, and shifted by up to 4 pixels with
    zeros coming in.
    """
    count, _, height, width = images.shape
    padded = F.pad(images, (4, 4, 4, 4))
    flip = torch.rand(count) < 0.5
    top, left = torch.randint(0, 9, (count, 1)), torch.randint(0, 9, (count, 1))
    columns = torch.arange(width).expand(count, width)
    columns = torch.where(flip[:, None], width - 1 - columns, columns) + left
    rows = torch.arange(height) + top
    index = torch.arange(count)[:, None, None, None].to(images.device)
    channels = torch.arange(images.shape[1])[None, :, None, None].to(images.device)
    rows, columns = rows.to(images.device), columns.to(images.device)
    return padded[index, channels, rows[:, None, :, None], columns[:, None, None, :]]
