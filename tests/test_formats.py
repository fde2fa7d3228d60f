# SPDX-License-Identifier: Apache-2.0
"""Every format of FORMATS: exact round trips, invariants, each error of packing and validation."""

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
from sparselt.errors import DeviceError, DtypeError, FormatError, ShapeError, SparseltError
from sparselt.formats import BSR, CSR, FORMATS, SparseWeight, pack

FORMAT_BLOCKS = [("csr", None), *(("bsr", block) for block in BLOCKS)]
SHAPES = [(1, 1), (1, 9), (9, 1), (17, 23), (5, 3, 7), (6, 2, 3, 5), (4, 1, 1, 1)]
EMPTY_SHAPES = [(0, 4), (4, 0), (0, 0), (3, 0, 5), (3, 4, 0, 2), (0, 2, 3, 3)]


def index(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def random_weight(shape: tuple[int, ...], density: float, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    return weight, torch.rand(shape, generator=generator) < density


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
    packed = pack(weight, mask, format, block)
    assert packed.shape == shape
    assert same_bits(packed.to_dense(), torch.where(mask, weight, 0.0))
    assert bool((packed.mask() | ~mask).all()), "a kept weight is not stored"
    packed.validate(full=True)


@pytest.mark.parametrize(("format", "block"), FORMAT_BLOCKS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_round_trip(format: str, block: tuple[int, int] | None, pattern: str) -> None:
    case = SpmmCase(17, 23, 1, pattern)
    weight, mask = case.dense()
    packed = case.weight(format, block)
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
    weight = random_weight((9, 11), 1.0, seed=3)[0].to(dtype)
    packed = pack(weight, format=format)
    assert packed.dtype == torch.float32
    assert torch.equal(packed.to_dense().to(dtype), weight)


@pytest.mark.parametrize(("format", "block"), FORMAT_BLOCKS)
def test_strides_and_gradients_of_the_weight_do_not_matter(
    format: str, block: tuple[int, int] | None
) -> None:
    weight, mask = random_weight((12, 10), 0.5, seed=4)
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
    packed = pack(weight, mask, format, block)
    assert (packed.rows, packed.cols) == (16, 75)
    assert packed.nnz == packed.values.numel() >= int(mask.sum())
    assert packed.density == packed.nnz / weight.numel()
    assert packed.nbytes == 4 * sum(part.numel() for part in packed.parts())
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
    packed = pack(weight, mask, format)
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


# Each line below makes one thing wrong; the error must name the argument and say what to do.
BAD_PACKS = {
    "list": (lambda: pack([[1.0]]), DtypeError, "weight: expected a torch.Tensor, got list"),
    "0-D": (lambda: pack(torch.tensor(1.0)), ShapeError, "0 dimensions"),
    "1-D": (lambda: pack(torch.ones(4)), ShapeError, "1 dimensions"),
    "5-D": (lambda: pack(torch.ones(1, 1, 1, 1, 1)), ShapeError, "5 dimensions"),
    "float64": (lambda: pack(torch.ones(2, 2).double()), DtypeError, r"\.float\(\)"),
    "int": (lambda: pack(torch.ones(2, 2, dtype=torch.int32)), DtypeError, r"\.float\(\)"),
    "complex": (lambda: pack(torch.ones(2, 2, dtype=torch.cfloat)), DtypeError, "complex64"),
    "sparse": (lambda: pack(torch.eye(3).to_sparse()), FormatError, "to_dense"),
    "meta": (lambda: pack(torch.ones(2, 2, device="meta")), DeviceError, "meta"),
    "format": (lambda: pack(torch.eye(3), format="nm"), FormatError, "'csr', 'bsr'"),
    "format type": (lambda: pack(torch.eye(3), format=["csr"]), FormatError, "'csr', 'bsr'"),
    "csr block": (lambda: pack(torch.eye(4), block=(2, 2)), FormatError, "format='bsr'"),
    "zero block": (lambda: pack(torch.eye(4), None, "bsr", (0, 1)), FormatError, "each from 1"),
    "negative block": (lambda: pack(torch.eye(4), None, "bsr", (4, -1)), FormatError, "each from"),
    "huge block": (lambda: pack(torch.eye(4), None, "bsr", (1 << 40, 1)), FormatError, "to 1024"),
    "one block": (lambda: pack(torch.eye(4), None, "bsr", (4,)), FormatError, "block: expected"),
    "int block": (lambda: pack(torch.eye(4), None, "bsr", 4), FormatError, "block: expected"),
    "float block": (lambda: pack(torch.eye(4), None, "bsr", (2.0, 2)), FormatError, "block"),
    "mask list": (lambda: pack(torch.eye(2), [[1, 0]]), DtypeError, "mask: expected"),
    "mask shape": (lambda: pack(torch.eye(2), torch.ones(2)), ShapeError, "do not broadcast"),
    "mask score": (
        lambda: pack(torch.eye(2), torch.full((2, 2), 0.7)),
        FormatError,
        "the value 0.69.*threshold",
    ),
    "mask nan": (lambda: pack(torch.eye(2), torch.full((2, 2), math.nan)), FormatError, "nan"),
    "mask counts": (lambda: pack(torch.eye(2), torch.full((2, 2), 2)), FormatError, "value 2"),
    "mask sparse": (lambda: pack(torch.eye(2), torch.eye(2).to_sparse()), FormatError, "dense"),
    "mask meta": (
        lambda: pack(torch.eye(2), torch.ones(2, 2, device="meta")),
        DeviceError,
        r"mask\.to\('cpu'\)",
    ),
}


@pytest.mark.parametrize("name", BAD_PACKS)
def test_pack_refuses(name: str) -> None:
    call, error, message = BAD_PACKS[name]
    with pytest.raises(error, match=message):
        call()


def csr(
    crow: Tensor | None = None,
    col: Tensor | None = None,
    values: Tensor | None = None,
    shape: tuple[int, ...] = (3, 4),
) -> SparseWeight:
    # | .  1  .  2 |
    # | .  .  .  . |
    # | 3  .  .  . |
    return CSR.from_parts(
        (
            index(0, 2, 2, 3) if crow is None else crow,
            index(1, 3, 0) if col is None else col,
            torch.tensor([1.0, 2.0, 3.0]) if values is None else values,
        ),
        shape,
    )


BAD_PARTS = {
    "crow int64": (lambda: csr(crow=index(0, 2, 2, 3).long()), DtypeError, "crow.*int32"),
    "crow float": (lambda: csr(crow=torch.ones(4)), DtypeError, "crow.*int32"),
    "crow list": (lambda: csr(crow=[0, 2, 2, 3]), DtypeError, "a torch.Tensor, got list"),
    "crow 2-D": (lambda: csr(crow=index(0, 2, 2, 3)[None]), FormatError, r"shape \(4,\)"),
    "crow short": (lambda: csr(crow=index(0, 2, 3)), FormatError, r"shape \(4,\).*got \(3,\)"),
    "crow long": (lambda: csr(crow=index(0, 2, 2, 3, 3)), FormatError, r"shape \(4,\)"),
    "crow start": (lambda: csr(crow=index(1, 2, 2, 3)), FormatError, "0 at the start, got 1"),
    "crow negative": (lambda: csr(crow=index(-1, 2, 2, 3)), FormatError, "0 at the start, got -1"),
    "crow falls": (lambda: csr(crow=index(0, 3, 2, 3)), FormatError, "never decrease.*row 1"),
    "crow wraps": (
        lambda: csr(crow=index(0, 2**31 - 1, -(2**31), 3)),
        FormatError,
        "never decrease",
    ),
    "crow beyond": (lambda: csr(crow=index(0, 2, 2, 4)), FormatError, "3 at the end.*got 4"),
    "crow below": (lambda: csr(crow=index(0, 2, 2, 2)), FormatError, "3 at the end.*got 2"),
    "crow strided": (
        lambda: csr(crow=index(0, 9, 2, 9, 2, 9, 3, 9)[::2]),
        FormatError,
        "contiguous",
    ),
    "col int64": (lambda: csr(col=index(1, 3, 0).long()), DtypeError, "col_indices.*int32"),
    "col 2-D": (lambda: csr(col=index(1, 3, 0)[None]), FormatError, "col_indices.*1 dimension"),
    "col negative": (lambda: csr(col=index(1, 3, -1)), FormatError, "from 0 to 3, got -1"),
    "col beyond": (lambda: csr(col=index(1, 4, 0)), FormatError, "from 0 to 3, got 4"),
    "col huge": (lambda: csr(col=index(1, 2**31 - 1, 0)), FormatError, "got 2147483647"),
    "col unsorted": (lambda: csr(col=index(3, 1, 0)), FormatError, "3 then 1 in row 0"),
    "col twice": (lambda: csr(col=index(1, 1, 0)), FormatError, "1 then 1 in row 0"),
    "values half": (lambda: csr(values=torch.ones(3).half()), DtypeError, "values.*float32"),
    "values double": (lambda: csr(values=torch.ones(3).double()), DtypeError, "values.*float32"),
    "values short": (lambda: csr(values=torch.ones(2)), FormatError, r"shape \(3,\).*got \(2,\)"),
    "values 2-D": (lambda: csr(values=torch.ones(3, 1)), FormatError, "values.*shape"),
    "values strided": (lambda: csr(values=torch.ones(6)[::2]), FormatError, "contiguous"),
    "values sparse": (lambda: csr(values=torch.ones(3).to_sparse()), FormatError, "dense"),
    "values meta": (lambda: csr(values=torch.ones(3, device="meta")), DeviceError, "device"),
    "shape rows": (lambda: csr(shape=(4, 4)), FormatError, r"shape \(5,\)"),
    "shape cols": (lambda: csr(shape=(3, 3)), FormatError, "from 0 to 2"),
    "shape 1-D": (lambda: csr(shape=(12,)), ShapeError, "1 dimensions"),
    "shape negative": (lambda: csr(shape=(3, -4)), ShapeError, "sizes >= 0"),
    "shape text": (lambda: csr(shape=("a", "b")), ShapeError, "whole numbers"),
    "shape overflow": (lambda: csr(shape=(3, 2**20, 2**20)), ShapeError, "2147483647"),
    "too few parts": (
        lambda: CSR.from_parts((index(0), index()), (0, 4)),
        FormatError,
        "3: crow_indices, col_indices, values",
    ),
    "csr with block": (
        lambda: CSR.from_parts((index(0), index(), torch.ones(0)), (0, 4), (2, 2)),
        FormatError,
        "bsr",
    ),
    "bsr block rows": (
        lambda: BSR.from_parts((index(0, 1), index(0), torch.ones(1, 2, 2)), (3, 2)),
        FormatError,
        r"shape \(3,\)",
    ),
    "bsr values": (
        lambda: BSR.from_parts((index(0, 1), index(0), torch.ones(1, 2, 2)), (2, 2), (2, 1)),
        FormatError,
        r"shape \(1, 2, 1\)",
    ),
    "bsr flat values": (
        lambda: BSR.from_parts((index(0, 1), index(0), torch.ones(4)), (2, 2), (2, 2)),
        FormatError,
        "values",
    ),
    "bsr column": (
        lambda: BSR.from_parts((index(0, 1), index(2), torch.ones(1, 2, 2)), (2, 4)),
        FormatError,
        "from 0 to 1, got 2",
    ),
    "bsr empty block": (
        lambda: BSR.from_parts((index(0, 1), index(0), torch.ones(1, 0, 2)), (2, 2)),
        FormatError,
        "each from 1",
    ),
}


@pytest.mark.parametrize("name", BAD_PARTS)
def test_validation_refuses(name: str) -> None:
    call, error, message = BAD_PARTS[name]
    with pytest.raises(error, match=message):
        call()


def test_good_parts_pass() -> None:
    expected = torch.tensor([[0.0, 1, 0, 2], [0, 0, 0, 0], [3, 0, 0, 0]])
    assert torch.equal(csr().to_dense(), expected)


def test_columns_may_fall_from_row_to_row_and_past_empty_rows() -> None:
    # Rows 0, 2, 3 and 5 are empty; each other row starts below where the last one ended.
    crow, col = index(0, 0, 2, 2, 2, 3, 3), index(2, 3, 0)
    CSR.from_parts((crow, col, torch.ones(3)), (6, 4)).validate(full=True)


def test_cheap_validation_leaves_the_indices_alone() -> None:
    packed = csr()
    packed.col_indices[0] = 77
    packed.validate(full=False)
    with pytest.raises(FormatError, match="got 77"):
        packed.validate(full=True)


@pytest.mark.parametrize("shape", [(2, 2**30 + 1), (2**30 + 1, 2)])
def test_more_than_int32_can_count_is_refused(shape: tuple[int, int]) -> None:
    # Meta tensors have sizes and no memory, so the edge is reached without allocating it.
    nnz = shape[0] * shape[1]
    parts = (
        torch.empty(shape[0] + 1, dtype=torch.int32, device="meta"),
        torch.empty(nnz, dtype=torch.int32, device="meta"),
        torch.empty(nnz, device="meta"),
    )
    with pytest.raises(FormatError, match=r"at most 2147483647.*split the weight"):
        CSR.from_parts(parts, shape)


def test_every_error_is_one_of_ours() -> None:
    for _, error, _ in (*BAD_PACKS.values(), *BAD_PARTS.values()):
        assert issubclass(error, SparseltError)


def test_pack_is_a_public_name() -> None:
    assert sparselt.pack is pack
    assert sparselt.SparseWeight is SparseWeight
