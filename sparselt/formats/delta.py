# SPDX-License-Identifier: Apache-2.0
"""Sliced ELL with a byte for a column: five bytes a kept weight, for weights read from memory."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from sparselt.formats.sell import SELL, section_rows
from sparselt.formats.slices import Slices, arrange

__all__ = ["JUMP", "Delta"]

JUMP = 255


class Delta(SELL):
    """SELL whose columns are told by how far each lies behind the one before in its row.

    Parts: those of `Sliced`, of which
        columns: (steps * h) uint8; the distance from the column before, at first from column 0 of
            the block. 255 goes on by as many columns and holds no value: where the next one lies
            farther off than 254, and where a row of the slice has no more.
        values: (steps * h) float32; 0.0 at such places.

    Example:
        >>> import torch
        >>> weight = Delta.from_dense(torch.tensor([[0.0, 5.0, 0.0, 6.0]]), block=(1, 4))
        >>> weight.columns.tolist(), weight.values.tolist()
        ([1, 2], [5.0, 6.0])
    """

    name: ClassVar[str] = "delta"
    index_dtypes: ClassVar[dict[str, torch.dtype]] = {"columns": torch.uint8}

    @property
    def kept(self) -> int:
        """Number of kept weights, fillers left out."""
        return int((self.columns != JUMP).sum())

    @classmethod
    def _arranged(
        cls,
        crow: Tensor,
        col: Tensor,
        values: Tensor,
        cols: int,
        block: tuple[int, int],
        groups: int,
    ) -> tuple[Tensor, ...]:
        columns = col.long()
        gaps = columns % block[1]
        near = torch.zeros(col.numel(), dtype=torch.bool)  # to the value before, of row and block
        near[1:] = columns[1:] // block[1] == columns[:-1] // block[1]
        starts = crow[:-1].long()
        near[starts[starts < col.numel()]] = False
        gaps[1:] -= torch.where(near[1:], gaps[:-1], 0)

        # A jump is an entry of its own before the value's, in the same row and block.
        entries = gaps // JUMP + 1
        last = torch.cumsum(entries, 0)
        starts = torch.cat([last.new_zeros(1), last])[crow.long()]
        grid = (crow.numel() - 1, cols)
        longer = torch.repeat_interleave(col, entries)
        slices, places = arrange(starts, longer, grid, block, section_rows(block[0]), groups)
        at = places[last - 1]
        deltas = torch.full((slices.columns.numel(),), JUMP, dtype=torch.uint8)
        deltas[at] = (gaps % JUMP).to(torch.uint8)
        packed = torch.zeros(slices.columns.numel())
        packed[at] = values
        return slices.block_slices, slices.slice_steps, slices.slice_rows, deltas, packed

    def _slices(self) -> Slices:
        height, block_cols = self.block
        deltas = self.columns.view(-1, height)
        sums = torch.zeros(deltas.shape[0] + 1, height, dtype=torch.int64)
        torch.cumsum(deltas, 0, out=sums[1:])
        # Of offsets that nobody has checked yet: what is wrong with them is found later.
        starts = self.slice_steps.long().clamp(0, deltas.shape[0])
        owners = torch.searchsorted(starts, torch.arange(deltas.shape[0]), right=True) - 1
        columns = sums[1:] - sums[starts[owners]]
        columns += columns >= block_cols  # what lies beyond the block is no filler
        columns = torch.where(deltas == JUMP, block_cols, columns).view(-1)
        indices = (self.block_slices, self.slice_steps, self.slice_rows, columns)
        return Slices(*indices, self.rows, self.cols, *self.block)
