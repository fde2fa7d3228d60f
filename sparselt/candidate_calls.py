# SPDX-License-Identifier: Apache-2.0
"""What is timed of a layer: a call of each candidate, dense included."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor, nn

from sparselt.cpu_timer import measure
from sparselt.neighbours import depthwise_conv2d, is_depthwise
from sparselt.nn import SPARSE_LAYERS, SparseLayer, SparseLinear
from sparselt.packed_rows import pack_rows, packed_linear, packs_rows
from sparselt.plan import DENSE, SEMI_STRUCTURED, Candidate, Plan
from sparselt.semi_structured import SemiStructuredLinear

__all__ = ["CandidateCalls", "call_us"]

Call = Callable[[], object]


class CandidateCalls:
    """A layer packed for its candidates, once for each format and block.

    Args:
        module: nn.Linear, nn.Conv1d or nn.Conv2d.
        mask: which weights are kept; None for those that are not 0.
        pool: the candidates, dense left out.
        in_program: whether dense means what a program runs, which is not always torch's operator.
    """

    def __init__(
        self,
        module: nn.Module,
        mask: Tensor | None,
        pool: Sequence[Candidate],
        in_program: bool = False,
    ) -> None:
        self.module, self.mask, self.pool = module, mask, pool
        self._dense_call = _in_program_call if in_program else _dense_call
        self._layers = {
            (item.format, item.block): _sparse_layer(module, mask, item)
            for item in pool
            if item.format != SEMI_STRUCTURED
        }

    def on(self, x: Tensor) -> dict[str, Call]:
        """A call on an input for each candidate, by name; "dense" first."""
        calls: dict[str, Call] = {DENSE: self._dense_call(self.module, x)}
        for item in self.pool:
            if item.format == SEMI_STRUCTURED:
                calls[item.kernel] = _semi_structured_call(self.module, self.mask, x)
            else:
                layer = self._layers[item.format, item.block]
                calls[item.kernel] = _sparse_call(layer, item.kernel, x)
        return calls


@cache
def call_us() -> float:
    """Microseconds on the CPU that the call of a sparse layer takes around its kernel."""
    layer, x = SparseLinear.from_dense(nn.Linear(8, 8)), torch.ones(1, 8)
    return measure({"call": lambda: layer(x)}, budget_ms=1.0)["call"]


def _sparse_layer(module: nn.Module, mask: Tensor | None, item: Candidate) -> SparseLayer:
    kind = next(sparse for dense, sparse in SPARSE_LAYERS.items() if isinstance(module, dense))
    return kind(module, Plan(item.kernel, item.format, "", block=item.block), mask)


def _dense_call(module: nn.Module, x: Tensor) -> Call:
    """Torch's operator: `forward` of these layers is F.linear or F.conv and nothing else."""
    forward = module.forward
    return lambda: forward(x)


def _in_program_call(module: nn.Module, x: Tensor) -> Call:
    """What a program runs for a dense layer."""
    if is_depthwise(module):
        return _depthwise_call(module, x)
    if isinstance(module, nn.Linear) and packs_rows(module, x.numel() // module.in_features):
        # What a program packs has to be faster than this, or it runs the plain weight.
        packed, linear = pack_rows(module, x.numel() // module.in_features), module
        return lambda: packed_linear(x, packed, linear)
    return _dense_call(module, x)


def _depthwise_call(module: nn.Module, x: Tensor) -> Call:
    assert isinstance(module, nn.Conv2d)
    assert not isinstance(module.padding, str)
    geometry = (module.stride, module.padding, module.dilation)
    return lambda: depthwise_conv2d(x, module.weight, module.bias, *geometry)


def _sparse_call(layer: SparseLayer, kernel: str, x: Tensor) -> Call:
    def call() -> object:
        layer.kernel = kernel
        return layer.forward(x)

    return call


def _semi_structured_call(module: nn.Module, mask: Tensor | None, x: Tensor) -> Call:
    """Packs at the first call: what torch's library refuses fails as a call does."""
    made: list[nn.Module] = []

    def call() -> object:
        if not made:
            assert isinstance(module, nn.Linear)
            # No parameter can be made of torch's tensor under inference mode.
            with torch.inference_mode(False), torch.no_grad():
                made.append(SemiStructuredLinear(module, Plan("", "", ""), mask))
        return made[0](x)

    return call
