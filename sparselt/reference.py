# SPDX-License-Identifier: Apache-2.0
"""The definition of every operation, in float64, loops and numpy: the oracle of all tests.

Nothing here is fast or clever. Every function takes and returns what its namesake in `sparselt.ops`
does, but computes in float64 and returns numpy arrays. Only stored weights take part, so a dropped
weight contributes nothing even where x is infinite.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor

from sparselt.errors import ShapeError, explain_mismatch
from sparselt.formats import SparseWeight, pack

__all__ = ["Array", "conv1d", "conv2d", "error_bound", "linear", "spmm"]

Array: TypeAlias = npt.NDArray[np.float64]
Input: TypeAlias = Tensor | npt.NDArray[np.floating]

UNIT_ROUNDOFF = 2.0**-24  # of float32, which every kernel accumulates in
SMALLEST_NORMAL = 2.0**-126  # of float32; a kernel may flush what is smaller to zero


def spmm(
    weight: SparseWeight,
    x: Input,
    bias: Input | None = None,
    residual: Input | None = None,
    lower: float | None = None,
    upper: float | None = None,
) -> Array:
    """Computes y = clamp(W x + bias + residual, lower, upper) for a sparse matrix W.

    Args:
        weight: W, (M, K).
        x: (K, N).
        bias: (M,), added to every column.
        residual: (M, N).
        lower: smallest value of y, None for no limit.
        upper: largest value of y, None for no limit; wins over a larger `lower`.

    Returns:
        y, (M, N) float64.

    Raises:
        ShapeError: x has not K rows.

    Example:
        >>> import torch, sparselt
        >>> weight = sparselt.pack(torch.tensor([[0.0, 2.0], [3.0, 0.0]]))
        >>> spmm(weight, torch.tensor([[1.0], [10.0]]), lower=5.0)
        array([[20.],
               [ 5.]])
    """
    values, stored = _matrix(weight)
    x = _float64(x)
    if x.ndim != 2 or x.shape[0] != weight.cols:
        raise ShapeError(explain_mismatch("x", f"({weight.cols}, N)", x.shape))
    y = np.zeros((weight.rows, x.shape[1]))
    for row in range(weight.rows):
        kept = np.flatnonzero(stored[row])
        y[row] = values[row, kept] @ x[kept]
    return _finish(y, 0, bias, residual, lower, upper)


def linear(
    x: Input,
    weight: SparseWeight,
    bias: Input | None = None,
    residual: Input | None = None,
    lower: float | None = None,
    upper: float | None = None,
) -> Array:
    """Computes y = clamp(x W^T + bias + residual, lower, upper), as torch's linear layer.

    Args:
        x: (..., K).
        weight: W, (M, K).
        bias: (M,).
        residual: (..., M).
        lower: smallest value of y, None for no limit.
        upper: largest value of y, None for no limit.

    Returns:
        y, (..., M) float64.

    Raises:
        ShapeError: the last size of x is not K.

    Example:
        >>> import torch, sparselt
        >>> linear(torch.tensor([1.0, 10.0]), sparselt.pack(torch.tensor([[0.0, 2.0]])))
        array([20.])
    """
    x = _float64(x)
    if x.ndim < 1 or x.shape[-1] != weight.cols:
        raise ShapeError(explain_mismatch("x", f"(..., {weight.cols})", x.shape))
    rows = int(np.prod(x.shape[:-1]))
    y = spmm(weight, x.reshape(rows, weight.cols).T).T.reshape(*x.shape[:-1], weight.rows)
    return _finish(y, -1, bias, residual, lower, upper)


def conv1d(
    x: Input,
    weight: SparseWeight,
    bias: Input | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
    residual: Input | None = None,
    lower: float | None = None,
    upper: float | None = None,
) -> Array:
    """Convolution of (B, C_in, L) with sparse filters (C_out, C_in/groups, S), as torch's.

    Args:
        x: (B, C_in, L).
        weight: (C_out, C_in/groups, S).
        bias: (C_out,).
        stride: step of the window, in elements.
        padding: zeros on both ends, in elements.
        dilation: distance of the filter's taps, in elements.
        groups: number of independent groups of channels.
        residual: (B, C_out, Q).
        lower: smallest value of y, None for no limit.
        upper: largest value of y, None for no limit.

    Returns:
        y, (B, C_out, Q) float64.

    Raises:
        ShapeError: the channels do not fit, or the dilated filter is longer than the padded input.

    Example:
        >>> import torch, sparselt
        >>> filters = sparselt.pack(torch.tensor([[[1.0, 0.0, 2.0]]]))
        >>> conv1d(torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]), filters)
        array([[[ 7., 10.]]])
    """
    values, stored = _matrix(weight)
    filters = (weight.shape[0], weight.shape[1], 1, weight.shape[2])
    step, gap, reach = (_pair(size)[1] for size in (stride, padding, dilation))
    y = _convolve(
        _float64(x)[:, :, None, :],
        values.reshape(filters),
        stored.reshape(filters),
        (1, step),
        (0, gap),
        (1, reach),
        groups,
    )
    return _finish(y[:, :, 0, :], 1, bias, residual, lower, upper)


def conv2d(
    x: Input,
    weight: SparseWeight,
    bias: Input | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
    residual: Input | None = None,
    lower: float | None = None,
    upper: float | None = None,
) -> Array:
    """Convolution of (B, C_in, H, W) with sparse filters (C_out, C_in/groups, R, S), as torch's.

    y[b, m, p, q] = sum over stored (c, r, s) of
    W[m, c, r, s] * x[b, group(m) * C_in/groups + c, p*stride + r*dilation - padding, ...].

    Args:
        x: (B, C_in, H, W).
        weight: (C_out, C_in/groups, R, S).
        bias: (C_out,).
        stride: step of the window, one number or (rows, columns), in pixels.
        padding: zeros on every side, one number or (rows, columns), in pixels.
        dilation: distance of the filter's taps, one number or (rows, columns), in pixels.
        groups: number of independent groups of channels.
        residual: (B, C_out, P, Q).
        lower: smallest value of y, None for no limit.
        upper: largest value of y, None for no limit.

    Returns:
        y, (B, C_out, P, Q) float64.

    Raises:
        ShapeError: the channels do not fit, or the dilated filter is larger than the padded input.

    Example:
        >>> import torch, sparselt
        >>> filters = sparselt.pack(torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]]))
        >>> conv2d(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]), filters, upper=4.5)
        array([[[[4.5]]]])
    """
    values, stored = _matrix(weight)
    y = _convolve(
        _float64(x),
        values.reshape(weight.shape),
        stored.reshape(weight.shape),
        _pair(stride),
        _pair(padding),
        _pair(dilation),
        groups,
    )
    return _finish(y, 1, bias, residual, lower, upper)


def _convolve(
    x: Array,
    values: Array,
    stored: npt.NDArray[np.bool_],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Array:
    filters, group_channels, *kernel = values.shape
    batch, channels, *size = x.shape
    if groups < 1 or channels != group_channels * groups or filters % groups:
        raise ShapeError(
            explain_mismatch(
                "x", f"{group_channels} * groups channels", f"{channels}, groups {groups}"
            )
        )
    x = np.pad(x, ((0, 0), (0, 0), (padding[0],) * 2, (padding[1],) * 2))
    rows, columns = (
        (size[axis] + 2 * padding[axis] - dilation[axis] * (kernel[axis] - 1) - 1) // stride[axis]
        + 1
        for axis in (0, 1)
    )
    if rows < 1 or columns < 1:
        raise ShapeError(explain_mismatch("x", "a map the dilated filter fits into", tuple(size)))
    y = np.zeros((batch, filters, rows, columns))
    for m, c, r, s in np.argwhere(stored):
        channel = m // (filters // groups) * group_channels + c
        top, left = r * dilation[0], s * dilation[1]
        below, right = top + (rows - 1) * stride[0] + 1, left + (columns - 1) * stride[1] + 1
        window = x[:, channel, top : below : stride[0], left : right : stride[1]]
        y[:, m] += values[m, c, r, s] * window
    return y


_ROW_AXIS: dict[Callable[..., Array], int] = {spmm: 0, linear: -1, conv1d: 1, conv2d: 1}


def error_bound(operation: Callable[..., Array], *arguments: object, **options: object) -> Array:
    """How far a float32 kernel may be from the float64 result, elementwise, in any summation order.

    |y - y64| <= g * (|W| |x| + |bias| + |residual|), with g = (n + 2) u / (1 - (n + 2) u), n the
    stored weights of the output's row and u = 2^-24: each term passes one product and at most
    n + 1 additions. Clamping cannot enlarge the error. What underflows is allowed for apart.

    Args:
        operation: `spmm`, `linear`, `conv1d` or `conv2d` of this module.
        *arguments: what the operation is called with.
        **options: the same; `lower` and `upper` are ignored.

    Returns:
        The bound, float64, of the shape of the operation's result.

    Raises:
        ShapeError: as the operation.

    Example:
        >>> import torch, sparselt
        >>> weight = sparselt.pack(torch.tensor([[3.0, -1.0]]))
        >>> bound = error_bound(spmm, weight, torch.tensor([[2.0], [2.0]]))
        >>> bool(abs(bound - 4 * 8 * 2**-24) < 1e-12)
        True

    Source: the standard bound of a dot product, N. Higham, Accuracy and Stability of Numerical
    Algorithms, 2nd edition, section 3.1.
    """
    given = inspect.signature(operation).bind(*arguments, **options).arguments
    weight = given["weight"]
    magnitude = operation(
        **{
            name: _absolute(value)
            for name, value in given.items()
            if name not in ("lower", "upper")
        }
    )
    terms = _matrix(weight)[1].sum(axis=1) + 2.0
    shape = [1] * magnitude.ndim
    shape[_ROW_AXIS[operation]] = weight.rows
    terms = terms.reshape(shape)
    growth = terms * UNIT_ROUNDOFF / (1 - terms * UNIT_ROUNDOFF)
    return np.asarray(growth * magnitude + terms * SMALLEST_NORMAL, dtype=np.float64)


def _absolute(argument: object) -> object:
    if isinstance(argument, SparseWeight):
        return pack(argument.to_dense().abs(), argument.mask())
    if isinstance(argument, (Tensor, np.ndarray)):
        return np.abs(_float64(argument))
    return argument


def _matrix(weight: SparseWeight) -> tuple[Array, npt.NDArray[np.bool_]]:
    """The values (M, K) in float64, and which of them are stored."""
    matrix = (weight.rows, weight.cols)
    return _float64(weight.to_dense()).reshape(matrix), weight.mask().cpu().numpy().reshape(matrix)


def _float64(x: Input) -> Array:
    array = x.detach().cpu().double().numpy() if isinstance(x, Tensor) else x
    return np.asarray(array, dtype=np.float64)


def _pair(size: int | tuple[int, ...]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[-1])


def _finish(
    y: Array,
    row_axis: int,
    bias: Input | None,
    residual: Input | None,
    lower: float | None,
    upper: float | None,
) -> Array:
    """clamp(y + bias + residual, lower, upper); NaN stays NaN."""
    if bias is not None:
        shape = [1] * y.ndim
        shape[row_axis] = y.shape[row_axis]
        y = y + _float64(bias).reshape(shape)
    if residual is not None:
        y = y + _float64(residual)
    # Limits are float32 wherever they are applied, so that a clamped result has no error.
    if lower is not None:
        y = np.maximum(y, float(np.float32(lower)))
    if upper is not None:
        y = np.minimum(y, float(np.float32(upper)))
    return y
