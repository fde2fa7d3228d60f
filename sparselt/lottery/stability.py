# SPDX-License-Identifier: Apache-2.0
"""Stability to the noise of training: do two runs from the same weights end in one valley?

Two copies of a network are trained from the same weights, differing in the order of the data alone.
Along the straight line between their final weights the error is looked at; by how much it rises
above the mean of both ends is the instability. A network is called stable below 2 %. Subnetworks
match the dense network's accuracy where they are stable, and rewinding to a later iteration makes
them so.

Source: Frankle, Dziugaite, Roy and Carbin 2019, "Linear mode connectivity and the lottery ticket
    hypothesis".
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparselt.errors import OptionError, explain_mismatch
from sparselt.lottery.batch_norm import batch_norms, recompute_statistics
from sparselt.lottery.controls import Arm
from sparselt.lottery.data import Data, load_data
from sparselt.lottery.masks import density, full_masks
from sparselt.lottery.networks import Factory, build, factory_of
from sparselt.lottery.recipe import Recipe
from sparselt.lottery.search import Progress, run_levels
from sparselt.lottery.seeds import derived_seed
from sparselt.lottery.training import Step, Training, evaluate, train

__all__ = ["STABLE", "Stability", "dense_arms", "linear_path", "measure_stability", "sweep"]

Loss = Callable[[Tensor, Tensor], Tensor]
State = Mapping[str, Tensor]

STABLE = 0.02


@dataclass(frozen=True)
class Stability:
    """What lies between two runs from the same weights.

    Attributes:
        start: Iteration the two runs part at.
        density: Kept weights over prunable weights.
        errors: Test error (0 to 1) at equal steps along the line, both ends included.
        train_errors: The same on the training split.
        batch_norm: ``recomputed`` on the training split at every point, or ``none`` if there is no
            batch norm.
    """

    start: int
    density: float
    errors: tuple[float, ...]
    train_errors: tuple[float, ...]
    batch_norm: str

    @property
    def instability(self) -> float:
        """Largest test error on the line less the mean of both ends."""
        return _rise(self.errors)

    @property
    def train_instability(self) -> float:
        """The same on the training split."""
        return _rise(self.train_errors)

    @property
    def is_stable(self) -> bool:
        """Whether the instability is below 2 %."""
        return self.instability < STABLE


def linear_path(
    model: nn.Module, first: State, second: State, data: Data, points: int = 30
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Errors along the line between two sets of weights.

    Batch-norm statistics belong to the weights they were gathered with, so they are gathered anew
    on the training split at every point, both ends included.

    Args:
        model: The network; its weights are overwritten.
        first: State dict of one end.
        second: State dict of the other.
        data: On the model's device.
        points: Number of points, both ends included, at least 3.

    Returns:
        (test errors, training errors), one a point.

    Raises:
        OptionError: Fewer than 3 points.
    """
    if points < 3:
        raise OptionError(explain_mismatch("points", "at least 3", points))
    test_errors, train_errors = [], []
    for index in range(points):
        share = index / (points - 1)
        model.load_state_dict(_between(first, second, share))
        recompute_statistics(model, data.train[0])
        test_errors.append(1 - evaluate(model, data.test)[1])
        train_errors.append(1 - evaluate(model, data.train)[1])
    return tuple(test_errors), tuple(train_errors)


