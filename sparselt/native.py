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
from torch import Tensor, fx

from sparselt.builder import LAYER, Builder, DenseStep, NotNativeError, Shape, operation
from sparselt.emit import emit
from sparselt.extension import ArenaPool, NativeProgram
from sparselt.fuse import argument, is_mutating

__all__ = ["SEGMENT", "Segment", "is_of_segment", "nativize"]

# Where a graph's node that calls a segment keeps it.
SEGMENT = "sparselt_segment"

# Programs kept by a segment; the oldest goes when one more is made.
_MAX_PROGRAMS = 32
# A run of this length on all threads is longer on one: there is nothing to choose.
_LONG_RUN_US = 1000.0
_ROUNDS = 7
_SAMPLE_ROUNDS = 2
_CLEAR_GAIN = 0.95
# Steps that return their operand's memory: what is written to them is written to it.
_VIEWS = {"alias", "contiguous", "detach", "flatten", "reshape", "view"}
# Steps that change nothing, whatever their flags look like.
_PURE = _VIEWS | {"adaptive_avg_pool2d", "avg_pool2d", "cat", "max_pool2d", "mean"}


class Segment:
    """A stretch of a graph: a function of tensors, and of whole numbers, that runs natively.

    Args:
        graph: its nodes; placeholders for what comes from outside.
        pool: of the arenas of all segments of a network.
    """

    def __init__(self, graph: fx.Graph, pool: ArenaPool) -> None:
        self.torch = fx.GraphModule({}, graph)
        self.pool = pool
        self.inputs = [node for node in graph.nodes if node.op == "placeholder"]
        self.nodes = [node for node in graph.nodes if node.op.startswith("call_")]
        self.outputs = next(node for node in graph.nodes if node.op == "output").args[0]
        self.programs: dict[tuple[Any, ...], _Program | None] = {}
        # By shapes, and not by threads: a choice between kernels that round differently.
        self.sample_wise: dict[tuple[Any, ...], bool] = {}
        self.lock = threading.Lock()

    def __call__(self, *values: Any) -> Any:
        """The results: one value, or a tuple of several."""
        program = self.program_for(values)
        if program is not None:
            return program(values)
        results = self.torch(*values)
        return results[0] if len(results) == 1 else results

    def program_for(self, values: Sequence[Any]) -> _Program | None:
        """The program for values of these shapes; None where torch is to run."""
        if torch.is_autocast_enabled("cpu") or not all(map(_is_plain, values)):
            return None
        key = (*_shapes(values), torch.get_num_threads())
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

    def _make(self, values: Sequence[Any]) -> _Program | None:
        if any(isinstance(x, Tensor) and x.numel() == 0 for x in values):
            return None
        try:
            return _Program(self, values)
        except (NotNativeError, RuntimeError):
            return None


