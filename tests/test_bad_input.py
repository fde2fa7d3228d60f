# SPDX-License-Identifier: Apache-2.0
"""Malformed calls: each is refused by an exception of ours that helps, and none crashes.

Every entry of the tables makes one thing wrong. What pack and from_parts refuse is in
test_format_errors.py, and files are in test_bad_files.py; here are the calls that reach the
operators, the layers and the whole-model functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

import sparselt
from sparselt import ops, pack
from sparselt.errors import (
    DeviceError,
    DtypeError,
    FormatError,
    GradientError,
    KernelError,
    OptionError,
    ShapeError,
    SparseltError,
)
from sparselt.tickets import Ticket

W = pack(torch.eye(4))  # (4, 4)
B = pack(torch.eye(4), format="bsr", block=(2, 2))
F1 = pack(torch.ones(2, 3, 3))  # (C_out, C_in, S)
F2 = pack(torch.ones(2, 3, 3, 3))  # (C_out, C_in, R, S)
X = torch.ones(4, 5)  # (K, N)
OUT = torch.empty(4, 5)
ROW = torch.ones(1, 3, 8)  # (B, C_in, L)
MAP = torch.ones(1, 3, 8, 8)  # (B, C_in, H, W)

Bad = tuple[Callable[[], object], type[SparseltError], str]

OPERATIONS: dict[str, Bad] = {
    "weight dense": (lambda: ops.spmm(torch.eye(4), X), FormatError, r"sparselt\.pack\(weight\)"),
    "weight none": (lambda: ops.spmm(None, X), FormatError, "a packed weight, got a NoneType"),
    "arguments swapped": (lambda: ops.linear(W, X), FormatError, "packed weight"),
    "weight of a convolution": (lambda: ops.spmm(F2, X), ShapeError, "2 dimensions"),
    "weight 2-D for conv2d": (lambda: ops.conv2d(MAP, W), ShapeError, "4 dimensions"),
    "weight 3-D for conv2d": (lambda: ops.conv2d(MAP, F1), ShapeError, "4 dimensions"),
    "weight 4-D for conv1d": (lambda: ops.conv1d(ROW, F2), ShapeError, "3 dimensions"),
    "x list": (lambda: ops.spmm(W, [[1.0]]), DtypeError, "x: expected a torch.Tensor, got list"),
    "x none": (lambda: ops.conv2d(None, F2), DtypeError, "x: expected a torch.Tensor"),
    "x none for conv1d": (lambda: ops.conv1d(None, F1), DtypeError, "x: expected a torch.Tensor"),
    "x numpy": (lambda: ops.linear(np.ones((2, 4)), W), DtypeError, "got ndarray"),
    "x rows": (lambda: ops.spmm(W, X.T), ShapeError, r"x: expected \(4, N\), got \(5, 4\)"),
    "x 1-D": (lambda: ops.spmm(W, X[:, 0]), ShapeError, r"\(4, N\)"),
    "x 3-D": (lambda: ops.spmm(W, X[None]), ShapeError, r"\(4, N\)"),
    "x features": (lambda: ops.linear(X, W), ShapeError, r"\(\.\.\., 4\), got \(4, 5\)"),
    "x 0-D": (lambda: ops.linear(torch.tensor(1.0), W), ShapeError, r"\(\.\.\., 4\)"),
    "x channels": (lambda: ops.conv2d(MAP[:, :2], F2), ShapeError, "3 channels"),
    "x 2-D map": (lambda: ops.conv2d(MAP[0, 0], F2), ShapeError, "3 channels"),
    "x 5-D map": (lambda: ops.conv2d(MAP[None], F2), ShapeError, "3 channels"),
    "x 1-D row": (lambda: ops.conv1d(ROW[0, 0], F1), ShapeError, "3 channels"),
    "x float64": (lambda: ops.spmm(W, X.double()), DtypeError, r"x\.float\(\)"),
    "x half": (lambda: ops.conv2d(MAP.half(), F2), DtypeError, r"float32, got torch\.float16"),
    "x int": (lambda: ops.spmm(W, X.int()), DtypeError, "int32"),
    "x complex": (lambda: ops.spmm(W, X.cfloat()), DtypeError, "complex64"),
    "x sparse": (lambda: ops.spmm(W, X.to_sparse()), FormatError, r"x\.to_dense\(\)"),
    "x meta": (lambda: ops.spmm(W, X.to("meta")), DeviceError, "meta"),
    "bias list": (lambda: ops.spmm(W, X, [1.0] * 4), DtypeError, "bias: expected a torch.Tensor"),
    "bias length": (lambda: ops.linear(X.T, W, torch.ones(3)), ShapeError, r"bias.*\(4,\).*\(3,\)"),
    "bias 2-D": (lambda: ops.spmm(W, X, torch.ones(4, 1)), ShapeError, r"bias: expected \(4,\)"),
    "bias float64": (lambda: ops.spmm(W, X, torch.ones(4).double()), DtypeError, "bias.float"),
    "bias meta": (lambda: ops.spmm(W, X, torch.ones(4, device="meta")), DeviceError, "bias"),
    "residual list": (lambda: ops.spmm(W, X, residual=[1.0]), DtypeError, "residual: expected"),
    "residual shape": (
        lambda: ops.conv2d(MAP, F2, residual=torch.ones(1, 2, 8, 8)),
        ShapeError,
        r"residual: expected \(1, 2, 6, 6\)",
    ),
    "residual broadcast": (
        lambda: ops.spmm(W, X, residual=torch.ones(4, 1)),
        ShapeError,
        r"residual: expected \(4, 5\)",
    ),
    "residual half": (lambda: ops.spmm(W, X, residual=X.half()), DtypeError, "residual"),
    "limits crossed": (lambda: ops.spmm(W, X, lower=2.0, upper=1), OptionError, "lower <= upper"),
    "limit nan": (lambda: ops.spmm(W, X, lower=math.nan), OptionError, "lower <= upper"),
    "limit text": (lambda: ops.linear(X.T, W, upper="6"), OptionError, "numbers"),
    "limit tensor": (lambda: ops.spmm(W, X, lower=torch.zeros(1)), OptionError, "numbers"),
    "stride 0": (lambda: ops.conv2d(MAP, F2, stride=0), OptionError, "at least 1"),
    "stride -1": (lambda: ops.conv2d(MAP, F2, stride=(1, -1)), OptionError, "at least 1"),
    "stride of three": (lambda: ops.conv2d(MAP, F2, stride=(1, 1, 1)), OptionError, "stride"),
    "stride of two for conv1d": (lambda: ops.conv1d(ROW, F1, stride=(1, 1)), OptionError, "stride"),
    "stride empty": (lambda: ops.conv2d(MAP, F2, stride=()), OptionError, "stride"),
    "stride fraction": (lambda: ops.conv2d(MAP, F2, stride=1.5), OptionError, "whole number"),
    "stride fractions": (lambda: ops.conv2d(MAP, F2, stride=(1.0, 2)), OptionError, "whole"),
    "stride none": (lambda: ops.conv2d(MAP, F2, stride=None), OptionError, "whole number"),
    "stride text": (lambda: ops.conv2d(MAP, F2, stride="12"), OptionError, "whole number"),
    "stride overflow": (lambda: ops.conv2d(MAP, F2, stride=2**64), OptionError, r"below 2\*\*31"),
    "padding -1": (lambda: ops.conv2d(MAP, F2, padding=-1), OptionError, "at least 0"),
    "padding word": (lambda: ops.conv2d(MAP, F2, padding="full"), OptionError, "'same'"),
    "padding same and stride": (
        lambda: ops.conv2d(MAP, F2, stride=2, padding="same"),
        OptionError,
        "give padding as numbers",
    ),
    "padding overflow": (lambda: ops.conv2d(MAP, F2, padding=2**62), OptionError, r"2\*\*31"),
    "padding wraps": (lambda: ops.conv2d(MAP, F2, padding=2**63), OptionError, r"2\*\*31"),
    "padding too large": (lambda: ops.conv2d(MAP, F2, padding=2**20), OptionError, "padding"),
    "padding large, few outputs": (
        lambda: ops.conv2d(MAP, F2, padding=2**20, stride=2**20),
        OptionError,
        "padding",
    ),
    "dilation 0": (lambda: ops.conv2d(MAP, F2, dilation=0), OptionError, "at least 1"),
    "dilation too large": (lambda: ops.conv2d(MAP, F2, dilation=100), ShapeError, "reach"),
    "dilation overflow": (lambda: ops.conv2d(MAP, F2, dilation=2**62), OptionError, r"2\*\*31"),
    "map too small": (lambda: ops.conv2d(MAP[..., :2], F2), ShapeError, "larger input"),
    "map empty": (lambda: ops.conv2d(MAP[..., :0], F2), ShapeError, "larger input"),
    "row too short": (lambda: ops.conv1d(ROW[..., :2], F1), ShapeError, "larger input"),
    "groups 0": (lambda: ops.conv2d(MAP, F2, groups=0), OptionError, "divisor of C_out = 2"),
    "groups -1": (lambda: ops.conv2d(MAP, F2, groups=-1), OptionError, "divisor"),
    "groups 3": (lambda: ops.conv2d(MAP, F2, groups=3), OptionError, "divisor"),
    "groups fraction": (lambda: ops.conv2d(MAP, F2, groups=1.0), OptionError, "divisor"),
    "groups and channels": (lambda: ops.conv2d(MAP, F2, groups=2), ShapeError, "6 channels"),
    "kernel unknown": (lambda: ops.spmm(W, X, kernel="fast"), KernelError, "csr_spmm_scalar"),
    "kernel none": (lambda: ops.spmm(W, X, kernel=None), KernelError, "one of csr_spmm"),
    "kernel of another operation": (
        lambda: ops.spmm(W, X, kernel="csr_conv2d_scalar"),
        KernelError,
        "one of csr_spmm",
    ),
    "kernel of another format": (
        lambda: ops.linear(X.T, B, kernel="csr_spmm_scalar"),
        KernelError,
        "one of bsr_spmm",
    ),
    "kernel for no such format": (
        lambda: ops.conv2d(MAP, pack(torch.ones(4, 3, 3, 3), format="bsr")),
        KernelError,
        "format='csr'",
    ),
    "gradient of x": (
        lambda: ops.spmm(W, X.clone().requires_grad_()),
        GradientError,
        "x requires a gradient",
    ),
    "gradient of bias": (
        lambda: ops.conv2d(MAP, F2, torch.ones(2, requires_grad=True)),
        GradientError,
        "bias requires a gradient",
    ),
}


def refused(bad: Bad) -> None:
    call, error, message = bad
    with pytest.raises(error, match=message) as caught:
        call()
    assert isinstance(caught.value, SparseltError)
    text = str(caught.value)
    assert len(text) > 20, f"says too little: {text!r}"
    assert "Traceback" not in text


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_refuse(name: str) -> None:
    refused(OPERATIONS[name])


def linear_like(x: torch.Tensor) -> object:
    return sparselt.nn.SparseLinear.from_dense(nn.Linear(4, 3))(x)


MODELS: dict[str, Bad] = {
    "layer of another kind": (
        lambda: sparselt.nn.SparseLinear.from_dense(nn.Conv2d(1, 1, 1)),
        OptionError,
        "nn.Linear, got Conv2d",
    ),
    "layer format": (
        lambda: sparselt.nn.SparseLinear.from_dense(nn.Linear(4, 3), format="nm"),
        OptionError,
        "'auto', 'csr' or 'bsr'",
    ),
    "layer kernel": (
        lambda: sparselt.nn.SparseLinear.from_dense(nn.Linear(4, 3), kernel="fast"),
        KernelError,
        "fast",
    ),
    "layer mask shape": (
        lambda: sparselt.nn.SparseLinear.from_dense(nn.Linear(4, 3), torch.ones(4, 3)),
        ShapeError,
        r"\(3, 4\)",
    ),
    "layer mask nan": (
        lambda: sparselt.nn.SparseLinear.from_dense(nn.Linear(4, 3), torch.full((3, 4), math.nan)),
        FormatError,
        "nan",
    ),
    "layer float64": (
        lambda: sparselt.nn.SparseLinear.from_dense(nn.Linear(4, 3).double()),
        KernelError,
        "computes float32, the weight is float64",
    ),
    "layer input features": (lambda: linear_like(torch.ones(2, 5)), ShapeError, r"4\)"),
    "layer input type": (lambda: linear_like(torch.ones(2, 4).double()), DtypeError, "float32"),
    "layer input gradient": (
        lambda: linear_like(torch.ones(2, 4, requires_grad=True)),
        GradientError,
        "forward only",
    ),
    "layer input channels": (
        lambda: sparselt.nn.SparseConv2d.from_dense(nn.Conv2d(3, 2, 3))(torch.ones(1, 2, 8, 8)),
        ShapeError,
        "channels|C_in|3",
    ),
    "layer input too small": (
        lambda: sparselt.nn.SparseConv2d.from_dense(nn.Conv2d(3, 2, 3))(torch.ones(1, 3, 2, 2)),
        ShapeError,
        "input",
    ),
    "convert no module": (lambda: sparselt.convert([1, 2]), OptionError, "torch.nn.Module"),
    "convert format": (
        lambda: sparselt.convert(nn.Linear(4, 3), format="nm"),
        OptionError,
        "format",
    ),
    "convert example": (
        lambda: sparselt.convert(nn.Linear(4, 3), torch.ones(2, 5)),
        OptionError,
        "the model fails on them",
    ),
    "compile no module": (
        lambda: sparselt.compile("model", torch.ones(2, 5)),
        OptionError,
        "torch.nn.Module",
    ),
    "ticket mask type": (
        lambda: Ticket({"w": torch.ones(2, 2)}, {"w": torch.ones(2, 2)}),
        FormatError,
        "bool",
    ),
    "ticket mask shape": (
        lambda: Ticket({"w": torch.ones(2, dtype=torch.bool)}, {"w": torch.ones(2, 2)}),
        ShapeError,
        "mask of w",
    ),
    "ticket for another model": (
        lambda: Ticket({"weight": torch.ones(3, 4) > 0}).apply(nn.Linear(4, 5)),
        ShapeError,
        "weight",
    ),
    "ticket for other names": (
        lambda: Ticket({"w": torch.ones(3, 4) > 0}).apply(nn.Linear(4, 3)),
        FormatError,
        "only in the ticket",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_layers_models_and_tickets_refuse(name: str) -> None:
    refused(MODELS[name])


# ---- the raw operators: checked again below Python, with torch's RuntimeError ----


def raw(**changes: object) -> object:
    arguments = {
        "x": X,
        "parts": W.parts(),
        "meta": W.meta(),
        "bias": None,
        "residual": None,
        "lower": None,
        "upper": None,
        "kernel": "csr",
        **changes,
    }
    return torch.ops.sparselt.spmm(*arguments.values())


CROW, COL, VALUES = W.parts()

RAW: dict[str, Callable[[], object]] = {
    "no parts": lambda: raw(parts=()),
    "two parts": lambda: raw(parts=(CROW, COL)),
    "empty meta": lambda: raw(meta=[]),
    "short meta": lambda: raw(meta=[1, 1, 4]),
    "long meta": lambda: raw(meta=[1, 1, 4, 2, 2]),
    "zero block": lambda: raw(meta=[0, 1, 4, 4]),
    "negative block": lambda: raw(meta=[-1, -1, 4, 4]),
    "negative rows": lambda: raw(meta=[1, 1, -4, 4]),
    "more rows": lambda: raw(meta=[1, 1, 5, 4]),
    "huge rows": lambda: raw(meta=[1, 1, 2**62, 4]),
    "other columns": lambda: raw(meta=[1, 1, 4, 3]),
    "wide indices": lambda: raw(parts=(CROW.long(), COL, VALUES)),
    "float indices": lambda: raw(parts=(CROW, COL.float(), VALUES)),
    "double values": lambda: raw(parts=(CROW, COL, VALUES.double())),
    "fewer values": lambda: raw(parts=(CROW, COL, VALUES[:3])),
    "fewer columns": lambda: raw(parts=(CROW, COL[:3], VALUES)),
    "strided values": lambda: raw(parts=(CROW, COL, torch.ones(8)[::2])),
    "bsr values with csr meta": lambda: raw(parts=B.parts()),
    "x of another rank": lambda: raw(x=X[0]),
    "x of another type": lambda: raw(x=X.double()),
    "bias of another length": lambda: raw(bias=torch.ones(5)),
    "residual of another shape": lambda: raw(residual=torch.ones(5, 4)),
    "limits crossed": lambda: raw(lower=1.0, upper=0.0),
    "unknown kernel": lambda: raw(kernel="fast"),
    "out of another shape": lambda: torch.ops.sparselt.spmm_out(
        X, torch.empty(4, 4), W.parts(), W.meta(), None, None, None, None, "csr"
    ),
    "out strided": lambda: torch.ops.sparselt.spmm_out(
        X, torch.empty(5, 4).T, W.parts(), W.meta(), None, None, None, None, "csr"
    ),
    "out that is the residual": lambda: torch.ops.sparselt.spmm_out(
        X, OUT, W.parts(), W.meta(), None, OUT, None, None, "csr"
    ),
}
GEOMETRY = {
    "no stride": ([], [0, 0], [1, 1], 1),
    "zero stride": ([0, 1], [0, 0], [1, 1], 1),
    "negative padding": ([1, 1], [-1, 0], [1, 1], 1),
    "huge padding": ([1, 1], [2**62, 0], [1, 1], 1),
    "large padding": ([1, 1], [2**30, 2**30], [1, 1], 1),
    "zero dilation": ([1, 1], [0, 0], [1, 0], 1),
    "huge dilation": ([1, 1], [0, 0], [1, 2**62], 1),
    "zero groups": ([1, 1], [0, 0], [1, 1], 0),
    "wrong groups": ([1, 1], [0, 0], [1, 1], 2),
}


@pytest.mark.parametrize("name", RAW)
def test_the_raw_spmm_refuses(name: str) -> None:
    with pytest.raises(RuntimeError) as caught:
        RAW[name]()
    assert len(str(caught.value)) > 20


@pytest.mark.parametrize("name", GEOMETRY)
def test_the_raw_conv2d_refuses(name: str) -> None:
    with pytest.raises(RuntimeError):
        torch.ops.sparselt.conv2d(
            MAP, F2.parts(), F2.meta(), None, None, *GEOMETRY[name], None, None, "csr"
        )


def test_enough_is_tried() -> None:
    assert len(OPERATIONS) + len(MODELS) >= 80
