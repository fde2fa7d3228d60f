# SPDX-License-Identifier: Apache-2.0
"""Rows of blocks: their parts as drawn, their way to blocks and back, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import sparselt
from sparselt.errors import FormatError, SparseltError
from sparselt.formats import BSELL, pack
from sparselt.nn import SparseConv2d, SparseLinear


def block_weight(rows: int, cols: int, block: tuple[int, int], density: float = 0.3) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    grid = torch.rand(rows // block[0], cols // block[1], generator=generator) < density
    kept = grid.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return torch.randn(rows, cols, generator=generator) * kept


def test_bsell_parts_are_as_drawn() -> None:
    # | 1  .  . | . |      slices of 4 rows, the last two of which there are not in the second;
    # | 2  .  . | . |      blocks of 3 columns; within a block, longer slices first
    # | .  .  . | . |
    # | .  .  . | . |
    # | .  3  4 | 5 |
    # | .  .  6 | 7 |
    weight = torch.zeros(6, 4)
    weight[0, 0], weight[1, 0], weight[4, 1], weight[4, 2] = 1, 2, 3, 4
    weight[4, 3], weight[5, 2], weight[5, 3] = 5, 6, 7
    packed = pack(weight, None, "bsell", (4, 3))
    block_slices, slice_steps, slice_rows, columns, values = (p.tolist() for p in packed.parts())
    assert block_slices == [0, 2, 4]
    assert slice_steps == [0, 2, 3, 4, 4]
    assert slice_rows == [4, 5, -1, -1, 0, 1, 2, 3] * 2
    assert columns == [1, 2, 0, 0]
    assert values == [[3, 0, 0, 0], [4, 6, 0, 0], [1, 2, 0, 0], [5, 7, 0, 0]]


@pytest.mark.parametrize("height", [4, 8, 16])
def test_bsell_is_blocks_and_back(height: int) -> None:
    weight = block_weight(720, 37, (height, 1))
    packed = BSELL.from_dense(weight, block=(height, 8))
    assert packed.block_slices.numel() == 5 * 5 + 1, "720 rows make 5 sections"
    blocks = pack(weight, format="bsr", block=(height, 1))
    back = packed.to_bsr()
    assert all(torch.equal(a, b) for a, b in zip(back.parts(), blocks.parts(), strict=True))


def test_square_blocks_are_rows_of_blocks() -> None:
    weight = block_weight(64, 96, (16, 16))
    packed = BSELL.from_dense(weight, block=(16, 384))
    assert packed.nnz == int((weight != 0).sum())
    assert torch.equal(packed.to_dense(), weight)


def _parts() -> list[Tensor]:
    packed = BSELL.from_dense(block_weight(12, 20, (4, 1)), block=(4, 8))
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
    parts[3][1] = parts[3][0]


def _widen_columns(parts: list[Tensor]) -> None:
    parts[3] = parts[3].int()


def _flatten_values(parts: list[Tensor]) -> None:
    parts[4] = parts[4].view(-1)


SPOILERS = {
    "block_slices starts late": _set(0, 0, 1),
    "block_slices ends early": _set(0, -1, 1),
    "block_slices has another length": _shorten(0),
    "slice_steps falls": _set(1, 2, -5),
    "slice_steps is short": _shorten(1),
    "slice_rows is short": _shorten(2),
    "a row out of range": _set(2, 0, 12),
    "a first row that is none": _set(2, 0, -1),
    "rows that are no neighbours": _set(2, 1, 3),
    "a row missing inside a slice": _set(2, 1, -1),
    "a row twice": _set(2, 4, 0),
    "columns is short": _shorten(3),
    "a filler's column": _set(3, 0, 8),
    "a negative column": _set(3, 0, -1),
    "a column beyond the weight": _set(3, -1, 7),
    "a column twice": _repeat_a_column,
    "columns of another type": _widen_columns,
    "values is short": _shorten(4),
    "values are flat": _flatten_values,
}


@pytest.mark.parametrize("spoil", SPOILERS.values(), ids=SPOILERS.keys())
def test_spoiled_bsell_parts_are_refused(spoil: Callable[[list[Tensor]], None]) -> None:
    parts = _parts()
    BSELL.from_parts(parts, (12, 20), (4, 8))
    spoil(parts)
    with pytest.raises(SparseltError, match="expected"):
        BSELL.from_parts(parts, (12, 20), (4, 8))


@pytest.mark.parametrize("block", [(1, 8), (12, 8), (32, 8), (4, 0), (4, 32768)])
def test_bsell_refuses_blocks_out_of_range(block: tuple[int, int]) -> None:
    with pytest.raises(FormatError, match="block: expected"):
        pack(torch.eye(4), format="bsell", block=block)


def block_convolution(height: int) -> nn.Conv2d:
    torch.manual_seed(0)
    dense = nn.Conv2d(12, 32, 3, stride=2, padding=1).requires_grad_(False)
    dense.weight.copy_(block_weight(32, 108, (height, 1)).view_as(dense.weight))
    return dense.eval()


@pytest.mark.parametrize("height", [4, 8, 16])
def test_a_convolution_whose_zeros_come_in_blocks_is_packed_in_rows_of_blocks(height: int) -> None:
    dense, x = block_convolution(height), torch.randn(2, 12, 9, 11)
    sparse = SparseConv2d.from_dense(dense)
    assert (sparse.weight.format, sparse.weight.block[0]) == ("bsell", height)
    torch.testing.assert_close(sparse(x), dense(x), atol=1e-5, rtol=1e-5)
    assert sparse.state_dict()["weight.values"].shape[1:] == (height, 1), "saved as blocks"
    other = SparseConv2d.from_dense(block_convolution(height))
    other.weight.values.zero_()
    other.load_state_dict(sparse.state_dict())
    assert torch.equal(other(x), sparse(x))


def test_a_layer_of_rows_of_blocks_leaves_the_cpu_in_a_format_of_other_devices() -> None:
    dense = nn.Linear(64, 40).requires_grad_(False)
    dense.weight.copy_(block_weight(40, 64, (8, 1)))
    for layer, want in (
        (SparseLinear.from_dense(dense), ("bsr", (8, 1))),
        (SparseConv2d.from_dense(block_convolution(8)), ("csr", (1, 1))),
    ):
        moved = layer.to("meta")
        assert (moved.weight.format, moved.weight.block) == want


@pytest.mark.parametrize(
    ("groups", "block"), [(2, ("bsell", 8)), (4, ("bsell", 8)), (16, ("csr", 1))]
)
def test_blocks_of_a_grouped_convolution_end_where_its_groups_do(groups, block) -> None:
    dense = nn.Conv2d(12 * groups, 32, 3, groups=groups).requires_grad_(False)
    dense.weight.copy_(block_weight(32, 108, (8, 1)).view_as(dense.weight))
    sparse, x = SparseConv2d.from_dense(dense), torch.randn(2, 12 * groups, 6, 7)
    assert (sparse.weight.format, sparse.weight.block[0]) == block
    torch.testing.assert_close(sparse(x), dense(x), atol=1e-5, rtol=1e-5)


def test_a_row_of_blocks_in_two_groups_is_refused() -> None:
    with pytest.raises(FormatError, match="a multiple of 8 rows, got 4"):
        pack(torch.ones(16, 2, 3, 3), format="bsell", block=(8, 16), groups=4)


def test_compiled_networks_of_blocks_are_right_and_can_be_saved(tmp_path, monkeypatch) -> None:
    kernels = [k for k in sparselt.ops.kernels() if k.format == "bsell" and k.usable]
    panel = next(k.name for k in kernels if k.op == "panel")
    monkeypatch.setenv("SPARSELT_KERNEL", panel)
    model, x = nn.Sequential(block_convolution(8), nn.ReLU()).eval(), torch.randn(1, 12, 9, 11)
    program = sparselt.compile(model, x)
    want = model(x)
    torch.testing.assert_close(program(x), want, atol=1e-5, rtol=1e-5)
    assert panel in str(sparselt.explain(program))
    program.save(tmp_path / "blocks.safetensors")
    again = sparselt.load_program(tmp_path / "blocks.safetensors")
    assert torch.equal(again(x), program(x))
