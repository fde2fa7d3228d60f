# SPDX-License-Identifier: Apache-2.0
"""Where the values of a matrix lie in sliced ELL with column blocks.

A panel kernel keeps one block of columns' activations in a cache and a slice of rows in registers.
So the matrix is cut into blocks of columns; within a block, rows are sorted by their number of
values and grouped into slices of a few rows of about the same length, whose values lie step by
step: one of each row. (Sliced ELL with sorted rows is the SELL-C-sigma of Kreutzer et al.,
arXiv 1307.6209; the column blocks are added here.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparselt.errors import FormatError, explain_mismatch
from sparselt.formats.base import run_of_each
from sparselt.formats.checks import check_fits_int32

__all__ = ["MAX_BLOCK_COLS", "Slices", "arrange"]

MAX_BLOCK_COLS = 2**15 - 1  # columns and the filler's column_block fit int16
_MAX_SECTIONS = 16


@dataclass(frozen=True)
class Slices:
    """The indices of a sliced matrix, `SELL`'s parts of the same names.

    Attributes:
        block_slices: (sections * blocks + 1) int32.
        slice_steps: (slices + 1) int32.
        slice_rows: (slices * height) int32, -1 for none.
        columns: (steps * height) int16 or a wider type, `block_cols` for none.
        rows: of the matrix.
        cols: of the matrix.
        height: rows of a slice.
        block_cols: columns of a block.
    """

    block_slices: Tensor
    slice_steps: Tensor
    slice_rows: Tensor
    columns: Tensor
    rows: int
    cols: int
    height: int
    block_cols: int

    @property
    def num_blocks(self) -> int:
        """Blocks of columns."""
        return max(1, -(-self.cols // self.block_cols))

    def entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """Row, column and place of every value that is no filler; a place counts steps * height."""
        slices = torch.arange(self.slice_steps.numel() - 1)
        slice_blocks = (
            torch.searchsorted(self.block_slices.long(), slices, right=True) - 1
        ) % self.num_blocks
        lengths = self.slice_steps.long().diff()
        step_slices = run_of_each(lengths)
        places = torch.arange(self.columns.numel())
        owners = step_slices[places // self.height]
        rows = self.slice_rows.long()[owners * self.height + places % self.height]
        columns = self.columns.long()
        kept = columns < self.block_cols
        columns = columns + slice_blocks[owners] * self.block_cols
        return rows[kept], columns[kept], places[kept]

    def validate(self) -> None:
        """Check every index in O(values).

        Raises:
            FormatError: offsets that fall or end elsewhere, indices out of range, a row or column
                met twice, a row in several sections or missing from the first or last block.
        """
        self._validate_offsets()
        self._validate_rows()
        self._validate_entries()

    def _validate_offsets(self) -> None:
        ends = {
            "block_slices": (self.block_slices, self.slice_steps.numel() - 1),
            "slice_steps": (self.slice_steps, self.columns.numel() // self.height),
        }
        for name, (offsets, end) in ends.items():
            rises = bool((offsets[1:] >= offsets[:-1]).all())
            if int(offsets[0]) != 0 or int(offsets[-1]) != end or not rises:
                raise FormatError(
                    explain_mismatch(name, f"offsets from 0, never falling, to {end}", "others")
                )
        columns = self.columns
        lowest, highest = (int(v) for v in columns.aminmax()) if columns.numel() else (0, 0)
        if lowest < 0 or highest > self.block_cols:
            got = f"from {lowest} to {highest}"
            raise FormatError(explain_mismatch("columns", f"0 to {self.block_cols}", got))

    def _validate_rows(self) -> None:
        rows = self.slice_rows.long()
        if rows.numel() and (int(rows.min()) < -1 or int(rows.max()) >= self.rows):
            raise FormatError(
                explain_mismatch("slice_rows", f"-1 to {self.rows - 1}", "one outside")
            )
        blocks = run_of_each(self.block_slices.long().diff()).repeat_interleave(self.height)
        held = rows >= 0
        sections, columns_of = blocks // self.num_blocks, blocks % self.num_blocks
        appearances = torch.bincount(
            columns_of[held] * self.rows + rows[held], minlength=self.num_blocks * self.rows
        ).view(self.num_blocks, self.rows)
        owner = torch.full((self.rows,), -1).scatter(0, rows[held], sections[held])
        ends_full = self.rows == 0 or bool((appearances[[0, -1]] == 1).all())
        leads = held.view(-1, self.height)
        if (
            not ends_full
            or bool((appearances > 1).any())
            or bool((owner[rows[held]] != sections[held]).any())
            or bool((leads[:, 1:] & ~leads[:, :-1]).any())
        ):
            expected = "each row once a block, in one section, and in the first and last block"
            raise FormatError(explain_mismatch("slice_rows", expected, "another arrangement"))

    def _validate_entries(self) -> None:
        rows, columns, _ = self.entries()
        if rows.numel() == 0:
            return
        if int(rows.min()) < 0 or int(columns.max()) >= self.cols:
            raise FormatError(
                explain_mismatch("columns", "values in rows and columns of the weight", "others")
            )
        if torch.unique(rows * self.cols + columns).numel() != rows.numel():
            raise FormatError(explain_mismatch("columns", "each column once a row", "a repetition"))


def arrange(
    crow: Tensor,
    col: Tensor,
    shape: tuple[int, int],
    block: tuple[int, int],
    section_rows: int,
    groups: int = 1,
) -> tuple[Slices, Tensor]:
    """Slices the rows of a compressed matrix.

    Args:
        crow: (rows + 1) int32 row offsets.
        col: (n) int32 columns, rising within a row.
        shape: (rows, cols).
        block: (rows of a slice, columns of a block).
        section_rows: the least rows of a section.
        groups: ranges of as many rows each, which get sections of their own.

    Returns:
        The slices, columns int16, and the place of each entry among their steps * height.

    Raises:
        FormatError: there are more than 2**31 - 1 places.
    """
    (rows, cols), (height, block_cols) = shape, block
    num_blocks = max(1, -(-cols // block_cols))
    count = col.numel()
    entry_rows = run_of_each(crow.long().diff())
    columns = col.long()
    # Entries lie by row and, within a row, by block: a "run" is a row's part of a block.
    entry_runs = entry_rows * num_blocks + columns // block_cols
    run_lengths = torch.bincount(entry_runs, minlength=rows * num_blocks)
    sections = _section_of_rows(crow, section_rows, groups)
    runs = _group_runs(run_lengths, sections, num_blocks, height)
    steps = torch.zeros(runs.lengths.numel() + 1, dtype=torch.int64)
    torch.cumsum(runs.lengths, 0, out=steps[1:])
    check_fits_int32(int(steps[-1]) * height)

    first_entries = torch.cumsum(run_lengths, 0) - run_lengths
    rank = torch.arange(count) - first_entries[entry_runs]
    places = (steps[runs.slice_of[entry_runs]] + rank) * height + runs.lane_of[entry_runs]
    packed_columns = torch.full((int(steps[-1]) * height,), block_cols, dtype=torch.int16)
    packed_columns[places] = (columns % block_cols).to(torch.int16)
    slices = Slices(
        runs.firsts.int(), steps.int(), runs.rows.int(), packed_columns, rows, cols, *block
    )
    return slices, places


@dataclass(frozen=True)
class _Runs:
    """First slice of each (section, block); rows and length of each slice; each run's place."""

    firsts: Tensor
    rows: Tensor
    lengths: Tensor
    slice_of: Tensor  # meaningless for runs without a slice, as is lane_of
    lane_of: Tensor


