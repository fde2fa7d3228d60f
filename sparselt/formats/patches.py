# SPDX-License-Identifier: Apache-2.0
"""What formats for tensor cores share: patches, and how the lists of 32 lanes lie in memory.

A group is 32 rows by 256 columns. A lane of a warp holds the same rows and columns of it all the
way, its patch: 4 rows, 8 apart, by 64 columns. A place is a number below 256 that says where in a
patch a weight is, in the order in which the operands of a tensor-core product take them: pairs of
neighbouring columns first, then the rows, then the pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparselt.errors import FormatError, explain_mismatch
from sparselt.formats.base import Part, SparseWeight, run_of_each

__all__ = ["CHUNK", "LANES", "PATCH", "PLACES", "Patches", "chunk_places"]

LANES = 32
GROUP = (32, 256)  # rows, columns
PATCH = (4, 64)
PLACES = 256  # of a patch
CHUNK = 4  # entries that a lane reads at once


class Patches(SparseWeight):
    """A weight as a list of chunks for each patch, chunk after chunk over the lanes of a group.

    The first chunks of all lanes that have one come first, in lane order, then the second ones, and
    so on, so that a warp reads memory in one piece. The parts of a subclass begin with

        chunk_offsets: (groups + 1) int32, chunks before each group; groups go row by row of groups.
        counts: (groups, 32) uint8, chunks of each lane.

    and end with the values, a chunk a row.
    """

    chunk_offsets = Part(0)
    counts = Part(1)

    @property
    def groups(self) -> int:
        """Number of groups of 32 x 256."""
        return -(-self.rows // GROUP[0]) * -(-self.cols // GROUP[1])

    @classmethod
    def check_block(cls, block: tuple[int, int] | None) -> tuple[int, int]:
        """(4, 64), the rows and columns of a patch; raises FormatError for any other block."""
        if block is not None and tuple(block) != PATCH:
            raise FormatError(explain_mismatch("block", f"None or {PATCH}", repr(block)))
        return PATCH

    def _entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of each stored weight: its slot, its place and its number among the values."""
        raise NotImplementedError

    def _stored(self) -> tuple[Tensor, Tensor]:
        slots, places, numbers = self._entries()
        row, column = self._position(slots, places)
        return row * self.cols + column, numbers

    def _position(self, slots: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Row and column of the matrix; a slot is a lane, numbered through all groups."""
        panels = max(-(-self.cols // GROUP[1]), 1)
        group, lane = slots // LANES, slots % LANES
        pair, half = places // 2, places % 2
        row = lane // 4 + 8 * (pair % 2) + 16 * (pair // 4 % 2)
        column = PATCH[1] * (lane % 4) + 4 * (pair // 8) + 2 * (pair // 2 % 2) + half
        return group // panels * GROUP[0] + row, group % panels * GROUP[1] + column

    @classmethod
    def _slots_and_places(cls, rows: Tensor, cols: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """The slot and place of weights at rows and columns of a matrix of `width` columns."""
        group = rows // GROUP[0] * -(-width // GROUP[1]) + cols // GROUP[1]
        row, column = rows % GROUP[0], cols % GROUP[1]
        lane = row % 8 * 4 + column // PATCH[1]
        pair = column % PATCH[1] // 4 * 8 + row // 16 * 4 + column % 4 // 2 * 2 + row // 8 % 2
        return group * LANES + lane, 2 * pair + column % 2

    def _check_chunks(self) -> None:
        """Offsets must be the sums of the counts, and end with the chunks that are there."""
        ends = self.counts.long().sum(1).cumsum(0)
        if int(self.chunk_offsets[0]) != 0 or not torch.equal(ends, self.chunk_offsets[1:].long()):
            raise FormatError(explain_mismatch("chunk_offsets", "the sums of counts", "others"))
        if int(self.chunk_offsets[-1]) != self.values.shape[0]:
            expected = f"{int(self.chunk_offsets[-1])} chunks"
            raise FormatError(explain_mismatch("values", expected, self.values.shape[0]))

    def _check_inside(self, slots: Tensor, places: Tensor) -> None:
        row, column = self._position(slots, places)
        if bool(((row >= self.rows) | (column >= self.cols)).any()):
            inside = f"rows below {self.rows}, columns below {self.cols}"
            raise FormatError(
                explain_mismatch(self.part_names[2], inside, "a weight outside the matrix")
            )


def chunk_places(chunks: Tensor) -> tuple[Tensor, Tensor]:
    """Where the chunks of the lanes of groups lie: group by group, step by step, lane by lane.

    Args:
        chunks: (groups * 32) int64, chunks of each lane.

    Returns:
        first (groups * 32) and order (chunks) int64: chunk i of lane l is stored as chunk
        order[first[l] + i].
    """
    owner = run_of_each(chunks)
    first = chunks.cumsum(0) - chunks
    step = torch.arange(owner.numel(), device=chunks.device) - first[owner]
    # A stable sort of what is in the order of lanes.
    stored = torch.argsort(owner // LANES * PLACES + step, stable=True)
    order = torch.empty_like(stored)
    order[stored] = torch.arange(stored.numel(), device=chunks.device)
    return first, order
