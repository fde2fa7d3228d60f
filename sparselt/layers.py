# SPDX-License-Identifier: Apache-2.0
"""Reads linear and convolution layers out of graphs, torch.export's and Dynamo's alike.

A node whose weight is known becomes the torch module that computes the same, so that everything
behind (planning, timing, packing) knows modules only.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from sparselt.fuse import argument
from sparselt.shelf import Shelf

__all__ = ["Constants", "GraphLayer", "read_layer", "set_weights"]

aten = torch.ops.aten

_LINEAR = {aten.linear.default, torch._C._nn.linear, F.linear}
_CONVOLUTIONS = {
    aten.conv1d.default: 1,
    aten.conv1d.padding: 1,
    aten.conv2d.default: 2,
    aten.conv2d.padding: 2,
    torch.conv1d: 1,
    torch.conv2d: 2,
    F.conv1d: 1,
    F.conv2d: 2,
}
_GENERAL_CONVOLUTION = {aten.convolution.default, torch.convolution}
_MATMUL = {
    aten.mm.default,
    aten.matmul.default,
    torch.mm,
    torch.matmul,
    operator.matmul,
    "mm",
    "matmul",
}
_ADDMM = {aten.addmm.default, torch.addmm}
_TRANSPOSE = {aten.t.default, aten.numpy_T.default, torch.t, "t"}
_SWAP = {aten.transpose.int, torch.transpose, "transpose", aten.permute.default, "permute"}


@dataclass(frozen=True)
class GraphLayer:
    """A layer of a graph.

    Attributes:
        node: where it is.
        input: what it reads.
        module: nn.Linear, nn.Conv1d or nn.Conv2d that computes the same.
        sources: the placeholders that weight and bias came from.
    """

    node: fx.Node
    input: fx.Node
    module: nn.Module
    sources: list[fx.Node] = field(default_factory=list)


class Constants:
    """The placeholders of a graph whose values are known, and transposes of them.

    Args:
        values: by placeholder.
        shelf: where some of them are to be taken from.
    """

    def __init__(self, values: dict[fx.Node, Tensor], shelf: Shelf) -> None:
        self.values = values
        self.shelf = shelf

    def __call__(self, node: Any) -> Tensor | None:
        """The value of a node; None if it is not known before the graph runs."""
        if not isinstance(node, fx.Node):
            return None
        if node in self.values:
            return self.shelf.take(self.values[node])
        if node.op not in ("call_function", "call_method") or not node.args:
            return None
        base = self(node.args[0])
        if base is None or base.dim() != 2:
            return None
        if node.target in _TRANSPOSE:
            return base.t()
        order = node.args[1] if len(node.args) == 2 else node.args[1:]
        if (
            node.target in _SWAP
            and isinstance(order, Sequence)
            and set(order) in ({0, 1}, {-1, -2})
        ):
            permuted = node.target in (aten.permute.default, "permute")
            return base.t() if not permuted or tuple(order) in ((1, 0), (-1, -2)) else base
        return None

    def put_back(self, nodes: Sequence[fx.Node]) -> None:
        """Returns the values of placeholders to the shelf."""
        for node in nodes:
            self.shelf.back(self.values[node])

    def source(self, node: Any) -> list[fx.Node]:
        """The placeholder that a known node's value comes from, in a list; empty for others."""
        while isinstance(node, fx.Node):
            if node in self.values:
                return [node]
            node = node.args[0] if node.args else None
        return []


def read_layer(node: fx.Node, constant: Constants) -> GraphLayer | None:
    """The layer that a node computes; None for a node of another kind or with an unknown weight.

    Args:
        node: of a graph of torch.export or Dynamo.
        constant: the known placeholders.
    """
    if node.op not in ("call_function", "call_method"):
        return None
    if node.target in _LINEAR:
        return _linear(node, constant, argument(node, 1, "weight"), argument(node, 2, "bias"))
    if node.target in _CONVOLUTIONS:
        names = ("stride", "padding", "dilation", "groups")
        stride, padding, dilation, groups = (
            argument(node, i + 3, name, default)
            for i, (name, default) in enumerate(zip(names, (1, 0, 1, 1), strict=True))
        )
        axes = _CONVOLUTIONS[node.target]
        return _convolution(node, constant, axes, (stride, padding, dilation), groups)
    if node.target in _GENERAL_CONVOLUTION and len(node.args) >= 9 and not node.args[6]:
        weight = constant(node.args[1])
        axes = 0 if weight is None else weight.dim() - 2
        if axes in (1, 2):
            geometry = (node.args[3], node.args[4], node.args[5])
            return _convolution(node, constant, axes, geometry, node.args[8])
    if node.target in _MATMUL and len(node.args) == 2:
        return _linear(node, constant, node.args[1], None, transposed=True)
    if node.target in _ADDMM and len(node.args) == 3 and not node.kwargs:
        bias, _, weight_node = node.args
        return _linear(node, constant, weight_node, bias, transposed=True, input_at=1)
    return None


def _linear(
    node: fx.Node,
    constant: Constants,
    weight_node: Any,
    bias_node: Any,
    transposed: bool = False,
    input_at: int = 0,
) -> GraphLayer | None:
    weight, bias = constant(weight_node), constant(bias_node)
    x = argument(node, input_at, "input")
    if weight is None or weight.dim() != 2 or not isinstance(x, fx.Node):
        return None
    weight = weight.t() if transposed else weight
    rows, cols = weight.shape
    if bias_node is not None and (bias is None or tuple(bias.shape) != (rows,)):
        return None
    module = nn.Linear(cols, rows, bias is not None, device="meta")
    return _finish(node, x, module, weight, bias, constant, (weight_node, bias_node))


def _convolution(
    node: fx.Node, constant: Constants, axes: int, geometry: tuple[Any, Any, Any], groups: Any
) -> GraphLayer | None:
    x, weight_node, bias_node = (
        argument(node, i, name) for i, name in enumerate(("input", "weight", "bias"))
    )
    weight, bias = constant(weight_node), constant(bias_node)
    numbers = [groups]
    for value in geometry:
        numbers += list(value) if isinstance(value, (list, tuple)) else [value]
    if weight is None or weight.dim() != axes + 2 or not isinstance(x, fx.Node):
        return None
    if (bias_node is not None and bias is None) or any(isinstance(n, fx.Node) for n in numbers):
        return None
    stride, padding, dilation = (_per_axis(value, axes) for value in geometry)
    kind: Any = nn.Conv1d if axes == 1 else nn.Conv2d
    module = kind(
        weight.shape[1] * groups,
        weight.shape[0],
        tuple(weight.shape[2:]),
        stride,
        padding,
        dilation,
        groups,
        bias is not None,
        device="meta",
    )
    return _finish(node, x, module, weight, bias, constant, (weight_node, bias_node))


def _per_axis(value: Any, axes: int) -> Any:
    if isinstance(value, (list, tuple)):
        numbers = tuple(value)
        return numbers * axes if len(numbers) == 1 else numbers
    return value


def _finish(
    node: fx.Node,
    x: fx.Node,
    module: nn.Module,
    weight: Tensor,
    bias: Tensor | None,
    constant: Constants,
    nodes: tuple[Any, Any],
) -> GraphLayer:
    set_weights(module, weight, bias)
    sources = [source for item in nodes for source in constant.source(item)]
    return GraphLayer(node, x, module.eval(), sources)


def set_weights(module: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """Gives a module its weights: detached, contiguous, without gradients."""
    module.weight = nn.Parameter(weight.detach().contiguous(), False)
    module.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), False))
