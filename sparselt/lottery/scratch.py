# SPDX-License-Identifier: Apache-2.0
"""Training the pruned architecture from scratch: the control of structured pruning.

If a shrunk network trained from new weights does as well as the pruned and fine-tuned one, the
architecture was found, not the weights (Liu et al. 2019, arXiv 1810.05270).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from sparselt.errors import OptionError, explain_mismatch
from sparselt.lottery.counting import count
from sparselt.lottery.networks import Factory, build
from sparselt.lottery.recipe import Recipe
from sparselt.tickets.architecture import Delta, shrink

__all__ = ["BUDGETS", "Scratch", "scratch_control"]


@dataclass(frozen=True)
class Scratch:
    """A shrunk network with new weights, and how long it may train.

    Attributes:
        model: The network.
        recipe: The original recipe with the budget's iterations; learning-rate drops and warm-up
            are stretched along.
        stretch: Iterations over those of the original recipe.
    """

    model: nn.Module
    recipe: Recipe
    stretch: float


def _same_epochs(saving: float, most: float) -> float:
    return 1.0


def _same_compute(saving: float, most: float) -> float:
    return min(max(saving, 1.0), most)


# Stretch of the training, from how many times cheaper the small network is and the most allowed.
BUDGETS: dict[str, Callable[[float, float], float]] = {
    "scratch_e": _same_epochs,
    "scratch_b": _same_compute,
}


def scratch_control(
    factory: Factory,
    delta: Delta,
    recipe: Recipe,
    shape: tuple[int, ...],
    budget: str = "scratch_e",
    *,
    seed: int = 0,
    most: float = 2.0,
) -> Scratch:
    """The shrunk network with newly drawn weights, and the recipe of its budget.

    Args:
        factory: Builds the original network, drawing weights from the global generator.
        delta: How it was shrunk.
        recipe: How the original network was trained.
        shape: Shape of one input.
        budget: ``scratch_e`` trains for as many epochs as the original network; ``scratch_b`` for
            as many multiply-accumulates.
        seed: Of the new weights.
        most: The longest training ``scratch_b`` may ask for, in lengths of the original; the paper
            stops at 2.

    Returns:
        Network and recipe. New weights are those the factory draws, scaled by the root of the
        fan-in that was lost, so that a layer's outputs have the variance its initialisation meant.

    Raises:
        OptionError: There is no such budget, or ``most`` is below 1.

    Example:
        >>> from sparselt.tickets.architecture import ChannelGroup, Slot
        >>> slots = (Slot("0.weight", 0, 4), Slot("0.bias", 0, 4), Slot("1.weight", 1, 4))
        >>> delta = Delta((ChannelGroup(4, slots),), ((0, 3),))
        >>> make = lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        >>> control = scratch_control(make, delta, Recipe(iterations=100), (3,), "scratch_b")
        >>> control.model[0].out_features, control.recipe.iterations
        (2, 200)
    """
    if budget not in BUDGETS:
        raise OptionError(explain_mismatch("budget", f"one of {', '.join(BUDGETS)}", budget))
    if most < 1:
        raise OptionError(explain_mismatch("most", "at least 1", most))
    model = build(factory, seed)
    dense = count(model, shape).macs
    fans = {name: weight[0].numel() for name, weight in _weights(model).items()}
    shrink(model, delta)
    with torch.no_grad():
        for name, weight in _weights(model).items():
            weight.mul_((fans[name] / weight[0].numel()) ** 0.5)
    stretch = BUDGETS[budget](dense / count(model, shape).macs, most)
    longer = replace(
        recipe,
        iterations=round(recipe.iterations * stretch),
        lr_drops=tuple(round(drop * stretch) for drop in recipe.lr_drops),
        warmup=round(recipe.warmup * stretch),
        rewind=0,
    )
    return Scratch(model, longer, stretch)


def _weights(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.dim() > 1}
