# SPDX-License-Identifier: Apache-2.0
"""The backend "sparselt" of torch.compile.

Dynamo hands over each graph that it finds between graph breaks, with weights as inputs. Their
values at that moment are packed, and stretches of the graph become native programs; if a weight has
changed by a later call (another tensor, or changed in place), the graph is lowered again.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.backends import registry
from torch._subclasses.fake_tensor import FakeTensor
from torch.amp.autocast_mode import _enter_autocast

from sparselt.cuda_graph import graphed
from sparselt.errors import KernelError
from sparselt.explanation import remember
from sparselt.lowering import lower
from sparselt.native import nativize
from sparselt.tune import Tuner

__all__ = ["backend"]

# A weight that changes at every call is not worth packing.
_MOST_REPACKS = 4


def backend(
    module: fx.GraphModule, example_inputs: Sequence[Any], **options: Any
) -> Callable[..., Any]:
    """Compiles one graph of Dynamo: its layers run sparse where that is faster, the rest in torch.

    Under enabled gradients with weights or inputs that require one, the graph runs in torch as it
    is, with a warning: sparse layers only run forward. So does one under autocast on the CPU, or
    with autocast in it: results are of torch's type.

    Args:
        module: the graph.
        example_inputs: a value for each placeholder; parameters and buffers of modules are among
            them.
        options: what torch.compile passes on: with mode="reduce-overhead" calls on a CUDA device
            replay CUDA graphs, and their results are the caller's own; others are ignored.

    Raises:
        KernelError: SPARSELT_KERNEL names a kernel that is unknown or does not fit a layer.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(8, 4).eval()
        >>> fast = torch.compile(model, backend=backend)
        >>> with torch.inference_mode():
        ...     fast(torch.ones(2, 8)).shape
        torch.Size([2, 4])
    """
    tensors = [x for x in example_inputs if isinstance(x, Tensor)]
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        warnings.warn(
            "the sparselt backend only runs forward, and gradients are enabled: this graph runs "
            "dense; call the compiled model under torch.inference_mode() or torch.no_grad()",
            stacklevel=2,
        )
        return module.forward
    if any(isinstance(x, FakeTensor) for x in tensors):
        return module.forward
    if _is_under_autocast(module.graph):
        warnings.warn(
            "kernels of the sparselt backend compute float32 on the CPU, and autocast asks for a "
            "narrower type: this graph runs dense",
            stacklevel=2,
        )
        return module.forward
    compiled = _Compiled(module, options.get("mode") == "reduce-overhead")
    return compiled if compiled.lower(example_inputs) else module.forward


class _Compiled:
    """A lowered graph that notices when the weights that it was lowered with have changed."""

    def __init__(self, module: fx.GraphModule, graphs: bool) -> None:
        self.module, self.graphs = module, graphs
        self.names: dict[int, str] = {}
        for index, node in enumerate(n for n in module.graph.nodes if n.op == "placeholder"):
            if re.search(r"_(parameters|buffers)_", str(node.target)):
                self.names[index] = str(node.target)
        self.repacks = 0
        self.run: Callable[..., Any] = module.forward
        self.watched: list[tuple[int, Tensor, tuple[int, int]]] = []

    def lower(self, inputs: Sequence[Any]) -> bool:
        """Lowers the graph with these values; False if it cannot be."""
        values = {index: inputs[index] for index in self.names if isinstance(inputs[index], Tensor)}
        weight_bytes = sum(v.numel() * v.element_size() for v in values.values())
        tuner = Tuner(weight_bytes=weight_bytes, in_program=True)
        hints = [x.node.hint if isinstance(x, torch.SymInt) else x for x in inputs]
        try:
            with torch.no_grad():
                lowered = lower(self.module, values, hints, tuner)
                run = nativize(lowered.module).forward
        except KernelError:
            raise
        except Exception as error:
            # A graph that cannot be read still has to run, and torch can run it.
            kind = type(error).__name__
            warnings.warn(f"a graph runs in torch as it is: {kind}: {error}", stacklevel=2)
            return False
        self.run = self.replayed(run, inputs) if self.graphs else run
        for row, index in zip(lowered.rows, lowered.weights, strict=True):
            if index is not None:
                remember(values[index], row)
        self.watched = [(i, values[i], _state(values[i])) for i in lowered.sources]
        return True

    def replayed(self, run: Callable[..., Any], inputs: Sequence[Any]) -> Callable[..., Any]:
        """A call as CUDA graphs, which read the model's own tensors where they lie.

        Runs kernel by kernel where one of these was replaced by another, and where the first call
        has written to one, as batch norm does in training: a recording would do so once more.
        """
        own = {index: inputs[index] for index in self.names}
        others = [index for index in range(len(inputs)) if index not in own]

        def with_own(leaves: Sequence[Any]) -> Any:
            given = iter(leaves)
            return run(*(own[i] if i in own else next(given) for i in range(len(inputs))))

        graph = graphed(with_own, [inputs[index] for index in others])
        before = {i: _state(own[i]) for i in own if isinstance(own[i], Tensor)}
        writes: bool | None = None

        def call(*args: Any) -> Any:
            nonlocal writes
            if writes or any(args[index] is not value for index, value in own.items()):
                return run(*args)
            result = graph([args[index] for index in others])
            if writes is None:
                writes = any(_state(own[i]) != state for i, state in before.items())
            return result

        return call

    def __call__(self, *args: Any) -> Any:
        for index, value, state in self.watched:
            if args[index] is not value or _state(value) != state:
                return self.again(args)
        return self.run(*args)

    def again(self, args: Sequence[Any]) -> Any:
        """Lowers anew with changed weights, or gives up packing those that keep changing."""
        self.repacks += 1
        if self.repacks > _MOST_REPACKS or not self.lower(args):
            self.run, self.watched = self.module.forward, []
        return self.run(*args)


def _is_under_autocast(graph: fx.Graph) -> bool:
    """Whether some of a graph runs under autocast on the CPU, on which Dynamo guards."""
    return torch.is_autocast_enabled("cpu") or any(
        node.target is _enter_autocast and node.args[0] == "cpu" for node in graph.nodes
    )


def _state(value: Tensor) -> tuple[int, int]:
    """Changes when a tensor's storage is replaced or written to."""
    return value.data_ptr(), 0 if value.is_inference() else value._version


# Where torch already knows the name from the package's entry point, it registers it itself.
if "sparselt" not in registry._BACKENDS:
    registry.register_backend(backend, name="sparselt")
