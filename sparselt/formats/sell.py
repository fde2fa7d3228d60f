# SPDX-License-Identifier: Apache-2.0
"""Sliced ELL with column blocks: the layout that the panel kernels walk fastest."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from sparselt.errors import DtypeError, FormatError, explain_mismatch
from sparselt.formats.base import SparseWeight
from sparselt.formats.checks import check_on_cpu, check_parts
from sparselt.formats.csr import CSR
from sparselt.formats.slices import MAX_BLOCK_COLS, Slices, arrange

__all__ = ["SELL"]

_DEFAULT_BLOCK = (4, 128)
_SECTION_ROWS = 128  # rows that a section has at least: fewer make poorer slices
_LOW_SLICE = 16
_SECTION_SLICES = 16  # slices of more than _LOW_SLICE rows that a section has at least


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
        if not (1 <= height <= 64 and 1 <= cols <= MAX_BLOCK_COLS):
            expected = f"(slice height of 1 to 64, columns of 1 to {MAX_BLOCK_COLS})"
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
        block = cls.check_block(block)
        check_on_cpu(weight.crow_indices, "sell")
        # Rows that are no multiple of the height leave the last slice of a section part empty.
        height = block[0]
        least = max(_SECTION_ROWS, _SECTION_SLICES * height if height > _LOW_SLICE else 0)
        grid = (weight.rows, weight.cols)
        slices, places = arrange(weight.crow_indices, weight.col_indices, grid, block, least)
        values = torch.zeros(slices.columns.numel())
        values[places] = weight.values
        indices = (slices.block_slices, slices.slice_steps, slices.slice_rows, slices.columns)
        return cls._trusted((*indices, values), weight.shape, block)

    def to_csr(self) -> CSR:
        """The same weight as compressed rows, fillers dropped."""
        rows, columns, places = self._slices().entries()
        order = torch.argsort(rows * max(1, self.cols) + columns)
        crow = torch.zeros(self.rows + 1, dtype=torch.int32)
        crow[1:] = torch.cumsum(torch.bincount(rows, minlength=self.rows), 0)
        parts = (crow, columns[order].int(), self.values[places[order]])
        return CSR.from_parts(parts, self.shape)

    def to_dense(self) -> Tensor:
        """The dense float32 weight of shape `shape`: kept values bit for bit, 0.0 elsewhere."""
        rows, columns, places = self._slices().entries()
        dense = torch.zeros(self.rows * self.cols)
        dense[rows * self.cols + columns] = self.values[places]
        return dense.view(self.shape)

    def mask(self) -> Tensor:
        """Bool tensor of shape `shape`: True where a weight is kept."""
        rows, columns, _ = self._slices().entries()
        kept = torch.zeros(self.rows * self.cols, dtype=torch.bool)
        kept[rows * self.cols + columns] = True
        return kept.view(self.shape)

    def _slices(self) -> Slices:
        indices = (self.block_slices, self.slice_steps, self.slice_rows, self.columns)
        return Slices(*indices, self.rows, self.cols, *self.block)

    def validate(self, full: bool = True) -> None:
        """Check types, ranks and lengths, with `full` every index; see `SparseWeight.validate`."""
        if len(self._parts) == len(self.part_names) and isinstance(self.columns, Tensor):
            check_on_cpu(self.columns, "sell")
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
            self._slices().validate()
