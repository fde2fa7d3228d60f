# SPDX-License-Identifier: Apache-2.0
"""Compressed sparse rows: one value and one column index a kept weight."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
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

__all__ = ["CSR"]


class CSR(SparseWeight):
    """Compressed sparse rows (any pattern): the kept weights row after row, columns rising.

    Parts:
        crow_indices: (M + 1) int32; row m owns entries crow_indices[m] to crow_indices[m + 1].
        col_indices: (nnz) int32, strictly rising within a row.
        values: (nnz) float32; on CUDA also float16 or bfloat16.

    Example:
        >>> import torch
        >>> weight = CSR.from_dense(torch.tensor([[0.0, 2.0], [3.0, 0.0]]))
        >>> weight.crow_indices.tolist(), weight.col_indices.tolist(), weight.values.tolist()
        ([0, 1, 2], [1, 0], [2.0, 3.0])
    """

    name: ClassVar[str] = "csr"
    part_names: ClassVar[tuple[str, ...]] = ("crow_indices", "col_indices", "values")

    @property
    def crow_indices(self) -> Tensor:
        """(M + 1) int32 row offsets."""
        return self._parts[0]

    @property
    def col_indices(self) -> Tensor:
        """(nnz) int32 columns."""
        return self._parts[1]

    @property
    def values(self) -> Tensor:
        """(nnz) float32 kept weights."""
        return self._parts[2]

    @property
    def nnz(self) -> int:
        """Number of stored values, which is the number of kept weights."""
        return self.values.numel()

    @classmethod
    def check_block(cls, block: tuple[int, int] | None) -> tuple[int, int]:
        """(1, 1); raises FormatError for any other block."""
        if block not in (None, (1, 1), [1, 1]):
            raise FormatError(
                explain_mismatch(
                    "block", "None for format 'csr'", block, "blocks need format='bsr'"
                )
            )
        return (1, 1)

    @classmethod
    def from_dense(
        cls, weight: Tensor, mask: Tensor | None = None, block: tuple[int, int] | None = None
    ) -> Self:
        """Pack the kept weights.

        Args:
            weight: (M, K), (C_out, C_in/groups, S) or (C_out, C_in/groups, R, S); float32, float16
                or bfloat16 (both exact in float32), any strides.
            mask: the same shape, bool or 0/1; a kept 0.0 stays stored. None means `weight != 0`.
            block: None.

        Returns:
            The packed weight, on the weight's device.

        Raises:
            DtypeError, ShapeError, DeviceError, FormatError: what was given is none of the above.

        Example:
            >>> import torch
            >>> CSR.from_dense(torch.eye(3)).nnz
            3
        """
        block = cls.check_block(block)
        dense, kept = kept_weights(weight, mask)
        crow, col, positions = compress(kept)
        return cls._trusted((crow, col, dense.view(-1)[positions]), tuple(weight.shape), block)

    def to_dense(self) -> Tensor:
        """The dense float32 weight of shape `shape`: kept values bit for bit, 0.0 elsewhere."""
        dense = torch.zeros(self.rows * self.cols, device=self.device)
        dense[self._positions()] = self.values.float()
        return dense.view(self.shape)

    def mask(self) -> Tensor:
        """Bool tensor of shape `shape`: True where a weight is kept."""
        kept = torch.zeros(self.rows * self.cols, dtype=torch.bool, device=self.device)
        kept[self._positions()] = True
        return kept.view(self.shape)

    def _positions(self) -> Tensor:
        return entry_rows(self.crow_indices, self.nnz) * self.cols + self.col_indices

    def validate(self, full: bool = True) -> None:
        """Check types, ranks and lengths, with `full` every index; see `SparseWeight.validate`."""
        check_parts(self._parts, self.part_names, self.name)
        check_compressed_lengths(self.crow_indices, self.col_indices, self.rows)
        if self.values.shape != self.col_indices.shape:
            raise FormatError(
                explain_mismatch(
                    "values",
                    f"shape ({self.col_indices.numel()},), the length of col_indices",
                    tuple(self.values.shape),
                )
            )
        check_fits_int32(self.nnz)
        if full:
            check_compressed_indices(self.crow_indices, self.col_indices, self.cols)
