# SPDX-License-Identifier: Apache-2.0
"""Units of pruning: single weights, blocks, whole filters, N of M.

A structure turns the scores of a tensor into scores of units, and a choice of units back into a
mask. Tensors are seen as matrices with one row an output channel, as the sparse formats see them.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sparselt.errors import OptionError, explain_mismatch

__all__ = ["Blocks", "parse_structure"]


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


def parse_structure(text: str) -> Blocks:
    """The structure a recipe names: ``RxC``, or ``filter``.

    Raises:
        OptionError: Anything else.

    Example:
        >>> parse_structure("4x1")
        Blocks(rows=4, cols=1)
    """
    if text == "filter":
        return Blocks(1, 0)
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise OptionError(explain_mismatch("structure", "RxC such as 16x1, or filter", text))
    return Blocks(int(match[1]), int(match[2]))
