# SPDX-License-Identifier: Apache-2.0
"""Rows of blocks in sliced ELL with column blocks: the panel kernels' layout of block weights."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from sparselt.errors import FormatError, explain_mismatch
from sparselt.formats.bsr import BSR
from sparselt.formats.sliced import Sliced
from sparselt.formats.slices import MAX_BLOCK_COLS, Slices, arrange

__all__ = ["BSELL"]

_DEFAULT_BLOCK = (4, 384)
_HEIGHTS = (4, 8, 16)  # what the kernels' registers hold
_SECTION_ROWS = 128  # of the weight


class BSELL(Sliced):
    """Sliced ELL of blocks of h x 1: a slice is one row of blocks, whose h rows share each column.

    Square blocks are rows of such blocks too. Parts: those of `Sliced`, of which
        slice_rows: the h neighbouring rows of each slice, -1 below the last.
        columns: (steps) int16; the column within its column block, rising along a slice.
        values: (steps, h) float32; 0.0 for rows below the last.

    Example:
        >>> import torch
        >>> weight = BSELL.from_dense(torch.ones(4, 2), block=(4, 128))
        >>> weight.columns.tolist(), weight.values.tolist()
        ([0, 1], [[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    """

    name: ClassVar[str] = "bsell"

    @classmethod
    def portable(cls, block: tuple[int, int]) -> tuple[str, tuple[int, int]]:
        """In blocks of h x 1."""
        return "bsr", (block[0], 1)

    @property
    def block_rows(self) -> int:
        """Rows of blocks."""
        return -(-self.rows // self.block[0])

    @classmethod
    def check_block(cls, block: tuple[int, int] | None) -> tuple[int, int]:
        """(h, columns of a column block); raises FormatError for sizes out of range."""
        height, cols = _DEFAULT_BLOCK if block is None else block
        if height not in _HEIGHTS or not 1 <= cols <= MAX_BLOCK_COLS:
            expected = f"(rows of {_HEIGHTS}, columns of 1 to {MAX_BLOCK_COLS})"
            raise FormatError(explain_mismatch("block", expected, block))
        return int(height), int(cols)

    @classmethod
    def _pack(
        cls,
        dense: Tensor,
        kept: Tensor,
        shape: tuple[int, ...],
        block: tuple[int, int],
        groups: int,
    ) -> tuple[Tensor, ...]:
        height = block[0]
        if groups > 1 and shape[0] // groups % height:
            expected = f"groups of a multiple of {height} rows"
            raise FormatError(explain_mismatch("groups", expected, shape[0] // groups))
        crow, col, blocks = BSR._pack(dense, kept, shape, (height, 1), groups)
        grid = (crow.numel() - 1, dense.shape[1])
        slices, places = arrange(crow, col, grid, (1, block[1]), _SECTION_ROWS // height, groups)
        values = torch.empty(slices.columns.numel(), height)
        values[places] = blocks.view(-1, height)
        rows = slices.slice_rows[:, None] * height + torch.arange(height, dtype=torch.int32)
        rows = torch.where(rows < dense.shape[0], rows, -1).view(-1)
        return slices.block_slices, slices.slice_steps, rows, slices.columns, values

    def to_bsr(self) -> BSR:
        """The same weight in blocks of h x 1."""
        crow, col, places = self._compressed()
        parts = (crow, col, self.values[places].unsqueeze(2))
        return BSR.from_parts(parts, self.shape, (self.block[0], 1))

    def to_dense(self) -> Tensor:
        """The dense float32 weight of shape `shape`: stored blocks bit for bit, 0.0 elsewhere."""
        return self.to_bsr().to_dense()

    def mask(self) -> Tensor:
        """Bool tensor of shape `shape`: True inside every stored block, kept weight or not."""
        return self.to_bsr().mask()

    def _slices(self) -> Slices:
        """The slices of block rows: what the h rows of each are, `_check_indices` has checked."""
        height, block_cols = self.block
        firsts = self.slice_rows[::height] // height
        offsets = (self.block_slices, self.slice_steps)
        return Slices(*offsets, firsts, self.columns, self.block_rows, self.cols, 1, block_cols)

    def _fits(self) -> bool:
        return self.columns.dim() == 1 and self.values.shape == (len(self.columns), self.block[0])

    def _check_indices(self) -> None:
        height, block_cols = self.block
        rows = self.slice_rows.long().view(-1, height)
        neighbours = rows[:, :1] + torch.arange(height)
        neighbours = torch.where(neighbours < self.rows, neighbours, -1)
        if bool((rows[:, 0] % height != 0).any()) or not torch.equal(rows, neighbours):
            expected = f"{height} neighbouring rows from a multiple of {height} on"
            raise FormatError(explain_mismatch("slice_rows", expected, "others"))
        super()._check_indices()
        if len(self.columns) and int(self.columns.max()) == block_cols:
            raise FormatError(explain_mismatch("columns", f"0 to {block_cols - 1}", block_cols))
