# SPDX-License-Identifier: Apache-2.0
"""Compressed sparse rows: one value and one column index a kept weight."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from sparselt.errors import FormatError, explain_mismatch
from sparselt.formats.base import compress, entry_rows
from sparselt.formats.compressed import Compressed

__all__ = ["CSR"]


class CSR(Compressed):
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
    def _pack(
        cls,
        dense: Tensor,
        kept: Tensor,
        shape: tuple[int, ...],
        block: tuple[int, int],
        groups: int,
    ) -> tuple[Tensor, ...]:
        crow, col, positions = compress(kept)
        return crow, col, dense.view(-1)[positions]

    def _stored(self) -> tuple[Tensor, Tensor]:
        rows = entry_rows(self.crow_indices, self.nnz)
        return rows * self.cols + self.col_indices, torch.arange(self.nnz, device=self.device)

    def _values_shape(self) -> tuple[int, ...]:
        return (self.col_indices.numel(),)
