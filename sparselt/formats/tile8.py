# SPDX-License-Identifier: Apache-2.0
"""Tiles of 32 x 256 with one-byte offsets: the format of CUDA products with few columns."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from sparselt.errors import FormatError, explain_mismatch
from sparselt.formats.base import Part, SparseWeight, run_of_each
from sparselt.formats.checks import check_fits_int32, check_shapes

__all__ = ["Tile8"]

SLICE_ROWS = 32  # a warp's lanes, one row each
PANEL_COLS = 256  # what a byte can tell apart
CHUNK = 4  # weights that a lane reads at once
MOST_COUNTED = 255  # in the byte that counts a row's weights in a panel
BANKS = 32  # of a GPU's shared memory, 4 bytes wide


class Tile8(SparseWeight):
    """Groups of 32 rows by 256 columns, in each of which an index is one byte.

    A row of a group is a list of chunks of 4 weights, the last one padded with zeros that are not
    stored weights. The first chunks of all rows that have one come first, in row order, then the
    second chunks, and so on. Three bytes a weight in 16 bits, five in float32, beside one a row and
    group and four a group.

    Parts:
        chunk_offsets: (groups + 1) int32, chunks before each group; groups go row by row of groups.
        counts: (groups, 32) uint8, stored weights of each row of each group.
        offsets: (chunks, 4) uint8, columns relative to the panel's first; any order within a row.
        values: (chunks, 4) float32; on CUDA also float16 or bfloat16.

    Its block is (32, 256), or (32, 128) where a row fills a panel, which a byte could not count.

    Example:
        >>> import torch
        >>> weight = Tile8.from_dense(torch.eye(3))
        >>> weight.nnz, weight.values.shape
        (3, torch.Size([3, 4]))
    """

    name: ClassVar[str] = "tile8"
    part_names: ClassVar[tuple[str, ...]] = ("chunk_offsets", "counts", "offsets", "values")

    index_dtypes: ClassVar[dict[str, torch.dtype]] = {"counts": torch.uint8, "offsets": torch.uint8}

    chunk_offsets = Part(0)
    counts = Part(1)
    offsets = Part(2)

    @property
    def nnz(self) -> int:
        """Number of stored weights, padding not counted; reads the counts."""
        return int(self.counts.sum(dtype=torch.int64))

    @classmethod
    def check_block(cls, block: tuple[int, int] | None) -> tuple[int, int]:
        """The block, (32, 256) for None; raises FormatError for other than that or (32, 128)."""
        known = ((SLICE_ROWS, PANEL_COLS), (SLICE_ROWS, PANEL_COLS // 2))
        if block is None:
            return known[0]
        if tuple(block) not in known:
            raise FormatError(
                explain_mismatch("block", f"None, {known[0]} or {known[1]}", repr(block))
            )
        return block[0], block[1]

    @classmethod
    def from_dense(
        cls,
        weight: Tensor,
        mask: Tensor | None = None,
        block: tuple[int, int] | None = None,
        groups: int = 1,
    ) -> Self:
        """As `SparseWeight.from_dense`; with no block in panels as wide as a byte can count.

        Example:
            >>> import torch
            >>> Tile8.from_dense(torch.ones(2, 256)).block
            (32, 128)
        """
        try:
            return super().from_dense(weight, mask, block, groups)
        except _FullPanelError:
            return super().from_dense(weight, mask, (SLICE_ROWS, PANEL_COLS // 2), groups)

    @classmethod
    def _pack(
        cls,
        dense: Tensor,
        kept: Tensor,
        shape: tuple[int, ...],
        block: tuple[int, int],
        groups: int,
    ) -> tuple[Tensor, ...]:
        rows, cols = kept.nonzero().unbind(1)
        check_fits_int32(CHUNK * rows.numel())
        group_rows = _group_rows(rows, cols, dense.shape[1], block)
        slots = _number_of_groups(dense.shape[0], dense.shape[1], block) * SLICE_ROWS
        counts = torch.bincount(group_rows, minlength=slots)
        if rows.numel() and int(counts.max()) > MOST_COUNTED:
            raise _FullPanelError

        # Lanes of a step read x at their offsets together: each begins at a bank of its own and
        # goes round, so that they meet as few others as their patterns allow.
        offset = cols % block[1]
        order = torch.argsort(
            (group_rows * BANKS + (offset - rows) % BANKS) * PANEL_COLS + offset, stable=True
        )
        place = _places(counts, group_rows[order])
        chunks = (counts + CHUNK - 1) // CHUNK
        total = int(chunks.sum())
        offsets = torch.zeros(total * CHUNK, dtype=torch.uint8, device=dense.device)
        values = torch.zeros(total * CHUNK, device=dense.device)
        offsets[place] = offset[order].to(torch.uint8)
        values[place] = dense[rows[order], cols[order]]
        starts = torch.zeros(counts.numel() // SLICE_ROWS + 1, dtype=torch.int32).to(dense.device)
        starts[1:] = chunks.view(-1, SLICE_ROWS).sum(1).cumsum(0)
        return (
            starts,
            counts.view(-1, SLICE_ROWS).to(torch.uint8),
            offsets.view(-1, CHUNK),
            values.view(-1, CHUNK),
        )

    def _stored(self) -> tuple[Tensor, Tensor]:
        counts = self.counts.view(-1).long()
        group_rows = run_of_each(counts)
        places = _places(counts, group_rows)
        panels = max(-(-self.cols // self.block[1]), 1)
        group, lane = group_rows // SLICE_ROWS, group_rows % SLICE_ROWS
        row = group // panels * SLICE_ROWS + lane
        column = group % panels * self.block[1] + self.offsets.view(-1)[places].long()
        return row * self.cols + column, places

    def _check_lengths(self) -> None:
        groups = _number_of_groups(self.rows, self.cols, self.block)
        chunks = self.values.shape[0] if self.values.dim() else 0
        lists, entries = (groups, SLICE_ROWS), (chunks, CHUNK)
        check_shapes(self._parts, self.part_names, (groups + 1,), lists, entries, entries)

    def _check_indices(self) -> None:
        chunks = (self.counts.long() + CHUNK - 1) // CHUNK
        starts = torch.zeros(chunks.shape[0] + 1, dtype=torch.int64, device=self.device)
        starts[1:] = chunks.sum(1).cumsum(0)
        if not torch.equal(starts, self.chunk_offsets.long()):
            raise FormatError(
                explain_mismatch("chunk_offsets", "the sums of the chunks of counts", "others")
            )
        if int(starts[-1]) != self.values.shape[0]:
            raise FormatError(
                explain_mismatch("values", f"{int(starts[-1])} chunks", self.values.shape[0])
            )
        panels = max(-(-self.cols // self.block[1]), 1)
        counts = self.counts.view(-1).long()
        group_rows = run_of_each(counts)
        group, lane = group_rows // SLICE_ROWS, group_rows % SLICE_ROWS
        offset = self.offsets.view(-1)[_places(counts, group_rows)].long()
        column = group % panels * self.block[1] + offset
        row = group // panels * SLICE_ROWS + lane
        if bool(((offset >= self.block[1]) | (column >= self.cols) | (row >= self.rows)).any()):
            raise FormatError(
                explain_mismatch(
                    "offsets",
                    f"columns below {self.cols}, rows below {self.rows}",
                    "a weight outside the matrix",
                )
            )
        positions = row * self.cols + column
        ordered = positions.sort().values
        if bool((ordered[1:] == ordered[:-1]).any()):
            raise FormatError(
                explain_mismatch("offsets", "each column once in a row", "one of them twice")
            )


class _FullPanelError(Exception):
    """A row fills a panel, which a byte cannot count."""


def _number_of_groups(rows: int, cols: int, block: tuple[int, int]) -> int:
    return -(-rows // block[0]) * -(-cols // block[1])


def _group_rows(rows: Tensor, cols: Tensor, width: int, block: tuple[int, int]) -> Tensor:
    """The row of a group that each weight belongs to, numbered through all groups."""
    panels = -(-width // block[1])
    return (rows // SLICE_ROWS * panels + cols // block[1]) * SLICE_ROWS + rows % SLICE_ROWS


def _places(counts: Tensor, group_rows: Tensor) -> Tensor:
    """Where among the values the weights go whose rows of groups are given, in rising order.

    Args:
        counts: (groups * 32) int64, weights of each row of each group.
        group_rows: (nnz) int64, sorted; `counts[i]` of them are i.

    Returns:
        (nnz) int64.
    """
    chunks = (counts + CHUNK - 1) // CHUNK
    owner = run_of_each(chunks)
    first_chunk = chunks.cumsum(0) - chunks
    step = torch.arange(owner.numel(), device=counts.device) - first_chunk[owner]
    # Stored by group, then step, then row: a stable sort of what is in the order of rows.
    stored = torch.argsort(owner // SLICE_ROWS * PANEL_COLS + step, stable=True)
    position = torch.empty_like(stored)
    position[stored] = torch.arange(stored.numel(), device=counts.device)
    first_weight = counts.cumsum(0) - counts
    rank = torch.arange(group_rows.numel(), device=counts.device) - first_weight[group_rows]
    return position[first_chunk[group_rows] + rank // CHUNK] * CHUNK + rank % CHUNK
