# SPDX-License-Identifier: Apache-2.0
"""The tile8 format: exact round trips, its layout on paper, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import PATTERNS, SpmmCase
from torch import Tensor

from sparselt.errors import DtypeError, FormatError
from sparselt.formats.tile8 import Tile8

SIZES = [(m, 257) for m in (0, 1, 31, 32, 33, 70)] + [(33, k) for k in (0, 1, 127, 255, 256, 600)]
Parts = list[Tensor]


@pytest.mark.parametrize(("rows", "cols"), SIZES)
def test_round_trip_is_exact(rows: int, cols: int) -> None:
    cases = [SpmmCase(rows, cols, 1, pattern, 0.2) for pattern in PATTERNS]
    for case in [*cases, SpmmCase(rows, cols, 1, density=1.0)]:
        weight, mask = case.dense()
        packed = Tile8.from_dense(weight, mask)
        packed.validate(full=True)
        assert packed.nnz == int(mask.sum()), case
        assert torch.equal(packed.mask(), mask), case
        assert torch.equal(packed.to_dense(), weight.where(mask, torch.zeros(()))), case


def test_convolution_filters_keep_their_shape() -> None:
    weight = torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Tile8.from_dense(weight).to_dense(), weight)


def test_layout_is_step_by_step_over_the_rows() -> None:
    # Row 0 keeps five weights, row 2 one: their first chunks, then the second chunk of row 0.
    weight = torch.zeros(3, 8)
    weight[0, :5] = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    weight[2, 7] = 6.0
    packed = Tile8.from_dense(weight)
    assert packed.chunk_offsets.tolist() == [0, 3]
    assert packed.counts[0, :4].tolist() == [5, 0, 1, 0]
    assert packed.values.tolist() == [[1, 2, 3, 4], [6, 0, 0, 0], [5, 0, 0, 0]]
    assert packed.offsets.tolist() == [[0, 1, 2, 3], [7, 0, 0, 0], [4, 0, 0, 0]]


def test_full_panel_row_takes_narrower_panels() -> None:
    assert Tile8.from_dense(torch.ones(2, 255)).block == (32, 256)
    assert Tile8.from_dense(torch.ones(2, 256)).block == (32, 128)


def test_a_weight_costs_little_more_than_its_value_and_a_byte() -> None:
    kept = torch.rand(256, 4096, generator=torch.Generator().manual_seed(0)) < 0.1
    packed = Tile8.from_dense(kept.float())
    indices = packed.nbytes - 4 * packed.nnz
    assert indices < 1.7 * packed.nnz


def parts_of_a_small_weight() -> Parts:
    weight = torch.zeros(40, 300)
    weight[0, :6] = 1.0
    weight[35, 299] = 2.0
    return list(Tile8.from_dense(weight).parts())


def cut(i: int) -> Callable[[Parts], None]:
    def apply(parts: Parts) -> None:
        parts[i] = parts[i][:-1].clone()

    return apply


def put(i: int, place: tuple[int, ...], value: int) -> Callable[[Parts], None]:
    def apply(parts: Parts) -> None:
        parts[i] = parts[i].clone()
        parts[i][place] = value

    return apply


BAD = {
    "no first offset": put(0, (0,), 1),
    "offsets of other chunks": put(0, (1,), 3),
    "short offsets": cut(0),
    "short counts": cut(1),
    "short indices": cut(2),
    "short values": cut(3),
    "more counted than stored": put(1, (0, 5), 9),
    "rows beyond the matrix": put(1, (3, 20), 0),
    "column beyond the matrix": put(2, (2, 0), 200),
    "column twice": put(2, (0, 1), 0),
}


@pytest.mark.parametrize("spoil", BAD.values(), ids=BAD)
def test_parts_that_contradict_each_other_are_refused(spoil: Callable[[Parts], None]) -> None:
    parts = parts_of_a_small_weight()
    assert Tile8.from_parts(parts, (40, 300)).nnz == 7
    if spoil is BAD["rows beyond the matrix"]:
        parts[1] = parts[1].clone()
        parts[1][3, 3], parts[1][3, 20] = 0, 1
    else:
        spoil(parts)
    with pytest.raises(FormatError, match="expected"):
        Tile8.from_parts(parts, (40, 300))


@pytest.mark.parametrize("i", range(4))
def test_another_type_is_refused(i: int) -> None:
    parts = parts_of_a_small_weight()
    parts[i] = parts[i].double()
    with pytest.raises(DtypeError, match=Tile8.part_names[i]):
        Tile8.from_parts(parts, (40, 300))


def test_another_block_is_refused() -> None:
    with pytest.raises(FormatError, match="block"):
        Tile8.from_dense(torch.eye(4), block=(16, 256))
