# SPDX-License-Identifier: Apache-2.0
"""Puts native programs in the place of stretches of a lowered graph.

A stretch is as many nodes as can run one after the other without torch. It becomes one call, which
makes a native program for each set of shapes that it meets and keeps it. Whatever is odd about a
call (autocast, a tensor that is no plain one on the CPU, a shape that a step refuses) runs the same
nodes in torch.
"""

from __future__ import annotations

import itertools
import math
import operator
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparselt.builder import LAYER, Builder, DenseStep, NotNativeError, operation
from sparselt.emit import emit
from sparselt.emit_views import VIEWS
from sparselt.extension import ArenaPool, NativeProgram
from sparselt.fuse import is_mutating

__all__ = ["SEGMENT", "Segment", "SegmentProgram", "is_of_segment", "nativize"]

# Where a graph's node that calls a segment keeps it.
SEGMENT = "sparselt_segment"

# Programs kept by a segment; the oldest goes when one more is made.
_MAX_PROGRAMS = 32
# A run of this length on all threads is longer on one: there is nothing to choose.
_LONG_RUN_US = 1000.0
# So is one whose first run takes that long, though it touches the arena for the first time.
_LONG_FIRST_RUN_US = 10_000.0
_ROUNDS = 7
_EACH_ROUNDS = 3
# A run shorter than this on one thread takes two only where they are so many times as fast.
_SHORT_RUN_US = 100.0
_CLEAR_GAIN = 1.3
# The first address of a tensor, and how many floats its samples lie apart.
_Stretches = list[tuple[int, int]]
# Steps that return their operand's memory: what is written to them is written to it.
_VIEWS = {"alias", "contiguous", "detach", *VIEWS}
# Steps that change nothing, whatever their flags look like.
_PURE = _VIEWS | {"adaptive_avg_pool2d", "avg_pool2d", "cat", "max_pool2d", "mean"}


class Segment:
    """A stretch of a graph: a function of tensors, and of whole numbers, that runs natively.

    Args:
        graph: its nodes; placeholders for what comes from outside.
        pool: of the arenas of all segments of a network.
        images_innermost: whether its programs keep the images of a batch innermost.
    """

    def __init__(self, graph: fx.Graph, pool: ArenaPool, images_innermost: bool = False) -> None:
        self.torch = fx.GraphModule({}, graph)
        self.pool = pool
        self.images_innermost = images_innermost
        self.inputs = [node for node in graph.nodes if node.op == "placeholder"]
        self.nodes = [node for node in graph.nodes if node.op.startswith("call_")]
        self.outputs = next(node for node in graph.nodes if node.op == "output").args[0]
        self.programs: dict[tuple[Any, ...], SegmentProgram | None] = {}
        self.lock = threading.Lock()

    def __call__(self, *values: Any) -> Any:
        """The results: one value, or a tuple of several."""
        program = self.program_for(values)
        if program is not None:
            return program(values)
        results = self.torch(*values)
        return results[0] if len(results) == 1 else results

    def program_for(self, values: Sequence[Any]) -> SegmentProgram | None:
        """The program for values of these shapes; None where torch is to run."""
        if torch.is_autocast_enabled("cpu") or not all(map(_is_plain, values)):
            return None
        key = (*[x.shape if isinstance(x, Tensor) else x for x in values], torch.get_num_threads())
        try:
            return self.programs[key]
        except KeyError:
            pass
        with self.lock, torch.inference_mode(False), torch.no_grad():
            if key not in self.programs:
                made = self._make(values)
                if len(self.programs) >= _MAX_PROGRAMS:
                    del self.programs[next(iter(self.programs))]
                self.programs[key] = made
            return self.programs[key]

    def _make(self, values: Sequence[Any]) -> SegmentProgram | None:
        if any(isinstance(x, Tensor) and x.numel() == 0 for x in values):
            return None
        try:
            return SegmentProgram(self, values)
        except (NotNativeError, RuntimeError):
            return None


