# SPDX-License-Identifier: Apache-2.0
"""Blocks of filters by channels, one filter tap each: for convolutions over channels-last maps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparselt.errors import FormatError, explain_mismatch
from sparselt.formats.bsr import BSR

__all__ = ["ChannelsLastBSR"]


class ChannelsLastBSR(BSR):
    """Block sparse filters for channels-last (NHWC) maps: a block lies under one tap (r, s).

    The filters (M, C, R, S) are seen as a matrix whose columns go tap by tap, and within a tap
    channel by channel, each tap filled up to whole blocks. So a block needs `block_cols`
    neighbouring channels of one pixel, which a channels-last map keeps together; `BSR` numbers
    columns channel by channel instead, where a block of more than R * S columns mixes taps. A
    weight whose filters have one tap has the same blocks in both.

    Parts:
        crow_indices: (ceil(M / block_rows) + 1) int32 offsets of block rows.
        col_indices: (num_blocks, 2) int32, a tap r * S + s and a block of channels; rising within a
            block row, taps first.
        values: (num_blocks, block_rows, block_cols) float32, each block row-major; 0.0 where a
            block overhangs the filters and where the mask drops a weight.

    Example:
        >>> import torch
        >>> weight = torch.zeros(32, 32, 3, 3)
        >>> weight[:16, 16:, 0, 2] = 1.0
        >>> ChannelsLastBSR.from_dense(weight, block=(16, 16)).col_indices.tolist()
        [[2, 1]]
    """

    name: ClassVar[str] = "bsr_nhwc"

    @classmethod
    def portable(cls, block: tuple[int, int]) -> tuple[str, tuple[int, int]]:
        """Compressed rows: these blocks are of columns in another order."""
        return "csr", (1, 1)

    @property
    def taps(self) -> int:
        """R * S; 1 for a matrix."""
        return math.prod(self.shape[2:])

    @property
    def channel_blocks(self) -> int:
        """Blocks that cover the channels of a tap."""
        return -(-self.shape[1] // self.block[1])

    @classmethod
    def check_block(cls, block: tuple[int, int] | None) -> tuple[int, int]:
        """The block, (64, 64) for None; raises FormatError as `BSR` does."""
        return (64, 64) if block is None else BSR.check_block(block)

    @classmethod
    def _pack(
        cls,
        dense: Tensor,
        kept: Tensor,
        shape: tuple[int, ...],
        block: tuple[int, int],
        groups: int,
    ) -> tuple[Tensor, ...]:
        by_taps = [_by_taps(matrix, shape, block[1]) for matrix in (dense, kept)]
        crow, col, values = BSR._pack(by_taps[0], by_taps[1], shape, block, groups)
        per_tap = max(-(-shape[1] // block[1]), 1)
        return crow, torch.stack((col // per_tap, col % per_tap), 1), values

    def _flat(self) -> BSR:
        """The matrix (M, taps * channels in whole blocks) as plain blocks."""
        tap, channel = self.col_indices.unbind(1)
        columns = self.taps * self.channel_blocks * self.block[1]
        parts = (self.crow_indices, tap * self.channel_blocks + channel, self.values)
        return BSR._trusted(parts, (self.shape[0], columns), self.block)

    def _spread(self, values: Tensor) -> Tensor:
        rows, channels = self.shape[:2]
        by_taps = self._flat()._spread(values)
        by_taps = by_taps.view(rows, self.taps, self.channel_blocks * self.block[1])
        return by_taps[..., :channels].transpose(1, 2).contiguous().view(self.shape)

    def _check_lengths(self) -> None:
        blocks = self.values.shape[0] if self.values.dim() else 0
        if self.col_indices.shape != (blocks, 2):
            got = tuple(self.col_indices.shape)
            raise FormatError(
                explain_mismatch("col_indices", f"shape ({blocks}, 2), (blocks, place)", got)
            )
        self._flat()

    def _check_indices(self) -> None:
        limits = self.col_indices.new_tensor([self.taps, self.channel_blocks])
        outside = (self.col_indices < 0) | (self.col_indices >= limits)
        if bool(outside.any()):
            expected = f"taps from 0 to {self.taps - 1} and blocks of channels from 0 to "
            raise FormatError(
                explain_mismatch(
                    "col_indices",
                    f"{expected}{self.channel_blocks - 1}",
                    self.col_indices[outside.any(1)][0].tolist(),
                )
            )
        self._flat()._check_indices()


def _by_taps(matrix: Tensor, shape: Sequence[int], block_cols: int) -> Tensor:
    """(M, C * taps) in filter order as (M, taps * C in whole blocks)."""
    rows, channels, taps = shape[0], shape[1], math.prod(shape[2:])
    overhang = -channels % block_cols
    by_taps = matrix.view(rows, channels, taps).transpose(1, 2)
    return pad(by_taps, (0, overhang)).reshape(rows, taps * (channels + overhang))
