# SPDX-License-Identifier: Apache-2.0
"""Adds steps that move values about to a native program: free where a value only changes its
shape, one copy where its elements change places.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from torch import fx

from sparselt.builder import Builder, NotNativeError, Shape, Shaped
from sparselt.fuse import argument

__all__ = ["VIEWS"]


def _flatten(build: Builder, node: fx.Node) -> Shaped:
    x = build.tensor(argument(node, 0, "input"))
    rank = len(x.shape)
    first = build.whole(argument(node, 1, "start_dim", 0)) % rank
    last = build.whole(argument(node, 2, "end_dim", -1)) % rank
    middle = math.prod(x.shape[first : last + 1])
    return Shaped(x.number, (*x.shape[:first], middle, *x.shape[last + 1 :]))


def _view(build: Builder, node: fx.Node) -> Shaped:
    x = build.tensor(node.args[0])
    sizes = node.args[1:] if len(node.args) > 2 else node.args[1]
    shape = [build.whole(n) for n in (sizes if isinstance(sizes, (list, tuple)) else [sizes])]
    if shape.count(-1) == 1:
        shape[shape.index(-1)] = x.floats // max(1, -math.prod(shape))
    if min(shape, default=1) < 1 or math.prod(shape) != x.floats:
        raise NotNativeError("a view of another size")
    return Shaped(x.number, tuple(shape))


def _reshaped(build: Builder, x: Shaped, shape: Shape) -> Shaped:
    if math.prod(shape) != x.floats:
        raise NotNativeError("a view of another size")
    return Shaped(x.number, shape)


def _unflatten(build: Builder, node: fx.Node) -> Shaped:
    x = build.tensor(argument(node, 0, "input"))
    dim = build.whole(argument(node, 1, "dim")) % len(x.shape)
    sizes = [build.whole(n) for n in argument(node, 2, "sizes")]
    if sizes.count(-1) == 1:
        sizes[sizes.index(-1)] = x.shape[dim] // max(1, -math.prod(sizes))
    return _reshaped(build, x, (*x.shape[:dim], *sizes, *x.shape[dim + 1 :]))


def _unsqueeze(build: Builder, node: fx.Node) -> Shaped:
    x = build.tensor(argument(node, 0, "input"))
    dim = build.whole(argument(node, 1, "dim")) % (len(x.shape) + 1)
    return _reshaped(build, x, (*x.shape[:dim], 1, *x.shape[dim:]))


def _squeeze(build: Builder, node: fx.Node) -> Shaped:
    x = build.tensor(argument(node, 0, "input"))
    dim = build.whole(argument(node, 1, "dim")) % len(x.shape)
    return _reshaped(
        build,
        x,
        (*x.shape[:dim], *([] if x.shape[dim] == 1 else x.shape[dim:][:1]), *x.shape[dim + 1 :]),
    )


def _select(build: Builder, node: fx.Node) -> Shaped:
    x = build.tensor(argument(node, 0, "input"))
    dim = build.whole(argument(node, 1, "dim")) % len(x.shape)
    index = build.whole(argument(node, 2, "index")) % x.shape[dim]
    if math.prod(x.shape[:dim]) != 1:
        raise NotNativeError("a selection that is no single stretch")
    shape = (*x.shape[:dim], *x.shape[dim + 1 :])
    floats = math.prod(shape)
    return Shaped(build.program.add_part(x.number, index * floats, floats), shape)


def _permute(build: Builder, node: fx.Node) -> Shaped:
    order = node.args[1] if len(node.args) == 2 else node.args[1:]
    if not isinstance(order, (list, tuple)) or node.kwargs:
        raise NotNativeError("an order that is no list")
    return _permuted(build, build.tensor(node.args[0]), [build.whole(n) for n in order])


def _transpose(build: Builder, node: fx.Node) -> Shaped:
    x = build.tensor(argument(node, 0, "input"))
    order = list(range(len(x.shape)))
    a, b = (build.whole(argument(node, i, f"dim{i - 1}")) for i in (1, 2))
    order[a], order[b] = order[b], order[a]
    return _permuted(build, x, order)


def _permuted(build: Builder, x: Shaped, order: list[int]) -> Shaped:
    rank = len(x.shape)
    order = [dim % rank for dim in order]
    shape = tuple(x.shape[dim] for dim in order)
    moved = [dim for dim in order if x.shape[dim] > 1]
    if moved == sorted(moved):
        return Shaped(x.number, shape)
    strides = [math.prod(x.shape[dim + 1 :]) for dim in moved]
    y = build.new(shape)
    build.program.add_gather(x.number, y.number, [x.shape[dim] for dim in moved], strides)
    return y


# By name. What is written to the result of one is, in torch, written to its operand.
VIEWS: Mapping[str, Callable[[Builder, fx.Node], Shaped]] = {
    "flatten": _flatten,
    "permute": _permute,
    "reshape": _view,
    "select": _select,
    "squeeze": _squeeze,
    "transpose": _transpose,
    "unflatten": _unflatten,
    "unsqueeze": _unsqueeze,
    "view": _view,
}
