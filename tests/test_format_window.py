# SPDX-License-Identifier: Apache-2.0
"""Windows: the parts as drawn, what is refused, and when a plan takes them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sparselt.errors import FormatError, SparseltError
from sparselt.formats import Window, pack
from sparselt.plan import DENSE, Facts, KernelInfo, candidates, choose
from sparselt.rules import RULES


def weight() -> Tensor:
    """Row 0 has three weights in two windows, row 1 one in the second, row 2 none."""
    dense = torch.zeros(3, 80)
    dense[0, 3], dense[0, 35], dense[0, 79], dense[1, 70] = 1.0, 2.0, 3.0, 4.0
    return dense


def test_window_parts_are_as_drawn() -> None:
    steps, rows, windows, columns, values = pack(weight(), format="window").parts()
    assert steps.tolist() == [0, 3]
    assert rows.tolist() == [0, 1, 2, *[-1] * 13]
    # Column 70 lies beyond the windows of columns 3 and 35, so row 1 waits twice.
    assert windows.tolist() == [0, 2, 4]
    assert columns[:, :3].tolist() == [[131, 0, 0], [131, 0, 0], [143, 134, 0]]
    assert values[:, :3].tolist() == [[1, 0, 0], [2, 0, 0], [3, 4, 0]]
    assert not columns[:, 3:].any()
    assert not values[:, 3:].any()


def test_rows_of_one_length_wait_for_nobody() -> None:
    packed = pack(torch.ones(32, 50), format="window")
    assert packed.nnz == 32 * 50
    assert packed.nbytes == packed.nnz * 5 + 100 * 2 + 4 * (3 + 32)


def index(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def changed(place: int, part: Tensor) -> list[Tensor]:
    parts = list(pack(weight(), format="window").parts())
    parts[place] = part
    return parts


def columns(*first: int) -> list[Tensor]:
    """The parts, with other columns of lane 0."""
    part = torch.zeros(3, 16, dtype=torch.uint8)
    part[:, 0], part[2, 1] = torch.tensor(first, dtype=torch.uint8), 134
    return changed(3, part)


def repeated() -> list[Tensor]:
    """Column 35 of row 0 twice, in the windows from 16 and from 32 on."""
    parts = columns(131, 128 + 19, 128 + 3)
    parts[2] = torch.tensor([0, 1, 2], dtype=torch.int16)
    return parts


def lane_without_row() -> list[Tensor]:
    part = pack(weight(), format="window").parts()[3].clone()
    part[0, 5] = 128
    return changed(3, part)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (changed(0, index(0, 2)), "slice_steps"),
        (changed(0, index(0, 1, 3)), "slice_steps"),
        (changed(1, index(0, 1, 1, *[-1] * 13)), "slice_rows"),
        (changed(1, index(0, 1, *[-1] * 13, 2)), "slice_rows"),
        (changed(2, torch.tensor([0, 2, 5], dtype=torch.int16)), "windows"),
        (changed(2, torch.tensor([-1, 2, 4], dtype=torch.int16)), "windows"),
        (changed(2, torch.tensor([0, 2], dtype=torch.int16)), "columns"),
        (columns(131, 131, 144), "columns"),  # column 80
        (columns(131, 160, 143), "columns"),
        (columns(131, 127, 143), "columns"),
        (repeated(), "columns"),
        (lane_without_row(), "columns"),
        (changed(4, torch.zeros(2, 16)), "values"),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts: list[Tensor], message: str) -> None:
    with pytest.raises(SparseltError, match=message):
        Window.from_parts(parts, (3, 80))


def test_blocks_and_rows_beyond_the_windows_are_refused() -> None:
    with pytest.raises(FormatError, match="block: expected None"):
        pack(torch.eye(4), format="window", block=(16, 1))
    with pytest.raises(FormatError, match="at most 524288 columns"):
        pack(torch.zeros(1, 2**19 + 1), format="window")
    long = Facts("linear", (4, 2**19 + 1), nnz=4, columns=1)
    assert "at most 524288" in RULES["window"].misfit(long)


def test_of_kernels_as_fast_as_each_other_the_registrys_first_is_taken() -> None:
    first = KernelInfo("window_spmv_fast", "spmv", "window", "cpu", (), 1, 1, "float32", True)
    slices = replace(first, name="sell_spmv_fast", format="sell", tile_columns=16)
    facts = Facts("linear", (64, 64), nnz=410, columns=1)
    for us, chosen in ((0.8, slices.name), (1.2, first.name), (3.0, first.name)):
        times = {first.name: 1.3, slices.name: us, DENSE: 9.0}
        assert choose(facts, [first, slices], times).kernel == chosen
    assert not candidates(replace(facts, columns=2), [first])[0].applies
