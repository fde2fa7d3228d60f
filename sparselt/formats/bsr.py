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
from sparselt.formats.base import SparseWeight, compress, entry_rows
from sparselt.formats.checks import (
    check_compressed_indices,
    check_compressed_lengths,
    check_fits_int32,
    check_parts,
    kept_weights,
)

__all__ = ["BSR", "MAX_BLOCK"]

MAX_BLOCK = (
    1024  # rows or columns; a larger block is a dense matrix, and padding to it costs memory
)


class BSR(SparseWeight):
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
    part_names: ClassVar[tuple[str, ...]] = ("crow_indices", "col_indices", "values")

    @property
    def crow_indices(self) -> Tensor:
        """(block rows + 1) int32 offsets."""
        return self._parts[0]

    @property
    def col_indices(self) -> Tensor:
        """(num_blocks) int32 block columns."""
        return self._parts[1]

    @property
    def values(self) -> Tensor:
        """(num_blocks, block_rows, block_cols) float32."""
        return self._parts[2]

    @property
    def nnz(self) -> int:
        """Number of stored values: blocks times the size of a block, padding included."""
        return self.values.numel()

    @property
    def block_grid(self) -> tuple[int, int]:
        """Number of block rows and block columns that cover the matrix."""
        return -(-self.rows // self.block[0]), -(-self.cols // self.block[1])

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
    def from_dense(
        cls, weight: Tensor, mask: Tensor | None = None, block: tuple[int, int] | None = None
    ) -> Self:
        """Pack every block that holds a kept weight.

        Args:
            weight: (M, K), (C_out, C_in/groups, S) or (C_out, C_in/groups, R, S); float32, float16
                or bfloat16 (both exact in float32), any strides.
            mask: the same shape, bool or 0/1; a block with a kept 0.0 stays stored. None means
                `weight != 0`.
            block: (block_rows, block_cols) of the flattened (M, K) matrix, each from 1 to 1024 and
                free to not divide it; None means (4, 1).

        Returns:
            The packed weight, on the weight's device.

        Raises:
            DtypeError, ShapeError, DeviceError, FormatError: what was given is none of the above.

        Example:
            >>> import torch
            >>> BSR.from_dense(torch.eye(4), block=(4, 1)).values.shape
            torch.Size([4, 4, 1])
        """
        block_rows, block_cols = block = cls.check_block(block)
        dense, kept = kept_weights(weight, mask)
        rows, cols = dense.shape
        grid_rows, grid_cols = -(-rows // block_rows), -(-cols // block_cols)
        overhang = (0, grid_cols * block_cols - cols, 0, grid_rows * block_rows - rows)
        if mask is not None:
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
        return cls._trusted((crow, col, values.contiguous()), tuple(weight.shape), block)

    def to_dense(self) -> Tensor:
        """The dense float32 weight of shape `shape`: stored blocks bit for bit, 0.0 elsewhere."""
        return self._spread(self.values.float())

    def mask(self) -> Tensor:
        """Bool tensor of shape `shape`: True inside every stored block, kept weight or not."""
        return self._spread(torch.ones((), dtype=torch.bool, device=self.device))

    def _spread(self, blocks: Tensor) -> Tensor:
        grid_rows, grid_cols = self.block_grid
        block_rows, block_cols = self.block
        tiles = blocks.new_zeros(grid_rows, block_rows, grid_cols, block_cols)
        rows = entry_rows(self.crow_indices, self.col_indices.numel())
        if rows.numel():
            tiles[rows, :, self.col_indices.long()] = blocks
        padded = tiles.view(grid_rows * block_rows, grid_cols * block_cols)
        return padded[: self.rows, : self.cols].contiguous().view(self.shape)

    def validate(self, full: bool = True) -> None:
        """Check types, ranks and lengths, with `full` every index; see `SparseWeight.validate`."""
        check_parts(self._parts, self.part_names, self.name)
        grid_rows, grid_cols = self.block_grid
        check_compressed_lengths(self.crow_indices, self.col_indices, grid_rows)
        expected = (self.col_indices.numel(), *self.block)
        if self.values.shape != expected:
            raise FormatError(
                explain_mismatch(
                    "values", f"shape {expected}, (blocks, *block)", tuple(self.values.shape)
                )
            )
        check_fits_int32(self.nnz)
        if full:
            check_compressed_indices(self.crow_indices, self.col_indices, grid_cols)
