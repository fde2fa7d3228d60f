# SPDX-License-Identifier: Apache-2.0
"""What shapes the common operators give, told without torch's own machinery.

Torch tells shapes by FakeTensorMode or by meta tensors, whose first use imports torch._dynamo and
sympy: 72 MiB, and a second. A program from a file needs neither where its graph holds nothing but
operators of this table; `sparselt.shapes` asks torch otherwise.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from sparselt.builder import operation

__all__ = ["UnknownShapeError", "outline", "value_of"]

Numbers = int | Sequence[int]


class UnknownShapeError(Exception):
    """Torch is to be asked: no rule, or arguments that the rule does not take."""


def outline(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor on the CPU of some shape and type that holds one number, or none."""
    return torch.zeros((), dtype=dtype).expand(tuple(shape))


def value_of(node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The outline of what a call computes, or the value itself if that is no tensor.

    Args:
        node: a call, of a graph of torch.export or Dynamo.
        args: its arguments, outlines for tensors.
        kwargs: likewise.

    Raises:
        UnknownShapeError: there is no rule for it.
    """
    rule = _RULES.get(operation(node))
    if rule is None:
        raise UnknownShapeError(operation(node))
    try:
        return rule(*args, **kwargs)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise UnknownShapeError(f"{operation(node)}: {error}") from error


def _check(fits: bool) -> None:
    if not fits:
        raise UnknownShapeError("shapes that do not fit, or a variant of the operator")


def _each(value: Numbers, axes: int) -> list[int]:
    """One number an axis."""
    numbers = [value] if isinstance(value, int) else list(value)
    numbers = numbers * axes if len(numbers) == 1 else numbers
    _check(len(numbers) == axes)
    return numbers


def _same(x: Tensor, inplace: bool = False) -> Tensor:
    return outline(x.shape)


def _bounded(x: Tensor, min: Any = None, max: Any = None, inplace: bool = False) -> Tensor:
    _check(not isinstance(min, Tensor) and not isinstance(max, Tensor))
    return outline(x.shape)


def _gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    return outline(x.shape)


def _dropout(x: Tensor, p: float = 0.5, train: bool = True) -> Tensor:
    return outline(x.shape)


def _softmax(x: Tensor, dim: int, dtype: None = None) -> Tensor:
    _check(dtype is None and -x.dim() <= dim < x.dim())
    return outline(x.shape)


def _layer_norm(
    x: Tensor, sizes: Sequence[int], weight: Any = None, bias: Any = None, *rest: Any
) -> Tensor:
    tail = tuple(sizes)
    _check(len(tail) > 0 and tuple(x.shape[-len(tail) :]) == tail)
    _check(all(tuple(t.shape) == tail for t in (weight, bias) if t is not None))
    return outline(x.shape)


def _batch_norm(x: Tensor, *factors: Any) -> Tensor:
    _check(all(tuple(t.shape) == (x.shape[1],) for t in factors if isinstance(t, Tensor)))
    return outline(x.shape)


def _binary(x: Any, other: Any) -> Tensor:
    """Of tensors, or of one and a number."""
    tensors = [value for value in (x, other) if isinstance(value, Tensor)]
    numbers = [value for value in (x, other) if not isinstance(value, Tensor)]
    _check(len(tensors) > 0 and all(type(number) in (int, float) for number in numbers))
    return outline(np.broadcast_shapes(*(tuple(t.shape) for t in tensors)))


def _binary_in_place(x: Tensor, other: Any) -> Tensor:
    y = _binary(x, other)
    _check(y.shape == x.shape)
    return y


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rows, cols = weight.shape
    _check(x.dim() > 0 and x.shape[-1] == cols)
    _check(bias is None or tuple(bias.shape) == (rows,))
    return outline((*x.shape[:-1], rows))


def _matmul(x: Tensor, other: Tensor) -> Tensor:
    _check(x.dim() > 1 and other.dim() > 1 and x.shape[-1] == other.shape[-2])
    batch = np.broadcast_shapes(tuple(x.shape[:-2]), tuple(other.shape[:-2]))
    return outline((*batch, x.shape[-2], other.shape[-1]))


def _addmm(bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return _linear(x, weight.t(), bias)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    _check(q.dim() > 2 and q.shape[:-2] == k.shape[:-2] and k.shape[:-1] == v.shape[:-1])
    _check(q.shape[-1] == k.shape[-1])
    return outline((*q.shape[:-1], v.shape[-1]))


def _convolution(axes: int) -> Callable[..., Tensor]:
    def rule(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Numbers = 1,
        padding: Numbers | str = 0,
        dilation: Numbers = 1,
        groups: int = 1,
    ) -> Tensor:
        _check(x.dim() == axes + 2 and weight.dim() == axes + 2)
        _check(x.shape[1] == weight.shape[1] * groups and weight.shape[0] % groups == 0)
        _check(bias is None or tuple(bias.shape) == (weight.shape[0],))
        if padding == "same":
            _check(_each(stride, axes) == [1] * axes)
            return outline((x.shape[0], weight.shape[0], *x.shape[2:]))
        around = 0 if isinstance(padding, str) else padding
        sizes = _windows(x.shape[2:], weight.shape[2:], stride, around, dilation)
        return outline((x.shape[0], weight.shape[0], *sizes))

    return rule


def _windows(
    sizes: Sequence[int], kernel: Numbers, stride: Numbers, padding: Numbers, dilation: Numbers = 1
) -> list[int]:
    """How many windows there are along each axis."""
    axes = len(sizes)
    taps, steps, around, apart = (_each(n, axes) for n in (kernel, stride, padding, dilation))
    _check(min(taps) > 0 and min(steps) > 0 and min(around) >= 0 and min(apart) > 0)
    counts = [
        (sizes[i] + 2 * around[i] - apart[i] * (taps[i] - 1) - 1) // steps[i] + 1
        for i in range(axes)
    ]
    _check(min(counts) > 0)
    return counts


def _pool(
    x: Tensor, kernel: Numbers, stride: Numbers | None = None, padding: Numbers = 0
) -> Tensor:
    """Of plain windows; torch tells of the rest."""
    around, taps = _each(padding, 2), _each(kernel, 2)
    _check(x.dim() in (3, 4) and all(2 * around[i] <= taps[i] for i in (0, 1)))
    return outline((*x.shape[:-2], *_windows(x.shape[-2:], kernel, stride or kernel, padding)))


def _adaptive_pool(x: Tensor, sizes: Numbers) -> Tensor:
    _check(x.dim() in (3, 4))
    return outline((*x.shape[:-2], *_each(sizes, 2)))


def _mean(x: Tensor, dims: Numbers, keepdim: bool = False) -> Tensor:
    numbers = [dims] if isinstance(dims, int) else list(dims)
    _check(len(numbers) > 0 and all(-x.dim() <= n < x.dim() for n in numbers))
    gone = {n % x.dim() for n in numbers}
    kept = [1 if i in gone else n for i, n in enumerate(x.shape) if keepdim or i not in gone]
    return outline(kept)


def _concatenated(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    first = tensors[0]
    at = dim % first.dim()
    rests = {(*t.shape[:at], *t.shape[at + 1 :]) for t in tensors}
    _check(len(rests) == 1 and all(t.dim() == first.dim() for t in tensors))
    total = sum(t.shape[at] for t in tensors)
    return outline((*first.shape[:at], total, *first.shape[at + 1 :]))


def _view(name: str) -> Callable[..., Any]:
    """What returns its operand's memory: computed, of the one number that an outline holds."""
    return lambda x, *args, **kwargs: getattr(x, name)(*args, **kwargs)


_BY_NAME: dict[Callable[..., Any], str] = {
    _same: """
        alias clone contiguous detach hardswish hardswish_ relu relu_ relu6 relu6_ sigmoid silu
        silu_ tanh
    """,
    _bounded: "clamp clamp_ hardtanh hardtanh_",
    _binary: "add div mul sub",
    _binary_in_place: "add_ div_ iadd mul_ sub_",
}
_VIEWS = """
    chunk expand flatten narrow permute reshape select squeeze split t transpose unbind unflatten
    unsqueeze view
"""
_RULES: dict[str, Callable[..., Any]] = {
    **{name: rule for rule, names in _BY_NAME.items() for name in names.split()},
    **{name: _view(name) for name in _VIEWS.split()},
    "adaptive_avg_pool2d": _adaptive_pool,
    "addmm": _addmm,
    "avg_pool2d": _pool,
    "batch_norm": _batch_norm,
    "cat": _concatenated,
    "conv1d": _convolution(1),
    "conv2d": _convolution(2),
    "dropout": _dropout,
    "gelu": _gelu,
    "getitem": operator.getitem,
    "layer_norm": _layer_norm,
    "linear": _linear,
    "matmul": _matmul,
    "max_pool2d": _pool,
    "mean": _mean,
    "mm": _matmul,
    "scaled_dot_product_attention": _attention,
    "softmax": _softmax,
    "sym_size": lambda x, dim: x.shape[dim],
}
