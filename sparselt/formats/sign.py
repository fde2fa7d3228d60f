# SPDX-License-Identifier: Apache-2.0
"""Signs and one magnitude a row: the format of random weights that were never trained."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from sparselt.errors import FormatError, explain_mismatch
from sparselt.formats.base import compress
from sparselt.formats.sell import section_rows
from sparselt.formats.sliced import Sliced
from sparselt.formats.slices import Slices, arrange

__all__ = ["MAX_SIGN_COLS", "Sign", "row_magnitudes"]

MAX_SIGN_COLS = 2**14 - 1  # twice as many and two more fit int16
_DEFAULT_BLOCK = (8, MAX_SIGN_COLS)


class Sign(Sliced):
    """Sliced ELL without values: a column says where a weight is and which sign it has.

    For weights of one magnitude a row, such as edge-popup tickets have: two bytes a kept weight.

    Parts: those of `Sliced`, of which
        columns: (steps, h) int16; the column within its block, rising along a row; block cols + 1
            more than that where the weight is negative; block cols where a row has no more.
        values: (M) float32; the magnitude of each row's weights, 0.0 for a row without.

    Example:
        >>> import torch
        >>> weight = Sign.from_dense(torch.tensor([[0.0, 0.5, -0.5]]), block=(1, 3))
        >>> weight.columns.tolist(), weight.values.tolist()
        ([[1], [6]], [0.5])
    """

    name: ClassVar[str] = "sign"

    @property
    def nnz(self) -> int:
        """Number of stored signs, fillers counted."""
        return self.columns.numel()

    @property
    def kept(self) -> int:
        """Number of kept weights, fillers left out."""
        return int((self.columns != torch.tensor(self.block[1]).to(self.columns.dtype)).sum())

    @classmethod
    def check_block(cls, block: tuple[int, int] | None) -> tuple[int, int]:
        """(slice height, block cols); raises FormatError for sizes out of range."""
        height, cols = _DEFAULT_BLOCK if block is None else block
        if not (1 <= height <= 64 and 1 <= cols <= MAX_SIGN_COLS):
            expected = f"(slice height of 1 to 64, columns of 1 to {MAX_SIGN_COLS})"
            raise FormatError(explain_mismatch("block", expected, block))
        return int(height), int(cols)

    @classmethod
    def _pack(
        cls,
        dense: Tensor,
        kept: Tensor,
        shape: tuple[int, ...],
        block: tuple[int, int],
        groups: int,
    ) -> tuple[Tensor, ...]:
        magnitudes = row_magnitudes(dense, kept)
        if magnitudes is None:
            expected = "weights of one finite magnitude a row for format 'sign'"
            raise FormatError(
                explain_mismatch("weight", expected, "others", "pack it with format='sell'")
            )
        crow, col, positions = compress(kept)
        height, block_cols = block
        grid = (dense.shape[0], dense.shape[1])
        slices, places = arrange(crow, col, grid, block, section_rows(height), groups)
        columns = slices.columns
        columns[places] += torch.signbit(dense.view(-1)[positions]).short() * (block_cols + 1)
        indices = (slices.block_slices, slices.slice_steps, slices.slice_rows)
        return (*indices, columns.view(-1, height), magnitudes)

    def to_dense(self) -> Tensor:
        """The dense float32 weight of shape `shape`: kept values bit for bit, 0.0 elsewhere."""
        rows, columns, places = self._slices().entries()
        values = self.values.float()[rows]
        negative = self.columns.view(-1)[places] > self.block[1]
        dense = torch.zeros(self.rows * self.cols)
        dense[rows * self.cols + columns] = torch.where(negative, -values, values)
        return dense.view(self.shape)

    def _stored(self) -> tuple[Tensor, Tensor]:
        rows, columns, places = self._slices().entries()
        return rows * self.cols + columns, places

    def _slices(self) -> Slices:
        block_cols = self.block[1]
        stored = self.columns.view(-1)
        columns = torch.where(stored > block_cols, stored - (block_cols + 1), stored)
        indices = (self.block_slices, self.slice_steps, self.slice_rows, columns)
        return Slices(*indices, self.rows, self.cols, *self.block)

    def _fits(self) -> bool:
        steps = self.columns.numel() // self.block[0]
        shapes = ((steps, self.block[0]), (self.rows,))
        return (self.columns.shape, self.values.shape) == shapes

    def _check_indices(self) -> None:
        highest = 2 * self.block[1]
        if self.nnz and int(self.columns.max()) > highest:
            raise FormatError(explain_mismatch("columns", f"0 to {highest}", "a larger one"))
        super()._check_indices()
        if not bool((self.values.isfinite() & ~self.values.signbit()).all()):
            expected = "finite magnitudes without a sign"
            raise FormatError(explain_mismatch("values", expected, "another"))


def row_magnitudes(weight: Tensor, kept: Tensor) -> Tensor | None:
    """The magnitude that all kept weights of a row have, exactly; None where they differ.

    Args:
        weight: (M, K) float32.
        kept: (M, K) bool.

    Returns:
        (M,) float32, 0.0 for rows without kept weights; None if some row has two magnitudes, or
        one that is not finite.

    Example:
        >>> import torch
        >>> row_magnitudes(torch.tensor([[2.0, -2.0], [0.0, 3.0]]), torch.eye(2).bool())
        tensor([2., 3.])
    """
    if not weight.numel():
        return torch.zeros(weight.shape[0])
    for count in (1, weight.shape[0]):  # the first row tells most weights apart
        size = weight[:count].abs()
        highest = size.where(kept[:count], size.new_zeros(())).amax(1)
        same = (size == highest[:, None]) | ~kept[:count]
        if not bool(same.all() & highest.isfinite().all()):
            return None
    return highest
