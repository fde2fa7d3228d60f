# SPDX-License-Identifier: Apache-2.0
"""Replays a program's launches as one CUDA graph, one graph for each set of input shapes.

A network of small layers spends more time on launching kernels than on running them. A graph
launches all of them at once. Its memory is fixed: inputs are copied in and results copied out, so a
caller owns what it is given and may keep it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sparselt.errors import DeviceError, explain_mismatch

__all__ = ["GraphedRun", "Graphs", "TorchGraphs", "graphed"]

Run = Callable[[Sequence[Any]], Any]

# Graphs kept by one program and plan, each with memory of its own; the one unused longest goes.
_MOST_GRAPHS = 8
# Sets of shapes that came once, and are worth a graph if they come again.
_MOST_SEEN = 1024
_WARM_UPS = 2


class Graphs(Protocol):
    """What `GraphedRun` needs of a device."""

    def can_capture(self) -> bool:
        """Whether the current stream is free for a capture or a replay."""
        ...

    def capture(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Records what `call` launches; returns the replay, and the result that it renews."""
        ...

    def wait(self) -> None:
        """Makes the current stream wait for the last `done`."""
        ...

    def done(self) -> None:
        """Marks the end of a replay on the current stream."""
        ...

    def settle(self) -> None:
        """Waits on the host for the last `done`."""
        ...


class TorchGraphs:
    """CUDA graphs of torch on one device; all share one pool of memory.

    Args:
        device: of every tensor that a graph reads and writes.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool: Any = None
        self._last: torch.cuda.Event | None = None

    def can_capture(self) -> bool:
        """Not while the caller records a graph, which our launches are to be part of."""
        return not torch.cuda.is_current_stream_capturing()

    def capture(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Runs `call` a few times on a stream of its own, and once more to record it."""
        with torch.cuda.device(self.device):
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UPS):
                    call()
            torch.cuda.current_stream().wait_stream(stream)
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the device meanwhile.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"
            ):
                result = call()
        return graph.replay, result

    def wait(self) -> None:
        """Two threads may call on two streams, and the graph's memory is one."""
        if self._last is not None:
            torch.cuda.current_stream(self.device).wait_event(self._last)

    def done(self) -> None:
        """Records an event."""
        if self._last is None:
            self._last = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._last.record(torch.cuda.current_stream(self.device))

    def settle(self) -> None:
        """Until then a graph's memory is in use."""
        if self._last is not None:
            self._last.synchronize()


@dataclass
class _Captured:
    inputs: list[Any]
    replay: Callable[[], None]
    result: Any


@dataclass
class GraphedRun:
    """A flat call that replays a graph from the second call of a set of shapes on.

    What cannot be captured runs as it is: the first call with a set of shapes, a call while the
    caller records a graph itself, and a network that waits for the device inside.

    Attributes:
        run: what is captured.
        graphs: of the device.
        device: of all tensors.
        note: a sentence on the graphs, for `explain`.
    """

    run: Run
    graphs: Graphs
    device: torch.device
    note: str = "launched as one CUDA graph from the second call of a set of input shapes on"
    _captured: OrderedDict[Any, _Captured | None] = field(default_factory=OrderedDict)
    _seen: set[Any] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, leaves: Sequence[Any]) -> Any:
        """The result, in tensors of the caller's own.

        Raises:
            DeviceError: an input is on another device than the program.
        """
        for leaf in leaves:
            if isinstance(leaf, Tensor) and leaf.device != self.device:
                raise DeviceError(
                    explain_mismatch("input", f"a tensor on {self.device}", leaf.device, "use .to")
                )
        if not self.graphs.can_capture():
            return self.run(leaves)
        key = tuple(
            (leaf.shape, leaf.stride(), leaf.dtype) if isinstance(leaf, Tensor) else repr(leaf)
            for leaf in leaves
        )
        # A tensor made under inference mode could not be written to outside of it.
        with self._lock, torch.inference_mode():
            captured = self._captured_for(key, leaves)
            if captured is not None:
                return self._replay(captured, leaves)
        return self.run(leaves)

    def _captured_for(self, key: Any, leaves: Sequence[Any]) -> _Captured | None:
        """The graph of a set of shapes; None where there is none, yet or at all."""
        if key in self._captured:
            self._captured.move_to_end(key)
            return self._captured[key]
        if key not in self._seen:
            if len(self._seen) >= _MOST_SEEN:
                self._seen.clear()
            self._seen.add(key)
            return None
        self._seen.remove(key)
        self._captured[key] = self._capture(leaves)
        if len(self._captured) > _MOST_GRAPHS:
            self.graphs.settle()
            self._captured.popitem(last=False)
        return self._captured[key]

    def _capture(self, leaves: Sequence[Any]) -> _Captured | None:
        self.graphs.wait()
        inputs = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        try:
            replay, result = self.graphs.capture(lambda: self.run(inputs))
        except RuntimeError as error:
            # A network that allocates by size of its data, or waits, is none the worse for it.
            line = str(error).strip().split("\n")[0]
            self.note = f"launched kernel by kernel, not as one CUDA graph: {line}"
            return None
        return _Captured(inputs, replay, result)

    def _replay(self, captured: _Captured, leaves: Sequence[Any]) -> Any:
        self.graphs.wait()
        for own, leaf in zip(captured.inputs, leaves, strict=True):
            if isinstance(own, Tensor):
                own.copy_(leaf, non_blocking=True)
        captured.replay()
        result = pytree.tree_map_only(Tensor, torch.clone, captured.result)
        self.graphs.done()
        return result


def graphed(run: Run, leaves: Sequence[Any]) -> Run:
    """A call as CUDA graphs where its inputs are on one CUDA device; else as it is.

    Args:
        run: a call without side effects.
        leaves: example inputs.
    """
    devices = {leaf.device for leaf in leaves if isinstance(leaf, Tensor)}
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        return run
    device = next(iter(devices))
    return GraphedRun(run, TorchGraphs(device), device)
