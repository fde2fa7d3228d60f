# SPDX-License-Identifier: Apache-2.0
"""Values and a bit a position: the parts as drawn, what is refused, and where plans offer it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from kernel_calls import spmm
from torch import Tensor

from sparselt import ops
from sparselt.errors import FormatError, SparseltError
from sparselt.formats import Bits, pack
from sparselt.plan import Facts, KernelInfo, candidates, choose

# Of formats in which some of x is loaded that no stored value meets.
KERNELS = [k for k in ops.kernels() if k.format in ("bits", "window") and k.usable]


def test_bits_parts_are_as_drawn() -> None:
    # 17 columns: a second mask for the last one.
    weight = torch.zeros(2, 17)
    weight[0, 1], weight[0, 16], weight[1, 15] = 2.0, 3.0, 4.0
    crow, masks, values = pack(weight, format="bits").parts()
    assert crow.tolist() == [0, 2, 3]
    assert masks.tolist() == [[2, 1], [-(2**15), 0]]
    assert values.tolist() == [2, 3, 4, *[0] * 16]


def test_a_position_takes_an_eighth_of_a_byte() -> None:
    mask = torch.rand(64, 256, generator=torch.Generator().manual_seed(0)) < 0.5
    packed = pack(torch.ones(64, 256), mask, "bits")
    assert packed.nbytes == 4 * packed.nnz + 64 * 256 // 8 + 4 * (64 + 1 + 16)


def changed(place: int, part: Tensor) -> list[Tensor]:
    parts = list(pack(torch.eye(3, 17), format="bits").parts())
    parts[place] = part
    return parts


def index(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


MASKS = torch.tensor([[1, 0], [2, 0], [4, 0]], dtype=torch.int16)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (changed(0, index(0, 1, 2)), "crow_indices"),
        (changed(0, index(0, 2, 2, 3)), "crow_indices"),
        (changed(0, index(0, 1, 2, 2)), "crow_indices"),
        (changed(1, MASKS[:, :1].contiguous()), "masks"),
        (changed(1, MASKS.to(torch.int32)), "masks"),
        (changed(1, MASKS * 2 + 1), "crow_indices"),
        (changed(1, torch.tensor([[1, 0], [2, 0], [0, 2]], dtype=torch.int16)), "bits beyond"),
        (changed(2, torch.ones(18)), "crow_indices"),
        (changed(2, torch.ones(3)), "values"),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts: list[Tensor], message: str) -> None:
    with pytest.raises(SparseltError, match=message):
        Bits.from_parts(parts, (3, 17))


def test_blocks_are_refused() -> None:
    with pytest.raises(FormatError, match="block: expected None"):
        pack(torch.eye(4), format="bits", block=(4, 1))


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("columns", [1, 3, 4, 6])
def test_what_no_stored_value_meets_leaves_no_trace(kernel: KernelInfo, columns: int) -> None:
    weight = torch.ones(9, 40)
    weight[:, ::2] = 0.0
    weight[4] = math.inf  # of a row of its own, beside zeros of others
    weight[4, ::2] = 0.0
    x = torch.ones(40, columns)
    x[::2] = math.nan
    y = spmm(kernel, pack(weight, format=kernel.format), x)
    assert torch.equal(y, torch.full((9, columns), 20.0).index_fill(0, torch.tensor(4), math.inf))


@pytest.mark.parametrize(("density", "applies"), [(0.1, False), (0.2, True), (0.6, True)])
def test_a_plan_offers_bits_where_enough_is_kept(density: float, applies: bool) -> None:
    fast = KernelInfo("bits_spmv_fast", "spmv", "bits", "cpu", (), 1, 4, "float32", True)
    slices = replace(fast, name="sell_spmv_fast", format="sell", tile_columns=16)
    facts = Facts("linear", (256, 256), nnz=int(density * 256 * 256), columns=1)
    (found, _) = candidates(facts, [fast])
    assert found.applies == applies
    assert applies or found.verdict == "is for at least 15 % kept weights"
    assert not candidates(replace(facts, columns=7), [fast])[0].applies
    chosen = {0.1: "sell_spmv_fast", 0.2: "bits_spmv_fast", 0.6: "dense"}
    assert choose(facts, [slices, fast]).kernel == chosen[density]
