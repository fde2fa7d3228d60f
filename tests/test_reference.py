# SPDX-License-Identifier: Apache-2.0
"""The reference against matrices small enough to draw, its convolutions against torch's float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cases import ConvCase, SpmmCase, assert_within_bound
from torch.nn import functional

from sparselt import reference
from sparselt.errors import ShapeError
from sparselt.formats import FORMATS, pack

#     | .  2  . |        | 1  10 |        | 4   40 |
# W = | .  .  . |    x = | 2  20 |  W x = | 0    0 |
#     | 3  .  4 |        | 3  30 |        | 15 150 |
W = torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 0.0], [3.0, 0.0, 4.0]])
X = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])
Y = [[4, 40], [0, 0], [15, 150]]


@pytest.mark.parametrize("format", FORMATS)
def test_spmm_is_as_drawn(format: str) -> None:
    signs = format == "sign"
    y = reference.spmm(pack(W.sign() if signs else W, format=format), X)
    assert y.dtype == np.float64
    assert y.tolist() == ([[2, 20], [0, 0], [4, 40]] if signs else Y)


def test_linear_is_spmm_transposed() -> None:
    assert reference.linear(X.T, pack(W)).tolist() == [[4, 0, 15], [40, 0, 150]]
    assert reference.linear(X[:, 0], pack(W)).tolist() == [4, 0, 15]
    assert reference.linear(X.T.view(1, 2, 1, 3), pack(W)).shape == (1, 2, 1, 3)


def test_epilogue_adds_bias_and_residual_and_then_clamps() -> None:
    bias, residual = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[0.0, 1], [0, -5], [-20, 0]])
    #   W x + bias     + residual      clamped to -2.5 .. 42
    # |  5   41 |      |  5   42 |     |  5   42  |
    # |  2    2 |      |  2   -3 |     |  2   -2.5|
    # | 18  153 |      | -2  153 |     | -2   42  |
    y = reference.spmm(pack(W), X, bias, residual, lower=-2.5, upper=42)
    assert y.tolist() == [[5, 42], [2, -2.5], [-2, 42]]
    flat = reference.linear(X.T, pack(W), bias, residual.T, lower=-2.5, upper=42)
    assert flat.tolist() == y.T.tolist()


def test_a_stored_zero_meets_infinity_and_a_dropped_weight_does_not() -> None:
    x = torch.tensor([[math.inf]])
    kept = torch.ones(1, 1, dtype=torch.bool)
    with np.errstate(invalid="ignore"):
        assert np.isnan(reference.spmm(pack(torch.zeros(1, 1), kept), x)).all()
    assert reference.spmm(pack(torch.zeros(1, 1)), x).tolist() == [[0]]


def test_clamping_keeps_nan() -> None:
    y = reference.spmm(pack(torch.ones(1, 1)), torch.tensor([[math.nan]]), lower=0, upper=6)
    assert np.isnan(y).all()


def test_limits_are_rounded_to_float32() -> None:
    y = reference.spmm(pack(torch.zeros(1, 1)), torch.ones(1, 1), lower=0.1)
    assert y.item() == float(np.float32(0.1))


def test_conv1d_is_as_drawn() -> None:
    # filter | 1  .  2 |, x | 1  2  3  4 | with one zero on each side
    # y[0] = 1*0 + 2*2 = 4, y[1] = 1*1 + 2*3 = 7, y[2] = 1*2 + 2*4 = 10, y[3] = 1*3 + 2*0 = 3
    filters, x = pack(torch.tensor([[[1.0, 0.0, 2.0]]])), torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    assert reference.conv1d(x, filters, padding=1).tolist() == [[[4, 7, 10, 3]]]
    assert reference.conv1d(x, filters, padding=1, stride=3).tolist() == [[[4, 3]]]
    # Two apart: y[0] = 1*0 + 2*4 = 8, y[1] = 1*1 + 2*0 = 1
    assert reference.conv1d(x, filters, padding=1, dilation=2).tolist() == [[[8, 1]]]


def test_conv2d_is_as_drawn() -> None:
    # x | 1 2 3 |   filter | 1 . |   y | 1+5  2+6 |
    #   | 4 5 6 |          | . 1 |     | 4+8  5+9 |
    #   | 7 8 9 |
    x = torch.arange(1.0, 10.0).view(1, 1, 3, 3)
    filters = pack(torch.eye(2).view(1, 1, 2, 2))
    assert reference.conv2d(x, filters).tolist() == [[[[6, 8], [12, 14]]]]
    assert reference.conv2d(x, filters, bias=torch.tensor([0.5])).tolist()[0][0][0] == [6.5, 8.5]


def test_groups_keep_channels_apart() -> None:
    # Filter 0 sees channel 0 only and doubles it; filter 1 sees channel 1 only and triples it.
    filters = pack(torch.tensor([2.0, 3.0]).view(2, 1, 1, 1))
    x = torch.tensor([10.0, 100.0]).view(1, 2, 1, 1)
    assert reference.conv2d(x, filters, groups=2).ravel().tolist() == [20, 300]


GEOMETRIES = [
    ConvCase(2, 4, 6, (9, 11), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    ConvCase(1, 4, 6, (9, 11), (3, 5), (2, 1), (1, 2), (2, 1), 2),
    ConvCase(3, 4, 8, (8, 7), (2, 3), (3, 2), (0, 2), (1, 2), 4),
    ConvCase(1, 3, 2, (1, 19), (1, 5), (1, 3), (0, 2), (1, 1), 1),
    ConvCase(1, 1, 1, (1, 1), (1, 1)),
    ConvCase(0, 3, 5, (7, 7), (3, 3)),
]


@pytest.mark.parametrize("case", GEOMETRIES, ids=str)
def test_conv2d_matches_torch_in_float64(case: ConvCase) -> None:
    weight = case.weight()
    expected = functional.conv2d(
        case.x().double(), weight.to_dense().double(), case.bias().double(), **case.options()
    )
    got = reference.conv2d(case.x(), weight, case.bias(), **case.options())
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("stride", "padding", "dilation", "groups"), [(1, 0, 1, 1), (2, 3, 2, 2)])
def test_conv1d_matches_torch_in_float64(
    stride: int, padding: int, dilation: int, groups: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(6, 4 // groups, 5, generator=generator)
    x = torch.randn(2, 4, 23, generator=generator)
    geometry = (stride, padding, dilation, groups)
    expected = functional.conv1d(x.double(), w.double(), None, *geometry)
    got = reference.conv1d(x, pack(w), None, *geometry)
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-12, atol=1e-12)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"\(3, N\)"):
        reference.spmm(pack(W), X.T)
    with pytest.raises(ShapeError, match=r"\(\.\.\., 3\)"):
        reference.linear(X, pack(W))
    filters = pack(torch.ones(2, 1, 3, 3))
    with pytest.raises(ShapeError, match="channels"):
        reference.conv2d(torch.ones(1, 2, 5, 5), filters)
    with pytest.raises(ShapeError, match="fits into"):
        reference.conv2d(torch.ones(1, 1, 2, 5), filters)


def test_the_bound_is_the_formula() -> None:
    # Row 2 stores 2 values, |W| |x| = 3*1 + 4*3 = 15, with bias and residual 17: g = 4 u.
    u = 2.0**-24
    bound = reference.error_bound(
        reference.spmm, pack(W), -X, bias=-torch.ones(3), residual=torch.ones(3, 2), lower=0
    )
    assert bound[2, 0] == pytest.approx(4 * u / (1 - 4 * u) * 17, rel=1e-12)
    limits = (-torch.ones(3), torch.ones(3, 2), 0.0, 0.5)
    assert np.array_equal(bound, reference.error_bound(reference.spmm, pack(W), X, *limits))
    # Row 1 stores nothing: 2 u * 2 for the two additions of the epilogue.
    assert bound[1, 0] == pytest.approx(2 * u / (1 - 2 * u) * 2, rel=1e-12)


def test_the_bound_follows_the_row_axis_of_each_operation() -> None:
    linear = reference.error_bound(reference.linear, X.T, pack(W))
    assert np.array_equal(linear, reference.error_bound(reference.spmm, pack(W), X).T)
    case = ConvCase(1, 2, 3, (5, 5), (3, 3), pattern="one full row")
    bound = reference.error_bound(reference.conv2d, case.x(), case.weight())
    assert bound.shape == (1, 3, 3, 3)
    assert bound[0, 1].min() > 1e-7 > bound[0, 0].max()


@pytest.mark.parametrize("format", FORMATS)
def test_float32_products_of_any_order_pass_and_a_lost_term_fails(format: str) -> None:
    case = SpmmCase(8, 200, 5, density=0.5)
    weight, x = case.weight(format), case.x()
    dense = weight.to_dense()
    assert_within_bound(case, dense @ x, reference.spmm, weight, x)
    backwards = dense.flip(1) @ x.flip(0)
    assert_within_bound(case, backwards, reference.spmm, weight, x)
    column = int(dense[3].abs().argmax())
    dense[3, column] = 0.0
    with pytest.raises(AssertionError, match=r"M=8,K=200.*worst at \(3, \d\): got"):
        assert_within_bound(case, dense @ x, reference.spmm, weight, x)


def test_a_nan_in_the_wrong_place_fails() -> None:
    got = torch.tensor(Y, dtype=torch.float32)
    assert_within_bound("drawn", got, reference.spmm, pack(W), X)
    got[1, 1] = math.nan
    with pytest.raises(AssertionError, match=r"worst at \(1, 1\): got nan"):
        assert_within_bound("drawn", got, reference.spmm, pack(W), X)
