# SPDX-License-Identifier: Apache-2.0
"""Sliced ELL: its parts as drawn, its way to compressed rows and back, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparselt.errors import FormatError, SparseltError
from sparselt.formats import SELL, pack


def sparse_weight(rows: int, cols: int, density: float) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, cols, generator=generator)
    return weight * (torch.rand(rows, cols, generator=generator) < density)


def test_sell_parts_are_as_drawn() -> None:
    # | 1  .  2 | 3 |      slices of 2 rows, blocks of 3 columns; within a block, longer rows first
    # | .  .  . | . |      and what a row lacks is column 3 (none) and 0
    # | .  4  . | 5 |
    weight = torch.tensor([[1.0, 0, 2, 3], [0, 0, 0, 0], [0, 4, 0, 5]])
    packed = pack(weight, None, "sell", (2, 3))
    block_slices, slice_steps, slice_rows, columns, values = (p.tolist() for p in packed.parts())
    assert block_slices == [0, 2, 4]
    assert slice_steps == [0, 2, 2, 3, 3]
    assert slice_rows == [0, 2, 1, -1, 0, 2, 1, -1]
    assert columns == [0, 1, 2, 3, 0, 0]
    assert values == [1, 4, 2, 0, 3, 5]


def test_sell_is_compressed_rows_and_back() -> None:
    rows = pack(sparse_weight(700, 37, 0.1))
    packed = SELL.from_csr(rows, (4, 8))
    assert packed.block_slices.numel() == 5 * 5 + 1, "700 rows make 5 sections"
    back = packed.to_csr()
    assert all(torch.equal(a, b) for a, b in zip(back.parts(), rows.parts(), strict=True))


@pytest.mark.parametrize("groups", [1, 2, 7, 28])
def test_a_section_lies_in_one_group(groups: int) -> None:
    weight = sparse_weight(560, 20, 0.2)
    packed = pack(weight, None, "sell", (4, 8), groups)
    assert torch.equal(packed.to_dense(), weight)
    sections = (packed.block_slices.numel() - 1) // 3
    assert sections % groups == 0
    assert sections == {1: 4, 2: 4}.get(groups, groups)
    for section in range(sections):
        first, last = packed.block_slices[[3 * section, 3 * section + 1]].tolist()
        rows = packed.slice_rows[4 * first : 4 * last]
        held = rows[rows >= 0] // (560 // groups)
        assert set(held.tolist()) == {section // (sections // groups)}


@pytest.mark.parametrize("groups", [0, -1, 3])
def test_groups_that_do_not_divide_the_rows_are_refused(groups: int) -> None:
    with pytest.raises(FormatError, match="groups: expected a divisor of 4 rows"):
        pack(torch.eye(4), format="sell", groups=groups)


def _sell_parts() -> list[Tensor]:
    packed = pack(sparse_weight(9, 20, 0.4), format="sell", block=(2, 8))
    return [part.clone() for part in packed.parts()]


def _set(part: int, at: int, value: float) -> Callable[[list[Tensor]], None]:
    def spoil(parts: list[Tensor]) -> None:
        parts[part].view(-1)[at] = value

    return spoil


def _shorten(part: int) -> Callable[[list[Tensor]], None]:
    def spoil(parts: list[Tensor]) -> None:
        parts[part] = parts[part][:-1].clone()

    return spoil


def _repeat_a_column(parts: list[Tensor]) -> None:
    parts[3][2] = parts[3][0]


def _widen_columns(parts: list[Tensor]) -> None:
    parts[3] = parts[3].int()


SPOILERS = {
    "block_slices starts late": _set(0, 0, 1),
    "block_slices falls": _set(0, 1, 99),
    "block_slices ends early": _set(0, -1, 1),
    "block_slices has another length": _shorten(0),
    "slice_steps starts late": _set(1, 0, 1),
    "slice_steps falls": _set(1, 2, -5),
    "slice_steps is short": _shorten(1),
    "slice_rows is short": _shorten(2),
    "a row out of range": _set(2, 0, 9),
    "a row below -1": _set(2, 0, -2),
    "a row twice": _set(2, 0, 8),
    "a row missing in the first block": _set(2, 0, -1),
    "columns is short": _shorten(3),
    "a column out of the block": _set(3, 0, 9),
    "a negative column": _set(3, 0, -1),
    "a column beyond the weight": _set(3, -2, 7),
    "a column twice": _repeat_a_column,
    "columns of another type": _widen_columns,
    "values is short": _shorten(4),
}


@pytest.mark.parametrize("spoil", SPOILERS.values(), ids=SPOILERS.keys())
def test_spoiled_sell_parts_are_refused(spoil: Callable[[list[Tensor]], None]) -> None:
    parts = _sell_parts()
    SELL.from_parts(parts, (9, 20), (2, 8))
    spoil(parts)
    with pytest.raises(SparseltError, match="expected"):
        SELL.from_parts(parts, (9, 20), (2, 8))


@pytest.mark.parametrize("block", [(0, 8), (65, 8), (4, 0), (4, 32768)])
def test_sell_refuses_blocks_out_of_range(block: tuple[int, int]) -> None:
    with pytest.raises(FormatError, match="block: expected"):
        pack(torch.eye(4), format="sell", block=block)
