# SPDX-License-Identifier: Apache-2.0
"""What pack and from_parts refuse: every rule of the formats broken one at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sparselt.errors import DeviceError, DtypeError, FormatError, ShapeError, SparseltError
from sparselt.formats import BSR, CSR, SparseWeight, pack


def index(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


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