class _Program:
    """A segment for inputs of given shapes."""

    def __init__(self, segment: Segment, values: Sequence[Any]) -> None:
        self.native = NativeProgram(torch.get_num_threads(), segment.pool)
        self.sample: _Program | None = None
        build = Builder(self.native)
        for node, value in zip(segment.inputs, values, strict=True):
            build.add_input(node, tuple(value.shape) if isinstance(value, Tensor) else value)
        for node in segment.nodes:
            emit(build, node)
        self.shapes = [build.add_output(node) for node in segment.outputs]
        if build.has_empty():
            raise NotNativeError("an empty tensor")
        self.native.finish()
        self.steps = [(node, build.values[node].floats) for node in build.names]
        if self.native.has_parts and torch.get_num_threads() > 1:
            self._choose_threads(values)
        if _has_samples(segment, values, self.shapes):
            self._choose_samples(segment, values)

    def __call__(self, values: Sequence[Any]) -> Any:
        inputs, outputs = self._bind(values)
        self._run(inputs, outputs)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        if self.sample is None:
            self.native.run([x.data_ptr() for x in inputs], [y.data_ptr() for y in outputs])
        else:
            self.sample.run_each(inputs, outputs)

    def run_each(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Runs a program for one sample on one after the other of several."""
        count = inputs[0].shape[0]
        given, results = (
            [(x.data_ptr(), x.nbytes // count) for x in tensors] for tensors in (inputs, outputs)
        )
        for i in range(count):
            self.native.run(
                [first + i * step for first, step in given],
                [first + i * step for first, step in results],
            )

    def watch(self, values: Sequence[Any]) -> tuple[Any, list[tuple[int, int]]]:
        """The results, and begin and end of each step in nanoseconds."""
        inputs, outputs = self._bind(values)
        spans = self.native.run_watched(
            [x.data_ptr() for x in inputs], [y.data_ptr() for y in outputs]
        )
        return outputs[0] if len(outputs) == 1 else tuple(outputs), spans

    def _bind(self, values: Sequence[Any]) -> tuple[list[Tensor], list[Tensor]]:
        inputs = [x.contiguous() for x in values if isinstance(x, Tensor)]
        return inputs, [torch.empty(shape) for shape in self.shapes]

    def _choose_threads(self, values: Sequence[Any]) -> None:
        """Runs on one thread where that is faster: waking another costs microseconds."""
        self(values)  # touches the arena for the first time, which is slow
        best = {True: math.inf, False: math.inf}
        for _ in range(_ROUNDS):
            for parallel in best:
                self.native.set_parallel(parallel)
                begin = time.perf_counter_ns()
                self(values)
                best[parallel] = min(best[parallel], (time.perf_counter_ns() - begin) / 1e3)
                if best[True] > _LONG_RUN_US:
                    return
        self.native.set_parallel(best[True] < best[False])

    def _choose_samples(self, segment: Segment, values: Sequence[Any]) -> None:
        """Takes one sample after the other where that is faster and comes to the same.

        Activations of one sample stay in caches that those of a batch do not fit. Kernels for one
        sample may round otherwise than those for a batch, so the choice is made once for all
        numbers of threads.
        """
        key = _shapes(values)
        if segment.sample_wise.get(key) is False:
            return
        # Not the caller's values: samples that are alike would hide that the network mixes them.
        inputs = [torch.randn(x.shape) for x in values]
        outputs, others = ([torch.empty(shape) for shape in self.shapes] for _ in range(2))
        whole = self._time(inputs, outputs)
        sample = None
        if key in segment.sample_wise or whole >= _LONG_RUN_US:
            sample = self._one_sample(segment, inputs)
        if key not in segment.sample_wise and sample is not None:
            runs = {False: [whole], True: []}
            for _ in range(_SAMPLE_ROUNDS):
                for each in runs:
                    self.sample = sample if each else None
                    runs[each].append(self._time(inputs, others if each else outputs))
            same = all(
                torch.allclose(a, b, 1e-4, 1e-4 * float(b.abs().max()))
                for a, b in zip(others, outputs, strict=True)
            )
            if not same or min(runs[True]) >= _CLEAR_GAIN * min(runs[False]):
                sample = None
        segment.sample_wise[key] = sample is not None
        self.sample = sample

    def _one_sample(self, segment: Segment, inputs: Sequence[Tensor]) -> _Program | None:
        """The segment's program for the first sample, where its outputs are one sample's too."""
        try:
            sample = _Program(segment, [x[:1] for x in inputs])
        except (NotNativeError, RuntimeError):
            return None
        return sample if sample.shapes == [(1, *shape[1:]) for shape in self.shapes] else None

    def _time(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> float:
        begin = time.perf_counter_ns()
        self._run(inputs, outputs)
        return (time.perf_counter_ns() - begin) / 1e3


def _shapes(values: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(x.shape if isinstance(x, Tensor) else x for x in values)


def _has_samples(segment: Segment, values: Sequence[Any], shapes: Sequence[Shape]) -> bool:
    """Whether all that goes in and out has one leading size above 1, by which nothing is joined."""
    if not all(isinstance(x, Tensor) and x.dim() for x in values):
        return False
    sizes = {shape[:1] for shape in (*[tuple(x.shape) for x in values], *shapes)}
    joined = any(
        operation(node) in ("cat", "concat") and argument(node, 1, "dim", 0) == 0
        for node in segment.nodes
    )
    return len(sizes) == 1 and sizes != {(1,)} and () not in sizes and not joined


def _is_plain(value: Any) -> bool:
    if isinstance(value, int):
        return True
    return (
        type(value) is Tensor
        and value.dtype is torch.float32
        and value.is_cpu
        and value.layout is torch.strided
    )


def nativize(module: fx.GraphModule) -> fx.GraphModule:
    """A graph whose native stretches are calls of segments; the same module where there are none.

    Args:
        module: lowered, with `meta["val"]` on its nodes; not changed.
    """
    nodes = [node for node in module.graph.nodes if node.op.startswith("call_")]
    native: set[fx.Node] = set()
    for node in nodes:
        if _is_native(node, native):
            native.add(node)
    if any(_changes(node) and node not in native for node in nodes):
        return module
    groups = list(_groups(module.graph, nodes, native))
    useful = [group for group in groups if group[0] in native and any(map(_is_sparse, group))]
    if not useful:
        return module
    pool, graph = ArenaPool(), fx.Graph()
    places: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            places[node] = graph.node_copy(node, places.__getitem__)
    for group in groups:
        if group in useful:
            _call_segment(graph, places, group, pool)
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
    build = Builder(NativeProgram(1, ArenaPool()))
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


def _is_sparse(node: fx.Node) -> bool:
    return LAYER in node.meta and not isinstance(node.meta[LAYER], DenseStep)


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
    graph: fx.Graph, places: dict[fx.Node, fx.Node], group: list[fx.Node], pool: ArenaPool
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
    segment = Segment(inner, pool)
    call = graph.call_function(_as_function(segment), tuple(places[node] for node in inputs))
    call.meta = dict(outputs[0].meta)
    call.meta[SEGMENT] = segment
    for index, node in enumerate(outputs):
        places[node] = call
        if len(outputs) > 1:
            places[node] = graph.call_function(operator.getitem, (call, index))
