# SPDX-License-Identifier: Apache-2.0
"""How fast weights are pruned over the levels, and how the learning rate runs within one.

Both are pure functions of a position, so a run can start, stop and go back anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from sparselt.errors import OptionError, explain_mismatch
from sparselt.lottery.recipe import Recipe

__all__ = ["LR_SCHEDULES", "SCHEDULES", "keep_fraction", "learning_rate", "number_of_levels"]


def geometric(rate: float, level: int, levels: int) -> float:
    """The published ladder: each round prunes ``rate`` of what is left."""
    return float((1 - rate) ** level)


def one_shot(rate: float, level: int, levels: int) -> float:
    """All of it in the first round: what ``levels`` rounds of ``rate`` would have left."""
    return float((1 - rate) ** levels) if level else 1.0


def cubic(rate: float, level: int, levels: int) -> float:
    """Fast first and slow last (Zhu and Gupta 2017), to the same end as the geometric ladder."""
    final = (1 - rate) ** levels
    left = 1 - level / levels if levels else 0.0
    return float(final + (1 - final) * left**3)


SCHEDULES: dict[str, Callable[[float, int, int], float]] = {
    "geometric": geometric,
    "one_shot": one_shot,
    "cubic": cubic,
}


def keep_fraction(recipe: Recipe, rate: float, level: int) -> float:
    """Share of a layer's weights that is left at ``level``; level 0 is dense.

    Raises:
        OptionError: An unknown schedule.

    Example:
        >>> round(keep_fraction(Recipe(), 0.2, 3), 3)
        0.512
    """
    if recipe.schedule not in SCHEDULES:
        raise OptionError(
            explain_mismatch("schedule", f"one of {', '.join(SCHEDULES)}", recipe.schedule)
        )
    return SCHEDULES[recipe.schedule](rate, level, recipe.levels)


def number_of_levels(recipe: Recipe) -> int:
    """Number of levels a run has, the dense one included."""
    return 1 + (min(recipe.levels, 1) if recipe.schedule == "one_shot" else recipe.levels)


def step(recipe: Recipe, iteration: int) -> float:
    """The full rate, divided by 10 at each of ``lr_drops``."""
    return 0.1 ** sum(iteration >= drop for drop in recipe.lr_drops)


def cosine(recipe: Recipe, iteration: int) -> float:
    """Half a cosine from the full rate to 0."""
    return 0.5 * (1 + math.cos(math.pi * iteration / recipe.iterations))


LR_SCHEDULES: dict[str, Callable[[Recipe, int], float]] = {"step": step, "cosine": cosine}


def learning_rate(recipe: Recipe, iteration: int) -> float:
    """Learning rate of one iteration; past the last one (fine-tuning) it stays where it ended.

    Raises:
        OptionError: An unknown learning-rate schedule.
    """
    if recipe.lr_schedule not in LR_SCHEDULES:
        raise OptionError(
            explain_mismatch("lr_schedule", f"one of {', '.join(LR_SCHEDULES)}", recipe.lr_schedule)
        )
    position = min(iteration, recipe.iterations - 1)
    rising = min(1.0, (position + 1) / recipe.warmup) if recipe.warmup else 1.0
    return recipe.lr * rising * LR_SCHEDULES[recipe.lr_schedule](recipe, position)
