# SPDX-License-Identifier: Apache-2.0
"""The shapes of all values of a graph, for given inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

__all__ = ["copied", "drawn", "propagate"]


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
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, torch.no_grad():
        fakes = [
            mode.from_tensor(x.detach(), static_shapes=True) if isinstance(x, Tensor) else x
            for x in inputs
        ]
    with torch.no_grad():
        FakeTensorProp(module, mode).propagate_dont_convert_inputs(*fakes)


def drawn(shape: Sequence[int], seed: int = 0) -> Tensor:
    """A normal float32 tensor to try a layer with, which leaves the user's generator alone."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))