def measure_stability(
    model: nn.Module,
    data: Data,
    recipe: Recipe,
    arm: Arm,
    *,
    points: int = 30,
    pair: int = 0,
    loss: Loss = F.cross_entropy,
    progress: Callable[[Step], None] | None = None,
) -> Stability:
    """Trains two copies from ``arm`` in different data orders and looks along the line between
    them.

    Args:
        model: A network of the right shape; left as it was.
        data: On the model's device.
        recipe: How to train; from ``arm.start`` to its last iteration.
        arm: Weights, masks and iteration to part at: of a level (``Level.arm``) or of
            :func:`dense_arms`.
        points: Number of points on the line.
        pair: Seeds the two data orders; another pair is another sample.
        loss: From outputs and labels to a scalar.
        progress: Called at every look at the validation split.
    """
    ends = []
    for copy_index in range(2):
        trained = copy.deepcopy(model)
        trained.load_state_dict(arm.state)
        how = Training(
            recipe,
            start=arm.start,
            order_seed=derived_seed(recipe.seed, "stability", pair, copy_index),
            loss=loss,
            progress=progress,
        )
        train(trained, data, how, arm.masks)
        ends.append(trained.state_dict())
    errors, train_errors = linear_path(copy.deepcopy(model), ends[0], ends[1], data, points)
    handled = "recomputed" if batch_norms(model) else "none"
    return Stability(arm.start, density(arm.masks), errors, train_errors, handled)


def dense_arms(
    network: str | Factory, data: Data, recipe: Recipe, iterations: Sequence[int]
) -> dict[int, Arm]:
    """The dense network as it is at each of ``iterations``, from one training in the recipe's own
    data order.
    """
    model = build(
        factory_of(network, data.shape, data.classes), derived_seed(recipe.seed, "weights")
    )
    masks, arms = full_masks(model, recipe), dict[int, Arm]()

    def observe(iteration: int, observed: nn.Module) -> None:
        if iteration in iterations:
            state = {name: value.clone() for name, value in observed.state_dict().items()}
            arms[iteration] = Arm(state, masks, iteration)

    order = derived_seed(recipe.seed, "order")
    train(model, data, Training(recipe, stop=max(iterations), order_seed=order, observe=observe))
    return arms


def sweep(
    network: str | Factory,
    data: str | Data,
    recipe: Recipe,
    rewinds: Sequence[int],
    *,
    points: int = 30,
    pairs: int = 1,
    folder: str | Path | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Iterator[tuple[Stability, Stability, float]]:
    """Stability of the dense network and of its ticket, over rewinding points.

    Args:
        network: A key of ``NETWORKS``, or a function that builds your network.
        data: A key of ``DATASETS``, or your tensors.
        recipe: Of the search; its last level is the ticket, and ``rewind`` is set to each point in
            turn.
        rewinds: Iterations to rewind to.
        points: Number of points on each line.
        pairs: Pairs of data orders; errors are averaged over them.
        folder: Where the searches are kept, as for ``run_levels``.
        progress: As for ``run_levels``.

    Yields:
        For each point (dense, ticket, test accuracy of the ticket).
    """
    loaded = load_data(data) if isinstance(data, str) else data
    model = build(factory_of(network, loaded.shape, loaded.classes), 0)
    dense = dense_arms(network, loaded, recipe, rewinds)
    for point in rewinds:
        at_point = replace(recipe, rewind=point)
        levels = run_levels(network, loaded, at_point, folder=folder, progress=progress)
        last = list(levels)[-1]
        both = [
            _mean(
                [
                    measure_stability(model, loaded, at_point, arm, points=points, pair=pair)
                    for pair in range(pairs)
                ]
            )
            for arm in (dense[point], last.arm)
        ]
        yield both[0], both[1], last.outcome.test_accuracy


def _between(first: State, second: State, share: float) -> dict[str, Tensor]:
    """The point ``share`` of the way; counters and other integers are those of the first end."""
    return {
        name: torch.lerp(value, second[name], share) if value.is_floating_point() else value
        for name, value in first.items()
    }


def _mean(samples: Sequence[Stability]) -> Stability:
    def averaged(rows: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
        return tuple(sum(column) / len(column) for column in zip(*rows, strict=True))

    return replace(
        samples[0],
        errors=averaged([sample.errors for sample in samples]),
        train_errors=averaged([sample.train_errors for sample in samples]),
    )


def _rise(errors: tuple[float, ...]) -> float:
    return max(errors) - (errors[0] + errors[-1]) / 2
