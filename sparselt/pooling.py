# SPDX-License-Identifier: Apache-2.0
"""Max pooling as maxima of shifted views.

Torch pools contiguous images one window at a time and keeps an index beside each maximum, which no
inference needs. The maxima of shifted views run in vectors: the rows of all windows first, then
their columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from sparselt.errors import ShapeError, explain_mismatch
from sparselt.fuse import argument

__all__ = ["POOLS", "max_pool_step", "shifted_max_pool"]

POOLS = {torch.ops.aten.max_pool2d.default, torch.max_pool2d, F.max_pool2d}
_NAMES = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")


def shifted_max_pool(
    x: Tensor,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> Tensor:
    """What F.max_pool2d computes, NaN included.

    Args:
        x: (..., H, W) of a floating type; each padded size at least the kernel's.
        kernel: (R, S), each at least 2.
        stride: of rows and columns.
        padding: of rows and columns, on both sides.

    Returns:
        (..., P, Q).

    Raises:
        ShapeError: no window fits.

    Example:
        >>> import torch
        >>> shifted_max_pool(torch.arange(16.0).view(1, 1, 4, 4), (2, 2), (2, 2), (0, 0)).tolist()
        [[[[5.0, 7.0], [13.0, 15.0]]]]
    """
    if padding != (0, 0):
        around = [padding[1], padding[1], padding[0], padding[0]]
        x = F.pad(x, around, value=-torch.inf)
    for dim in (-2, -1):
        taps, step = kernel[dim], stride[dim]
        count = (x.shape[dim] - taps) // step + 1
        if count < 1:
            expected = f"at least {taps} rows or columns, padding included"
            raise ShapeError(explain_mismatch("x", expected, tuple(x.shape), "use a larger input"))
        x = _maximum(x, dim, taps, step, count)
    return x


def max_pool_step(node: fx.Node) -> Callable[..., Tensor] | None:
    """The pooling of a graph's node by shifted maxima; None where it does not apply.

    The result takes the node's own arguments.

    Args:
        node: any node, with `meta["val"]` on its input.
    """
    if node.target not in POOLS:
        return None
    given = [argument(node, i + 1, name) for i, name in enumerate(_NAMES)]
    source = argument(node, 0, "input")
    if argument(node, len(_NAMES) + 1, "return_indices"):
        return None
    value = source.meta.get("val") if isinstance(source, fx.Node) else None
    kernel, stride, padding = _pair(given[0]), _pair(given[1] or given[0]), _pair(given[2] or 0)
    plain = _pair(given[3] or 1) == (1, 1) and not given[4]
    if not isinstance(value, Tensor) or not value.is_floating_point() or not plain:
        return None
    if kernel is None or stride is None or padding is None:
        return None
    if value.device.type != "cpu" or min(kernel) < 2 or min(stride) < 1 or min(padding) < 0:
        return None
    # A smaller input is torch's to refuse, and so is a padding that whole windows fit into.
    fits = all(value.shape[i] + 2 * padding[i] >= kernel[i] for i in (-2, -1))
    if not fits or any(2 * padding[i] > kernel[i] for i in (0, 1)):
        return None
    own = kernel, stride, padding

    def step(input: Tensor, *_: object, **__: object) -> Tensor:
        return shifted_max_pool(input, *own)

    step.__name__ = step.__qualname__ = "max_pool2d"
    return step


def _maximum(x: Tensor, dim: int, taps: int, step: int, count: int) -> Tensor:
    """The maximum of `taps` neighbours at every `step`-th place of a dimension."""
    reach = step * (count - 1) + 1
    shifted = [_slice(x, dim, tap, tap + reach, step) for tap in range(taps)]
    result = torch.maximum(shifted[0], shifted[1])
    for other in shifted[2:]:
        torch.maximum(result, other, out=result)
    return result


def _slice(x: Tensor, dim: int, begin: int, end: int, step: int) -> Tensor:
    return x[..., begin:end:step, :] if dim == -2 else x[..., begin:end:step]


def _pair(value: Any) -> tuple[int, int] | None:
    numbers = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if not numbers or not all(isinstance(n, int) for n in numbers):
        return None
    return (numbers[0], numbers[-1])
