# SPDX-License-Identifier: Apache-2.0
"""Dense layers that stand between sparse ones, where torch is slow at them.

Torch runs a depthwise convolution fast on channels-last images only; sparse convolutions read and
write contiguous ones. So this package has kernels of its own for it, with the same epilogue.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sparselt.errors import KernelError, ShapeError, explain_mismatch
from sparselt.extension import conv_shape, kernels

__all__ = ["MAX_TAPS", "depthwise_conv2d", "is_depthwise"]

# Columns of the widest window that the kernels take (kMaxDepthwiseTaps of csrc/kernels.h).
MAX_TAPS = 32


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    *,
    residual: Tensor | None = None,
    lower: float | None = None,
    upper: float | None = None,
    kernel: str = "",
) -> Tensor:
    """A convolution of each channel on its own: y = clamp(conv2d(x, weight) + bias + residual).

    Args:
        x: (B, C, H, W) float32 on the CPU.
        weight: (C * multiplier, 1, R, S) float32, dense; S is at most `MAX_TAPS`.
        bias: (C * multiplier,) float32.
        stride: of rows and columns.
        padding: zeros on each side of the rows and columns.
        dilation: of rows and columns.
        residual: (B, C * multiplier, P, Q) float32, added to the result.
        lower: the least value of y; None for no bound.
        upper: the largest value of y; None for no bound.
        kernel: the kernel to run, by name; empty for the first usable one.

    Returns:
        (B, C * multiplier, P, Q) float32, contiguous.

    Raises:
        ShapeError: an argument does not fit the weight.
        KernelError: there is no such kernel, or it cannot run here.

    Example:
        >>> depthwise_conv2d(torch.ones(1, 2, 4, 4), torch.ones(2, 1, 3, 3)).shape
        torch.Size([1, 2, 2, 2])
    """
    if weight.dim() != 4 or weight.shape[1] != 1 or weight.shape[3] > MAX_TAPS:
        expected = f"(C * multiplier, 1, R, S) with S <= {MAX_TAPS}"
        raise ShapeError(explain_mismatch("weight", expected, tuple(weight.shape)))
    if x.dim() != 4 or not x.shape[1] or weight.shape[0] % x.shape[1]:
        expected = f"(B, C, H, W) with C a divisor of {weight.shape[0]}"
        raise ShapeError(explain_mismatch("x", expected, tuple(x.shape)))
    usable = [k.name for k in kernels() if k.op == "depthwise" and k.usable]
    if kernel and kernel not in usable:
        raise KernelError(explain_mismatch("kernel", f"one of {', '.join(usable)}", repr(kernel)))
    y: Tensor = torch.ops.sparselt.depthwise_conv2d(
        x, weight, bias, residual, stride, padding, dilation, lower, upper, kernel or "dense"
    )
    return y


def is_depthwise(module: nn.Module) -> bool:
    """Whether `depthwise_conv2d` computes what a module does.

    Args:
        module: of a float32 model on the CPU.

    Example:
        >>> is_depthwise(nn.Conv2d(8, 8, 3, groups=8)), is_depthwise(nn.Conv2d(8, 8, 3))
        (True, False)
    """
    return (
        isinstance(module, nn.Conv2d)
        and module.groups == module.in_channels
        and not isinstance(module.padding, str)
        and module.padding_mode == "zeros"
        and module.kernel_size[1] <= MAX_TAPS
        and module.weight.dtype == torch.float32
        and module.weight.device.type == "cpu"
    )


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    lower: float | None,
    upper: float | None,
    kernel: str,
) -> Tensor:
    return x.new_empty(conv_shape(x, [1, 1, *weight.shape], stride, padding, dilation))


torch.library.register_fake("sparselt::depthwise_conv2d", _fake)
