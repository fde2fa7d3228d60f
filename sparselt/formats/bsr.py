# SPDX-License-Identifier: Apache-2.0
"""Block sparse rows: one column index for a whole block of weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import Self

from sparselt.errors import FormatError, explain_mismatch
from sparselt.formats.base import compress, entry_rows
from sparselt.formats.checks import check_fits_int32
from sparselt.formats.compressed import Compressed

__all__ = ["BSR", "MAX_BLOCK"]

MAX_BLOCK = (
    1024  # rows or columns; a larger block is a dense matrix, and padding to it costs memory
)


class BSR(Compressed):
    """Block sparse rows: every block that holds a kept weight is stored whole, zeros included.

    Parts:
        crow_indices: (ceil(M / block_rows) + 1) int32 offsets of block rows.
        col_indices: (num_blocks) int32 block columns, strictly rising within a block row.
        values: (num_blocks, block_rows, block_cols) float32, each block row-major. Where a block
            overhangs the matrix, and where the mask drops a weight inside a block, it holds 0.0.

    Example:
        >>> import torch
        >>> weight = BSR.from_dense(torch.eye(4), block=(2, 2))
        >>> weight.col_indices.tolist(), weight.nnz
        ([0, 1], 8)
    """

    name: ClassVar[str] = "bsr"

    @classmethod
    def portable(cls, block: tuple[int, int]) -> tuple[str, tuple[int, int]]:
        """As it is."""
        return "bsr", block

    @classmethod
    def check_block(cls, block: tuple[int, int] | None) -> tuple[int, int]:
        """The block, (4, 1) for None; raises FormatError unless it is two sizes from 1 to 1024."""
        if block is None:
            return (4, 1)
        sizes = tuple(block) if isinstance(block, (tuple, list, torch.Size)) else ()
        whole = all(isinstance(size, int) and not isinstance(size, bool) for size in sizes)
        if len(sizes) != 2 or not whole or not all(1 <= size <= MAX_BLOCK for size in sizes):
            raise FormatError(
                explain_mismatch(
                    "block",
                    f"(rows, cols), each from 1 to {MAX_BLOCK}",
                    repr(block),
                    "for example (4, 1) or (16, 16)",
                )
            )
        return sizes[0], sizes[1]

    @classmethod
    def from_parts(
        cls,
        parts: Sequence[Tensor],
        shape: Sequence[int],
        block: tuple[int, int] | None = None,
    ) -> Self:
        """Adopt parts that were made elsewhere, after checking all of them.

        Args:
            parts: crow_indices, col_indices and values; contiguous, not copied.
            shape: logical dense shape, 2 to 4 sizes.
            block: (block_rows, block_cols); None means that of `values`.

        Returns:
            The weight; its `parts()` are the tensors given.

        Raises:
            FormatError, DtypeError, ShapeError, DeviceError: as `validate(full=True)` does.
        """
        values = parts[-1] if len(parts) == len(cls.part_names) else None
        if block is None and isinstance(values, Tensor) and values.dim() == 3:
            block = (values.shape[1], values.shape[2])
        return cls(parts, shape, block)

    @classmethod
    def _pack(
        cls,
        dense: Tensor,
        kept: Tensor,
        shape: tuple[int, ...],
        block: tuple[int, int],
        groups: int,
    ) -> tuple[Tensor, ...]:
        (rows, cols), (block_rows, block_cols) = dense.shape, block
        grid_rows, grid_cols = -(-rows // block_rows), -(-cols // block_cols)
        overhang = (0, grid_cols * block_cols - cols, 0, grid_rows * block_rows - rows)
        dense = dense.masked_fill(~kept, 0.0)
        if any(overhang):
            dense, kept = pad(dense, overhang), pad(kept, overhang)
        tiled = (grid_rows, block_rows, grid_cols, block_cols)
        kept_blocks = kept.view(tiled).any(3).any(1)
        check_fits_int32(int(kept_blocks.sum()) * block_rows * block_cols)
        crow, col, positions = compress(kept_blocks)
        if grid_cols:
            values = dense.view(tiled)[positions // grid_cols, :, positions % grid_cols]
        else:
            values = dense.new_zeros(0, block_rows, block_cols)
        return crow, col, values.contiguous()

    def _spread(self, values: Tensor) -> Tensor:
        grid_rows, grid_cols = self.block_grid
        block_rows, block_cols = self.block
        tiles = values.new_zeros(grid_rows, block_rows, grid_cols, block_cols)
        rows = entry_rows(self.crow_indices, self.col_indices.numel())
        if rows.numel():
            tiles[rows, :, self.col_indices.long()] = values
        padded = tiles.view(grid_rows * block_rows, grid_cols * block_cols)
        return padded[: self.rows, : self.cols].contiguous().view(self.shape)
