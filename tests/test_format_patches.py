# SPDX-License-Identifier: Apache-2.0
"""Formats of patches (bitmask, patch8): exact round trips, their layout on paper, and refusals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import PATTERNS, SpmmCase
from torch import Tensor

from sparselt.errors import DtypeError, FormatError
from sparselt.formats import FORMATS, Bitmask, Patch8

NAMES = ("bitmask", "patch8")
SIZES = [(m, 257) for m in (0, 1, 31, 32, 33, 70)] + [(33, k) for k in (0, 1, 63, 64, 256, 600)]
Parts = list[Tensor]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("rows", "cols"), SIZES)
def test_round_trip_is_exact(name: str, rows: int, cols: int) -> None:
    cases = [SpmmCase(rows, cols, 1, pattern, 0.2) for pattern in PATTERNS]
    for case in [*cases, SpmmCase(rows, cols, 1, density=1.0)]:
        weight, mask = case.dense()
        packed = FORMATS[name].from_dense(weight, mask)
        packed.validate(full=True)
        assert packed.nnz == int(mask.sum()), case
        assert torch.equal(packed.mask(), mask), case
        assert torch.equal(packed.to_dense(), weight.where(mask, torch.zeros(()))), case


def fragment() -> Tensor:
    """Row 9 of a group at its first columns: rows 8 to 15 are the second word of a step."""
    weight = torch.zeros(32, 256)
    weight[9, 0], weight[9, 1], weight[9, 2] = 1.0, 2.0, 3.0
    weight[17, 5], weight[1, 70] = 4.0, 5.0
    return weight


def test_places_follow_the_operands_of_a_tensor_core_product() -> None:
    # Lane 4 has rows 1, 9, 17, 25 at columns 0 to 63, lane 5 the same rows at columns 64 to 127.
    packed = Patch8.from_dense(fragment())
    assert packed.counts[0].tolist() == [0, 0, 0, 0, 1, 1, *[0] * 26]
    # Words: 1 of step 0, 3 of step 0 (the second pair of columns), 4 of step 1 (row 17).
    assert packed.places.tolist() == [2, 3, 6, 2 * (8 + 4) + 1, *[2 * (8 + 2)] * 4]
    assert packed.values.tolist() == [[1, 2, 3, 4], [5, 5, 5, 5]]


def test_bits_and_queues_follow_the_places() -> None:
    packed = Bitmask.from_dense(fragment())
    assert packed.counts[0].tolist() == [0, 0, 0, 0, 1, 1, *[0] * 26]
    assert packed.masks[0, 0, 4].tolist() == [1 << 2 | 1 << 3 | 1 << 6 | 1 << 25, 0, 0, 0]
    assert packed.masks[0, 0, 5].tolist() == [1 << 20, 0, 0, 0]
    assert int((packed.masks != 0).sum()) == 2
    # Even places on the left, odd ones on the right.
    assert packed.values[0].tolist() == [[1, 2], [3, 4], [0, 0], [0, 0]]
    assert packed.values[1].tolist() == [[5, 0], [0, 0], [0, 0], [0, 0]]


@pytest.mark.parametrize(
    ("name", "density", "most"), [("bitmask", 0.5, 1.21), ("patch8", 0.1, 0.33)]
)
def test_a_position_costs_the_bytes_that_the_kernels_count_on(
    name: str, density: float, most: float
) -> None:
    kept = torch.rand(256, 4096, generator=torch.Generator().manual_seed(0)) < density
    packed = FORMATS[name].from_dense(kept.float())
    values = packed.parts()[-1].numel()
    in_16_bits = packed.nbytes - 4 * values + 2 * values
    assert in_16_bits < most * kept.numel()


def parts_of_a_small_weight(name: str) -> Parts:
    weight = torch.zeros(40, 300)
    weight[0, :6] = torch.arange(1.0, 7.0)
    weight[35, 299] = 7.0
    return list(FORMATS[name].from_dense(weight).parts())


def cut(i: int) -> Callable[[Parts], None]:
    def apply(parts: Parts) -> None:
        parts[i] = parts[i][:-1].clone()

    return apply


def put(i: int, place: tuple[int, ...], value: float) -> Callable[[Parts], None]:
    def apply(parts: Parts) -> None:
        parts[i] = parts[i].clone()
        parts[i][place] = value

    return apply


COMMON = {
    "no first offset": put(0, (0,), 1),
    "offsets of other chunks": put(0, (1,), 3),
    "short offsets": cut(0),
    "short counts": cut(1),
    "short indices": cut(2),
    "short values": cut(3),
    "more counted than stored": put(1, (0, 5), 2),
}
BAD = {
    "bitmask": COMMON
    | {
        "a bit more than counted": put(2, (0, 1, 9, 3), 1),
        # Row 35 at column 299 is place 165 of lane 12 of the last group; 176 is column 300 and 167
        # is row 43.
        "column beyond the matrix": put(2, (3, 1, 12, 1), 1 << 176 % 32),
        "row beyond the matrix": put(2, (3, 1, 12, 1), 1 << 167 % 32),
    },
    "patch8": COMMON
    | {
        "place twice": put(2, (1,), 0),
        "falling places": put(2, (0,), 9),
        "other value repeated": put(3, (1, 3), 9.0),
        "column beyond the matrix": put(2, slice(8, 12), 255),  # type: ignore[arg-type]
    },
}


@pytest.mark.parametrize(
    ("name", "fault"), [(name, fault) for name in NAMES for fault in BAD[name]]
)
def test_parts_that_contradict_each_other_are_refused(name: str, fault: str) -> None:
    parts = parts_of_a_small_weight(name)
    assert FORMATS[name].from_parts(parts, (40, 300)).nnz == 7
    BAD[name][fault](parts)
    with pytest.raises(FormatError, match="expected"):
        FORMATS[name].from_parts(parts, (40, 300))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("i", range(4))
def test_another_type_is_refused(name: str, i: int) -> None:
    parts = parts_of_a_small_weight(name)
    parts[i] = parts[i].double()
    with pytest.raises(DtypeError, match=FORMATS[name].part_names[i]):
        FORMATS[name].from_parts(parts, (40, 300))


@pytest.mark.parametrize("name", NAMES)
def test_another_block_is_refused(name: str) -> None:
    with pytest.raises(FormatError, match="block"):
        FORMATS[name].from_dense(torch.eye(4), block=(32, 256))
