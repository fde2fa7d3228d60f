# SPDX-License-Identifier: Apache-2.0
"""A byte for a column: the parts as drawn, jumps, what is refused, and where plans offer it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from kernel_calls import spmm
from torch import Tensor

from sparselt import ops
from sparselt.errors import SparseltError
from sparselt.formats import CSR, Delta, pack
from sparselt.plan import Facts, KernelInfo, candidates, choose

KERNELS = [kernel for kernel in ops.kernels() if kernel.format == "delta" and kernel.usable]
EACH_KERNEL = pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
DISTANCES = (1, 254, 255, 256, 509, 510, 511, 1000)


def far_apart(distance: int) -> Tensor:
    """Rows with values 2, 3 and 0.0 so far from each other, one row of a single one, one full."""
    weight = torch.zeros(4, 2 * distance + 3)
    weight[0, distance], weight[0, -1] = 2.0, 3.0
    weight[2, -2] = 4.0
    weight[3] = 1.0
    return weight


def test_delta_parts_are_as_drawn() -> None:
    # Two blocks of 300 columns; 299 is 255 and 44, as far as 44 behind a jump.
    weight = torch.zeros(2, 600)
    weight[0, 2], weight[0, 299], weight[1, 7], weight[1, 300] = 1.0, 2.0, 3.0, 4.0
    block_slices, slice_steps, slice_rows, columns, values = pack(
        weight, None, "delta", (2, 300)
    ).parts()
    assert block_slices.tolist() == [0, 1, 2]
    assert slice_steps.tolist() == [0, 3, 4]
    assert slice_rows.tolist() == [0, 1, 1, 0]
    assert columns.view(-1, 2).tolist() == [[2, 7], [255, 255], [42, 255], [0, 255]]
    assert values.view(-1, 2).tolist() == [[1, 3], [0, 0], [2, 0], [4, 0]]


@pytest.mark.parametrize("distance", DISTANCES)
def test_values_far_apart_round_trip(distance: int) -> None:
    weight = far_apart(distance)
    packed = Delta.from_csr(CSR.from_dense(weight), (4, 4096))
    assert torch.equal(packed.to_dense(), weight)
    assert torch.equal(packed.mask(), weight != 0)
    assert torch.equal(packed.to_csr().to_dense(), weight)
    Delta.from_parts(packed.parts(), weight.shape, packed.block)


def test_a_kept_weight_takes_five_bytes() -> None:
    mask = torch.rand(64, 4096, generator=torch.Generator().manual_seed(0)) < 0.1
    weight = torch.ones(64, 4096)
    delta, sell = (pack(weight, mask, format, (16, 4096)) for format in ("delta", "sell"))
    assert delta.nnz == sell.nnz
    assert delta.nbytes == sell.nbytes - sell.nnz


@EACH_KERNEL
@pytest.mark.parametrize("columns", [1, 3, 8, 16])
@pytest.mark.parametrize("distance", DISTANCES)
def test_jumps_meet_no_x(kernel: KernelInfo, columns: int, distance: int) -> None:
    # The full row, with a slice of its own where slices are of one row, meets every NaN.
    weight = far_apart(distance)
    x = torch.ones(weight.shape[1], columns)
    x[(weight[:3] == 0).all(0)] = math.nan
    height = kernel.tile_rows if kernel.tile_rows > 1 else 3
    y = spmm(kernel, pack(weight, format="delta", block=(height, 4096)), x)
    assert torch.equal(y[:3], torch.tensor([5.0, 0.0, 4.0])[:, None].expand(3, columns))
    assert bool(y[3].isnan().all())


@EACH_KERNEL
def test_a_kept_zero_meets_its_infinity(kernel: KernelInfo) -> None:
    weight, x = torch.zeros(1, 600), torch.ones(600, 1)
    mask, x[511] = torch.zeros(1, 600, dtype=torch.bool), math.inf
    mask[0, 511] = True
    height = kernel.tile_rows if kernel.tile_rows > 1 else 1
    assert spmm(kernel, pack(weight, mask, "delta", (height, 600)), x).isnan()


def _set(part: int, at: int, value: int) -> Callable[[list[Tensor]], None]:
    def spoil(parts: list[Tensor]) -> None:
        parts[part].view(-1)[at] = value

    return spoil


def _replace(part: int, change: Callable[[Tensor], Tensor]) -> Callable[[list[Tensor]], None]:
    def spoil(parts: list[Tensor]) -> None:
        parts[part] = change(parts[part])

    return spoil


SPOILERS = {
    "slice_steps falls": _set(1, 1, -5),
    "slice_steps ends late": _set(1, -1, 99),
    "a row out of range": _set(2, 0, 9),
    "a column of the filler": _set(3, 0, 8),
    "a column out of the block": _set(3, 0, 9),
    "a column beyond the weight": _set(3, -2, 7),
    "a column twice": _set(3, 2, 0),
    "columns is short": _replace(3, lambda part: part[:-1].clone()),
    "columns of another type": _replace(3, lambda part: part.short()),
    "values is short": _replace(4, lambda part: part[:-1].clone()),
}


@pytest.mark.parametrize("spoil", SPOILERS.values(), ids=SPOILERS.keys())
def test_spoiled_delta_parts_are_refused(spoil: Callable[[list[Tensor]], None]) -> None:
    packed = pack(torch.ones(9, 20), format="delta", block=(2, 8))
    parts = [part.clone() for part in packed.parts()]
    Delta.from_parts(parts, (9, 20), (2, 8))
    spoil(parts)
    with pytest.raises(SparseltError, match="expected"):
        Delta.from_parts(parts, (9, 20), (2, 8))


@pytest.mark.parametrize(
    ("density", "columns", "verdict"),
    [
        (0.1, 1, "applies"),
        (0.005, 1, "is for at least 1 % kept weights"),
        (0.1, 2, "is for one column"),
    ],
)
def test_a_plan_offers_deltas_for_one_column(density: float, columns: int, verdict: str) -> None:
    fast = KernelInfo("delta_spmv_fast", "spmv", "delta", "cpu", (), 16, 16, "float32", True)
    slices = replace(fast, name="sell_spmv_fast", format="sell")
    facts = Facts("linear", (900, 900), nnz=int(density * 900 * 900), columns=columns)
    found = candidates(facts, [slices, fast])[1]
    assert (found.verdict, found.block) == (verdict, (16, 900))
    times = {"sell_spmv_fast": 600.0, "delta_spmv_fast": 500.0, "dense": 4000.0}
    faster = "delta" if verdict == "applies" else "sell"
    assert choose(facts, [slices, fast], times).format == faster
    assert choose(facts, [slices, fast]).format == "sell"  # nobody knows whether it is cold
