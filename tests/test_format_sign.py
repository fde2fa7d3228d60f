# SPDX-License-Identifier: Apache-2.0
"""Signs and one magnitude a row: the parts as drawn, what is refused, and who gets the format."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import sparselt
from sparselt.errors import FormatError, SparseltError
from sparselt.facts import facts_of, is_of_one_magnitude
from sparselt.formats import Sign, pack
from sparselt.lottery.edge_popup import add_supermasks, read_supermasks
from sparselt.nn import SparseLinear
from sparselt.plan import candidates


def signs(rows: int, cols: int, density: float = 0.4) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    kept = torch.rand(rows, cols, generator=generator) < density
    sizes = torch.arange(0.25, rows).view(-1, 1)
    return torch.copysign(sizes, torch.randn(rows, cols, generator=generator)) * kept


def test_sign_parts_are_as_drawn() -> None:
    # | 2  . -2 | 2 |      slices of 2 rows, blocks of 3 columns; a negative weight's column is 4
    # | .  .  . | . |      more, and what a row lacks is column 3
    # | .  5  . | . |
    packed = pack(torch.tensor([[2.0, 0, -2, 2], [0, 0, 0, 0], [0, 5, 0, 0]]), None, "sign", (2, 3))
    block_slices, slice_steps, slice_rows, columns, values = (p.tolist() for p in packed.parts())
    assert block_slices == [0, 2, 4]
    assert slice_steps == [0, 2, 2, 3, 3]
    assert slice_rows == [0, 2, 1, -1, 0, 1, 2, -1]
    assert columns == [[0, 1], [6, 3], [0, 3]]
    assert values == [2, 0, 5]


def test_a_kept_weight_takes_two_bytes() -> None:
    weight = signs(512, 4096, 0.5)
    packed = pack(weight, format="sign", block=(16, 4096))
    assert packed.nbytes < 2.1 * int(weight.count_nonzero())


@pytest.mark.parametrize("value", [1.0000001, 2.0, 0.0, torch.nan])
def test_weights_of_two_magnitudes_in_a_row_are_refused(value: float) -> None:
    weight, mask = torch.ones(3, 4), torch.ones(3, 4)
    assert is_of_one_magnitude(weight, mask > 0)
    weight[2, 1] = value
    assert not is_of_one_magnitude(weight, mask > 0)
    with pytest.raises(FormatError, match="one finite magnitude a row"):
        pack(weight, mask, "sign")


def test_infinite_weights_are_refused() -> None:
    # The magnitude is multiplied with the row's sum, which infinities do not commute with.
    with pytest.raises(FormatError, match="one finite magnitude a row"):
        pack(torch.full((2, 2), torch.inf), format="sign")


def _set(part: int, at: int, value: float) -> Callable[[list[Tensor]], None]:
    def spoil(parts: list[Tensor]) -> None:
        parts[part].view(-1)[at] = value

    return spoil


def _replace(part: int, change: Callable[[Tensor], Tensor]) -> Callable[[list[Tensor]], None]:
    def spoil(parts: list[Tensor]) -> None:
        parts[part] = change(parts[part])

    return spoil


SPOILERS = {
    "block_slices starts late": _set(0, 0, 1),
    "slice_steps falls": _set(1, 2, -5),
    "a row out of range": _set(2, 0, 9),
    "a column beyond the negative ones": _set(3, 0, 17),
    "a negative column": _set(3, 0, -1),
    "columns are flat": _replace(3, lambda part: part.view(-1)),
    "columns of another type": _replace(3, lambda part: part.int()),
    "a step too few": _replace(3, lambda part: part[:-1].clone()),
    "a magnitude with a sign": _set(4, 3, -1.0),
    "an infinite magnitude": _set(4, 3, torch.inf),
    "a magnitude too few": _replace(4, lambda part: part[:-1].clone()),
}


@pytest.mark.parametrize("spoil", SPOILERS.values(), ids=SPOILERS.keys())
def test_spoiled_sign_parts_are_refused(spoil: Callable[[list[Tensor]], None]) -> None:
    parts = [part.clone() for part in pack(signs(9, 20), format="sign", block=(2, 8)).parts()]
    Sign.from_parts(parts, (9, 20), (2, 8))
    spoil(parts)
    with pytest.raises(SparseltError, match="expected"):
        Sign.from_parts(parts, (9, 20), (2, 8))


@pytest.mark.parametrize("block", [(0, 8), (65, 8), (4, 0), (4, 16384)])
def test_sign_refuses_blocks_out_of_range(block: tuple[int, int]) -> None:
    with pytest.raises(FormatError, match="block: expected"):
        pack(torch.eye(4), format="sign", block=block)


def edge_popup_layer(weights: str) -> nn.Linear:
    masked = nn.Sequential(nn.Linear(96, 40))
    add_supermasks(masked, 0.3, weights=weights, seed=1)
    plain = nn.Sequential(nn.Linear(96, 40))
    read_supermasks(masked).apply(plain)
    layer = plain[0]
    assert isinstance(layer, nn.Linear)
    return layer


@pytest.mark.parametrize(
    ("weights", "offered"), [("signed_constant", True), ("kaiming_normal", False)]
)
def test_sign_kernels_are_offered_for_edge_popup_tickets(weights: str, offered: bool) -> None:
    layer = edge_popup_layer(weights)
    for columns, few in ((1, True), (24, True), (25, False)):
        facts = facts_of(layer, layer.weight != 0, columns)
        kernels = [k for k in sparselt.ops.kernels() if k.format == "sign" and k.usable]
        found = [c for c in candidates(facts, kernels) if c.format == "sign"]
        assert found
        assert all(c.applies == (offered and few) for c in found)


def test_a_layer_of_signs_is_right_and_saved_as_compressed_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SPARSELT_KERNEL", "sign_spmv_scalar")
    layer, x = edge_popup_layer("signed_constant"), torch.randn(3, 96)
    sparse = SparseLinear.from_dense(layer)
    assert sparse.weight.format == "sign"
    torch.testing.assert_close(sparse(x), layer(x).detach(), atol=1e-5, rtol=1e-5)
    assert torch.equal(sparse.to_dense().weight, layer.weight)
    state = sparse.state_dict()
    assert "weight.crow_indices" in state
    other = SparseLinear.from_dense(layer)
    other.weight.values.zero_()
    other.load_state_dict(state)
    assert torch.equal(other(x), sparse(x))
