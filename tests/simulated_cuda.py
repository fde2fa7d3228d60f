# SPDX-License-Identifier: Apache-2.0
"""Tensors that say they are on a CUDA device and keep their values on the CPU.

Under `simulated_cuda()` everything above the kernels meets GPUs that are not there: torch's own
operators run on the values inside, tensors of two devices refuse each other, and an operator of
sparselt is csrc/cuda's own, run on this CPU (`cuda_host.operators`). The kernel that it launches
gives what float64 arithmetic on the unpacked weight gives, or runs from its source (`cuda_host`).
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cuda_host import Host, registered
from cuda_host.operators import CPU, Launch, operators
from torch import Tensor, nn
from torch.nn import functional
from torch.sparse import SparseSemiStructuredTensor, SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from sparselt import cuda_graph, extension
from sparselt.formats import FORMATS

__all__ = ["Gpu", "SimulatedGraphs", "SimulatedTensor", "simulated_cuda"]

aten = torch.ops.aten
# What takes tensors of two devices.
_CROSSING = {aten._to_copy.default, aten.copy_.default, aten.index.Tensor, aten.index_put_.default}


def product_of_halves(
    x: Tensor,
    packed: Tensor,
    meta: Tensor,
    bias: Tensor | None,
    rows: int,
    least_rows: int,
    least_cols: int,
    transposed: bool,
) -> Tensor:
    """Torch's semi_structured::cutlass_mm, which it has for CUDA alone."""
    dense = sparse_semi_structured_to_dense_cutlass(packed, meta).double()
    y = dense @ (x.t() if transposed else x).double()
    y = (y if bias is None else y + bias[:, None]).to(x.dtype)
    return y.t().contiguous() if transposed else y


class SimulatedTensor(Tensor):
    """A tensor "on" a CUDA device."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor, device: torch.device) -> SimulatedTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls, values.shape, strides=values.stride(), dtype=values.dtype, device=device
        )
        made.values = values
        return made

    def __repr__(self) -> str:
        return f"SimulatedTensor({self.values}, device={self.device})"

    def __deepcopy__(self, memo: dict[int, Any]) -> SimulatedTensor:
        copied = SimulatedTensor(self.values.clone(), self.device)
        return (
            nn.Parameter(copied, self.requires_grad) if isinstance(self, nn.Parameter) else copied
        )

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        try:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        except RuntimeError as error:
            # What asks the CUDA library for its device before it calls an operator.
            if "not linked with support for cuda" not in str(error):
                raise
        leaves = pytree.tree_leaves((args, kwargs))
        device = next(leaf.device for leaf in leaves if isinstance(leaf, SimulatedTensor))
        result = func(*inside(tuple(args)), **inside(kwargs))
        return pytree.tree_map_only(Tensor, lambda t: SimulatedTensor(t, device), result)

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        raise AssertionError(f"{func} met a simulated tensor outside of simulated_cuda()")


def inside(tree: Any) -> Any:
    """The same with the values of simulated tensors in their places."""
    return pytree.tree_map_only(SimulatedTensor, lambda tensor: tensor.values, tree)


class Gpu(TorchDispatchMode):
    """The mode that runs operators on simulated tensors.

    Attributes:
        launches: names of the kernels that have run.
        asked: names of the operators of torch that have.
        machine: runs kernels from their sources; None for float64 arithmetic.
    """

    def __init__(self, machine: Host | None = None) -> None:
        super().__init__()
        self.launches: list[str] = []
        self.asked: list[str] = []
        self.machine = machine

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        self.asked.append(func.__name__)
        if any(issubclass(kind, SparseSemiStructuredTensor) for kind in types):
            with self:
                return SparseSemiStructuredTensorCUTLASS.__torch_dispatch__(
                    func, types, args, kwargs
                )
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        simulated = [tensor for tensor in tensors if isinstance(tensor, SimulatedTensor)]
        target = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        if target is not None and target.type == "cuda":
            target = torch.device("cuda", target.index or 0)
            kwargs["device"] = torch.device("cpu")
        if target is None and simulated:
            target = args[0].device if func is aten.copy_.default else simulated[0].device
        if func.namespace == "sparselt" and simulated:
            return self.run(func.__name__.split(".")[0], args)
        if func not in _CROSSING:
            same_device(func, tensors)
        wrappers = {id(tensor.values): tensor for tensor in simulated}
        call = product_of_halves if func.namespace == "semi_structured" else func
        result = call(*inside(tuple(args)), **inside(kwargs))
        if target is None or target.type != "cuda":
            return result

        def wrap(tensor: Tensor) -> Tensor:
            known = wrappers.get(id(tensor))
            return SimulatedTensor(tensor, target) if known is None else known

        return pytree.tree_map_only(Tensor, wrap, result)

    def run(self, op: str, args: Sequence[Any]) -> Any:
        """An operator of sparselt, from its source."""
        device = next(x for x in args if isinstance(x, SimulatedTensor)).device
        elsewhere = [
            (t, CPU) if not isinstance(t, SimulatedTensor) else (t.values, t.device.index)
            for t in pytree.tree_leaves(args)
            if isinstance(t, Tensor) and t.device != device
        ]
        own = inside(tuple(args))

        def launched(launch: Launch) -> None:
            self.launches.append(launch.kernel)
            launch.y.copy_(self._result(op, own, launch))

        y = operators().call(op, *own, device=device.index, elsewhere=elsewhere, on_launch=launched)
        return None if y is None else SimulatedTensor(y, device)

    def _result(self, op: str, args: Sequence[Any], launch: Launch) -> Tensor:
        """What a kernel writes, flat as it lies in memory."""
        if self.machine is not None:
            return self.machine.launch(
                launch.kernel, launch.integers, launch.arrays, launch.limits, launch.workspace
            )
        x, (parts, meta, bias, residual, *rest) = args[0], args[1 + op.endswith("_out") :]
        *geometry, lower, upper, _ = rest
        format_name = registered()[launch.kernel][1]
        block = None if format_name == "csr" else tuple(meta[:2])
        values = [*parts[:-1], parts[-1].float()]
        weight = FORMATS[format_name].from_parts(values, meta[2:], block).to_dense().double()
        if op.startswith("conv2d"):
            y = functional.conv2d(x.double(), weight.view(meta[2:]), None, *geometry)
            y = finished(y, bias, residual, (lower, upper), 1)
            return (y.movedim(1, -1) if format_name == "bsr_nhwc" else y).flatten()
        y = x.double() @ weight.mT if op == "linear" else weight @ x.double()
        return finished(y, bias, residual, (lower, upper), -1 if op == "linear" else 0).flatten()


def finished(y: Tensor, bias: Any, residual: Any, limits: Any, axis: int) -> Tensor:
    """Bias along an axis, residual and clamp."""
    if bias is not None:
        y = y + bias.double().view([-1 if i == axis % y.dim() else 1 for i in range(y.dim())])
    y = y if residual is None else y + residual.double()
    return y if limits == (None, None) else y.clamp(*limits)


def same_device(func: Any, tensors: Sequence[Tensor]) -> None:
    """Torch's rule: numbers may come from the CPU, everything else from one device."""
    devices = {tensor.device for tensor in tensors if tensor.dim() or tensor.is_cuda}
    if len(devices) > 1:
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, got {devices}")


