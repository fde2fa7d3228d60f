# SPDX-License-Identifier: Apache-2.0
"""Units of pruning: single weights, blocks, whole filters, N of every M.

A structure turns the scores of a tensor into scores of units, and a choice of units back into a
mask. Tensors are seen as matrices with one row an output channel, as the sparse formats see them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from sparselt.errors import OptionError, explain_mismatch

__all__ = ["Blocks", "NOfM", "parse_structure"]


@dataclass(frozen=True)
class Blocks:
    """Blocks of ``rows`` x ``cols`` weights, all kept or all pruned; 1x1 is unstructured pruning.

    Blocks start at the first row and column. Those at a ragged edge hold fewer weights and are
    scored by the mean of what they hold, so an edge is neither favoured nor pruned first.

    Attributes:
        rows: Output channels in a block.
        cols: Inputs in a block; 0 means the whole row, so ``Blocks(1, 0)`` prunes filters.
    """

    rows: int
    cols: int

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Number of block rows and block columns of a tensor of ``shape``."""
        height, width = self._matrix(shape)
        return -(-height // self.rows), -(-width // self._width(width))

    def pool(self, scores: Tensor) -> Tensor:
        """Mean score of each block.

        Args:
            scores: (C_out, ...) float.

        Returns:
            (block rows * block columns,) in row-major order.
        """
        if (self.rows, self.cols) == (1, 1):
            return scores.reshape(-1)
        sums = self._blocked(scores.reshape(self._matrix(tuple(scores.shape)))).sum((1, 3))
        sizes = self._blocked(torch.ones(self._matrix(tuple(scores.shape)))).sum((1, 3))
        return (sums / sizes).reshape(-1)

    def spread(self, kept: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The mask of a tensor of ``shape`` whose kept blocks are ``kept``.

        Args:
            kept: (block rows * block columns,) bool.
            shape: Shape of the tensor.

        Returns:
            bool mask of ``shape``.
        """
        height, width = self._matrix(shape)
        tall = kept.reshape(self.grid(shape)).repeat_interleave(self.rows, 0)[:height]
        return tall.repeat_interleave(self._width(width), 1)[:, :width].reshape(shape).contiguous()

    def collapse(self, mask: Tensor) -> Tensor:
        """Which blocks of a block mask are kept: the inverse of :meth:`spread`."""
        return self.pool(mask.float()) > 0

    def count(self, shapes: Sequence[tuple[int, ...]], fraction: float, level: int) -> int:
        """Number of units that stay at ``fraction`` of all, after ``level`` rounds.

        At least one, unless all are pruned by intent: rounding alone must not cut a small layer of
        large blocks out of the network.
        """
        units = sum(math.prod(self.grid(shape)) for shape in shapes)
        return max(round(units * fraction), min(units, math.ceil(fraction)))

    def at_least(self, shapes: Sequence[tuple[int, ...]], keep: int) -> int:
        """The smallest number of units that can stay and is not below ``keep``."""
        return keep

    def choose(
        self, scores: Sequence[Tensor], shapes: Sequence[tuple[int, ...]], keep: int
    ) -> list[Tensor]:
        """The ``keep`` units of the largest scores over all tensors; of equals the earlier.

        Args:
            scores: Of the units of each tensor, as :meth:`pool` gives them; minus infinity where
                nothing is left to keep.
            shapes: Of the tensors.
            keep: Number of units to keep.

        Returns:
            One bool tensor of units a tensor.
        """
        flat = torch.cat(list(scores))
        assert keep <= int((flat > -torch.inf).count_nonzero()), "masks must be nested"
        chosen = torch.zeros(flat.numel(), dtype=torch.bool)
        chosen[torch.sort(flat, descending=True, stable=True).indices[:keep]] = True
        return list(torch.split(chosen, [len(units) for units in scores]))

    def shuffle(self, kept: Tensor, shape: tuple[int, ...], source: torch.Generator) -> Tensor:
        """The kept units of a tensor, moved to random places that the structure allows."""
        return kept[torch.randperm(kept.numel(), generator=source)]

    def _width(self, width: int) -> int:
        return self.cols or max(width, 1)

    @staticmethod
    def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
        return shape[0], math.prod(shape[1:])

    def _blocked(self, matrix: Tensor) -> Tensor:
        """(block rows, rows, block columns, cols), zero padded at the ragged edges."""
        height, width = matrix.shape
        cols = self._width(width)
        padded = F.pad(matrix, (0, -width % cols, 0, -height % self.rows))
        return padded.reshape(
            padded.shape[0] // self.rows, self.rows, padded.shape[1] // cols, cols
        )


@dataclass(frozen=True)
class NOfM(Blocks):
    """N of every M neighbouring weights along the input channels, as 2:4 of sparse tensor cores.

    A level prunes one weight of every group, so 2:4 is reached in two rounds whatever the rates;
    layers of rate 0 stay dense. A group at a ragged edge keeps up to N of what it holds.

    Attributes:
        n: Weights kept in a group.
        m: Weights in a group.
    """

    rows: int = field(default=1, init=False)
    cols: int = field(default=1, init=False)
    n: int
    m: int

    def count(self, shapes: Sequence[tuple[int, ...]], fraction: float, level: int) -> int:
        """Number of weights that stay after ``level`` rounds."""
        kept = self.m if fraction == 1 else max(self.n, self.m - level)
        return sum(self._count(shape, kept) for shape in shapes)

    def at_least(self, shapes: Sequence[tuple[int, ...]], keep: int) -> int:
        """The smallest number of weights that whole groups can keep and is not below ``keep``."""
        return min(count for count in self._counts(shapes) if count >= keep)

    def choose(
        self, scores: Sequence[Tensor], shapes: Sequence[tuple[int, ...]], keep: int
    ) -> list[Tensor]:
        """The largest of each group, as many a group as ``keep`` in all come to."""
        counts = self._counts(shapes)
        if keep not in counts:
            raise OptionError(
                explain_mismatch(f"weights kept by {self.n}:{self.m}", f"one of {counts}", keep)
            )
        return [
            self._largest(score, shape, counts.index(keep))
            for score, shape in zip(scores, shapes, strict=True)
        ]

    def shuffle(self, kept: Tensor, shape: tuple[int, ...], source: torch.Generator) -> Tensor:
        """As many kept in each group as before, at random places in it."""
        most = int(self._grouped(kept.float(), shape, 0.0).sum(-1).max()) if kept.any() else 0
        return self._largest(torch.rand(kept.numel(), generator=source), shape, most)

    def _counts(self, shapes: Sequence[tuple[int, ...]]) -> list[int]:
        """Weights that stay where each group keeps 0, 1, ... M of its own."""
        return [sum(self._count(shape, n) for shape in shapes) for n in range(self.m + 1)]

    def _count(self, shape: tuple[int, ...], kept: int) -> int:
        channels = shape[1]
        whole, rest = divmod(channels, self.m)
        return math.prod(shape) // max(channels, 1) * (whole * kept + min(rest, kept))

    def _largest(self, scores: Tensor, shape: tuple[int, ...], kept: int) -> Tensor:
        groups = self._grouped(scores, shape, -torch.inf)
        order = torch.sort(groups, dim=-1, descending=True, stable=True).indices
        chosen = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., :kept], True)
        # (rows, taps, padded channels) back to torch's (rows, channels, taps)
        rows, channels = shape[0], shape[1]
        return chosen.flatten(2)[:, :, :channels].transpose(1, 2).reshape(rows, -1).flatten()

    def _grouped(self, values: Tensor, shape: tuple[int, ...], filler: float) -> Tensor:
        """(rows, taps, groups, M): neighbours along the input channels."""
        taps = math.prod(shape[2:])
        lanes = values.reshape(shape[0], shape[1], taps).transpose(1, 2)
        padded = F.pad(lanes, (0, -shape[1] % self.m), value=filler)
        return padded.reshape(shape[0], taps, -1, self.m)


def parse_structure(text: str) -> Blocks:
    """The structure a recipe names: ``RxC``, ``N:M`` or ``filter``.

    Raises:
        OptionError: Anything else.

    Example:
        >>> parse_structure("4x1")
        Blocks(rows=4, cols=1)
    """
    if text == "filter":
        return Blocks(1, 0)
    if match := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text):
        return Blocks(int(match[1]), int(match[2]))
    match = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", text)
    if match is None or int(match[1]) > int(match[2]):
        expected = "RxC such as 16x1, N:M such as 2:4, or filter"
        raise OptionError(explain_mismatch("structure", expected, text))
    return NOfM(int(match[1]), int(match[2]))
