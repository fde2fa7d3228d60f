# SPDX-License-Identifier: Apache-2.0
"""A layer as a compiled program runs it: between others, with its values kept as the program does.

The neighbours hand every value on unchanged (each row keeps one weight, a 1) and run panels. So the
program keeps the layer's input and output in panels where the layer's kernel can, and the result is
the layer's own.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from sparselt import ops
from sparselt.builder import LAYER, DenseStep
from sparselt.extension import ArenaPool
from sparselt.facts import facts_of
from sparselt.native import Segment
from sparselt.nn import SPARSE_LAYERS, SparseLayer
from sparselt.plan import Plan
from sparselt.rules import block_for

__all__ = ["MiddleLayer"]


class MiddleLayer:
    """The call of a layer in the middle of a native program of three.

    Args:
        module: nn.Linear or nn.Conv2d without bias.
        mask: which weights are kept.
        plan: what it runs.
        x: the program's input, and the layer's.
        images_innermost: whether the program keeps its values so.

    Attributes:
        in_panels: how many of the layer's values, input and output, the program keeps in panels.
    """

    def __init__(
        self,
        module: nn.Linear | nn.Conv2d,
        mask: Tensor,
        plan: Plan,
        x: Tensor,
        images_innermost: bool = False,
    ) -> None:
        middle: SparseLayer | DenseStep = (
            DenseStep("layer", module, None, None)
            if plan.is_dense
            else SPARSE_LAYERS[type(module)](module, plan, mask)
        )
        rows, cols = module.weight.shape[:2]
        columns = x.numel() // cols
        graph = fx.Graph()
        node = graph.placeholder("x")
        for layer in (_hand_on(module, cols, columns), middle, _hand_on(module, rows, columns)):
            node = graph.call_function(_in_torch, (node,))
            node.meta[LAYER] = layer
        graph.output((node,))
        program = Segment(graph, ArenaPool(), images_innermost).program_for([x])
        assert program is not None, f"{plan.kernel}: no native program of {module}"
        self._x, self._program = x, program
        places = [
            place for place, (step, _) in enumerate(program.steps) if step.meta[LAYER] is middle
        ]
        self._steps = places[0], places[-1]
        self.in_panels = program.native.num_in_panels

    def __call__(self) -> Tensor:
        """The layer's output."""
        y = self._program([self._x])
        assert isinstance(y, Tensor)
        return y

    def step_us(self) -> float:
        """Runs the program; the microseconds that the layer took of it."""
        _, spans = self._program.watch([self._x])
        first, last = self._steps
        return (spans[last][1] - spans[first][0]) / 1e3


def _in_torch(x: Tensor) -> Tensor:
    raise AssertionError("every layer here has a native step")


def _hand_on(module: nn.Module, size: int, columns: int) -> SparseLayer:
    """A layer of `size` channels or features that returns its input."""
    plain = (
        nn.Linear(size, size, False)
        if isinstance(module, nn.Linear)
        else nn.Conv2d(size, size, 1, bias=False)
    )
    weight = torch.eye(size).view(plain.weight.shape)
    plain.weight = nn.Parameter(weight, requires_grad=False)
    facts = facts_of(plain, weight != 0, columns)
    kernel = next(k for k in ops.kernels() if k.usable and k.op == "panel" and k.format == "sell")
    plan = Plan(kernel.name, kernel.format, "", block=block_for(facts, kernel))
    return SPARSE_LAYERS[type(plain)](plain, plan)
