# SPDX-License-Identifier: Apache-2.0
"""Blocks of filters by channels, one filter tap each: for convolutions over channels-last maps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import Self

from sparselt.errors import FormatError, explain_mismatch
from sparselt.formats.base import SparseWeight
from sparselt.formats.bsr import BSR
from sparselt.formats.checks import check_parts, kept_weights

__all__ = ["ChannelsLastBSR"]


class ChannelsLastBSR(SparseWeight):
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
    part_names: ClassVar[tuple[str, ...]] = ("crow_indices", "col_indices", "values")

    @property
    def crow_indices(self) -> Tensor:
        """(block rows + 1) int32 offsets."""
        return self._parts[0]

    @property
    def col_indices(self) -> Tensor:
        """(num_blocks, 2) int32: tap and block of channels."""
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
    def from_dense(
        cls, weight: Tensor, mask: Tensor | None = None, block: tuple[int, int] | None = None
    ) -> Self:
        """Pack every block that holds a kept weight.

        Args:
            weight: (M, K), (C_out, C_in/groups, S) or (C_out, C_in/groups, R, S); float32, float16
                or bfloat16 (both exact in float32), any strides.
            mask: the same shape, bool or 0/1; a block with a kept 0.0 stays stored. None means
                `weight != 0`.
            block: (filters, channels), each from 1 to 1024; None means (64, 64).

        Returns:
            The packed weight, on the weight's device.

        Raises:
            DtypeError, ShapeError, DeviceError, FormatError: what was given is none of the above.

        Example:
            >>> import torch
            >>> ChannelsLastBSR.from_dense(torch.ones(4, 3, 3, 3), block=(4, 8)).values.shape
            torch.Size([9, 4, 8])
        """
        block = cls.check_block(block)
        dense, kept = kept_weights(weight, mask)
        shape = tuple(weight.shape)
        flat = BSR.from_dense(
            _by_taps(dense, shape, block[1]), _by_taps(kept, shape, block[1]), block
        )
        per_tap = max(-(-shape[1] // block[1]), 1)
        col = flat.col_indices
        places = torch.stack((col // per_tap, col % per_tap), 1)
        return cls._trusted((flat.crow_indices, places, flat.values), shape, block)

    def _flat(self) -> BSR:
        """The matrix (M, taps * channels in whole blocks) as plain blocks."""
        tap, channel = self.col_indices.unbind(1)
        columns = self.taps * self.channel_blocks * self.block[1]
        parts = (self.crow_indices, tap * self.channel_blocks + channel, self.values)
        return BSR._trusted(parts, (self.shape[0], columns), self.block)

    def _unfold(self, flat: Tensor) -> Tensor:
        rows, channels = self.shape[:2]
        by_taps = flat.view(rows, self.taps, self.channel_blocks * self.block[1])
        return by_taps[..., :channels].transpose(1, 2).contiguous().view(self.shape)

    def to_dense(self) -> Tensor:
        """The dense float32 weight of shape `shape`: stored blocks bit for bit, 0.0 elsewhere."""
        return self._unfold(self._flat().to_dense())

    def mask(self) -> Tensor:
        """Bool tensor of shape `shape`: True inside every stored block, kept weight or not."""
        return self._unfold(self._flat().mask())

    def validate(self, full: bool = True) -> None:
        """Check types, ranks and lengths, with `full` every index; see `SparseWeight.validate`."""
        check_parts(self._parts, self.part_names, self.name)
        blocks = self.values.shape[0] if self.values.dim() else 0
        if self.col_indices.shape != (blocks, 2):
            got = tuple(self.col_indices.shape)
            raise FormatError(
                explain_mismatch("col_indices", f"shape ({blocks}, 2), (blocks, place)", got)
            )
        limits = self.col_indices.new_tensor([self.taps, self.channel_blocks])
        outside = (self.col_indices < 0) | (self.col_indices >= limits)
        if full and bool(outside.any()):
            expected = f"taps from 0 to {self.taps - 1} and blocks of channels from 0 to "
            raise FormatError(
                explain_mismatch(
                    "col_indices",
                    f"{expected}{self.channel_blocks - 1}",
                    self.col_indices[outside.any(1)][0].tolist(),
                )
            )
        self._flat().validate(full)


def _by_taps(matrix: Tensor, shape: Sequence[int], block_cols: int) -> Tensor:
    """(M, C * taps) in filter order as (M, taps * C in whole blocks)."""
    rows, channels, taps = shape[0], shape[1], math.prod(shape[2:])
    overhang = -channels % block_cols
    by_taps = matrix.view(rows, channels, taps).transpose(1, 2)
    return pad(by_taps, (0, overhang)).reshape(rows, taps * (channels + overhang))
