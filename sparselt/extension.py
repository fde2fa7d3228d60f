# SPDX-License-Identifier: Apache-2.0
"""Loads the compiled extension and completes its operators with what torch.compile needs.

The only module that imports ``sparselt._C``: importing it registers ``torch.ops.sparselt``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from sparselt import _C
from sparselt.plan import KernelInfo

__all__ = ["conv_shape", "isa", "kernels"]


@cache
def kernels() -> tuple[KernelInfo, ...]:
    """Every kernel of the registry, in order of preference, and whether it can run here.

    Example:
        >>> [kernel.name for kernel in kernels() if kernel.op == "spmm" and kernel.usable][-1]
        'bsr_spmm_scalar'
    """
    return tuple(KernelInfo(**entry) for entry in _C.kernels())


def isa() -> str:
    """The instruction set in use: "scalar", "avx2", "avx512" or "neon".

    It is the best that this CPU has, or the one that the environment variable ``SPARSELT_ISA``
    names when sparselt is first imported.
    """
    return _C.isa()


def conv_shape(
    x: Tensor,
    meta: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int, int, int]:
    """The shape (B, C_out, P, Q) of a convolution's result.

    Args:
        x: (B, C_in, H, W).
        meta: block rows, block columns, then the weight's shape (C_out, C_in / groups, R, S).
        stride: along H and W.
        padding: along H and W, on each side.
        dilation: along H and W.
    """
    height, width = (
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (meta[4 + i] - 1) - 1) // stride[i] + 1
        for i in range(2)
    )
    return x.shape[0], meta[2], height, width


def _fake_spmm(
    x: Tensor,
    parts: list[Tensor],
    meta: list[int],
    bias: Tensor | None,
    residual: Tensor | None,
    lower: float | None,
    upper: float | None,
    kernel: str,
) -> Tensor:
    return x.new_empty((meta[2], x.shape[1]))


def _fake_linear(
    x: Tensor,
    parts: list[Tensor],
    meta: list[int],
    bias: Tensor | None,
    residual: Tensor | None,
    lower: float | None,
    upper: float | None,
    kernel: str,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], meta[2]))


def _fake_conv2d(
    x: Tensor,
    parts: list[Tensor],
    meta: list[int],
    bias: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    lower: float | None,
    upper: float | None,
    kernel: str,
) -> Tensor:
    return x.new_empty(conv_shape(x, meta, stride, padding, dilation))


def _fake_out(*arguments: object) -> None:
    return None


_FAKES: dict[str, Callable[..., object]] = {
    "spmm": _fake_spmm,
    "linear": _fake_linear,
    "conv2d": _fake_conv2d,
    "spmm_out": _fake_out,
    "conv2d_out": _fake_out,
}
for _name, _fake in _FAKES.items():
    torch.library.register_fake(f"sparselt::{_name}", _fake)
for _name in ("spmm", "linear", "conv2d"):
    # Under autocast inputs arrive in a narrower type; kernels compute in float32 either way.
    torch.library.register_autocast(f"sparselt::{_name}", "cpu", torch.float32)