def _section_of_rows(crow: Tensor, section_rows: int, groups: int) -> Tensor:
    """The section of each row: contiguous ranges of about the same number of values."""
    rows = crow.numel() - 1
    count = max(1, min(_MAX_SECTIONS, rows // section_rows) // groups)  # of a group
    # Rows are counted too, so that an empty weight is shared out as well.
    load = crow.long() + torch.arange(rows + 1)
    first = torch.arange(rows) // max(1, rows // groups) * (rows // groups)
    own, whole = load[:-1] - load[first], load[first + rows // groups] - load[first]
    return first // max(1, rows // groups) * count + own * count // whole


def _group_runs(run_lengths: Tensor, sections: Tensor, num_blocks: int, height: int) -> _Runs:
    """Sorts the runs of each (section, block) by length and groups them into slices.

    Args:
        run_lengths: (rows * num_blocks) values of each row in each block.
        sections: (rows) section of each row.
        num_blocks: blocks of columns.
        height: rows of a slice.

    Returns:
        The slices, and slice and lane of each run.
    """
    rows = sections.numel()
    blocks = torch.arange(num_blocks).repeat(rows)
    run_rows = torch.arange(rows).repeat_interleave(num_blocks)
    kept = (run_lengths > 0) | (blocks == 0) | (blocks == num_blocks - 1)
    runs = kept.nonzero().view(-1)
    owners = sections[run_rows[runs]] * num_blocks + blocks[runs]
    longest = int(run_lengths.max()) if run_lengths.numel() else 0
    # Stable: rows of the same length keep their order, so packing is deterministic.
    order = torch.argsort(owners * (longest + 1) + longest - run_lengths[runs], stable=True)
    runs, owners = runs[order], owners[order]

    num_owners = (int(sections.max()) + 1 if rows else 1) * num_blocks
    per_owner = torch.bincount(owners, minlength=num_owners)
    position = torch.arange(runs.numel()) - (torch.cumsum(per_owner, 0) - per_owner)[owners]
    slices_per_owner = (per_owner + height - 1) // height
    firsts = torch.zeros(num_owners + 1, dtype=torch.int64)
    torch.cumsum(slices_per_owner, 0, out=firsts[1:])
    slices, lanes = firsts[owners] + position // height, position % height

    slice_rows = torch.full((int(firsts[-1]) * height,), -1)
    slice_rows[slices * height + lanes] = run_rows[runs]
    lengths = torch.zeros(int(firsts[-1]), dtype=torch.int64)
    leaders = lanes == 0
    lengths[slices[leaders]] = run_lengths[runs[leaders]]
    run_slices = torch.zeros(run_lengths.numel(), dtype=torch.int64)
    run_lanes = torch.zeros(run_lengths.numel(), dtype=torch.int64)
    run_slices[runs], run_lanes[runs] = slices, lanes
    return _Runs(firsts, slice_rows, lengths, run_slices, run_lanes)
