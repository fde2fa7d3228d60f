# SPDX-License-Identifier: Apache-2.0
"""What the row-compressed formats share: offsets of (block) rows, and an index an entry."""

from __future__ import annotations

from typing import ClassVar

from sparselt.errors import FormatError, explain_mismatch
from sparselt.formats.base import Part, SparseWeight
from sparselt.formats.checks import (
    check_compressed_indices,
    check_compressed_lengths,
    check_fits_int32,
)

__all__ = ["Compressed"]


class Compressed(SparseWeight):
    """Entries row after row, each a weight or a block of `block` weights.

    Parts:
        crow_indices: (ceil(M / block_rows) + 1) int32 offsets of (block) rows.
        col_indices: (entries) int32 (block) columns, strictly rising within a (block) row.
        values: (entries, ...) float32; on CUDA also float16 or bfloat16.
    """

    part_names: ClassVar[tuple[str, ...]] = ("crow_indices", "col_indices", "values")

    crow_indices = Part(0)
    col_indices = Part(1)

    @property
    def block_grid(self) -> tuple[int, int]:
        """Number of block rows and block columns that cover the matrix."""
        return -(-self.rows // self.block[0]), -(-self.cols // self.block[1])

    def _values_shape(self) -> tuple[int, ...]:
        """What the number of entries implies."""
        return (self.col_indices.numel(), *self.block)

    def _check_lengths(self) -> None:
        check_compressed_lengths(self.crow_indices, self.col_indices, self.block_grid[0])
        expected = self._values_shape()
        if self.values.shape != expected:
            raise FormatError(
                explain_mismatch(
                    "values",
                    f"shape {expected}, an entry for each of col_indices",
                    tuple(self.values.shape),
                )
            )
        check_fits_int32(self.nnz)

    def _check_indices(self) -> None:
        check_compressed_indices(self.crow_indices, self.col_indices, self.block_grid[1])
