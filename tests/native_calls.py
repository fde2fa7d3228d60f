# SPDX-License-Identifier: Apache-2.0
"""What the tests of native programs share: compiled networks, and how exact their results are."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import sparselt
from sparselt.native import SEGMENT, Segment

__all__ = ["assert_as_exact_as_torch", "compiled", "segments_of"]


def segments_of(program) -> list[Segment]:
    (planned, *_) = program._families[0].planned.values()
    return [node.meta[SEGMENT] for node in planned.module.graph.nodes if SEGMENT in node.meta]


def compiled(model: nn.Module, x: Tensor):
    """The program, and how often a segment of it has run in torch."""
    program = sparselt.compile(model, x)
    in_torch: list[int] = []
    for segment in segments_of(program):
        run = segment.torch.forward
        segment.torch.forward = lambda *v, run=run: (in_torch.append(1), run(*v))[1]
    return program, in_torch


def assert_as_exact_as_torch(got: object, model: nn.Module, x: Tensor) -> None:
    """At most four times as far from the float64 result as torch's float32 result is, by maximum
    norm, and no closer than a few roundings is asked for."""
    given = x.double() if x.is_floating_point() else x
    with torch.no_grad():
        exact = pytree.tree_leaves(copy.deepcopy(model).double()(given))
        plain = pytree.tree_leaves(model(x.clone()))
    for a, b, c in zip(pytree.tree_leaves(got), plain, exact, strict=True):
        if not b.is_floating_point():
            continue
        assert a.shape == b.shape
        scale = float(c.abs().max())
        bound = max(4 * float((b - c).abs().max()), 1e-6 * scale)
        assert float((a - c).abs().max()) <= bound
