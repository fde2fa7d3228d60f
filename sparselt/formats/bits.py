# SPDX-License-Identifier: Apache-2.0
"""Values and one bit a position, by rows: the CPU's format where half of the weights are kept."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from sparselt.errors import FormatError, explain_mismatch
from sparselt.formats.base import Part, SparseWeight
from sparselt.formats.checks import check_fits_int32

__all__ = ["MASK_BITS", "Bits"]

MASK_BITS = 16


class Bits(SparseWeight):
    """The kept weights of each row in order, and a bit for each place of it; for the CPU.

    With half of the weights kept a position takes 2.1 bytes, everything included.

    Parts:
        crow_indices: (M + 1) int32; row m owns values crow_indices[m] to crow_indices[m + 1].
        masks: (M, ceil(K / 16)) int16; bit k % 16 of mask [m, k // 16] says whether (m, k) is kept.
        values: (nnz + 16) float32; 16 zeros at the end, so that a register may be loaded from any.

    Example:
        >>> import torch
        >>> weight = Bits.from_dense(torch.tensor([[0.0, 2.0, 3.0], [4.0, 0.0, 0.0]]))
        >>> weight.masks.tolist(), weight.values[: weight.nnz].tolist()
        ([[6], [1]], [2.0, 3.0, 4.0])
    """

    name: ClassVar[str] = "bits"
    part_names: ClassVar[tuple[str, ...]] = ("crow_indices", "masks", "values")
    index_dtypes: ClassVar[dict[str, torch.dtype]] = {"masks": torch.int16}
    cpu_only: ClassVar[bool] = True

    crow_indices = Part(0)
    masks = Part(1)

    @property
    def nnz(self) -> int:
        """Number of stored weights."""
        return self.values.numel() - MASK_BITS

    @classmethod
    def check_block(cls, block: tuple[int, int] | None) -> tuple[int, int]:
        """(1, 1); raises FormatError for any other block."""
        if block not in (None, (1, 1), [1, 1]):
            raise FormatError(explain_mismatch("block", "None for format 'bits'", block))
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
        rows, cols = kept.shape
        crow = torch.zeros(rows + 1, dtype=torch.int64)
        crow[1:] = kept.sum(1).cumsum(0)
        check_fits_int32(int(crow[-1]))
        padded = np.zeros((rows, -(-cols // MASK_BITS) * MASK_BITS), dtype=bool)
        padded[:, :cols] = kept.numpy()
        masks = np.packbits(padded, axis=1, bitorder="little").view("<i2")
        values = torch.cat([dense[kept], torch.zeros(MASK_BITS)])
        return crow.to(torch.int32), torch.from_numpy(masks), values

    def _bits(self) -> Tensor:
        """(M, a multiple of 16) bool."""
        shifts = torch.arange(MASK_BITS, dtype=torch.int16)
        return (self.masks[:, :, None] >> shifts & 1).bool().flatten(1)

    def _stored(self) -> tuple[Tensor, Tensor]:
        rows, columns = self._bits().nonzero().unbind(1)
        return rows * self.cols + columns, torch.arange(self.nnz)

    def _check_lengths(self) -> None:
        masks = (self.rows, -(-self.cols // MASK_BITS))
        fits = {
            "crow_indices": self.crow_indices.shape == (self.rows + 1,),
            "masks": self.masks.shape == masks,
            "values": self.values.dim() == 1 and self.nnz >= 0,
        }
        for name, good in fits.items():
            if not good:
                expected = "the length that shape and other parts imply"
                raise FormatError(explain_mismatch(name, expected, "another"))
        check_fits_int32(self.nnz)

    def _check_indices(self) -> None:
        bits = self._bits()
        if bool(bits[:, self.cols :].any()):
            raise FormatError(explain_mismatch("masks", f"{self.cols} columns", "bits beyond"))
        crow = torch.zeros(self.rows + 1, dtype=torch.int64)
        crow[1:] = bits.sum(1).cumsum(0)
        if not torch.equal(crow, self.crow_indices.long()) or int(crow[-1]) != self.nnz:
            expected = "as many values a row as its masks have bits"
            raise FormatError(explain_mismatch("crow_indices", expected, "others"))
