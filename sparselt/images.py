# SPDX-License-Identifier: Apache-2.0
"""Runs a batch in groups of 16 images, with the images innermost.

A vector register then holds one pixel of 16 images, so convolutions read their input where it lies,
whatever the filter, the stride and the size of the map (csrc/ops/image_layout.h).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparselt.samples import EachSample

__all__ = ["IMAGES", "GroupsOfImages", "is_worth_grouping"]

IMAGES = 16
# So many images left over are worth a run with idle lanes.
_LEAST_IMAGES = 10


def is_worth_grouping(leaves: Sequence[Any]) -> bool:
    """Whether inputs are maps of enough images.

    Args:
        leaves: tensors of as many samples each, and other values.
    """
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return all(leaf.dim() > 2 and len(leaf) >= _LEAST_IMAGES for leaf in tensors)


class GroupsOfImages:
    """A flat call that computes 16 images of a batch after the other.

    Args:
        groups: of the network planned with images innermost.
        each: of the same for one sample, for the few that may be left over.
    """

    def __init__(self, groups: EachSample, each: EachSample) -> None:
        self.groups = groups
        self.each = each

    def __call__(self, leaves: Sequence[Any]) -> Sequence[Tensor]:
        """The graph's results, put together along the first dimension.

        Args:
            leaves: tensors of as many samples each, and other values.
        """
        count = next(leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor))
        whole = count // IMAGES * IMAGES
        if whole == count:
            return self.groups(leaves, IMAGES)
        rest = _of_samples(leaves, whole, count)
        if count - whole >= _LEAST_IMAGES:
            last = self.groups(rest, count - whole)
        else:
            last = self.each(rest)
        if not whole:
            return last
        first = self.groups(_of_samples(leaves, 0, whole), IMAGES)
        return [torch.cat(pair) for pair in zip(first, last, strict=True)]


def _of_samples(leaves: Sequence[Any], begin: int, end: int) -> list[Any]:
    return [leaf[begin:end] if isinstance(leaf, Tensor) else leaf for leaf in leaves]
