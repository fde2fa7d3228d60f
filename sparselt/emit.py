# SPDX-License-Identifier: Apache-2.0
"""Adds the nodes of a lowered graph to a native program, for one set of shapes.

A function a kind of node. Each raises `NotNativeError` for a variant that has no native step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from sparselt.builder import (
    AFFINE,
    LAYER,
    Builder,
    DenseStep,
    NotNativeError,
    Shape,
    Shaped,
    operation,
)
from sparselt.emit_views import VIEWS
from sparselt.extension import conv_shape
from sparselt.few_channels import few_channels_in_panels
from sparselt.fuse import argument, clamp_bounds
from sparselt.neighbours import is_depthwise
from sparselt.nn import SparseConv1d, SparseConv2d, SparseLayer, SparseLinear

__all__ = ["emit"]

# Where a channel has fewer values in a row, torch's batch norm is the faster one.
_LEAST_AREA = 16

Bounds = tuple[float | None, float | None]


def emit(build: Builder, node: fx.Node) -> None:
    """Adds one node, whose arguments have been added.

    Args:
        build: the program.
        node: of a lowered graph.

    Raises:
        NotNativeError: there is no native step for it.
    """
    if LAYER in node.meta:
        result = _layer(build, node)
        if any(build.tensor(other).shape != result.shape for other in node.args[1:]):
            raise NotNativeError("a residual of another shape")
    elif AFFINE in node.meta:
        result = _affine(build, node)
    elif clamp_bounds(node) is not None:
        result = _elements(build, node, "identity", clamp_bounds(node))
    elif operation(node) in _EMITTERS:
        result = _EMITTERS[operation(node)](build, node)
    else:
        raise NotNativeError(operation(node))
    build.add(node, result)


def _layer(build: Builder, node: fx.Node) -> Shaped:
    layer = node.meta[LAYER]
    x = build.tensor(node.args[0])
    residual = build.tensor(node.args[1]) if len(node.args) > 1 else None
    if isinstance(layer, DenseStep):
        images = build.program.images_innermost
        panels = few_channels_in_panels(layer.module, images) if len(x.shape) == 4 else None
        if panels is None:
            return _dense(build, layer, x, residual)
        panels.lower, panels.upper = layer.lower, layer.upper
        layer = panels
    assert isinstance(layer, SparseLayer)
    parts, bias = list(layer.weight.parts()), layer.bias
    end = (layer.lower, layer.upper, layer.kernel or layer.weight.format)
    other = -1 if residual is None else residual.number
    if parts[-1].dtype is not torch.float32:
        raise NotNativeError("a weight that is not float32")
    ops = torch.ops.sparselt
    if isinstance(layer, SparseLinear):
        y = build.new((*x.shape[:-1], layer.out_features))
        batch = math.prod(x.shape[:-1])
        given = ([x.number, other, y.number], batch, parts, layer.weight.meta(), bias)
        ops.program_linear(build.program.handle, *given, *end)
        return y
    if not isinstance(layer, (SparseConv1d, SparseConv2d)) or layer.pad_first is not None:
        raise NotNativeError("a padding that is laid out first")
    axes = len(layer.stride)
    if len(x.shape) != axes + 2:
        raise NotNativeError("an input without batch")
    lifted = [*x.shape[:2], *[1] * (2 - axes), *x.shape[2:]]
    geometry, meta = layer.geometry(), layer.weight.lifted_meta
    shape = conv_shape(torch.empty(lifted, device="meta"), meta, *geometry[:3])
    y = build.new((*shape[:2], *shape[4 - axes :]))
    given_conv = ([x.number, other, y.number], lifted, parts, meta, bias)
    ops.program_conv2d(build.program.handle, *given_conv, *geometry, *end)
    return y


def _dense(build: Builder, step: DenseStep, x: Shaped, residual: Shaped | None) -> Shaped:
    module = step.module
    assert isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d))
    geometry: tuple[Any, ...] = ([], [], [], 1)
    shape: Sequence[int] = (*x.shape[:-1], module.weight.shape[0])
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        axes = len(module.kernel_size)
        if isinstance(module.padding, str) or len(x.shape) != axes + 2:
            raise NotNativeError("a padding by name, or an input without batch")
        geometry = (module.stride, module.padding, module.dilation, module.groups)
        sizes = [
            (x.shape[2 + i] + 2 * module.padding[i] - module.dilation[i] * (taps - 1) - 1)
            // module.stride[i]
            + 1
            for i, taps in enumerate(module.kernel_size)
        ]
        shape = (x.shape[0], module.out_channels, *sizes)
    if is_depthwise(module):
        return _depthwise(build, step, x, residual, shape)
    y = build.new(shape, by_torch=True)
    numbers = [x.number, -1, y.number]
    rows = math.prod(x.shape[:-1])
    packed = None if step.packs is None or build.trial else step.packs.packed(rows)
    given = (list(x.shape), module.weight, module.bias, *geometry, packed)
    torch.ops.sparselt.program_dense(build.program.handle, numbers, *given)
    if residual is None and step.lower is None and step.upper is None:
        return y
    name = "identity" if residual is None else "add"
    return _append(build, name, y, residual, (step.lower, step.upper))


def _depthwise(
    build: Builder, step: DenseStep, x: Shaped, residual: Shaped | None, shape: Sequence[int]
) -> Shaped:
    module = step.module
    assert isinstance(module, nn.Conv2d)
    y = build.new(shape)
    numbers = [x.number, -1 if residual is None else residual.number, y.number]
    given = (list(x.shape), module.weight, module.bias)
    geometry = (module.stride, module.padding, module.dilation)
    end = (step.lower, step.upper, "dense")
    torch.ops.sparselt.program_depthwise(build.program.handle, numbers, *given, *geometry, *end)
    return y


def _affine(build: Builder, node: fx.Node) -> Shaped:
    step = node.meta[AFFINE]
    x = build.tensor(node.args[0])
    channels, area = len(step.scale), math.prod(x.shape[2:])
    if area < _LEAST_AREA:
        raise NotNativeError("a batch norm of few values a channel")
    build.kept += [step.scale, step.shift]
    y = build.new(x.shape)
    build.program.add_affine(
        x.number,
        y.number,
        x.shape[0],
        channels,
        area,
        step.scale.data_ptr(),
        step.shift.data_ptr(),
        -math.inf if step.lower is None else step.lower,
        math.inf if step.upper is None else step.upper,
    )
    return y


def _append(
    build: Builder, name: str, x: Shaped, other: Shaped | None, bounds: Bounds | None = None
) -> Shaped:
    """An elementwise step."""
    lower, upper = bounds or (None, None)
    y = build.new(x.shape)
    build.program.add_elements(
        name,
        x.number,
        -1 if other is None else other.number,
        y.number,
        x.floats,
        -math.inf if lower is None else lower,
        math.inf if upper is None else upper,
    )
    return y


def _elements(build: Builder, node: fx.Node, name: str, bounds: Bounds | None = None) -> Shaped:
    return _append(build, name, build.tensor(node.args[0]), None, bounds)


def _unary(name: str) -> Callable[[Builder, fx.Node], Shaped]:
    def emit(build: Builder, node: fx.Node) -> Shaped:
        if any(key not in ("input", "inplace") for key in node.kwargs):
            raise NotNativeError("a variant of an activation")
        return _elements(build, node, name)

    return emit


def _binary(name: str) -> Callable[[Builder, fx.Node], Shaped]:
    def emit(build: Builder, node: fx.Node) -> Shaped:
        if len(node.args) != 2 or node.kwargs.get("alpha", 1) != 1:
            raise NotNativeError("a sum with a factor")
        x, other = (_operand(build, arg) for arg in node.args)
        return _joined(build, name, *((x, other) if x.floats >= other.floats else (other, x)))

    return emit


def _operand(build: Builder, arg: Any) -> Shaped:
    if isinstance(arg, (int, float)) and not isinstance(arg, bool):
        return build.constant(torch.tensor(float(arg), dtype=torch.float32))
    return build.tensor(arg)


def _joined(build: Builder, name: str, x: Shaped, other: Shaped) -> Shaped:
    """A sum or product; the other operand may be repeated along first and last dimensions."""
    if x.shape == other.shape:
        return _append(build, name, x, other)
    rank = len(x.shape)
    sizes = [*[1] * (rank - len(other.shape)), *other.shape]
    if len(sizes) != rank or any(n not in (1, x.shape[i]) for i, n in enumerate(sizes)):
        raise NotNativeError("operands of shapes that give a third one")
    own = [i for i in range(rank) if x.shape[i] > 1 and sizes[i] > 1] or [rank - 1]
    first, last = own[0], own[-1] + (other.floats > 1)
    if math.prod(x.shape[first:last]) != other.floats:
        raise NotNativeError("a value repeated in between")
    y = build.new(x.shape)
    parts = (math.prod(x.shape[:first]), other.floats, math.prod(x.shape[last:]))
    build.program.add_broadcast(name, x.number, other.number, y.number, *parts)
    return y


def _softmax(build: Builder, node: fx.Node) -> Shaped:
    x = build.tensor(argument(node, 0, "input"))
    dim = build.whole(argument(node, 1, "dim")) % len(x.shape)
    kind = node.kwargs.get("dtype", node.args[2] if len(node.args) == 3 else None)
    if dim != len(x.shape) - 1 or kind is not None:
        raise NotNativeError("a softmax over another dimension than the last, or of another type")
    y = build.new(x.shape)
    build.program.add_softmax(x.number, y.number, x.floats // x.shape[-1], x.shape[-1])
    return y


def _layer_norm(build: Builder, node: fx.Node) -> Shaped:
    x = build.tensor(argument(node, 0, "input"))
    sizes = [build.whole(n) for n in argument(node, 1, "normalized_shape")]
    weight, bias = argument(node, 2, "weight"), argument(node, 3, "bias")
    factors = None if weight is None else build.tensor(weight)
    floats, epsilon = math.prod(sizes), float(argument(node, 4, "eps", 1e-5))
    if factors is not None and factors.floats != floats:
        raise NotNativeError("a weight of another size")
    y = build.new(x.shape)
    factor = -1 if factors is None else factors.number
    build.program.add_standardize(x.number, factor, y.number, x.floats // floats, floats, epsilon)
    return y if bias is None else _joined(build, "add", y, build.tensor(bias))


def _window(build: Builder, node: fx.Node, x: Shaped) -> tuple[list[int], list[int]]:
    """Sizes, kernel, stride and padding of a pooling, and the sizes of its result."""
    kernel = build.pair(argument(node, 1, "kernel_size"))
    stride = build.pair(argument(node, 2, "stride") or kernel)
    padding = build.pair(argument(node, 3, "padding", 0))
    if len(x.shape) not in (3, 4) or any(2 * padding[i] > kernel[i] for i in (0, 1)):
        raise NotNativeError("a pooling that torch refuses")
    sizes = x.shape[-2:]
    out = [(sizes[i] + 2 * padding[i] - kernel[i]) // stride[i] + 1 for i in (0, 1)]
    if min(out) < 1:
        raise NotNativeError("a window larger than the input")
    return [*sizes, *kernel, *stride, *padding], out


def _max_pool(build: Builder, node: fx.Node) -> Shaped:
    x = build.tensor(argument(node, 0, "input"))
    dilation, ceil = argument(node, 4, "dilation", 1), argument(node, 5, "ceil_mode", False)
    if build.pair(dilation) != (1, 1) or ceil or argument(node, 6, "return_indices", False):
        raise NotNativeError("a variant of max pooling")
    window, out = _window(build, node, x)
    y = build.new((*x.shape[:-2], *out))
    build.program.add_max_pool(x.number, y.number, math.prod(x.shape[:-2]), window)
    return y


def _mean_pool(build: Builder, node: fx.Node) -> Shaped:
    x = build.tensor(argument(node, 0, "input"))
    if argument(node, 4, "ceil_mode", False) or argument(node, 6, "divisor_override") is not None:
        raise NotNativeError("a variant of average pooling")
    window, out = _window(build, node, x)
    y = build.new((*x.shape[:-2], *out))
    counted = bool(argument(node, 5, "count_include_pad", True))
    build.program.add_mean_pool(x.number, y.number, math.prod(x.shape[:-2]), window, counted)
    return y


def _adaptive_mean_pool(build: Builder, node: fx.Node) -> Shaped:
    x = build.tensor(argument(node, 0, "input"))
    out = build.pair(argument(node, 1, "output_size"))
    if out == (1, 1):
        return _mean_of_last(build, x, 2, (*x.shape[:-2], 1, 1))
    if any(x.shape[i - 2] % out[i] for i in (0, 1)):
        raise NotNativeError("windows of different sizes")
    kernel = [x.shape[i - 2] // out[i] for i in (0, 1)]
    y = build.new((*x.shape[:-2], *out))
    window = [*x.shape[-2:], *kernel, *kernel, 0, 0]
    build.program.add_mean_pool(x.number, y.number, math.prod(x.shape[:-2]), window, True)
    return y


def _mean(build: Builder, node: fx.Node) -> Shaped:
    x = build.tensor(argument(node, 0, "input"))
    dims = argument(node, 1, "dim")
    numbers = dims if isinstance(dims, (list, tuple)) else [dims]
    rank = len(x.shape)
    places = sorted(build.whole(dim) % rank for dim in numbers)
    if node.kwargs.get("dtype") or places != list(range(rank - len(places), rank)):
        raise NotNativeError("a mean over other than the last dimensions")
    kept = [1] * len(places) if argument(node, 2, "keepdim", False) else []
    return _mean_of_last(build, x, len(places), (*x.shape[: rank - len(places)], *kept))


def _mean_of_last(build: Builder, x: Shaped, dims: int, shape: Shape) -> Shaped:
    y = build.new(shape)
    build.program.add_mean(x.number, y.number, y.floats, x.floats // y.floats)
    return y


def _same(build: Builder, node: fx.Node) -> Shaped:
    return build.tensor(node.args[0])


def _concatenate(build: Builder, node: fx.Node) -> Shaped:
    """Values written where they belong where each is one stretch, and copied there otherwise."""
    listed = argument(node, 0, "tensors")
    members = [build.tensor(item) for item in listed]
    rank = len(members[0].shape)
    dim = build.whole(argument(node, 1, "dim", 0)) % rank
    rests = {(*m.shape[:dim], *m.shape[dim + 1 :]) for m in members}
    if len(rests) != 1:
        raise NotNativeError("a sum of shapes that do not fit")
    total = sum(m.shape[dim] for m in members)
    y = build.new((*members[0].shape[:dim], total, *members[0].shape[dim + 1 :]))
    outer = math.prod(members[0].shape[:dim])
    inner, offset = y.floats // outer, 0
    for member in members:
        own = member.floats // outer
        if outer > 1 or not build.lay_in(member, y, offset):
            part = build.program.add_part(y.number, offset, (outer - 1) * inner + own)
            build.program.add_copy(member.number, part, outer, own, own, inner)
        offset += own
    return y


_EMITTERS: Mapping[str, Callable[[Builder, fx.Node], Shaped]] = {
    "adaptive_avg_pool2d": _adaptive_mean_pool,
    "add": _binary("add"),
    "add_": _binary("add"),
    "alias": _same,
    "avg_pool2d": _mean_pool,
    "cat": _concatenate,
    "clone": _same,
    "concat": _concatenate,
    "contiguous": _same,
    "detach": _same,
    "gelu": _unary("gelu"),
    "hardswish": _unary("hardswish"),
    "hardswish_": _unary("hardswish"),
    "iadd": _binary("add"),
    "layer_norm": _layer_norm,
    "max_pool2d": _max_pool,
    "mean": _mean,
    "mul": _binary("mul"),
    "sigmoid": _unary("sigmoid"),
    "silu": _unary("silu"),
    "silu_": _unary("silu"),
    "softmax": _softmax,
    **VIEWS,
}
