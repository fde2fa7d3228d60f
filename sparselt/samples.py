# SPDX-License-Identifier: Apache-2.0
"""Runs a batch one sample at a time, by the network planned for one.

The activations of one sample stay in caches that those of a batch do not fit. Where the network is
one native program, each thread may run samples of its own.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from sparselt.native import SEGMENT, Segment
from sparselt.shapes import drawn

__all__ = [
    "EachSample",
    "OnlySegment",
    "agree",
    "first_samples",
    "may_run_each",
    "only_segment",
]

# Two ways to compute the same differ by less than this share of the largest result.
_TOLERANCE = 1e-4


class EachSample:
    """A flat call that computes one sample of a batch after the other, or a few together.

    Args:
        module: the network planned for one sample, or for a few.
        constants: the values of the placeholders before the inputs.
    """

    def __init__(self, module: fx.GraphModule, constants: Sequence[Tensor]) -> None:
        self.forward = module.forward
        self.constants = constants
        self.only = only_segment(module.graph)

    def __call__(self, leaves: Sequence[Any], together: int = 1) -> Sequence[Tensor]:
        """The graph's results, put together along the first dimension.

        Args:
            leaves: tensors of as many samples each, and other values.
            together: how many samples are computed at a time; divides their number.
        """
        if self.only is not None:
            found = self.only.run(self.constants, leaves, together)
            if found is not None:
                return found
        count = next(leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor))
        results: list[Tensor] = []
        for i in range(0, count, together):
            some = [leaf[i : i + together] if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            own_results = self.forward(*self.constants, *some)
            if not results:
                results = [y.new_empty((count, *y.shape[1:])) for y in own_results]
            for whole, own in zip(results, own_results, strict=True):
                whole[i : i + together] = own
        return results


@dataclass(frozen=True)
class OnlySegment:
    """A segment that is all of a graph; found by `only_segment`.

    Attributes:
        segment: what the graph calls.
        arguments: for each argument, the place of its placeholder.
        results: for each of the graph's results, its place among the segment's.
    """

    segment: Segment
    arguments: list[int]
    results: list[int]

    @property
    def is_straight(self) -> bool:
        """Whether the segment takes the graph's only placeholder and returns its only result."""
        return self.arguments == [0] and self.results == [0] and len(self.segment.outputs) == 1

    def run(
        self, constants: Sequence[Tensor], leaves: Sequence[Any], together: int = 1
    ) -> list[Tensor] | None:
        """The results for all samples, some together; None where the segment is torch's to run."""
        given = [*constants, *leaves]
        values = [given[place] for place in self.arguments]
        each = [p >= len(constants) and isinstance(given[p], Tensor) for p in self.arguments]
        some = [x[:together] if own else x for x, own in zip(values, each, strict=True)]
        program = self.segment.program_for(some)
        if program is None or any(shape[:1] != (together,) for shape in program.shapes):
            return None
        found = program.run_each(values, each)
        return [found[place] for place in self.results]


def only_segment(graph: fx.Graph) -> OnlySegment | None:
    """The segment that computes all of a graph's results; None where there is no such."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    calls = [node for node in graph.nodes if SEGMENT in node.meta]
    if len(calls) != 1 or any(node not in placeholders for node in calls[0].args):
        return None
    arguments = [placeholders.index(node) for node in calls[0].args]
    places = []
    for node in results_of(graph):
        if node is calls[0]:
            places.append(0)
        elif node.target is operator.getitem and node.args[0] is calls[0]:
            places.append(node.args[1])
        else:
            return None
    return OnlySegment(calls[0].meta[SEGMENT], arguments, places)


def results_of(graph: fx.Graph) -> list[Any]:
    """What a flat graph returns, item by item."""
    return list(next(node for node in graph.nodes if node.op == "output").args[0])


def first_samples(leaves: Sequence[Any], count: int = 1) -> list[Any] | None:
    """The inputs of the first sample or samples; None where they are not of several samples each.

    Args:
        leaves: tensors, and other values.
        count: of samples.
    """
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    counts = {tuple(leaf.shape[:1]) for leaf in tensors}
    if len(counts) != 1 or counts & {(), (0,), (1,)}:
        return None
    # What is drawn at random to compare results by is a number.
    if any(leaf.dtype is not torch.float32 or not leaf.is_cpu for leaf in tensors):
        return None
    return [leaf[:count] if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def may_run_each(graph: fx.Graph, count: int, cache_bytes: int) -> bool:
    """Whether results are of samples, and some activation of all is larger than a core's cache.

    Args:
        graph: flat, with the values for all samples in `meta["val"]`.
        count: of samples.
        cache_bytes: of a core's second-level cache.
    """
    results = [
        node.meta.get("val") if isinstance(node, fx.Node) else node for node in results_of(graph)
    ]
    if not all(isinstance(y, Tensor) and tuple(y.shape[:1]) == (count,) for y in results):
        return False
    values = [node.meta.get("val") for node in graph.nodes if node.op == "call_function"]
    sizes = [y.numel() * y.element_size() for y in values if isinstance(y, Tensor)]
    return max(sizes, default=0) > cache_bytes


def agree(
    whole: Callable[[Sequence[Any]], Any],
    each: Callable[[Sequence[Any]], Any],
    leaves: Sequence[Any],
) -> bool:
    """Whether two calls give the same results, to rounding, for samples that all differ.

    Args:
        whole: computes all samples together.
        each: computes each by itself.
        leaves: of the shapes to run.
    """
    # Not the caller's values: samples that are alike would hide that the network mixes them.
    values = [drawn(x.shape, i) if isinstance(x, Tensor) else x for i, x in enumerate(leaves)]
    results = (pytree.tree_leaves(call(values)) for call in (each, whole))
    for a, b in zip(*results, strict=True):
        if not isinstance(b, Tensor) or not b.is_floating_point() or a.shape != b.shape:
            return False
        if not torch.allclose(a, b, _TOLERANCE, _TOLERANCE * float(b.abs().max())):
            return False
    return True
