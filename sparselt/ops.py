# SPDX-License-Identifier: Apache-2.0
"""Sparse products and convolutions on plain tensors.

Each function checks its arguments, then calls one operator of the extension
(``torch.ops.sparselt``): registered with a fake kernel, so that torch.compile and torch.export see
through it. All of them run forward only and compute

    y = clamp(op(x, weight) + bias + residual, lower, upper)

in one pass over y; ``lower=0.0`` is a ReLU, ``lower=0.0, upper=6.0`` a ReLU6. On the CPU everything
is float32; on CUDA it is float32, float16 or bfloat16, all operands alike, and sums are float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from sparselt.errors import (
    DeviceError,
    DtypeError,
    FormatError,
    GradientError,
    OptionError,
    ShapeError,
    explain_mismatch,
)
from sparselt.extension import check_kernel, code_bytes, conv_shape, isa, kernels

__all__ = ["code_bytes", "conv1d", "conv2d", "isa", "kernels", "linear", "spmm"]

_CUDA_TYPES = (torch.float32, torch.float16, torch.bfloat16)


class PackedMatrix(Protocol):
    """What an operation needs of a weight; `SparseWeight` and `nn.PackedWeight` have it."""

    shape: tuple[int, ...]

    @property
    def format(self) -> str: ...

    def parts(self) -> Sequence[Tensor]: ...

    def meta(self) -> list[int]: ...


def spmm(
    weight: PackedMatrix,
    x: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    lower: float | None = None,
    upper: float | None = None,
    kernel: str = "",
) -> Tensor:
    """Multiplies a sparse matrix with a dense one: y = clamp(W x + bias + residual).

    Args:
        weight: (M, K), from `sparselt.pack`.
        x: (K, N), on the weight's device; float32, on CUDA also float16 or bfloat16, as the weight
            is. Not contiguous is allowed, and copied.
        bias: (M,), added to each column.
        residual: (M, N), added to the product.
        lower: the least value of y; None for no bound.
        upper: the largest value of y; None for no bound.
        kernel: the kernel to run, by name; empty for the first usable one.

    Returns:
        (M, N), contiguous, in the type of x.

    Raises:
        ShapeError, DtypeError, DeviceError: an argument does not fit the weight.
        GradientError: an argument asks for a gradient.
        KernelError: the kernel is unknown, unusable here, or for another format.

    Example:
        >>> weight = sparselt.pack(torch.eye(3))
        >>> sparselt.ops.spmm(weight, torch.ones(3, 2)).shape
        torch.Size([3, 2])
    """
    _check_types(weight, 2, x, bias, residual)
    rows, cols = weight.shape
    if x.dim() != 2 or x.shape[0] != cols:
        raise ShapeError(
            explain_mismatch("x", f"({cols}, N)", tuple(x.shape), "rows of x meet columns of W")
        )
    _check_operands(x, weight, bias, residual, (rows, x.shape[1]), (lower, upper), kernel, "spmm")
    y: Tensor = torch.ops.sparselt.spmm(
        x, weight.parts(), weight.meta(), bias, residual, lower, upper, kernel or weight.format
    )
    return y


def linear(
    x: Tensor,
    weight: PackedMatrix,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    lower: float | None = None,
    upper: float | None = None,
    kernel: str = "",
) -> Tensor:
    """A linear layer in torch's layout: y = clamp(x W^T + bias + residual).

    Args:
        x: (..., K), of types as for `spmm`.
        weight: (M, K), from `sparselt.pack`.
        bias: (M,).
        residual: (..., M), added to the product.
        lower: the least value of y; None for no bound.
        upper: the largest value of y; None for no bound.
        kernel: the kernel to run (one of spmm's), by name; empty for the first usable one.

    Returns:
        (..., M), contiguous.

    Raises:
        As `spmm`.

    Example:
        >>> weight = sparselt.pack(torch.eye(3)[:2])
        >>> sparselt.ops.linear(torch.ones(5, 3), weight).shape
        torch.Size([5, 2])
    """
    _check_types(weight, 2, x, bias, residual)
    rows, cols = weight.shape
    if x.dim() < 1 or x.shape[-1] != cols:
        raise ShapeError(explain_mismatch("x", f"(..., {cols})", tuple(x.shape)))
    _check_operands(
        x, weight, bias, residual, (*x.shape[:-1], rows), (lower, upper), kernel, "spmm"
    )
    y: Tensor = torch.ops.sparselt.linear(
        x, weight.parts(), weight.meta(), bias, residual, lower, upper, kernel or weight.format
    )
    return y


def conv1d(
    x: Tensor,
    weight: PackedMatrix,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    residual: Tensor | None = None,
    lower: float | None = None,
    upper: float | None = None,
    kernel: str = "",
) -> Tensor:
    """A 1-D convolution (torch's cross-correlation) with a sparse weight.

    Args:
        x: (B, C_in, W) or (C_in, W), of types as for `spmm`.
        weight: (C_out, C_in / groups, S), from `sparselt.pack`.
        bias: (C_out,).
        stride: as in `torch.nn.functional.conv1d`.
        padding: numbers, "valid" or "same", likewise.
        dilation: likewise.
        groups: likewise.
        residual: shaped as the result, added before the clamp.
        lower: the least value of y; None for no bound.
        upper: the largest value of y; None for no bound.
        kernel: the kernel to run (one of conv2d's), by name; empty for the first usable one.

    Returns:
        (B, C_out, Q), contiguous; without B where x has none.

    Raises:
        As `spmm`; OptionError for a stride, padding, dilation or groups out of range.
    """
    _check_types(weight, 3, x, bias, residual)
    meta = weight.meta()
    y = _convolve(
        x.unsqueeze(-2),
        weight,
        [*meta[:-1], 1, meta[-1]],
        bias,
        None if residual is None else residual.unsqueeze(-2),
        ((1, *_numbers("stride", stride, 1)), (1, *_numbers("dilation", dilation, 1))),
        padding if isinstance(padding, str) else (0, *_numbers("padding", padding, 1)),
        groups,
        (lower, upper),
        kernel,
    )
    return y.squeeze(-2)


def conv2d(
    x: Tensor,
    weight: PackedMatrix,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    residual: Tensor | None = None,
    lower: float | None = None,
    upper: float | None = None,
    kernel: str = "",
) -> Tensor:
    """A 2-D convolution (torch's cross-correlation) with a sparse weight.

    Args:
        x: (B, C_in, H, W) or (C_in, H, W), of types as for `spmm`.
        weight: (C_out, C_in / groups, R, S), from `sparselt.pack`.
        bias: (C_out,).
        stride: as in `torch.nn.functional.conv2d`.
        padding: numbers, "valid" or "same", likewise.
        dilation: likewise.
        groups: likewise.
        residual: shaped as the result, added before the clamp.
        lower: the least value of y; None for no bound.
        upper: the largest value of y; None for no bound.
        kernel: the kernel to run, by name; empty for the first usable one.

    Returns:
        (B, C_out, P, Q), contiguous; without B where x has none.

    Raises:
        As `spmm`; OptionError for a stride, padding, dilation or groups out of range.

    Example:
        >>> weight = sparselt.pack(torch.ones(4, 3, 3, 3))
        >>> sparselt.ops.conv2d(torch.ones(1, 3, 8, 8), weight, padding=1).shape
        torch.Size([1, 4, 8, 8])
    """
    _check_types(weight, 4, x, bias, residual)
    return _convolve(
        x,
        weight,
        weight.meta(),
        bias,
        residual,
        (_numbers("stride", stride, 2), _numbers("dilation", dilation, 2)),
        padding if isinstance(padding, str) else _numbers("padding", padding, 2),
        groups,
        (lower, upper),
        kernel,
    )


def _convolve(
    x: Tensor,
    weight: PackedMatrix,
    meta: list[int],
    bias: Tensor | None,
    residual: Tensor | None,
    steps: tuple[tuple[int, ...], tuple[int, ...]],
    padding: str | tuple[int, ...],
    groups: int,
    bounds: tuple[float | None, float | None],
    kernel: str,
) -> Tensor:
    stride, dilation = steps
    rows, group_channels, height, width = meta[2:]
    if x.dim() == 3:
        lifted = None if residual is None else residual.unsqueeze(0)
        return _convolve(
            x.unsqueeze(0), weight, meta, bias, lifted, steps, padding, groups, bounds, kernel
        ).squeeze(0)
    if not isinstance(groups, int) or groups < 1 or rows % groups:
        raise OptionError(explain_mismatch("groups", f"a divisor of C_out = {rows}", groups))
    if x.dim() != 4 or x.shape[1] != group_channels * groups:
        expected = f"{group_channels * groups} channels ({groups} groups of {group_channels})"
        raise ShapeError(explain_mismatch("x", expected, tuple(x.shape)))
    if isinstance(padding, str):
        x, padding = _pad_by_name(x, padding, (height, width), stride, dilation)
    given = (stride, padding, dilation)
    if min(*stride, *dilation) < 1 or min(padding) < 0 or max(*stride, *dilation, *padding) >> 31:
        expected = "stride and dilation of at least 1, padding of at least 0, all below 2**31"
        raise OptionError(explain_mismatch("stride, padding, dilation", expected, given))
    shape = conv_shape(x, meta, stride, padding, dilation)
    if min(shape[2:]) < 1:
        expected = f"a padded size of at least the kernel's reach ({(height, width)} taps)"
        hint = "use more padding or a larger input"
        raise ShapeError(explain_mismatch("x", expected, tuple(x.shape), hint))
    # Looked at only where padding is huge: a symbolic size must not be bounded otherwise.
    if max(padding) >= 2**15 and math.prod(x.shape[2 + i] + 2 * padding[i] for i in (0, 1)) >> 31:
        raise OptionError(explain_mismatch("padding", "a map below 2**31 pixels", padding))
    _check_operands(x, weight, bias, residual, shape, bounds, kernel, "conv2d")
    end = (*given, groups, *bounds, kernel or weight.format)
    y: Tensor = torch.ops.sparselt.conv2d(x, weight.parts(), meta, bias, residual, *end)
    return y


def _numbers(name: str, value: int | Sequence[int], count: int) -> tuple[int, ...]:
    numbers = tuple(value) if isinstance(value, Sequence) else (value,) * count
    if len(numbers) != count or not all(isinstance(number, int) for number in numbers):
        raise OptionError(explain_mismatch(name, f"a whole number or {count}", repr(value)))
    return numbers


def _pad_by_name(
    x: Tensor,
    padding: str,
    taps: tuple[int, int],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
) -> tuple[Tensor, tuple[int, int]]:
    """Torch's "valid" and "same"; an odd total goes to the right and bottom, as torch has it."""
    if padding == "valid":
        return x, (0, 0)
    if padding != "same":
        raise OptionError(explain_mismatch("padding", "numbers, 'valid' or 'same'", repr(padding)))
    if stride != (1, 1):
        raise OptionError(
            explain_mismatch("stride", "1 with padding='same'", stride, "give padding as numbers")
        )
    total_h, total_w = (d * (k - 1) for d, k in zip(dilation, taps, strict=True))
    if total_h % 2 or total_w % 2:
        x = torch.nn.functional.pad(x, (0, total_w % 2, 0, total_h % 2))
    return x, (total_h // 2, total_w // 2)


def _check_types(weight: PackedMatrix, dims: int, *tensors: object) -> None:
    if not hasattr(weight, "parts"):
        got = f"a {type(weight).__name__}"
        raise FormatError(
            explain_mismatch("weight", "a packed weight", got, "use sparselt.pack(weight)")
        )
    for name, tensor in zip(("x", "bias", "residual"), tensors, strict=True):
        if not isinstance(tensor, Tensor) and (name == "x" or tensor is not None):
            raise DtypeError(explain_mismatch(name, "a torch.Tensor", type(tensor).__name__))
        if isinstance(tensor, Tensor) and tensor.layout != torch.strided:
            raise FormatError(
                explain_mismatch(name, "a dense tensor", tensor.layout, f"use {name}.to_dense()")
            )
    if len(weight.shape) != dims:
        raise ShapeError(explain_mismatch("weight", f"{dims} dimensions", tuple(weight.shape)))


def _check_operands(
    x: Tensor,
    weight: PackedMatrix,
    bias: Tensor | None,
    residual: Tensor | None,
    shape: Sequence[int],
    bounds: tuple[object, object],
    kernel: str,
    op: str,
) -> None:
    low, high = (
        default if bound is None else bound
        for bound, default in zip(bounds, (-math.inf, math.inf), strict=True)
    )
    if not (isinstance(low, int | float) and isinstance(high, int | float) and low <= high):
        raise OptionError(explain_mismatch("lower, upper", "numbers, lower <= upper", bounds))
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ShapeError(explain_mismatch("bias", f"({weight.shape[0]},)", tuple(bias.shape)))
    if residual is not None and tuple(residual.shape) != tuple(shape):
        raise ShapeError(explain_mismatch("residual", tuple(shape), tuple(residual.shape)))
    values = weight.parts()[-1]
    for name, tensor in (("x", x), ("bias", bias), ("residual", residual), ("weight", values)):
        if tensor is None:
            continue
        if tensor.device != x.device:
            raise DeviceError(
                explain_mismatch(name, f"a tensor on {x.device}, as x is", tensor.device, "use .to")
            )
        _check_dtype(name, tensor, x)
        if tensor.requires_grad and torch.is_grad_enabled():
            raise GradientError(
                f"{name} requires a gradient, and sparse layers only run forward: call them under "
                "torch.no_grad(), and train the dense model with its masks instead"
            )
    check_kernel(kernel, op, weight.format, weight.parts(), weight.meta()[0], _computed_in(x))


def _check_dtype(name: str, tensor: Tensor, x: Tensor) -> None:
    """float32 on the CPU; one of CUDA's types, and that of x, there. Autocast converts."""
    if tensor.dtype == x.dtype == torch.float32 or torch.is_autocast_enabled(x.device.type):
        return
    if not x.is_cuda and tensor.dtype != torch.float32:
        raise DtypeError(
            explain_mismatch(name, "float32", tensor.dtype, f"convert it with {name}.float()")
        )
    if x.is_cuda and tensor.dtype not in _CUDA_TYPES:
        raise DtypeError(explain_mismatch(name, "float32, float16 or bfloat16", tensor.dtype))
    if tensor.dtype != x.dtype:
        hint = f"convert it with {name}.to(dtype={x.dtype})"
        raise DtypeError(explain_mismatch(name, f"{x.dtype}, as x is", tensor.dtype, hint))


def _computed_in(x: Tensor) -> str:
    """The type that a kernel must compute, without the "torch." prefix."""
    if not x.is_cuda:
        return "float32"
    cast = torch.is_autocast_enabled("cuda")
    return str(torch.get_autocast_dtype("cuda") if cast else x.dtype).removeprefix("torch.")