class SegmentProgram:
    """A segment for inputs of given shapes.

    Attributes:
        shapes: of the results.
        steps: the node that each step belongs to, and the floats of its result.
        threads: of torch's that it is planned for.
        apart: whether each thread runs samples of its own; None where that was never asked.
    """

    def __init__(self, segment: Segment, values: Sequence[Any]) -> None:
        self.threads = torch.get_num_threads()
        self.native = NativeProgram(self.threads, segment.pool, segment.images_innermost)
        build = Builder(self.native)
        for node, value in zip(segment.inputs, values, strict=True):
            build.add_input(node, tuple(value.shape) if isinstance(value, Tensor) else value)
        for node in segment.nodes:
            emit(build, node)
        self.shapes = [build.add_output(node) for node in segment.outputs]
        self.strides = [_strides(shape) for shape in self.shapes]
        if build.has_empty():
            raise NotNativeError("an empty tensor")
        self.native.finish()
        self.kept = build.kept
        self.steps = [(node, build.values[node].floats) for node in build.names]
        self.apart: bool | None = None
        if self.native.has_parts and self.threads > 1:
            self._choose_threads(values)

    def __call__(self, values: Sequence[Any]) -> Any:
        inputs, outputs = self._bind(values)
        self.native.run([x.data_ptr() for x in inputs], [y.data_ptr() for y in outputs])
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def straight(self, x: Tensor) -> Tensor | None:
        """The one result for the one input, of its shape; None where `Segment` must look closer.

        The shortest way in, for networks that run for microseconds: the checks and an allocation
        in half the time of `torch.empty`. Needs no inference mode.
        """
        if (
            x.dtype is not torch.float32
            or not x.is_cpu
            or x.layout is not torch.strided
            or not x.is_contiguous()
            or torch.get_num_threads() != self.threads
            or torch.is_autocast_enabled("cpu")
        ):
            return None
        y = x.new_empty_strided(self.shapes[0], self.strides[0])
        self.native.run_one(x.data_ptr(), y.data_ptr())
        return y

    def run_each(self, values: Sequence[Any], of_samples: Sequence[bool]) -> list[Tensor]:
        """The results for each of several samples, put together.

        Args:
            values: tensors, and whole numbers.
            of_samples: which of them are of all samples, along the first dimension: of a multiple
                of those that the program is for.
        """
        given = zip(values, of_samples, strict=True)
        inputs = [(x.contiguous(), each) for x, each in given if isinstance(x, Tensor)]
        samples = next(x.shape[0] for x, each in inputs if each)
        count = samples // self.shapes[0][0]
        outputs = [
            torch.empty((samples, *shape[1:]), dtype=torch.float32, device="cpu")
            for shape in self.shapes
        ]
        sources = [(x.data_ptr(), x.numel() // count if each else 0) for x, each in inputs]
        results = [(y.data_ptr(), y.numel() // count) for y in outputs]
        if self.apart is None and count >= torch.get_num_threads() > 1:
            self.apart = self._choose_apart(sources, results)
        self.native.run_each(sources, results, count, bool(self.apart))
        return outputs

    def watch(self, values: Sequence[Any]) -> tuple[Any, list[tuple[int, int]]]:
        """The results, and begin and end of each step in nanoseconds."""
        inputs, outputs = self._bind(values)
        spans = self.native.run_watched(
            [x.data_ptr() for x in inputs], [y.data_ptr() for y in outputs]
        )
        return outputs[0] if len(outputs) == 1 else tuple(outputs), spans

    def _bind(self, values: Sequence[Any]) -> tuple[list[Tensor], list[Tensor]]:
        inputs = [x.contiguous() for x in values if isinstance(x, Tensor)]
        return inputs, [
            torch.empty_strided(*size, dtype=torch.float32, device="cpu")
            for size in zip(self.shapes, self.strides, strict=True)
        ]

    def _choose_threads(self, values: Sequence[Any]) -> None:
        """Runs on one thread where that is faster: waking another costs microseconds.

        A short run takes two only for a clear gain: where others keep the cores busy, the second
        thread arrives after milliseconds.
        """
        if _microseconds(self, values) > _LONG_FIRST_RUN_US:
            return
        best = {True: math.inf, False: math.inf}
        for _ in range(_ROUNDS):
            for parallel in best:
                self.native.set_parallel(parallel)
                best[parallel] = min(best[parallel], _microseconds(self, values))
                if best[True] > _LONG_RUN_US:
                    return
        gain = _CLEAR_GAIN if best[False] < _SHORT_RUN_US else 1.0
        self.native.set_parallel(best[True] * gain < best[False])

    def _choose_apart(self, inputs: _Stretches, outputs: _Stretches) -> bool:
        """Whether threads gain by having samples of their own, to the same bits."""
        threads = torch.get_num_threads()
        best = {True: math.inf, False: math.inf}
        for _ in range(_EACH_ROUNDS):
            for apart in best:
                us = _microseconds(self.native.run_each, inputs, outputs, threads, apart)
                best[apart] = min(best[apart], us)
        return best[True] < best[False]


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def _microseconds(call: Callable[..., object], *args: Any) -> float:
    begin = time.perf_counter_ns()
    call(*args)
    return (time.perf_counter_ns() - begin) / 1e3


def _is_plain(value: Any) -> bool:
    if isinstance(value, int):
        return True
    return (
        type(value) in (Tensor, nn.Parameter)
        and value.dtype is torch.float32
        and value.is_cpu
        and value.layout is torch.strided
    )


def nativize(module: fx.GraphModule, images_innermost: bool = False) -> fx.GraphModule:
    """A graph whose native stretches are calls of segments; the same module where there are none.

    Args:
        module: lowered, with `meta["val"]` on its nodes; not changed.
        images_innermost: see `Segment`.
    """
    nodes = [node for node in module.graph.nodes if node.op.startswith("call_")]
    native: set[fx.Node] = set()
    for node in nodes:
        if _is_native(node, native):
            native.add(node)
    if any(_changes(node) and node not in native for node in nodes):
        return module
    groups = list(_groups(module.graph, nodes, native))
    useful = [group for group in groups if group[0] in native and any(map(_gains, group))]
    if not useful:
        return module
    pool, graph = ArenaPool(), fx.Graph()
    places: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            places[node] = graph.node_copy(node, places.__getitem__)
    for group in groups:
        if group in useful:
            _call_segment(graph, places, group, pool, images_innermost)
        else:
            for node in group:
                places[node] = graph.node_copy(node, places.__getitem__)
    output = next(node for node in module.graph.nodes if node.op == "output")
    places[output] = graph.node_copy(output, places.__getitem__)
    graph.lint()
    return fx.GraphModule(module, graph)


def _is_native(node: fx.Node, native: set[fx.Node]) -> bool:
    """Whether a node has a native step, tried out on a program of its own."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not _is_plain_like(value) or value.numel() == 0:
        return False
    if _changes(node) and not _changes_its_own(node, native):
        return False
    build = Builder(NativeProgram(1, ArenaPool()), trial=True)
    try:
        for source in node.all_input_nodes:
            given = source.meta.get("val")
            if isinstance(given, Tensor):
                if not _is_plain_like(given):
                    return False
                build.add_input(source, tuple(given.shape))
            else:
                build.add_input(source, int(given))  # type: ignore[arg-type]
        emit(build, node)
    except (NotNativeError, RuntimeError, TypeError, ValueError):
        return False
    return build.values[node].shape == tuple(value.shape)


def _is_plain_like(value: Tensor) -> bool:
    return value.dtype is torch.float32 and value.device.type == "cpu"


def _gains(node: fx.Node) -> bool:
    """Whether a node is a layer that a native program has more for than torch's operator."""
    layer = node.meta.get(LAYER)
    if not isinstance(layer, DenseStep):
        return layer is not None
    value = node.meta["val"]
    return layer.packs is not None and layer.packs.packed(math.prod(value.shape[:-1])) is not None


def _changes(node: fx.Node) -> bool:
    return is_mutating(node) and operation(node) not in _PURE


def _changes_its_own(node: fx.Node, native: set[fx.Node]) -> bool:
    """Whether a node changes a tensor in place that nothing else reads or shares memory with."""
    changed = node.args[0]
    return (
        isinstance(changed, fx.Node)
        and changed in native
        and operation(changed) not in _VIEWS
        and list(changed.users) == [node]
    )


def _as_function(segment: Segment) -> Callable[..., Any]:
    def native_program(*values: Any) -> Any:
        return segment(*values)

    return native_program


def is_of_segment(node: fx.Node) -> bool:
    """Whether a node of a graph calls a segment, or takes one of its results apart."""
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        return SEGMENT in node.args[0].meta
    return SEGMENT in node.meta


def _groups(
    graph: fx.Graph, nodes: Sequence[fx.Node], native: set[fx.Node]
) -> Iterable[list[fx.Node]]:
    """The nodes in an order that keeps native ones together, cut where the kind changes."""
    done = {node for node in graph.nodes if not node.op.startswith("call_")}
    waiting = list(nodes)
    for kind in itertools.cycle((False, True)):
        if not waiting:
            return
        group: list[fx.Node] = []
        rest: list[fx.Node] = []
        for node in waiting:
            ready = (node in native) is kind and all(x in done for x in node.all_input_nodes)
            (group if ready else rest).append(node)
            if ready:
                done.add(node)
        if group:
            yield group
        waiting = rest


def _call_segment(
    graph: fx.Graph,
    places: dict[fx.Node, fx.Node],
    group: list[fx.Node],
    pool: ArenaPool,
    images_innermost: bool,
) -> None:
    """Adds the call of a segment made of some nodes, and leaves its results in `places`."""
    members = set(group)
    inputs = list(dict.fromkeys(x for n in group for x in n.all_input_nodes if x not in members))
    outputs = [node for node in group if any(user not in members for user in node.users)]
    inner = fx.Graph()
    own: dict[fx.Node, fx.Node] = {}
    for index, node in enumerate(inputs):
        own[node] = inner.placeholder(f"outside_{index}")
    for node in group:
        own[node] = inner.node_copy(node, own.__getitem__)
    results = [own[node] for node in outputs]
    inner.output(tuple(results))
    segment = Segment(inner, pool, images_innermost)
    call = graph.call_function(_as_function(segment), tuple(places[node] for node in inputs))
    call.meta = dict(outputs[0].meta)
    call.meta[SEGMENT] = segment
    for index, node in enumerate(outputs):
        places[node] = call
        if len(outputs) > 1:
            places[node] = graph.call_function(operator.getitem, (call, index))
