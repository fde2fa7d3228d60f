# SPDX-License-Identifier: Apache-2.0
"""Rows of blocks in sliced ELL with column blocks: the panel kernels' layout of block weights."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from sparselt.errors import DtypeError, FormatError, explain_mismatch
from sparselt.formats.base import SparseWeight
from sparselt.formats.bsr import BSR
from sparselt.formats.checks import check_fits_int32, check_on_cpu, check_parts
from sparselt.formats.slices import MAX_BLOCK_COLS, Slices, arrange

__all__ = ["BSELL"]

_DEFAULT_BLOCK = (4, 384)
_HEIGHTS = (4, 8, 16)  # what the kernels' registers hold
_SECTION_ROWS = 128  # of the weight


class BSELL(SparseWeight):
    """Sliced ELL of blocks of h x 1: a slice is one row of blocks, whose h rows share each column.

    Square blocks are rows of such blocks too. `block` is (h, columns of a column block).

    Parts, for b column blocks and s sections of block rows (for threads to share):
        block_slices: (s * b + 1) int32; column block j of section i owns the slices from entry
            i * b + j.
        slice_steps: (slices + 1) int32; slice i owns steps slice_steps[i] to slice_steps[i + 1].
        slice_rows: (slices * h) int32; the h neighbouring rows of each slice, -1 below the last.
        columns: (steps) int16; the column within its column block, rising along a slice.
        values: (steps, h) float32; 0.0 for rows below the last.

    Each row is in one section; in the first and the last column block it has a slice even if it is
    empty there, since kernels begin and finish a row's sum in them.

    Example:
        >>> import torch
        >>> weight = BSELL.from_dense(torch.ones(4, 2), block=(4, 128))
        >>> weight.columns.tolist(), weight.values.tolist()
        ([0, 1], [[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    """

    name: ClassVar[str] = "bsell"
    part_names: ClassVar[tuple[str, ...]] = (
        "block_slices",
        "slice_steps",
        "slice_rows",
        "columns",
        "values",
    )

    @property
    def block_slices(self) -> Tensor:
        """(sections * column blocks + 1) int32: first slice of each block of each section."""
        return self._parts[0]

    @property
    def slice_steps(self) -> Tensor:
        """(slices + 1) int32: first step of each slice."""
        return self._parts[1]

    @property
    def slice_rows(self) -> Tensor:
        """(slices * h) int32: rows, or -1."""
        return self._parts[2]

    @property
    def columns(self) -> Tensor:
        """(steps) int16: columns within their column block."""
        return self._parts[3]

    @property
    def values(self) -> Tensor:
        """(steps, h) float32."""
        return self._parts[4]

    @property
    def nnz(self) -> int:
        """Number of stored values, whole blocks counted."""
        return self.values.numel()

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
    def from_dense(
        cls, weight: Tensor, mask: Tensor | None = None, block: tuple[int, int] | None = None
    ) -> Self:
        """Pack every h x 1 block that holds a kept weight.

        Args:
            weight: as for `BSR.from_dense`.
            mask: as for `BSR.from_dense`.
            block: (h, columns of a column block), h one of 4, 8 and 16; None means (4, 384).

        Returns:
            The packed weight, on the weight's device.

        Raises:
            DtypeError, ShapeError, DeviceError, FormatError: what was given cannot be packed.

        Example:
            >>> import torch
            >>> BSELL.from_dense(torch.eye(3)).nnz
            12
        """
        block = cls.check_block(block)
        check_on_cpu(weight, "bsell")
        blocks = BSR.from_dense(weight, mask, (block[0], 1))
        grid = blocks.block_grid
        slices, places = arrange(
            blocks.crow_indices,
            blocks.col_indices,
            grid,
            (1, block[1]),
            _SECTION_ROWS // block[0],
        )
        values = torch.empty(slices.columns.numel(), block[0])
        values[places] = blocks.values.view(-1, block[0])
        rows = slices.slice_rows[:, None] * block[0] + torch.arange(block[0], dtype=torch.int32)
        rows = torch.where(rows < blocks.rows, rows, -1).view(-1)
        parts = (slices.block_slices, slices.slice_steps, rows, slices.columns, values)
        return cls._trusted(parts, blocks.shape, block)

    def to_bsr(self) -> BSR:
        """The same weight in blocks of h x 1."""
        rows, columns, places = self._slices().entries()
        order = torch.argsort(rows * max(1, self.cols) + columns)
        crow = torch.zeros(self.block_rows + 1, dtype=torch.int32)
        crow[1:] = torch.cumsum(torch.bincount(rows, minlength=self.block_rows), 0)
        values = self.values[places[order]].unsqueeze(2)
        return BSR.from_parts((crow, columns[order].int(), values), self.shape, (self.block[0], 1))

    def to_dense(self) -> Tensor:
        """The dense float32 weight of shape `shape`: stored blocks bit for bit, 0.0 elsewhere."""
        return self.to_bsr().to_dense()

    def mask(self) -> Tensor:
        """Bool tensor of shape `shape`: True inside every stored block, kept weight or not."""
        return self.to_bsr().mask()

    def _slices(self) -> Slices:
        """The slices of block rows: what the h rows of each are, `validate` has checked."""
        height, block_cols = self.block
        firsts = self.slice_rows[::height] // height
        offsets = (self.block_slices, self.slice_steps)
        return Slices(*offsets, firsts, self.columns, self.block_rows, self.cols, 1, block_cols)

    def validate(self, full: bool = True) -> None:
        """Check types, ranks and lengths, with `full` every index; see `SparseWeight.validate`."""
        if len(self._parts) == len(self.part_names) and isinstance(self.columns, Tensor):
            check_on_cpu(self.columns, "bsell")
            if self.columns.dtype != torch.int16:
                raise DtypeError(explain_mismatch("columns", torch.int16, self.columns.dtype))
            check_parts((*self._parts[:3], self.values), (*self.part_names[:3], "values"), "bsell")
        else:
            check_parts(self._parts, self.part_names, self.name)
        height, block_cols = self.block
        slices, steps = self.slice_steps.numel() - 1, self.columns.numel()
        num_blocks = max(1, -(-self.cols // block_cols))
        lengths = {
            "block_slices": (self.block_slices.numel() - 1) % num_blocks == 0,
            "slice_steps": slices >= 0,
            "slice_rows": self.slice_rows.numel() == slices * height,
            "columns": self.columns.is_contiguous(),
            "values": self.values.shape == (steps, height),
        }
        for name, fits in lengths.items():
            if not fits or any(part.dim() != 1 for part in self._parts[:4]):
                raise FormatError(
                    explain_mismatch(name, "the length that the other parts imply", "another")
                )
        check_fits_int32(self.nnz)
        if full:
            self._validate_neighbours()
            self._slices().validate()
            if steps and int(self.columns.max()) == block_cols:
                raise FormatError(
                    explain_mismatch("columns", f"0 to {block_cols - 1}", str(block_cols))
                )

    def _validate_neighbours(self) -> None:
        height = self.block[0]
        rows = self.slice_rows.long().view(-1, height)
        neighbours = rows[:, :1] + torch.arange(height)
        neighbours = torch.where(neighbours < self.rows, neighbours, -1)
        if rows.numel() and (
            bool((rows[:, 0] % height != 0).any()) or bool((rows != neighbours).any())
        ):
            expected = f"{height} neighbouring rows from a multiple of {height} on"
            raise FormatError(explain_mismatch("slice_rows", expected, "others"))
