# SPDX-License-Identifier: Apache-2.0
"""Batch norms that fold into no layer: a factor and a term a channel, and the clamp after them.

A network that normalises before its convolutions has them between a sum and a ReLU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from sparselt.builder import AFFINE, AffineStep
from sparselt.fuse import BatchNorm, clamp_bounds, fold_batch_norm, read_batch_norm

__all__ = ["bind_affine"]


def bind_affine(graph: fx.Graph, constant: Callable[[Any], Tensor | None]) -> list[fx.Node]:
    """Puts one call in place of each known batch norm of float32 on the CPU and its clamp.

    Args:
        graph: after its layers took what they fold; with `meta["val"]` on its nodes.
        constant: value of a node that is a known weight; None for any other node.

    Returns:
        The nodes that constants were read from.
    """
    sources: list[fx.Node] = []
    for node in list(graph.nodes):
        found = read_batch_norm(node, constant)
        x = node.meta.get("val")
        if found is None or not isinstance(x, Tensor):
            continue
        norm, read = found
        folded = fold_batch_norm(torch.ones(len(norm.mean)), None, norm)
        if folded is None or x.dtype is not torch.float32 or x.device.type != "cpu":
            continue
        end, bounds = _with_clamp(node)
        with graph.inserting_before(node):
            call = graph.call_function(_step(norm, *bounds), (node.args[0],))
        call.meta = {**end.meta, AFFINE: AffineStep(*folded, *bounds)}
        end.replace_all_uses_with(call)
        for old in dict.fromkeys((end, node)):
            graph.erase_node(old)
        sources += read
    return sources


def _with_clamp(node: fx.Node) -> tuple[fx.Node, tuple[float | None, float | None]]:
    user = next(iter(node.users), None)
    bounds = None if user is None else clamp_bounds(user)
    if user is None or bounds is None or len(node.users) != 1 or user.args[0] is not node:
        return node, (None, None)
    return user, bounds


def _step(norm: BatchNorm, lower: float | None, upper: float | None) -> Callable[..., Tensor]:
    """The same in torch, which takes any layout of x."""
    given = (norm.weight, norm.bias, norm.mean, norm.var, False, 0.0, norm.eps, False)

    def step(x: Tensor) -> Tensor:
        y: Tensor = torch.batch_norm(x, *given)
        return y if lower is None and upper is None else y.clamp_(lower, upper)

    step.__name__ = step.__qualname__ = "batch_norm"
    return step
