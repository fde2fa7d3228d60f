# SPDX-License-Identifier: Apache-2.0
"""The bsr_nhwc format: exact round trips, the order of its blocks, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from cases import PATTERNS, ConvCase

from sparselt.errors import DtypeError, FormatError
from sparselt.formats import BSR
from sparselt.formats.bsr_nhwc import ChannelsLastBSR

SHAPES = [
    ((40, 24), (16, 8)),
    ((5, 3, 4), (4, 2)),
    ((33, 20, 3, 3), (16, 16)),
    ((8, 4, 1, 1), (8, 4)),
    ((0, 4, 3, 3), (8, 4)),
    ((4, 0, 3, 3), (8, 4)),
    ((4, 4, 3, 0), (8, 4)),
]


@pytest.mark.parametrize(("shape", "block"), SHAPES, ids=str)
def test_round_trip_is_exact(shape: tuple[int, ...], block: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    mask = torch.rand(shape, generator=generator) < 0.02
    packed = ChannelsLastBSR.from_dense(weight, mask, block)
    packed.validate(full=True)
    assert torch.equal(packed.to_dense(), weight.where(mask, torch.zeros(())))
    assert bool((packed.mask() >= mask).all())
    again = ChannelsLastBSR.from_parts(packed.parts(), packed.shape, packed.block)
    assert torch.equal(again.to_dense(), packed.to_dense())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_stored_blocks_are_those_with_a_kept_weight(pattern: str) -> None:
    weight, mask = ConvCase(1, 20, 24, (5, 5), (3, 2), pattern=pattern, density=0.01).dense()
    packed = ChannelsLastBSR.from_dense(weight, mask, (8, 4))
    by_block = mask.view(3, 8, 5, 4, 6).permute(0, 4, 2, 1, 3).flatten(3).any(3)
    places = [
        [tap, channel]
        for block_row in by_block.tolist()
        for tap, channels in enumerate(block_row)
        for channel, kept in enumerate(channels)
        if kept
    ]
    assert packed.col_indices.tolist() == places


def test_values_are_filters_by_channels() -> None:
    weight = torch.arange(2.0 * 4 * 2).view(2, 4, 1, 2)
    packed = ChannelsLastBSR.from_dense(weight, block=(2, 2))
    assert packed.col_indices.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert packed.values[3].tolist() == weight[:, 2:, 0, 1].tolist()


def test_filters_of_one_tap_have_the_blocks_of_bsr() -> None:
    weight = torch.randn(20, 24, 1, 1, generator=torch.Generator().manual_seed(0))
    ours = ChannelsLastBSR.from_dense(weight, block=(8, 8))
    plain = BSR.from_dense(weight, block=(8, 8))
    assert torch.equal(ours.values, plain.values)
    assert torch.equal(ours.col_indices[:, 1], plain.col_indices)


@pytest.mark.parametrize("place", [[9, 0], [-1, 0], [0, 2], [0, -1]], ids=str)
def test_index_out_of_range_is_refused(place: list[int]) -> None:
    packed = ChannelsLastBSR.from_dense(torch.ones(4, 8, 3, 3), block=(4, 4))
    crow, col, values = packed.parts()
    col = col.clone()
    col[3] = torch.tensor(place, dtype=torch.int32)
    with pytest.raises(FormatError, match="taps from 0 to 8 and blocks of channels from 0 to 1"):
        ChannelsLastBSR.from_parts((crow, col, values), packed.shape, packed.block)


def test_parts_that_contradict_each_other_are_refused() -> None:
    packed = ChannelsLastBSR.from_dense(torch.ones(4, 8, 3, 3), block=(4, 4))
    crow, col, values = packed.parts()
    for parts in ((crow, col[:, 0].clone(), values), (crow, col, values[:-1].clone())):
        with pytest.raises(FormatError, match="col_indices"):
            ChannelsLastBSR.from_parts(parts, packed.shape, packed.block)
    with pytest.raises(FormatError, match="rise"):
        ChannelsLastBSR.from_parts((crow, col.flip(0), values), packed.shape, packed.block)
    with pytest.raises(DtypeError, match="col_indices"):
        ChannelsLastBSR.from_parts((crow, col.long(), values), packed.shape, packed.block)
