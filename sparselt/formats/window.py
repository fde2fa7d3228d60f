# SPDX-License-Identifier: Apache-2.0
"""Slices of 16 rows that walk x in windows: the CPU's format for one column and warm weights."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from sparselt.errors import FormatError, explain_mismatch
from sparselt.formats.base import Part, SparseWeight, compress
from sparselt.formats.checks import check_fits_int32

__all__ = ["LANES", "MAX_WINDOW_COLS", "WINDOW", "Window"]

LANES = 16  # rows of a slice, and the columns from a window's begin to the next one's
WINDOW = 2 * LANES
MAX_WINDOW_COLS = 2**15 * LANES
_KEPT = 128


class Window(SparseWeight):
    """Slices of 16 rows, a lane each; a step meets x in 32 neighbouring columns alone.

    Two registers hold those columns, so that a permutation takes the place of a gather. A lane
    whose next weight lies beyond the step's window waits. At 10 % density and random places every
    third does, so a kept weight takes 7 to 8 bytes.

    Parts, for slices of 16 rows, the longest rows first:
        slice_steps: (slices + 1) int32; slice i owns steps slice_steps[i] to slice_steps[i + 1].
        slice_rows: (slices * 16) int32; the row of each lane, -1 for none.
        windows: (steps) int16; the step's window begins at column 16 * windows.
        columns: (steps, 16) uint8; 128 and the column within the window, 0 for a lane that waits.
        values: (steps, 16) float32; 0.0 for a lane that waits.

    Example:
        >>> import torch
        >>> weight = Window.from_dense(torch.tensor([[0.0, 2.0], [3.0, 0.0]]))
        >>> weight.columns[0, :3].tolist(), weight.values[0, :3].tolist()
        ([129, 128, 0], [2.0, 3.0, 0.0])
    """

    name: ClassVar[str] = "window"
    part_names: ClassVar[tuple[str, ...]] = (
        "slice_steps",
        "slice_rows",
        "windows",
        "columns",
        "values",
    )
    index_dtypes: ClassVar[dict[str, torch.dtype]] = {
        "windows": torch.int16,
        "columns": torch.uint8,
    }
    cpu_only: ClassVar[bool] = True

    slice_steps = Part(0)
    slice_rows = Part(1)
    windows = Part(2)
    columns = Part(3)

    @classmethod
    def check_block(cls, block: tuple[int, int] | None) -> tuple[int, int]:
        """(1, 1); raises FormatError for any other block."""
        if block not in (None, (1, 1), [1, 1]):
            raise FormatError(explain_mismatch("block", "None for format 'window'", block))
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
        if kept.shape[1] > MAX_WINDOW_COLS:
            expected = f"at most {MAX_WINDOW_COLS} columns for format 'window'"
            raise FormatError(explain_mismatch("weight", expected, kept.shape[1]))
        crow, col, positions = compress(kept)
        rows, slices, windows, entries = _steps(crow.numpy(), col.numpy())
        check_fits_int32(entries.size)
        steps = np.zeros(rows.size // LANES + 1, dtype=np.int32)
        steps[1:] = np.cumsum(np.bincount(slices, minlength=rows.size // LANES))
        # Torch's memory, not numpy's, begins at a cache line, as each step's values then do.
        columns = torch.zeros(entries.shape, dtype=torch.uint8)
        values = torch.zeros(entries.shape)
        held = entries >= 0
        taken, begins = torch.from_numpy(entries[held]), torch.from_numpy(windows * LANES)
        within = col.long()[taken] - begins[:, None].expand(entries.shape)[torch.from_numpy(held)]
        columns[torch.from_numpy(held)] = (within + _KEPT).to(torch.uint8)
        values[torch.from_numpy(held)] = dense.view(-1)[positions[taken]]
        indices = (steps, rows.astype(np.int32), windows.astype(np.int16))
        return *(torch.from_numpy(part) for part in indices), columns, values

    @property
    def kept(self) -> int:
        """Number of kept weights, fillers left out."""
        return int((self.columns >= _KEPT).sum())

    def _stored(self) -> tuple[Tensor, Tensor]:
        lengths = self.slice_steps.diff().numpy()
        slices = torch.from_numpy(np.repeat(np.arange(lengths.size), lengths))
        rows = self.slice_rows.view(-1, LANES).long()[slices]
        columns = self.windows.long()[:, None] * LANES + self.columns.long() - _KEPT
        places = (self.columns.view(-1) >= _KEPT).nonzero().view(-1)
        return (rows * self.cols + columns).view(-1)[places], places

    def _check_lengths(self) -> None:
        slices, steps = -(-self.rows // LANES), self.windows.numel()
        fits = {
            "slice_steps": self.slice_steps.shape == (slices + 1,),
            "slice_rows": self.slice_rows.shape == (slices * LANES,),
            "windows": self.windows.dim() == 1,
            "columns": self.columns.shape == (steps, LANES),
            "values": self.values.shape == (steps, LANES),
        }
        for name, good in fits.items():
            if not good:
                expected = "the length that shape and other parts imply"
                raise FormatError(explain_mismatch(name, expected, "another"))
        check_fits_int32(self.nnz)

    def _check_indices(self) -> None:
        steps, rows, windows = self.slice_steps, self.slice_rows.long(), self.windows.long()
        if int(steps[0]) != 0 or bool((steps.diff() < 0).any()) or int(steps[-1]) != len(windows):
            expected = f"offsets from 0, never falling, to {len(windows)}"
            raise FormatError(explain_mismatch("slice_steps", expected, "others"))
        if not torch.equal(rows[: self.rows].sort().values, torch.arange(self.rows)) or bool(
            (rows[self.rows :] != -1).any()
        ):
            raise FormatError(explain_mismatch("slice_rows", "each row once, then -1", "others"))
        if bool(((windows < 0) | (windows * LANES >= max(1, self.cols))).any()):
            raise FormatError(explain_mismatch("windows", "begins within the columns", "others"))
        self._check_columns()

    def _check_columns(self) -> None:
        columns = self.columns.long()
        last = self.windows.long()[:, None] * LANES + columns - _KEPT
        waits = columns == 0
        if bool(
            ((columns < _KEPT) | (columns >= _KEPT + WINDOW) | (last >= self.cols))[~waits].any()
        ):
            expected = "0, or 128 and a column within the window and the weight"
            raise FormatError(explain_mismatch("columns", expected, "another"))
        positions, _ = self._stored()
        if bool((positions < 0).any()) or torch.unique(positions).numel() != positions.numel():
            expected = "each column once a row, and none where there is no row"
            raise FormatError(explain_mismatch("columns", expected, "others"))


def _steps(
    crow: np.ndarray, col: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The steps of compressed rows (crow, col).

    Each step of a slice begins its window at the first column that is left in any of its rows, and
    takes the next weight of each row that has one there.

    Returns:
        rows (slices * 16), -1 for none; of each step, by slice, the slice (steps), the window
        (steps), and the entry of each lane (steps, 16), -1 for none.
    """
    lengths = np.diff(crow)
    slices = -(-lengths.size // LANES)
    rows = np.full(slices * LANES, -1)
    rows[: lengths.size] = np.argsort(-lengths, kind="stable")
    held = rows >= 0
    left, end = np.zeros((2, slices * LANES), dtype=np.int64)
    left[held], end[held] = crow[rows[held]], crow[rows[held] + 1]
    left, end = left.reshape(-1, LANES), end.reshape(-1, LANES)
    none = np.int64(MAX_WINDOW_COLS)
    columns = np.append(col, none).astype(np.int64)
    taken_slices, windows, entries = [], [], []
    running = np.flatnonzero((left < end).any(1))
    while running.size:
        at = left[running]
        ahead = np.where(at < end[running], columns[at], none)
        window = ahead.min(1) // LANES
        takes = ahead < np.minimum(window * LANES + WINDOW, none)[:, None]
        taken_slices.append(running)
        windows.append(window)
        entries.append(np.where(takes, at, -1))
        left[running] += takes
        running = running[(left[running] < end[running]).any(1)]
    if not windows:
        return rows, np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, LANES), np.int64)
    owners = np.concatenate(taken_slices)
    order = np.argsort(owners, kind="stable")
    return rows, owners[order], np.concatenate(windows)[order], np.concatenate(entries)[order]
