# SPDX-License-Identifier: Apache-2.0
"""The shapes of all values of a graph, for given inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from sparselt.shape_rules import UnknownShapeError, outline, value_of

__all__ = ["copied", "drawn", "outline", "propagate"]


def copied(module: fx.GraphModule) -> fx.GraphModule:
    """A module with a copy of the graph."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    return fx.GraphModule(module, graph)


def propagate(module: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Leaves the shape of every node's value in its `meta["val"]`, without computing anything.

    Args:
        module: the graph.
        inputs: a value for every placeholder.
    """
    with torch.no_grad():
        try:
            _by_rules(module.graph, inputs)
        except UnknownShapeError:
            _by_torch(module, inputs)


def drawn(shape: Sequence[int], seed: int = 0) -> Tensor:
    """A normal float32 tensor to try a layer with, which leaves the user's generator alone."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def _by_rules(graph: fx.Graph, inputs: Sequence[Any]) -> None:
    given = iter(inputs)
    for node in graph.nodes:
        if node.op == "placeholder":
            value = next(given)
            # Batch norms' counters of steps are there, and nobody reads them.
            read = isinstance(value, Tensor) and node.users
            node.meta["val"] = _outline_of(value) if read else value
        elif node.op in ("call_function", "call_method"):
            args = fx.node.map_arg(node.args, _value)
            node.meta["val"] = value_of(node, args, fx.node.map_arg(node.kwargs, _value))
        elif node.op != "output":
            raise UnknownShapeError(node.op)


def _value(node: fx.Node) -> Any:
    return node.meta["val"]


def _outline_of(x: Tensor) -> Tensor:
    """The outline of a plain tensor; of any other, the rules do not tell."""
    known = x.dtype is torch.float32 and x.is_cpu and x.layout is torch.strided
    if not known or type(x) not in (Tensor, torch.nn.Parameter):
        raise UnknownShapeError("another tensor than a plain one of float32 on the CPU")
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    if last and not x.is_contiguous():
        raise UnknownShapeError("a layout of its own")
    return outline(x.shape)


def _by_torch(module: fx.GraphModule, inputs: Sequence[Any]) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        fakes = [
            mode.from_tensor(x.detach(), static_shapes=True) if isinstance(x, Tensor) else x
            for x in inputs
        ]
    FakeTensorProp(module, mode).propagate_dont_convert_inputs(*fakes)
