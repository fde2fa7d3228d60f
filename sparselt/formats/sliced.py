# SPDX-License-Identifier: Apache-2.0
"""What the sliced formats share: slices of rows in sections and blocks of columns."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from sparselt.errors import FormatError, explain_mismatch
from sparselt.formats.base import Part, SparseWeight
from sparselt.formats.checks import check_fits_int32
from sparselt.formats.slices import Slices

__all__ = ["Sliced"]


class Sliced(SparseWeight):
    """Sliced ELL with column blocks, for the CPU; `block` is (slice height, block cols).

    Parts, for b blocks of columns, s sections of rows (for threads to share) and slices of h rows:
        block_slices: (s * b + 1) int32; block j of section i owns the slices from entry i * b + j.
        slice_steps: (slices + 1) int32; slice i owns steps slice_steps[i] to slice_steps[i + 1].
        slice_rows: (slices * h) int32; the rows of each slice, -1 where it has fewer.
        columns: int16; the column within its block of each stored value, or of each step.
        values: float32.

    Each row is in one section; in the first and the last block it has a slice even if it is empty
    there, since kernels begin and finish a row's sum in them.
    """

    part_names: ClassVar[tuple[str, ...]] = (
        "block_slices",
        "slice_steps",
        "slice_rows",
        "columns",
        "values",
    )
    index_dtypes: ClassVar[dict[str, torch.dtype]] = {"columns": torch.int16}
    cpu_only: ClassVar[bool] = True

    block_slices = Part(0)
    slice_steps = Part(1)
    slice_rows = Part(2)
    columns = Part(3)

    @property
    def num_blocks(self) -> int:
        """Blocks of columns."""
        return max(1, -(-self.cols // self.block[1]))

    @abstractmethod
    def _slices(self) -> Slices:
        """The slices as rows of `Slices`: of the weight, or of its blocks."""

    @abstractmethod
    def _fits(self) -> bool:
        """Whether columns and values have the shapes that steps need."""

    def _compressed(self) -> tuple[Tensor, Tensor, Tensor]:
        """Row offsets and columns int32 of the slices' entries, and their places, by row."""
        slices = self._slices()
        rows, columns, places = slices.entries()
        order = torch.argsort(rows * max(1, self.cols) + columns)
        crow = torch.zeros(slices.rows + 1, dtype=torch.int32)
        crow[1:] = torch.cumsum(torch.bincount(rows, minlength=slices.rows), 0)
        return crow, columns[order].int(), places[order]

    def _check_lengths(self) -> None:
        slices = self.slice_steps.numel() - 1
        fits = {
            "block_slices": (self.block_slices.numel() - 1) % self.num_blocks == 0,
            "slice_steps": slices >= 0,
            "slice_rows": self.slice_rows.numel() == slices * self.block[0],
            "columns": self._fits(),
        }
        for name, good in fits.items():
            if not good or any(part.dim() != 1 for part in self._parts[:3]):
                raise FormatError(
                    explain_mismatch(name, "the length that the other parts imply", "another")
                )
        check_fits_int32(self.nnz)

    def _check_indices(self) -> None:
        self._slices().validate()
