# SPDX-License-Identifier: Apache-2.0
"""How many weights each layer keeps when only the total is given.

To add a budget, write a function from a layer's shape to its relative density and add one line to
``LAYER_DENSITIES``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from sparselt.errors import OptionError, explain_mismatch
from sparselt.lottery.masks import Group
from sparselt.lottery.structures import Blocks

__all__ = ["LAYER_DENSITIES", "budget_groups", "share_out"]


def uniform(shape: tuple[int, ...]) -> float:
    """Every layer keeps the same share of its weights."""
    return 1.0


def erk(shape: tuple[int, ...]) -> float:
    """Erdos-Renyi-Kernel: density falls with the product of the sizes and rises with their sum, so
    small layers stay denser.

    Source: Mocanu et al. 2018; with kernel sizes, Evci et al. 2020.
    """
    return sum(shape) / math.prod(shape)


LAYER_DENSITIES: dict[str, Callable[[tuple[int, ...]], float]] = {"uniform": uniform, "erk": erk}


def budget_groups(
    budget: str,
    shapes: Mapping[str, tuple[int, ...]],
    density: float,
    structure: Blocks | None = None,
) -> list[Group]:
    """What :func:`sparselt.lottery.masks.prune` is to keep for a total density.

    Args:
        budget: ``global`` (all layers compete) or a key of ``LAYER_DENSITIES``.
        shapes: Shape of each prunable tensor, in the network's order.
        density: Kept over prunable units, over all layers, from 0 to 1.
        structure: Unit of pruning; single weights by default.

    Returns:
        Groups whose ``keep`` add up to exactly ``round(density * units)``. Within a budget by layer
        no layer keeps more than it has, and none is emptied while there is a unit for each.

    Raises:
        OptionError: An unknown budget, or a density outside 0 to 1.

    Example:
        >>> shapes = {"first": (2, 100), "last": (10, 2)}
        >>> [group.keep for group in budget_groups("uniform", shapes, 0.5)]
        [100, 10]
        >>> [group.keep for group in budget_groups("erk", shapes, 0.5)]
        [98, 12]
    """
    if budget != "global" and budget not in LAYER_DENSITIES:
        known = ", ".join(["global", *LAYER_DENSITIES])
        raise OptionError(explain_mismatch("budget", f"one of {known}", budget))
    if not 0 <= density <= 1:
        raise OptionError(explain_mismatch("density", "a number from 0 to 1", density))
    structure = structure or Blocks(1, 1)
    units = [math.prod(structure.grid(shape)) for shape in shapes.values()]
    keep = round(density * sum(units))
    if budget == "global":
        return [Group(tuple(shapes), keep)]
    relative = [LAYER_DENSITIES[budget](shape) if all(shape) else 0.0 for shape in shapes.values()]
    wants = [share * count for share, count in zip(relative, units, strict=True)]
    kept = share_out(wants, units, keep)
    return [Group((name,), count) for name, count in zip(shapes, kept, strict=True)]


def share_out(wants: Sequence[float], caps: Sequence[int], keep: int) -> list[int]:
    """Whole numbers in proportion to ``wants``, each at most its cap, that add up to ``keep``.

    What a cap cuts off goes to the others in proportion. Fractions are rounded by largest
    remainder, the earlier of equals first. Nobody whose cap allows one gets none while ``keep``
    suffices for all.

    Args:
        wants: Relative claims, at least 0.
        caps: Largest share of each.
        keep: The sum, at most that of the caps.

    Example:
        >>> share_out([1.0, 1.0, 8.0], [10, 10, 4], 10)
        [3, 3, 4]
    """
    assert 0 <= keep <= sum(caps), "the caps must leave room for the sum"
    quotas = _filled(wants, caps, keep)
    shares = [min(math.floor(quota), cap) for quota, cap in zip(quotas, caps, strict=True)]
    by_remainder = sorted(range(len(caps)), key=lambda place: shares[place] - quotas[place])
    while sum(shares) < keep:
        for place in by_remainder:
            if shares[place] < caps[place] and sum(shares) < keep:
                shares[place] += 1
    if keep >= sum(cap > 0 for cap in caps):
        for place, cap in enumerate(caps):
            if cap and not shares[place]:
                shares[shares.index(max(shares))] -= 1
                shares[place] = 1
    return shares


def _filled(wants: Sequence[float], caps: Sequence[int], keep: int) -> list[float]:
    """Real shares in proportion to ``wants``; who would pass its cap gets the cap, and the rest is
    shared anew.
    """
    full: set[int] = set()
    while True:
        left = keep - sum(caps[place] for place in full)
        claims = sum(want for place, want in enumerate(wants) if place not in full)
        quotas = [
            float(caps[place]) if place in full else left * (want / claims if claims else 0.0)
            for place, want in enumerate(wants)
        ]
        over = {place for place, cap in enumerate(caps) if quotas[place] > cap}
        if not over:
            return quotas
        full |= over
