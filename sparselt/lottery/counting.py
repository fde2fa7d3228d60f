# SPDX-License-Identifier: Apache-2.0
"""What a network costs, from shapes alone: multiply-accumulates and parameters.

Nothing is computed: the network runs on torch's meta device under torch's own operation counter.
Neither number is a time; measure that.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sparselt.errors import OptionError, explain_mismatch

__all__ = ["Cost", "count"]


@dataclass(frozen=True)
class Cost:
    """What one input costs, and what a network holds.

    Attributes:
        macs: Multiply-accumulates of convolutions and matrix products for one input. Papers on
            filter pruning print them as FLOP; it is half of what counts both operations.
        weights: Weights of rank 2 and more: no biases, no normalisation.
        parameters: All parameters.
        layers: (multiply-accumulates, weights) of every layer that has some.
    """

    macs: int
    weights: int
    parameters: int
    layers: dict[str, tuple[int, int]] = field(repr=False)

    def of(self, other: Cost) -> tuple[float, float]:
        """Share of ``other``'s multiply-accumulates and weights that this one has."""
        return self.macs / other.macs, self.weights / other.weights


def count(model: nn.Module, shape: tuple[int, ...], ignore: Sequence[str] = ()) -> Cost:
    """Counts from shapes what ``model`` costs for one input.

    Zeros count as weights: only what is really removed makes a network smaller here.

    Args:
        model: The network, on any device; not changed.
        shape: Shape of one input, without the batch.
        ignore: Patterns of layer names to leave out of all numbers but ``parameters``.

    Raises:
        OptionError: A pattern names no layer, or the network does not accept the shape.

    Example:
        >>> count(nn.Conv2d(3, 8, 3, padding=1), (3, 16, 16))
        Cost(macs=55296, weights=216, parameters=224)
    """
    meta = copy.deepcopy(model).to("meta").eval()
    counter = FlopCounterMode(display=False)
    try:
        with torch.no_grad(), counter:
            meta(torch.empty(1, *shape, device="meta"))
    except Exception as error:
        first = str(error).partition("\n")[0]
        raise OptionError(f"shape: the network does not run on {shape}: {first}") from error
    by_module = counter.get_flop_counts()
    root = type(meta).__name__
    layers = {}
    for name, module in meta.named_modules():
        weights = sum(p.numel() for p in module.parameters(recurse=False) if p.dim() > 1)
        macs = sum(by_module.get(f"{root}.{name}" if name else root, {}).values()) // 2
        if weights:
            layers[name] = (macs, weights)
    left_out = _ignored(list(layers), ignore)
    return Cost(
        macs=counter.get_total_flops() // 2 - sum(layers[name][0] for name in left_out),
        weights=sum(weights for name, (_, weights) in layers.items() if name not in left_out),
        parameters=sum(parameter.numel() for parameter in meta.parameters()),
        layers={name: cost for name, cost in layers.items() if name not in left_out},
    )


def _ignored(names: Sequence[str], patterns: Sequence[str]) -> set[str]:
    found: set[str] = set()
    for pattern in patterns:
        matching = {name for name in names if fnmatchcase(name, pattern)}
        if not matching:
            raise OptionError(explain_mismatch("ignore", f"a pattern of {list(names)}", pattern))
        found |= matching
    return found
