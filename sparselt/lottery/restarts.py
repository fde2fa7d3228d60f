# SPDX-License-Identifier: Apache-2.0
"""What training starts from after a round of pruning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sparselt.errors import OptionError, explain_mismatch
from sparselt.lottery.recipe import Recipe

__all__ = ["RESTARTS", "Restart", "restart_of"]


@dataclass(frozen=True)
class Restart:
    """One way to go on after pruning.

    Attributes:
        rewound: Whether weights go back to the iteration ``recipe.rewind``; otherwise they stay as
            trained.
        start: First iteration of the schedule and of the data order.
        stop: The iteration to stop before.
    """

    rewound: bool
    start: Callable[[Recipe], int]
    stop: Callable[[Recipe], int]


RESTARTS: dict[str, Restart] = {
    # The lottery ticket: original weights (rewind = 0) or those of an early iteration (Frankle et
    # al. 2019).
    "rewind": Restart(True, lambda recipe: recipe.rewind, lambda recipe: recipe.iterations),
    # Trained weights, learning rate back to that of the iteration (Renda et al. 2020).
    "lr_rewind": Restart(False, lambda recipe: recipe.rewind, lambda recipe: recipe.iterations),
    # Trained weights at the last learning rate, for as many iterations as rewinding would repeat.
    "fine_tune": Restart(
        False,
        lambda recipe: recipe.iterations,
        lambda recipe: 2 * recipe.iterations - recipe.rewind,
    ),
    # Trained weights, the whole schedule again (Frankle and Carbin 2018, appendix B).
    "continue": Restart(False, lambda recipe: 0, lambda recipe: recipe.iterations),
}


def restart_of(recipe: Recipe) -> Restart:
    """The restart that ``recipe`` names.

    Raises:
        OptionError: There is none of that name.
    """
    if recipe.restart not in RESTARTS:
        raise OptionError(
            explain_mismatch("restart", f"one of {', '.join(RESTARTS)}", recipe.restart)
        )
    return RESTARTS[recipe.restart]
