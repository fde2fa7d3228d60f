# SPDX-License-Identifier: Apache-2.0
"""Patches of 4 x 64 with one-byte places: the format of tensor-core products with few columns."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from sparselt.errors import FormatError, explain_mismatch
from sparselt.formats.base import Part, run_of_each
from sparselt.formats.checks import check_fits_int32, check_shapes
from sparselt.formats.patches import CHUNK, LANES, PATCH, PLACES, Patches, chunk_places

__all__ = ["Patch8"]


class Patch8(Patches):
    """The kept weights of each patch as a list of values and one-byte places.

    A list is padded to a multiple of 4 by repeating its last weight: to spread it into a dense
    patch takes no more than its chunks. Three bytes a weight in 16 bits.

    Parts:
        chunk_offsets: (groups + 1) int32, chunks before each group of 32 x 256.
        counts: (groups, 32) uint8, chunks of each lane.
        places: (4 * chunks) uint8, rising within a list.
        values: (chunks, 4) float32; on CUDA also float16 or bfloat16.

    Example:
        >>> import torch
        >>> weight = Patch8.from_dense(torch.eye(3))
        >>> weight.nnz, weight.block
        (3, (4, 64))
    """

    name: ClassVar[str] = "patch8"
    part_names: ClassVar[tuple[str, ...]] = ("chunk_offsets", "counts", "places", "values")
    index_dtypes: ClassVar[dict[str, torch.dtype]] = {"counts": torch.uint8, "places": torch.uint8}

    places = Part(2)

    @property
    def nnz(self) -> int:
        """Number of stored weights, repeats not counted; walks the lists."""
        return self._entries()[0].numel()

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
        check_fits_int32(CHUNK * rows.numel())
        slots, places = cls._slots_and_places(rows, cols, dense.shape[1])
        order = torch.argsort(slots * PLACES + places)
        slots, places = slots[order], places[order]
        groups = -(-dense.shape[0] // 32) * -(-dense.shape[1] // 256)
        counts = torch.bincount(slots, minlength=groups * LANES)
        chunks = (counts + CHUNK - 1) // CHUNK
        first, stored = chunk_places(chunks)

        # Entry e of a list of n takes its weight min(e, n - 1).
        owner = run_of_each(CHUNK * chunks)
        entry = torch.arange(owner.numel(), device=dense.device) - CHUNK * first[owner]
        source = (counts.cumsum(0) - counts)[owner] + torch.minimum(entry, counts[owner] - 1)
        target = CHUNK * stored[first[owner] + entry // CHUNK] + entry % CHUNK
        packed = torch.empty(owner.numel(), dtype=torch.uint8, device=dense.device)
        packed[target] = places[source].to(torch.uint8)
        values = torch.empty(owner.numel(), device=dense.device)
        values[target] = dense[rows, cols][order][source]
        starts = torch.zeros(groups + 1, dtype=torch.int32, device=dense.device)
        starts[1:] = chunks.view(-1, LANES).sum(1).cumsum(0)
        counts = chunks.view(-1, LANES).to(torch.uint8)
        return starts, counts, packed, values.view(-1, CHUNK)

    def _listed(self) -> tuple[Tensor, Tensor, Tensor]:
        """Slot, place and number of each entry, list after list, repeats included."""
        chunks = self.counts.view(-1).long()
        first, stored = chunk_places(chunks)
        owner = run_of_each(CHUNK * chunks)
        entry = torch.arange(owner.numel(), device=self.device) - CHUNK * first[owner]
        numbers = CHUNK * stored[first[owner] + entry // CHUNK] + entry % CHUNK
        return owner, self.places[numbers].long(), numbers

    def _entries(self) -> tuple[Tensor, Tensor, Tensor]:
        slots, places, numbers = self._listed()
        fresh = torch.ones_like(slots, dtype=torch.bool)
        fresh[1:] = (slots[1:] != slots[:-1]) | (places[1:] != places[:-1])
        return slots[fresh], places[fresh], numbers[fresh]

    def _check_lengths(self) -> None:
        chunks = self.values.shape[0] if self.values.dim() else 0
        groups, names = self.groups, self.part_names
        shapes = ((groups + 1,), (groups, LANES), (CHUNK * chunks,), (chunks, CHUNK))
        check_shapes(self._parts, names, *shapes)

    def _check_indices(self) -> None:
        self._check_chunks()
        if int(self.counts.max() if self.groups else 0) > PLACES // CHUNK:
            raise FormatError(explain_mismatch("counts", f"at most {PLACES // CHUNK}", "more"))
        slots, places, numbers = self._listed()
        self._check_inside(slots, places)
        together = slots[1:] == slots[:-1]
        values = self.values.view(-1)[numbers].view(torch.uint8).view(-1, self.values.itemsize)
        repeats = together & (places[1:] == places[:-1])
        # Repeats fill the last chunk of a list and nothing else.
        last = torch.ones_like(slots, dtype=torch.bool)
        last[:-CHUNK] = slots[CHUNK:] != slots[:-CHUNK]
        bad = together & (places[1:] < places[:-1]) | repeats & ~last[1:]
        bad |= repeats & (values[1:] != values[:-1]).any(1)
        bad[1:] |= repeats[:-1] & together[1:] & ~repeats[1:]
        if bool(bad.any()):
            raise FormatError(
                explain_mismatch(
                    "places", f"rising places of a {PATCH} patch, the last one repeated", "others"
                )
            )
