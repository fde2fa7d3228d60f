# SPDX-License-Identifier: Apache-2.0
"""Every format of FORMATS: exact round trips and invariants, and which weights they take."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from cases import BLOCKS, PATTERNS, SpmmCase, guarded_weight
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sparselt
from sparselt.formats import BSR, FORMATS, SparseWeight, pack

SLICES = ((4, 128), (2, 5), (1, 1), (3, 7), (16, 32767))
FORMAT_BLOCKS = [
    ("csr", None),
    *(("bsr", block) for block in BLOCKS),
    *(("sell", block) for block in SLICES),
    *(("bsell", block) for block in ((4, 128), (8, 5), (16, 1), (4, 32767))),
    *(("tile8", block) for block in (None, (32, 128))),
    *(("delta", block) for block in SLICES),
    *(("sign", block) for block in (None, (2, 5), (1, 1), (16, 16383))),
    ("bits", None),
    ("window", None),
    ("bitmask", None),
    ("patch8", None),
    *(("bsr_nhwc", block) for block in (None, (2, 3), (16, 16))),
]
SHAPES = [(1, 1), (1, 9), (9, 1), (17, 23), (5, 3, 7), (6, 2, 3, 5), (4, 1, 1, 1)]
EMPTY_SHAPES = [(0, 4), (4, 0), (0, 0), (3, 0, 5), (3, 4, 0, 2), (0, 2, 3, 3)]


def random_weight(shape: tuple[int, ...], density: float, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    return weight, torch.rand(shape, generator=generator) < density


def suited(format: str, weight: Tensor) -> Tensor:
    """The weight, or for a format of one magnitude a row another one with its signs."""
    return torch.copysign(torch.full_like(weight, 0.3), weight) if format == "sign" else weight


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.view(torch.int32), b.view(torch.int32))


def test_every_format_is_tested_here() -> None:
    assert {name for name, _ in FORMAT_BLOCKS} == set(FORMATS)


@pytest.mark.parametrize(("format", "block"), FORMAT_BLOCKS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
def test_round_trip_is_bit_exact(
    format: str, block: tuple[int, int] | None, shape: tuple[int, ...], density: float
) -> None:
    weight, mask = random_weight(shape, density, seed=1)
    weight = suited(format, weight)
    packed = pack(weight, mask, format, block)
    assert packed.shape == shape
    assert same_bits(packed.to_dense(), torch.where(mask, weight, 0.0))
    assert bool((packed.mask() | ~mask).all()), "a kept weight is not stored"
    assert int(mask.sum()) <= packed.kept <= packed.nnz
    if not format.startswith("bs"):  # blocks count in full
        assert packed.kept == int(packed.mask().sum())
    packed.validate(full=True)


@pytest.mark.parametrize(("format", "block"), FORMAT_BLOCKS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_round_trip(format: str, block: tuple[int, int] | None, pattern: str) -> None:
    case = SpmmCase(17, 23, 1, pattern)
    weight, mask = case.dense()
    weight = suited(format, weight)
    packed = pack(weight, mask, format, block)
    assert same_bits(packed.to_dense(), torch.where(mask, weight, 0.0))
    again = type(packed).from_parts(packed.parts(), packed.shape, packed.block)
    assert same_bits(again.to_dense(), packed.to_dense())


@pytest.mark.parametrize(("format", "block"), FORMAT_BLOCKS)
@pytest.mark.parametrize("shape", EMPTY_SHAPES)
def test_empty_weights_work(
    format: str, block: tuple[int, int] | None, shape: tuple[int, ...]
) -> None:
    packed = pack(torch.zeros(shape), torch.ones(shape), format, block)
    packed.validate(full=True)
    assert packed.nnz == 0
    assert packed.density == 0.0
    assert packed.to_dense().shape == packed.mask().shape == shape


def test_csr_parts_are_as_drawn() -> None:
    # | .  2  . |
    # | .  .  . |
    # | 3  .  4 |
    packed = pack(torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 0.0], [3.0, 0.0, 4.0]]))
    crow, col, values = packed.parts()
    assert (crow.tolist(), col.tolist(), values.tolist()) == ([0, 1, 1, 3], [1, 0, 2], [2, 3, 4])
    assert (crow.dtype, col.dtype, values.dtype) == (torch.int32, torch.int32, torch.float32)
    assert packed.meta() == [1, 1, 3, 3]


def test_bsr_parts_are_as_drawn() -> None:
    # | .  2 | . |      blocks of 2x2: block row 0 holds block column 0, block row 1 holds 1,
    # | .  . | . |      which overhangs the matrix on both sides and is filled with zeros
    # |------+---|
    # | .  . | 4 |
    packed = pack(
        torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 4.0]]), None, "bsr", (2, 2)
    )
    crow, col, values = packed.parts()
    assert (crow.tolist(), col.tolist()) == ([0, 1, 2], [0, 1])
    assert values.tolist() == [[[0, 2], [0, 0]], [[4, 0], [0, 0]]]
    assert packed.meta() == [2, 2, 3, 3]
    stored = [[True, True, False], [True, True, False], [False, False, True]]
    assert packed.mask().tolist() == stored


@pytest.mark.parametrize(("format", "block"), FORMAT_BLOCKS)
def test_the_mask_decides_and_not_the_value(format: str, block: tuple[int, int] | None) -> None:
    weight = torch.zeros(6, 7)
    mask = torch.zeros(6, 7, dtype=torch.bool)
    mask[2, 3] = True
    packed = pack(weight, mask, format, block)
    assert packed.nnz >= 1
    assert bool(packed.mask()[2, 3])
    weight[2, 3], weight[0, 0] = -0.0, 5.0
    dense = pack(weight, mask, format, block).to_dense()
    assert math.copysign(1.0, dense[2, 3].item()) == -1.0
    assert dense[0, 0] == 0.0


@pytest.mark.parametrize(("format", "block"), FORMAT_BLOCKS)
def test_a_dropped_nan_leaves_no_trace(format: str, block: tuple[int, int] | None) -> None:
    weight = torch.full((5, 5), math.nan)
    mask = torch.zeros(5, 5, dtype=torch.bool)
    mask[1, 1], weight[1, 1] = True, 2.0
    dense = pack(weight, mask, format, block).to_dense()
    assert dense.sum() == 2.0


def test_without_a_mask_what_is_not_zero_is_kept() -> None:
    weight = torch.tensor([[0.0, -0.0, 1e-45, math.nan, math.inf]])
    assert pack(weight).col_indices.tolist() == [2, 3, 4]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32, torch.half])
def test_masks_of_zeros_and_ones_mean_the_same_in_any_type(dtype: torch.dtype) -> None:
    weight, mask = random_weight((9, 11), 0.4, seed=2)
    packed = pack(weight, mask.to(dtype))
    assert torch.equal(packed.mask(), mask)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("format", FORMATS)
def test_narrow_floats_are_stored_exactly(dtype: torch.dtype, format: str) -> None:
    weight = suited(format, random_weight((9, 11), 1.0, seed=3)[0].to(dtype))
    packed = pack(weight, format=format)
    assert packed.dtype == torch.float32
    assert torch.equal(packed.to_dense().to(dtype), weight)


@pytest.mark.parametrize(("format", "block"), FORMAT_BLOCKS)
def test_strides_and_gradients_of_the_weight_do_not_matter(
    format: str, block: tuple[int, int] | None
) -> None:
    weight, mask = random_weight((12, 10), 0.5, seed=4)
    weight = suited(format, weight)
    expected = pack(weight, mask, format, block).to_dense()
    turned = weight.T.contiguous().T
    wide = torch.randn(12, 20)
    wide[:, ::2] = weight
    for other in (turned, wide[:, ::2], torch.nn.Parameter(weight)):
        packed = pack(other, mask.T.contiguous().T, format, block)
        assert same_bits(packed.to_dense(), expected)
        assert not any(part.requires_grad for part in packed.parts())
    channels_last = weight.view(3, 4, 2, 5).to(memory_format=torch.channels_last)
    assert same_bits(
        pack(channels_last, format=format, block=block).to_dense(), channels_last.contiguous()
    )


@pytest.mark.parametrize("format", FORMATS)
def test_packing_shares_no_memory_with_the_weight(format: str) -> None:
    weight = torch.ones(8, 4)
    packed = pack(weight, format=format)
    weight.fill_(7.0)
    assert torch.equal(packed.to_dense(), torch.ones(8, 4))


@pytest.mark.parametrize(("format", "block"), FORMAT_BLOCKS)
def test_sizes_are_what_the_parts_say(format: str, block: tuple[int, int] | None) -> None:
    weight, mask = random_weight((16, 3, 5, 5), 0.3, seed=5)
    packed = pack(suited(format, weight), mask, format, block)
    assert (packed.rows, packed.cols) == (16, 75)
    # What fills up a chunk is no stored value.
    chunked = format in ("tile8", "bitmask", "patch8", "bits")
    whole = packed.columns if format == "sign" else packed.values
    stored = int(mask.sum()) if chunked else whole.numel()
    assert packed.nnz == stored >= int(mask.sum())
    assert packed.density == packed.nnz / weight.numel()
    assert packed.nbytes == sum(part.numel() * part.element_size() for part in packed.parts())
    assert packed.device == weight.device
    assert len(packed.parts()) == len(packed.part_names)
    assert packed.meta() == [*packed.block, 16, 3, 5, 5]
    if format == "csr":
        assert packed.density == int(mask.sum()) / weight.numel()


@pytest.mark.parametrize("format", FORMATS)
def test_a_weight_is_immutable(format: str) -> None:
    packed = pack(torch.eye(4), format=format)
    with pytest.raises(AttributeError, match="immutable"):
        packed.shape = (2, 8)
    with pytest.raises(AttributeError, match="immutable"):
        packed.extra = 1
    with pytest.raises(AttributeError):
        packed.values = torch.zeros(4)
    with pytest.raises(AttributeError, match="immutable"):
        del packed.shape


@pytest.mark.parametrize("format", FORMATS)
def test_copies_and_pickles_are_equal_and_apart(format: str) -> None:
    weight, mask = random_weight((6, 2, 3, 3), 0.4, seed=6)
    packed = pack(suited(format, weight), mask, format)
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed)), packed.to("cpu")):
        assert type(other) is type(packed)
        assert (other.shape, other.block) == (packed.shape, packed.block)
        assert same_bits(other.to_dense(), packed.to_dense())
    assert copy.deepcopy(packed).values.data_ptr() != packed.values.data_ptr()


def test_the_blocks_of_bsr_parts_are_those_of_the_values() -> None:
    packed = pack(torch.eye(6), format="bsr", block=(2, 3))
    assert BSR.from_parts(packed.parts(), (6, 6)).block == (2, 3)


def test_parts_in_slices_of_larger_buffers_are_accepted() -> None:
    packed = pack(torch.eye(5))
    assert torch.equal(guarded_weight(packed, offset=3).to_dense(), torch.eye(5))


def test_repr_names_shape_and_density() -> None:
    text = repr(pack(torch.eye(4), format="bsr", block=(2, 2)))
    assert text == "BSR(shape=(4, 4), nnz=8, density=0.5, block=(2, 2), device=cpu)"


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    shape=st.one_of(
        st.tuples(*[st.integers(0, 20)] * 2),
        st.tuples(*[st.integers(0, 6)] * 3),
        st.tuples(*[st.integers(0, 5)] * 4),
    ),
    density=st.sampled_from([0.0, 0.05, 0.3, 0.9, 1.0]),
    block=st.one_of(st.none(), st.tuples(st.integers(1, 9), st.integers(1, 9))),
    seed=st.integers(0, 2**31),
)
def test_any_weight_round_trips(
    shape: tuple[int, ...], density: float, block: tuple[int, int] | None, seed: int
) -> None:
    weight, mask = random_weight(shape, density, seed)
    packed = pack(weight, mask, "csr" if block is None else "bsr", block)
    assert same_bits(packed.to_dense(), torch.where(mask, weight, 0.0))
    again = type(packed).from_parts(packed.parts(), shape, packed.block)
    assert torch.equal(again.mask(), packed.mask())


def test_pack_is_a_public_name() -> None:
    assert sparselt.pack is pack
    assert sparselt.SparseWeight is SparseWeight
