# SPDX-License-Identifier: Apache-2.0
"""A network without sparse layers, run as torch's oneDNN runs it best.

Weights are laid out once in the order that oneDNN's kernels read, what follows a layer is computed
in the kernel, and images stay channels-last from one convolution to the next: convolutions with
such weights return channels-last images whatever they read, and torch's operators hand that layout
on, so only what reads a tensor in its own order needs a conversion.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from sparselt.builder import LAYER, DenseStep, operation
from sparselt.fuse import clamp_bounds, is_mutating
from sparselt.shapes import copied

__all__ = ["prepack"]

_Step = Callable[..., Tensor]

# So many terms in one chain have twice the error of torch's product, which adds up in parts.
_LONG_ROW = 512

# Operations that return a new tensor in the layout of their first operand.
_FRESH = {
    "adaptive_avg_pool2d",
    "add",
    "avg_pool2d",
    "batch_norm",
    "cat",
    "clamp",
    "gelu",
    "hardswish",
    "hardtanh",
    "max_pool2d",
    "mul",
    "pad",
    "relu",
    "relu6",
    "sigmoid",
    "silu",
}
# The same of their operand's memory.
_IN_PLACE = {"add_", "clamp_", "hardswish_", "hardtanh_", "iadd", "relu_", "relu6_", "silu_"}
# What oneDNN computes of a result besides bounds: its names, by operation.
_ACTIVATIONS = {
    "gelu": "gelu",
    "hardswish": "hardswish",
    "hardswish_": "hardswish",
    "sigmoid": "sigmoid",
    "silu": "swish",
    "silu_": "swish",
}


@dataclass(frozen=True)
class _End:
    """What follows the product: bounds, or an activation by oneDNN's name."""

    lower: float | None = None
    upper: float | None = None
    name: str = "none"
    algorithm: str = ""

    @property
    def attribute(self) -> tuple[str, list[float], str]:
        """As oneDNN's operators take it; "none" where they cannot compute it."""
        if self.lower == 0.0 and self.upper is None:
            return "relu", [], ""
        if self.lower is not None and self.upper is not None:
            return "hardtanh", [self.lower, self.upper], ""
        return self.name, [], self.algorithm

    def after(self, y: Tensor) -> Tensor:
        """Computed by torch, in place where it can be."""
        if self.lower is not None or self.upper is not None:
            return y.clamp_(self.lower, self.upper)
        if self.name == "none":
            return y
        by_name: dict[str, Callable[[Tensor], Tensor]] = {
            "gelu": lambda x: F.gelu(x, approximate=self.algorithm),
            "hardswish": F.hardswish,
            "sigmoid": torch.sigmoid,
            "swish": F.silu,
        }
        return by_name[self.name](y)


def prepack(module: fx.GraphModule, weights: dict[str, Tensor]) -> fx.GraphModule | None:
    """A graph whose dense layers have prepacked weights; None where that changes nothing.

    Args:
        module: lowered without sparse layers, with `meta["val"]` on its nodes; not changed.
        weights: prepacked before, by the layers' names, and a place to leave new ones, so that the
            plans for several sizes of one network share their memory.
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return None
    result = copied(module)
    if any(is_mutating(node) and not _is_harmless(node) for node in result.graph.nodes):
        return None
    packed: set[fx.Node] = set()
    head = _head(result.graph)
    for node in list(result.graph.nodes):
        step = None if node is head else _step_of(node, weights)
        if step is not None:
            node.target = step
            packed.add(node)
    if not packed:
        return None
    _convert(result.graph, packed)
    result.graph.lint()
    result.recompile()
    return result


def _is_harmless(node: fx.Node) -> bool:
    """Whether a node changes, if anything, a tensor that nobody else reads."""
    if LAYER in node.meta or operation(node) in _FRESH:
        return True
    changed = node.args[0] if node.args else None
    if operation(node) not in _IN_PLACE or not isinstance(changed, fx.Node):
        return False
    own = LAYER in changed.meta or operation(changed) in _FRESH | _IN_PLACE
    return own and list(changed.users) == [node]


def _head(graph: fx.Graph) -> fx.Node | None:
    """A classifier of a convolutional network that sums long rows, which stays as torch runs it.

    oneDNN adds up a row in one go, and these roundings are the result's. Other networks keep the
    gain in time: their products are most of it.
    """
    modules = {n: n.meta[LAYER].module for n in graph.nodes if type(n.meta.get(LAYER)) is DenseStep}
    if not any(isinstance(module, nn.Conv2d) for module in modules.values()):
        return None
    output: fx.Node = next(node for node in graph.nodes if node.op == "output")
    for node in output.all_input_nodes:
        module = modules.get(node)
        if isinstance(module, nn.Linear) and module.in_features >= _LONG_ROW:
            return node
    return None


def _step_of(node: fx.Node, weights: dict[str, Tensor]) -> _Step | None:
    """What a node that is a dense layer is to call; takes the activation after it along."""
    dense = node.meta.get(LAYER)
    source = node.args[0] if node.args else None
    x = source.meta.get("val") if isinstance(source, fx.Node) else None
    if not isinstance(dense, DenseStep) or not isinstance(x, Tensor):
        return None
    module = dense.module
    if not (x.dtype is module.weight.dtype is torch.float32 and x.device.type == "cpu"):
        return None
    # One row is read once: torch's product of a matrix and a vector starts sooner.
    rows = type(module) is nn.Linear and x.numel() > x.shape[-1]
    if not rows and not (isinstance(module, nn.Conv2d) and x.dim() == 4):
        return None
    end = _End(dense.lower, dense.upper)
    if end == _End():
        end = _take_activation(node)
    if dense.name not in weights:
        weights[dense.name] = _weight(module, x.shape)
    weight = weights[dense.name]
    if isinstance(module, nn.Linear):
        return _linear(weight, module.bias, end)
    assert isinstance(module, nn.Conv2d)
    in_place = len(node.args) > 1 and _may_overwrite(node.args[1], node)
    return _convolution(module, weight, end, in_place)


def _weight(module: nn.Module, shape: Sequence[int]) -> Tensor:
    """A layer's weight as oneDNN reads it for inputs of about this shape; opaque to torch."""
    ops = torch.ops.mkldnn
    packed: Tensor
    with torch.no_grad():
        if isinstance(module, nn.Conv2d):
            more = (0, 0, *_padding(module)[1])
            sizes = [size + own for size, own in zip(shape, more, strict=True)]
            packed = ops._reorder_convolution_weight(module.weight, *_geometry(module), sizes)
        else:
            packed = ops._reorder_linear_weight(module.weight, math.prod(shape[:-1]))
    return packed


