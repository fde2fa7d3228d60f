# SPDX-License-Identifier: Apache-2.0
"""Sliced ELL with column blocks: the layout that the panel kernels walk fastest.

A kernel keeps one block of columns' activations in the L1 cache and a slice of rows in registers.
So the matrix is cut into blocks of columns; within a block, rows are sorted by their number of
values and grouped into slices of a few rows of about the same length, whose values lie step by
step: one of each row. (Sliced ELL with sorted rows is the SELL-C-sigma of Kreutzer et al.,
arXiv 1307.6209; the column blocks are added here.)
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from sparselt.errors import DeviceError, DtypeError, FormatError, explain_mismatch
from sparselt.formats.base import SparseWeight
from sparselt.formats.checks import check_fits_int32, check_parts
from sparselt.formats.csr import CSR

__all__ = ["SELL"]

_DEFAULT_BLOCK = (4, 128)
_MAX_BLOCK_COLS = 2**15 - 1  # columns and the filler's column_block fit int16
_SECTION_ROWS = 128  # rows that a section has at least: fewer make poorer slices
_LOW_SLICE = 16
_SECTION_SLICES = 16  # slices of more than _LOW_SLICE rows that a section has at least
_MAX_SECTIONS = 16


class SELL(SparseWeight):
    """Sliced ELL with column blocks, for the panel kernels; `block` is (slice height, block cols).

    Parts, for b blocks of columns, s sections of rows (for threads to share) and slices of h rows:
        block_slices: (s * b + 1) int32; block j of section i owns the slices from entry i * b + j.
        slice_steps: (slices + 1) int32; slice i owns steps slice_steps[i] to slice_steps[i + 1].
        slice_rows: (slices * h) int32; the rows of each slice, -1 where it has fewer.
        columns: (steps * h) int16; the column within its block, rising along a row; block cols
            where a row of the slice has no more values.
        values: (steps * h) float32; 0.0 at such places.

    Each row is in one section; in the first and the last block it has a slice even if it is empty
    there, since kernels begin and finish a row's sum in them.

    Example:
        >>> import torch
        >>> weight = SELL.from_dense(torch.eye(4), block=(2, 128))
        >>> weight.slice_rows.tolist(), weight.columns.tolist()
        ([0, 1, 2, 3], [0, 1, 2, 3])
    """

    name: ClassVar[str] = "sell"
    part_names: ClassVar[tuple[str, ...]] = (
        "block_slices",
        "slice_steps",
        "slice_rows",
        "columns",
        "values",
    )

    @property
    def block_slices(self) -> Tensor:
        """(sections * blocks + 1) int32: first slice of each block of each section."""
        return self._parts[0]

    @property
    def slice_steps(self) -> Tensor:
        """(slices + 1) int32: first step of each slice."""
        return self._parts[1]

    @property
    def slice_rows(self) -> Tensor:
        """(slices * height) int32: rows, or -1."""
        return self._parts[2]

    @property
    def columns(self) -> Tensor:
        """(steps * height) int16: columns within their block, or block cols for none."""
        return self._parts[3]

    @property
    def values(self) -> Tensor:
        """(steps * height) float32."""
        return self._parts[4]

    @property
    def nnz(self) -> int:
        """Number of stored values, fillers counted."""
        return self.values.numel()

    @property
    def num_blocks(self) -> int:
        """Blocks of columns."""
        return max(1, -(-self.cols // self.block[1]))

    @classmethod
    def check_block(cls, block: tuple[int, int] | None) -> tuple[int, int]:
        """(slice height, block cols); raises FormatError for sizes out of range."""
        height, cols = _DEFAULT_BLOCK if block is None else block
        if not (1 <= height <= 64 and 1 <= cols <= _MAX_BLOCK_COLS):
            expected = f"(slice height of 1 to 64, columns of 1 to {_MAX_BLOCK_COLS})"
            raise FormatError(explain_mismatch("block", expected, block))
        return int(height), int(cols)

    @classmethod
    def from_dense(
        cls, weight: Tensor, mask: Tensor | None = None, block: tuple[int, int] | None = None
    ) -> Self:
        """Pack the kept weights.

        Args:
            weight: as for `CSR.from_dense`.
            mask: as for `CSR.from_dense`.
            block: (slice height, block cols); None means (4, 128).

        Returns:
            The packed weight, on the weight's device.

        Raises:
            DtypeError, ShapeError, DeviceError, FormatError: what was given cannot be packed.

        Example:
            >>> import torch
            >>> SELL.from_dense(torch.eye(3)).nnz
            4
        """
        return cls.from_csr(CSR.from_dense(weight, mask), block)

    @classmethod
    def from_csr(cls, weight: CSR, block: tuple[int, int] | None = None) -> Self:
        """Re-pack compressed rows; a kept 0.0 stays stored.

        Args:
            weight: any CSR weight.
            block: (slice height, block cols); None means (4, 128).
        """
        height, block_cols = block = cls.check_block(block)
        _check_on_cpu(weight.crow_indices)
        num_blocks = max(1, -(-weight.cols // block_cols))
        entry_rows = torch.repeat_interleave(
            torch.arange(weight.rows), weight.crow_indices.long().diff(), output_size=weight.nnz
        )
        columns = weight.col_indices.long()
        # Entries lie by row and, within a row, by block: a "run" is a row's part of a block.
        entry_runs = entry_rows * num_blocks + columns // block_cols
        run_lengths = torch.bincount(entry_runs, minlength=weight.rows * num_blocks)
        sections = _section_of_rows(weight, height)
        run_slices, run_lanes, slices = _group_runs(run_lengths, sections, num_blocks, height)
        steps = torch.zeros(len(slices.lengths) + 1, dtype=torch.int64)
        torch.cumsum(slices.lengths, 0, out=steps[1:])
        check_fits_int32(int(steps[-1]) * height)

        first_entries = torch.cumsum(run_lengths, 0) - run_lengths
        rank = torch.arange(weight.nnz) - first_entries[entry_runs]
        places = (steps[run_slices[entry_runs]] + rank) * height + run_lanes[entry_runs]
        packed_columns = torch.full((int(steps[-1]) * height,), block_cols, dtype=torch.int16)
        packed_columns[places] = (columns % block_cols).to(torch.int16)
        values = torch.zeros(int(steps[-1]) * height)
        values[places] = weight.values
        parts = (slices.firsts, steps, slices.rows, packed_columns, values)
        typed = tuple(p.int() if p.dtype == torch.int64 else p for p in parts)
        return cls._trusted(typed, weight.shape, block)

    def to_csr(self) -> CSR:
        """The same weight as compressed rows, fillers dropped."""
        rows, columns, places = self._entries()
        order = torch.argsort(rows * max(1, self.cols) + columns)
        crow = torch.zeros(self.rows + 1, dtype=torch.int32)
        crow[1:] = torch.cumsum(torch.bincount(rows, minlength=self.rows), 0)
        parts = (crow, columns[order].int(), self.values[places[order]])
        return CSR.from_parts(parts, self.shape)

    def to_dense(self) -> Tensor:
        """The dense float32 weight of shape `shape`: kept values bit for bit, 0.0 elsewhere."""
        rows, columns, places = self._entries()
        dense = torch.zeros(self.rows * self.cols)
        dense[rows * self.cols + columns] = self.values[places]
        return dense.view(self.shape)

    def mask(self) -> Tensor:
        """Bool tensor of shape `shape`: True where a weight is kept."""
        rows, columns, _ = self._entries()
        kept = torch.zeros(self.rows * self.cols, dtype=torch.bool)
        kept[rows * self.cols + columns] = True
        return kept.view(self.shape)

    def _entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """Row, column and place in `values` of every kept weight."""
        height, block_cols = self.block
        slices = torch.arange(self.slice_steps.numel() - 1)
        slice_blocks = (
            torch.searchsorted(self.block_slices.long(), slices, right=True) - 1
        ) % self.num_blocks
        lengths = self.slice_steps.long().diff()
        step_slices = torch.repeat_interleave(slices, lengths)
        places = torch.arange(self.nnz)
        owners = step_slices[places // height]
        rows = self.slice_rows.long()[owners * height + places % height]
        columns = self.columns.long()
        kept = columns < block_cols
        columns = columns + slice_blocks[owners] * block_cols
        return rows[kept], columns[kept], places[kept]

    def validate(self, full: bool = True) -> None:
        """Check types, ranks and lengths, with `full` every index; see `SparseWeight.validate`."""
        if len(self._parts) == len(self.part_names) and isinstance(self.columns, Tensor):
            _check_on_cpu(self.columns)
            if self.columns.dtype != torch.int16:
                raise DtypeError(explain_mismatch("columns", torch.int16, self.columns.dtype))
            check_parts((*self._parts[:3], self.values), (*self.part_names[:3], "values"), "sell")
        else:
            check_parts(self._parts, self.part_names, self.name)
        height = self.block[0]
        slices = self.slice_steps.numel() - 1
        lengths = {
            "block_slices": (self.block_slices.numel() - 1) % self.num_blocks == 0,
            "slice_steps": slices >= 0,
            "slice_rows": self.slice_rows.numel() == slices * height,
            "columns": self.columns.numel() == self.values.numel()
            and self.columns.is_contiguous()
            and self.values.numel() % height == 0,
        }
        for name, fits in lengths.items():
            if not fits or any(part.dim() != 1 for part in self._parts):
                raise FormatError(
                    explain_mismatch(name, "the length that the other parts imply", "another")
                )
        if full:
            self._validate_offsets()
            self._validate_rows()

    def _validate_offsets(self) -> None:
        ends = {
            "block_slices": (self.block_slices, self.slice_steps.numel() - 1),
            "slice_steps": (self.slice_steps, self.values.numel() // self.block[0]),
        }
        for name, (offsets, end) in ends.items():
            rises = bool((offsets[1:] >= offsets[:-1]).all())
            if int(offsets[0]) != 0 or int(offsets[-1]) != end or not rises:
                raise FormatError(
                    explain_mismatch(name, f"offsets from 0, never falling, to {end}", "others")
                )
        lowest, highest = (int(v) for v in self.columns.aminmax()) if self.nnz else (0, 0)
        if lowest < 0 or highest > self.block[1]:
            got = f"from {lowest} to {highest}"
            raise FormatError(explain_mismatch("columns", f"0 to {self.block[1]}", got))

    def _validate_rows(self) -> None:
        rows = self.slice_rows.long()
        if rows.numel() and (int(rows.min()) < -1 or int(rows.max()) >= self.rows):
            raise FormatError(
                explain_mismatch("slice_rows", f"-1 to {self.rows - 1}", "one outside")
            )
        blocks = torch.repeat_interleave(
            torch.arange(self.block_slices.numel() - 1), self.block_slices.long().diff()
        ).repeat_interleave(self.block[0])
        held = rows >= 0
        sections, columns_of = blocks // self.num_blocks, blocks % self.num_blocks
        appearances = torch.bincount(
            columns_of[held] * self.rows + rows[held], minlength=self.num_blocks * self.rows
        ).view(self.num_blocks, self.rows)
        owner = torch.full((self.rows,), -1).scatter(0, rows[held], sections[held])
        ends_full = self.rows == 0 or bool((appearances[[0, -1]] == 1).all())
        leads = held.view(-1, self.block[0])
        if (
            not ends_full
            or bool((appearances > 1).any())
            or bool((owner[rows[held]] != sections[held]).any())
            or bool((leads[:, 1:] & ~leads[:, :-1]).any())
        ):
            expected = "each row once a block, in one section, and in the first and last block"
            raise FormatError(explain_mismatch("slice_rows", expected, "another arrangement"))
        self._validate_entries()

    def _validate_entries(self) -> None:
        rows, columns, _ = self._entries()
        if rows.numel() == 0:
            return
        if int(rows.min()) < 0 or int(columns.max()) >= self.cols:
            raise FormatError(
                explain_mismatch("columns", "values in rows and columns of the weight", "others")
            )
        if torch.unique(rows * self.cols + columns).numel() != rows.numel():
            raise FormatError(explain_mismatch("columns", "each column once a row", "a repetition"))


def _check_on_cpu(part: Tensor) -> None:
    if part.is_cuda:
        hint = "CUDA kernels read other formats: pack the weight with format='csr'"
        raise DeviceError(
            explain_mismatch("format 'sell'", "a weight on the CPU", part.device, hint)
        )


class _Slices:
    """The slices of a weight: first slice of each (section, block), rows and lengths of each."""

    def __init__(self, firsts: Tensor, rows: Tensor, lengths: Tensor) -> None:
        self.firsts, self.rows, self.lengths = firsts, rows, lengths


def _section_of_rows(weight: CSR, height: int) -> Tensor:
    """The section of each row: contiguous ranges of about the same number of values."""
    # Rows that are no multiple of the height leave the last slice of a section part empty.
    least = max(_SECTION_ROWS, _SECTION_SLICES * height if height > _LOW_SLICE else 0)
    count = max(1, min(_MAX_SECTIONS, weight.rows // least))
    before = weight.crow_indices[:-1].long()
    # Rows are counted too, so that an empty weight is shared out as well.
    load = before + torch.arange(weight.rows)
    return load * count // max(1, weight.nnz + weight.rows)


def _group_runs(
    run_lengths: Tensor, sections: Tensor, num_blocks: int, height: int
) -> tuple[Tensor, Tensor, _Slices]:
    """Sorts the runs of each (section, block) by length and groups them into slices.

    Args:
        run_lengths: (rows * num_blocks) values of each row in each block.
        sections: (rows) section of each row.
        num_blocks: blocks of columns.
        height: rows of a slice.

    Returns:
        Slice and lane of each run (meaningless for runs without a slice), and the slices.
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
    return run_slices, run_lanes, _Slices(firsts, slice_rows, lengths)
