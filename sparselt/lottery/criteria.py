# SPDX-License-Identifier: Apache-2.0
"""What decides which weights go: a score for every weight, the smallest pruned first.

To add a criterion, write a function from a :class:`Subject` to scores and add one line to
``CRITERIA``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparselt.errors import OptionError, explain_mismatch
from sparselt.lottery.data import Data
from sparselt.lottery.saliency import SYNFLOW_STEPS, grasp, snip, synflow

__all__ = ["CRITERIA", "Criterion", "Scores", "Subject", "criterion_of"]

Scores = dict[str, Tensor]


@dataclass(frozen=True)
class Subject:
    """What a criterion may look at.

    Attributes:
        model: The network, pruned weights at 0.0: trained, or as training starts from it.
        start: The weights that training started from, by tensor name, dense.
        masks: The present masks.
        data: The data; criteria may use the training split alone.
        generator: For random choices.
    """

    model: nn.Module
    start: Mapping[str, Tensor]
    masks: Mapping[str, Tensor]
    data: Data
    generator: torch.Generator

    def weights(self) -> Scores:
        """The model's masked tensors, detached."""
        return {name: self.model.get_parameter(name).detach().cpu() for name in self.masks}


@dataclass(frozen=True)
class Criterion:
    """One way to rank weights.

    Attributes:
        score: Scores of every weight; larger is kept longer.
        before_training: Whether it ranks the weights that training starts from, not the trained
            ones.
        steps: Rounds of scoring and pruning that lead from one level to the next.
    """

    score: Callable[[Subject], Scores]
    before_training: bool = False
    steps: int = 1


def magnitude(subject: Subject) -> Scores:
    """Absolute value (Han et al. 2015; Frankle and Carbin 2018)."""
    return {name: weight.abs() for name, weight in subject.weights().items()}


def smallest(subject: Subject) -> Scores:
    """The reverse of magnitude: keeps the smallest weights, as a control."""
    return {name: -weight.abs() for name, weight in subject.weights().items()}


def movement(subject: Subject) -> Scores:
    """How far training moved a weight (Zhou et al. 2019)."""
    return {name: (w - subject.start[name]).abs() for name, w in subject.weights().items()}


def magnitude_increase(subject: Subject) -> Scores:
    """How much larger training made a weight (Zhou et al. 2019)."""
    return {name: w.abs() - subject.start[name].abs() for name, w in subject.weights().items()}


def random(subject: Subject) -> Scores:
    """Uniform random scores."""
    return {
        name: torch.rand(mask.shape, generator=subject.generator)
        for name, mask in subject.masks.items()
    }


CRITERIA: dict[str, Criterion] = {
    "magnitude": Criterion(magnitude),
    "magnitude_at_start": Criterion(magnitude, before_training=True),
    "smallest": Criterion(smallest),
    "movement": Criterion(movement),
    "magnitude_increase": Criterion(magnitude_increase),
    "random": Criterion(random, before_training=True),
    "snip": Criterion(snip, before_training=True),
    "grasp": Criterion(grasp, before_training=True),
    "synflow": Criterion(synflow, before_training=True, steps=SYNFLOW_STEPS),
}


def criterion_of(name: str) -> Criterion:
    """The criterion of that name.

    Raises:
        OptionError: There is none.
    """
    if name not in CRITERIA:
        raise OptionError(explain_mismatch("criterion", f"one of {', '.join(CRITERIA)}", name))
    return CRITERIA[name]
