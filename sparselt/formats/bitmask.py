# SPDX-License-Identifier: Apache-2.0
"""Values and one bit a position: the format of CUDA products where half of the weights are kept."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from sparselt.errors import FormatError, explain_mismatch
from sparselt.formats.base import Part
from sparselt.formats.checks import check_fits_int32, check_shapes
from sparselt.formats.patches import CHUNK, LANES, PLACES, Patches, chunk_places

__all__ = ["Bitmask"]

WORDS = PLACES // 32  # of bits a patch


class Bitmask(Patches):
    """The kept weights of each patch in order, and a bit for each place of it.

    A patch has two queues of values, one for its even places and one for its odd ones, the shorter
    one filled up with zeros; a chunk is 4 values of both. With half of the weights kept a position
    takes 1.2 bytes in 16 bits, everything included.

    Parts:
        chunk_offsets: (groups + 1) int32, chunks before each group of 32 x 256.
        counts: (groups, 32) uint8, chunks of each lane.
        masks: (groups, 2, 32, 4) int32; bit p % 32 of word [g, p // 128, lane, p // 32 % 4] says
            whether place p of the lane's patch is kept.
        values: (chunks, 4, 2) float32; on CUDA also float16 or bfloat16.

    Example:
        >>> import torch
        >>> weight = Bitmask.from_dense(torch.eye(3))
        >>> weight.nnz, weight.masks.shape
        (3, torch.Size([1, 2, 32, 4]))
    """

    name: ClassVar[str] = "bitmask"
    part_names: ClassVar[tuple[str, ...]] = ("chunk_offsets", "counts", "masks", "values")
    index_dtypes: ClassVar[dict[str, torch.dtype]] = {"counts": torch.uint8}

    masks = Part(2)

    @property
    def nnz(self) -> int:
        """Number of stored weights; counts the bits."""
        return int(self._bits().sum())

    @classmethod
    def _pack(
        cls,
        dense: Tensor,
        kept: Tensor,
        shape: tuple[int, ...],
        block: tuple[int, int],
        groups: int,
    ) -> tuple[Tensor, ...]:
        rows, cols = kept.nonzero().unbind(1)
        check_fits_int32(2 * CHUNK * rows.numel())
        slots, places = cls._slots_and_places(rows, cols, dense.shape[1])
        groups = -(-dense.shape[0] // 32) * -(-dense.shape[1] // 256)
        order = torch.argsort((2 * slots + places % 2) * PLACES + places)
        slots, places = slots[order], places[order]
        chunks, numbers = _numbers(slots, places, groups)
        values = torch.zeros(2 * CHUNK * int(chunks.sum()), device=dense.device)
        values[numbers] = dense[rows, cols][order]

        bits = torch.zeros(groups * LANES * WORDS, dtype=torch.int64, device=dense.device)
        bits.scatter_add_(0, slots * WORDS + places // 32, 1 << places % 32)
        masks = bits.to(torch.int32).view(groups, LANES, 2, 4).transpose(1, 2).contiguous()
        starts = torch.zeros(groups + 1, dtype=torch.int32, device=dense.device)
        starts[1:] = chunks.view(-1, LANES).sum(1).cumsum(0)
        counts = chunks.view(-1, LANES).to(torch.uint8)
        return starts, counts, masks, values.view(-1, CHUNK, 2)

    def _bits(self) -> Tensor:
        """(groups * 32, 256) bool, a row a patch."""
        words = self.masks.transpose(1, 2).reshape(-1, WORDS, 1)
        shifts = torch.arange(32, dtype=torch.int32, device=self.device)
        return (words >> shifts & 1).bool().view(-1, PLACES)

    def _entries(self) -> tuple[Tensor, Tensor, Tensor]:
        slots, places = self._bits().nonzero().unbind(1)
        order = torch.argsort(2 * slots + places % 2, stable=True)
        slots, places = slots[order], places[order]
        return slots, places, _numbers(slots, places, self.groups)[1]

    def _check_lengths(self) -> None:
        chunks = self.values.shape[0] if self.values.dim() else 0
        groups, names = self.groups, self.part_names
        masks, values = (groups, 2, LANES, 4), (chunks, CHUNK, 2)
        check_shapes(self._parts, names, (groups + 1,), (groups, LANES), masks, values)

    def _check_indices(self) -> None:
        slots, places = self._bits().nonzero().unbind(1)
        if not torch.equal(_chunks(slots, places, self.groups)[0], self.counts.view(-1).long()):
            raise FormatError(explain_mismatch("counts", "the chunks that masks need", "others"))
        self._check_chunks()
        self._check_inside(slots, places)


def _chunks(slots: Tensor, places: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Chunks of each slot, and the lengths of all queues (two a slot)."""
    queues = torch.bincount(2 * slots + places % 2, minlength=2 * groups * LANES)
    return (queues.view(-1, 2).max(1).values + CHUNK - 1) // CHUNK, queues


def _numbers(slots: Tensor, places: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Chunks of each slot, and the number among the values of weights sorted by queue."""
    chunks, queues = _chunks(slots, places, groups)
    first, stored = chunk_places(chunks)
    half = places % 2
    rank = torch.arange(slots.numel(), device=slots.device)
    rank -= (queues.cumsum(0) - queues)[2 * slots + half]
    chunk = stored[first[slots] + rank // CHUNK]
    return chunks, 2 * (CHUNK * chunk + rank % CHUNK) + half