class SimulatedEvent:
    """An event of a stream on which everything has happened when it is recorded."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.seconds = math.nan

    def record(self, stream: object = None) -> None:
        self.seconds = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: SimulatedEvent) -> float:
        return 1e3 * (end.seconds - self.seconds)


class SimulatedGraphs:
    """Graphs whose replay calls again what was captured, into the same results.

    Attributes:
        log: what was asked for, in order.
        busy: whether the caller records a graph of its own.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.log: list[str] = []
        self.busy = False

    def can_capture(self) -> bool:
        return not self.busy

    def capture(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        self.log.append("capture")
        result = call()

        def replay() -> None:
            self.log.append("replay")
            for old, new in zip(*map(pytree.tree_leaves, (result, call())), strict=True):
                if isinstance(old, Tensor):
                    old.copy_(new)

        return replay, result

    def wait(self) -> None:
        self.log.append("wait")

    def done(self) -> None:
        self.log.append("done")

    def settle(self) -> None:
        self.log.append("settle")


@contextmanager
def simulated_cuda(
    monkeypatch: pytest.MonkeyPatch,
    machine: Host | None = None,
    capabilities: Sequence[int] = (90, 90),
) -> Iterator[Gpu]:
    """GPUs for the block of code.

    Args:
        monkeypatch: undoes what is changed of torch and sparselt.
        machine: runs kernels from their sources.
        capabilities: the compute capability of each, 90 for 9.0.
    """
    if torch.version.cuda is not None:
        pytest.skip("a CUDA build of torch meets a device in test_cuda_device_api.py")
    operators().set_devices(*capabilities)
    with monkeypatch.context() as patch:
        # Or else a module writes a moved parameter's data into the old one, a plain tensor.
        patch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(Tensor, "cuda", lambda tensor, device=None: tensor.to(device or "cuda:0"))
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        patch.setattr(torch.cuda, "Event", SimulatedEvent)
        patch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        patch.setattr(torch.cuda, "synchronize", lambda device=None: None)
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        properties = SimpleNamespace(
            name="simulated", major=9, minor=0, L2_cache_size=1 << 16, multi_processor_count=2
        )
        patch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
        patch.setattr(torch.cuda, "get_device_name", lambda device=None: "simulated")
        patch.setattr(SparseSemiStructuredTensor, "_FORCE_CUTLASS", True)
        patch.setattr(cuda_graph, "TorchGraphs", SimulatedGraphs)
        patch.setenv("SPARSELT_CACHE", "off")
        patch.setattr(extension, "_cuda", operators().module)
        patch.setattr(extension, "_SERVED", extension.served())
        extension.kernels.cache_clear()
        try:
            with Gpu(machine) as gpu:
                yield gpu
        finally:
            extension.kernels.cache_clear()
