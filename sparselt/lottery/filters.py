# SPDX-License-Identifier: Apache-2.0
"""Which filters go first: a score for every channel of a group, the smallest removed first.

To add one, write a function ``(group, tensors, generator) -> scores`` and add one line to
``FILTER_CRITERIA``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sparselt.errors import OptionError, explain_mismatch
from sparselt.tickets.architecture import ChannelGroup

__all__ = ["FILTER_CRITERIA", "FilterCriterion", "filter_criterion_of"]

Tensors = Mapping[str, Tensor]
FilterCriterion = Callable[[ChannelGroup, Tensors, torch.Generator], Tensor]


def l1(group: ChannelGroup, tensors: Tensors, generator: torch.Generator) -> Tensor:
    """Sum of absolute weights of a filter (Li et al. 2016), over all layers that are summed."""
    return torch.stack([filters.abs().sum(1) for filters in _filters(group, tensors)]).sum(0)


def l2(group: ChannelGroup, tensors: Tensors, generator: torch.Generator) -> Tensor:
    """Euclidean norm of a filter, over all layers that are summed."""
    squares = torch.stack([filters.square().sum(1) for filters in _filters(group, tensors)])
    return squares.sum(0).sqrt()


def batch_norm(group: ChannelGroup, tensors: Tensors, generator: torch.Generator) -> Tensor:
    """Absolute scale of the batch norm behind a filter (Liu et al. 2017, arXiv 1708.06519)."""
    scales = [
        tensors[slot.tensor][slot.positions(group.channels)].abs().sum(1)
        for slot in group.slots
        if slot.tensor.endswith("weight") and tensors[slot.tensor].dim() == 1
    ]
    if not scales:
        raise OptionError(
            f"criterion batch_norm: expected a batch norm behind {', '.join(group.layers)}, got "
            "none; take l1"
        )
    return torch.stack([scale.float() for scale in scales]).sum(0)


def geometric_median(group: ChannelGroup, tensors: Tensors, generator: torch.Generator) -> Tensor:
    """Sum of distances to the other filters: what lies amid them is replaceable (He et al. 2019,
    arXiv 1811.00250).
    """
    exact = "donot_use_mm_for_euclid_dist"
    return torch.stack(
        [torch.cdist(f, f, compute_mode=exact).sum(1) for f in _filters(group, tensors)]
    ).sum(0)


def largest_l1(group: ChannelGroup, tensors: Tensors, generator: torch.Generator) -> Tensor:
    """The reverse of l1: removes the largest filters, as a control."""
    return -l1(group, tensors, generator)


def random(group: ChannelGroup, tensors: Tensors, generator: torch.Generator) -> Tensor:
    """Uniform random scores, as a control."""
    return torch.rand(group.channels, generator=generator)


FILTER_CRITERIA: dict[str, FilterCriterion] = {
    "l1": l1,
    "l2": l2,
    "batch_norm": batch_norm,
    "geometric_median": geometric_median,
    "largest_l1": largest_l1,
    "random": random,
}


def filter_criterion_of(name: str) -> FilterCriterion:
    """The criterion of that name.

    Raises:
        OptionError: There is none.
    """
    if name not in FILTER_CRITERIA:
        expected = f"one of {', '.join(FILTER_CRITERIA)}"
        raise OptionError(explain_mismatch("filter criterion", expected, name))
    return FILTER_CRITERIA[name]


def _filters(group: ChannelGroup, tensors: Tensors) -> list[Tensor]:
    """Weights of each layer that produces the group's channels, (channels, weights) float32."""
    found = []
    for slot in group.slots:
        weight = tensors[slot.tensor]
        if slot.axis == 0 and weight.dim() > 1:
            rows = weight.detach().cpu().float()[slot.positions(group.channels)]
            found.append(rows.reshape(group.channels, -1))
    return found