def _take_activation(node: fx.Node) -> _End:
    """The activation after a layer, which becomes a part of it."""
    user = next(iter(node.users), None)
    if user is None or len(node.users) != 1:
        return _End()
    bounds, name = clamp_bounds(user), _ACTIVATIONS.get(operation(user))
    if (bounds is None and name is None) or user.args[0] is not node:
        return _End()
    algorithm = str(user.kwargs.get("approximate", "none")) if name == "gelu" else ""
    user.replace_all_uses_with(node)
    user.graph.erase_node(user)
    return _End(*bounds) if bounds is not None else _End(name=name or "none", algorithm=algorithm)


def _may_overwrite(residual: Any, node: fx.Node) -> bool:
    """Whether a node may write its result to what it adds: a layer's result that dies with it."""
    if not isinstance(residual, fx.Node) or LAYER not in residual.meta:
        return False
    users = list(residual.users)
    own = all(LAYER in user.meta or operation(user) in _FRESH for user in users)
    return own and all(user is node or user < node for user in users)


def _convert(graph: fx.Graph, packed: set[fx.Node]) -> None:
    """Makes images contiguous again where something reads them in their own order."""
    last: set[fx.Node] = set()
    for node in list(graph.nodes):
        moved = [source for source in node.all_input_nodes if source in last]
        dense = isinstance(node.meta.get(LAYER), DenseStep)
        keeps = dense or (LAYER not in node.meta and operation(node) in _FRESH | _IN_PLACE)
        if moved and operation(node) == "max_pool2d":
            # Lowering may have put there what is faster on contiguous images.
            node.target = torch.max_pool2d
        for source in () if keeps else moved:
            with graph.inserting_before(node):
                call = graph.call_method("contiguous", (source,))
            call.meta = {"val": source.meta["val"]}
            node.replace_input_with(source, call)
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.dim() == 4 and (node in packed or (keeps and moved)):
            last.add(node)


def _convolution(module: nn.Conv2d, weight: Tensor, end: _End, in_place: bool) -> _Step:
    ops, bias = torch.ops.mkldnn, module.bias
    geometry, (_, more) = _geometry(module), _padding(module)
    padding, *others = geometry
    attribute = end.attribute
    # All that oneDNN computes after a sum is ReLU.
    unary, after = ("relu", _End()) if attribute[0] == "relu" else (None, end)
    binary = (weight, bias, *geometry, "add", None, unary, [], None)

    def prepacked_conv2d(x: Tensor, residual: Tensor | None = None) -> Tensor:
        if any(more):
            x = F.pad(x, (0, more[1], 0, more[0]))
        y: Tensor
        if not _is_plain(x):
            stride, dilation, groups = others
            y = torch.conv2d(x, weight.to_dense(), bias, stride, padding, dilation, groups)
            return end.after(y if residual is None else y.add_(residual))
        if residual is None:
            y = ops._convolution_pointwise(x, weight, bias, *geometry, *attribute)
            return y
        if in_place:
            return after.after(ops._convolution_pointwise_.binary(residual, x, *binary))
        return after.after(ops._convolution_pointwise.binary(x, residual, *binary))

    return prepacked_conv2d


def _geometry(module: nn.Conv2d) -> tuple[Any, ...]:
    """Padding, stride, dilation and groups, in oneDNN's order."""
    return _padding(module)[0], list(module.stride), list(module.dilation), module.groups


def _padding(module: nn.Conv2d) -> tuple[list[int], list[int]]:
    """Zeros on both sides of rows and columns, and how many more at their ends."""
    if not isinstance(module.padding, str):
        return list(module.padding), [0, 0]
    both = [0, 0]
    if module.padding == "same":
        both = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    return [n // 2 for n in both], [n % 2 for n in both]


def _linear(weight: Tensor, bias: Tensor | None, end: _End) -> _Step:
    ops, attribute = torch.ops.mkldnn, end.attribute

    def prepacked_linear(x: Tensor, residual: Tensor | None = None) -> Tensor:
        y: Tensor
        if not _is_plain(x):
            y = F.linear(x, weight.to_dense(), bias)
            return end.after(y if residual is None else y.add_(residual))
        if residual is None:
            y = ops._linear_pointwise(x, weight, bias, *attribute)
            return y
        return end.after(ops._linear_pointwise.binary(x, residual, weight, bias, "add"))

    return prepacked_linear


def _is_plain(x: Tensor) -> bool:
    """Whether oneDNN's operators take a tensor, and torch would compute with it as they do."""
    return type(x) is Tensor and x.dtype is torch.float32 and not torch.is_autocast_enabled("cpu")
