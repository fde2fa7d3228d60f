# SPDX-License-Identifier: Apache-2.0
"""Sliced ELL with column blocks: the layout that the panel kernels walk fastest."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from sparselt.errors import FormatError, explain_mismatch
from sparselt.formats.base import compress
from sparselt.formats.checks import check_on_cpu
from sparselt.formats.csr import CSR
from sparselt.formats.sliced import Sliced
from sparselt.formats.slices import MAX_BLOCK_COLS, Slices, arrange

__all__ = ["SELL", "section_rows"]

_DEFAULT_BLOCK = (4, 128)
_SECTION_ROWS = 128  # rows that a section has at least: fewer make poorer slices
_LOW_SLICE = 16
_SECTION_SLICES = 16  # slices of more than _LOW_SLICE rows that a section has at least


class SELL(Sliced):
    """Sliced ELL of single weights: rows of a block are sorted by length, short ones filled up.

    Parts: those of `Sliced`, of which
        columns: (steps * h) int16; the column within its block, rising along a row; block cols
            where a row of the slice has no more values.
        values: (steps * h) float32; 0.0 at such places.

    Example:
        >>> import torch
        >>> weight = SELL.from_dense(torch.eye(4), block=(2, 128))
        >>> weight.slice_rows.tolist(), weight.columns.tolist()
        ([0, 1, 2, 3], [0, 1, 2, 3])
    """

    name: ClassVar[str] = "sell"

    @classmethod
    def check_block(cls, block: tuple[int, int] | None) -> tuple[int, int]:
        """(slice height, block cols); raises FormatError for sizes out of range."""
        height, cols = _DEFAULT_BLOCK if block is None else block
        if not (1 <= height <= 64 and 1 <= cols <= MAX_BLOCK_COLS):
            expected = f"(slice height of 1 to 64, columns of 1 to {MAX_BLOCK_COLS})"
            raise FormatError(explain_mismatch("block", expected, block))
        return int(height), int(cols)

    @classmethod
    def from_csr(cls, weight: CSR, block: tuple[int, int] | None = None) -> Self:
        """Re-pack compressed rows; a kept 0.0 stays stored.

        Args:
            weight: any CSR weight.
            block: (slice height, block cols); None means (4, 128).
        """
        block = cls.check_block(block)
        check_on_cpu(weight.crow_indices, cls.name)
        rows = (weight.crow_indices, weight.col_indices, weight.values)
        parts = cls._arranged(*rows, weight.cols, block, 1)
        return cls._trusted(parts, weight.shape, block)

    @classmethod
    def _pack(
        cls,
        dense: Tensor,
        kept: Tensor,
        shape: tuple[int, ...],
        block: tuple[int, int],
        groups: int,
    ) -> tuple[Tensor, ...]:
        crow, col, positions = compress(kept)
        values = dense.view(-1)[positions]
        return cls._arranged(crow, col, values, kept.shape[1], block, groups)

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
        """The parts for compressed rows."""
        grid = (crow.numel() - 1, cols)
        slices, places = arrange(crow, col, grid, block, section_rows(block[0]), groups)
        packed = torch.zeros(slices.columns.numel())
        packed[places] = values
        return slices.block_slices, slices.slice_steps, slices.slice_rows, slices.columns, packed

    def to_csr(self) -> CSR:
        """The same weight as compressed rows, fillers dropped."""
        crow, col, places = self._compressed()
        return CSR.from_parts((crow, col, self.values[places]), self.shape)

    @property
    def kept(self) -> int:
        """Number of kept weights, fillers left out."""
        return int((self.columns != torch.tensor(self.block[1]).to(self.columns.dtype)).sum())

    def _stored(self) -> tuple[Tensor, Tensor]:
        rows, columns, places = self._slices().entries()
        return rows * self.cols + columns, places

    def _slices(self) -> Slices:
        indices = (self.block_slices, self.slice_steps, self.slice_rows, self.columns)
        return Slices(*indices, self.rows, self.cols, *self.block)

    def _fits(self) -> bool:
        steps = self.columns.numel() // self.block[0]
        return self.columns.shape == self.values.shape == (steps * self.block[0],)


def section_rows(height: int) -> int:
    """The least rows of a section of slices of `height` rows."""
    # Rows that are no multiple of the height leave the last slice of a section part empty.
    return max(_SECTION_ROWS, _SECTION_SLICES * height if height > _LOW_SLICE else 0)
