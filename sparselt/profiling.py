# SPDX-License-Identifier: Apache-2.0
"""Where the time of one run goes: every layer, every other operation, and what lies between them.

Operations are timed one by one, the steps of a native program in passing. Of several runs the
median one is kept whole, so that its rows add up to its length.
"""

from __future__ import annotations

import json
import math
import operator
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparselt.builder import operation
from sparselt.errors import OptionError, explain_mismatch
from sparselt.explanation import Explanation, Row
from sparselt.native import SEGMENT
from sparselt.tickets.file import replace_file

__all__ = ["Profile", "ProfileRow", "profile_graph", "profile_modules"]

_HEADINGS = ("layer", "kernel", "nonzeros", "us", "share", "GFLOP/s", "dense GFLOP/s")
_BETWEEN = "(between)"
# (row, begin, end) in nanoseconds, one for each timed operation of a run.
_Spans = list[tuple[int, int, int]]


@dataclass(frozen=True)
class ProfileRow:
    """One step of a run.

    Attributes:
        layer: its qualified name; an operation of torch in brackets for what is no layer;
            "(between)" for the time outside of all of these.
        kernel: the kernel that ran, or "dense", "native" or "torch"; empty for the time between.
        nonzeros: kept weights; None for what is no layer.
        us: microseconds.
        share: of the run.
        gflops: 10^9 floating point operations a second, counting kept weights; None for no layer.
        dense_gflops: the same, counting all weights.
    """

    layer: str
    kernel: str
    nonzeros: int | None
    us: float
    share: float
    gflops: float | None = None
    dense_gflops: float | None = None


class Profile(Sequence[ProfileRow]):
    """The rows of one run; `str()` is a table, `save_trace` writes a file for a trace viewer.

    Attributes:
        rows: in the order they ran, "(between)" last.
        total_us: length of the run; the rows add up to it.
        undisturbed_us: median microseconds of a run that is not watched step by step.
    """

    def __init__(
        self,
        rows: Sequence[ProfileRow],
        spans: Sequence[tuple[int, float, float]],
        total_us: float,
        undisturbed_us: float,
    ) -> None:
        self.rows = tuple(rows)
        self.total_us = total_us
        self.undisturbed_us = undisturbed_us
        self._spans = tuple(spans)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __iter__(self) -> Iterator[ProfileRow]:
        return iter(self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain values: {"rows": [...], "total_us": float, "undisturbed_us": float}."""
        rows = [asdict(row) for row in self.rows]
        return {"rows": rows, "total_us": self.total_us, "undisturbed_us": self.undisturbed_us}

    def __str__(self) -> str:
        table = [_HEADINGS, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in table) for i in range(len(_HEADINGS))]
        lines = []
        for line in table:
            pairs = list(zip(line, widths, strict=True))
            cells = [cell.ljust(width) for cell, width in pairs[:2]]
            cells += [cell.rjust(width) for cell, width in pairs[2:]]
            lines.append("  ".join(cells).rstrip())
        lines.insert(1, "-" * max(len(line) for line in lines))
        lines.append(
            f"{self.total_us:.0f} us in all, watched step by step; {self.undisturbed_us:.0f} us a "
            "run otherwise"
        )
        return "\n".join(lines)

    __repr__ = __str__

    def save_trace(self, path: str | Path) -> None:
        """Writes the run in Chrome's trace format, for chrome://tracing or ui.perfetto.dev.

        Args:
            path: of the JSON file; written beside and then renamed.
        """
        events = []
        for index, begin, end in self._spans:
            row = self.rows[index]
            arguments = {k: v for k, v in asdict(row).items() if k != "share" and v is not None}
            events.append(
                {
                    "name": row.layer or "(model)",
                    "cat": "layer" if row.nonzeros is not None else "torch",
                    "ph": "X",
                    "ts": begin,
                    "dur": end - begin,
                    "pid": os.getpid(),
                    "tid": 0,
                    "args": arguments,
                }
            )
        text = json.dumps({"traceEvents": events, "displayTimeUnit": "ns"}, allow_nan=False)
        replace_file(Path(path), text.encode())


@dataclass
class _Step:
    """What is known of a row before anything is timed."""

    layer: str
    kernel: str
    row: Row | None = None
    columns: float = 0.0

    def count(self, elements: int) -> None:
        """Notes N of the product from the size of its result."""
        if self.row is not None:
            self.columns = elements / max(1, self.row.shape[0])


def profile_graph(
    module: fx.GraphModule,
    values: Sequence[Any],
    rows: Sequence[Row],
    calls: dict[str, int],
    run: Callable[[], object],
    runs: int,
) -> Profile:
    """The profile of a lowered graph.

    Args:
        module: the graph.
        values: of its placeholders.
        rows: of its layers.
        calls: the row of each node that is a layer, by node name.
        run: the same call, not watched.
        runs: how many to time.
    """
    steps: list[_Step] = []
    places: dict[str, int] = {}

    def place_of(node: fx.Node, where: str) -> int:
        """The row of a node, made when it first runs, natively or in torch."""
        if node.name not in places:
            row = rows[calls[node.name]] if node.name in calls else None
            known = (row.layer, row.kernel) if row else (f"({operation(node)})", where)
            places[node.name] = len(steps)
            steps.append(_Step(*known, row))
        return places[node.name]

    def watched() -> _Spans:
        watcher = _Watcher(module, place_of, steps)
        watcher.run(*values)
        return watcher.spans

    return _profile(steps, watched, run, runs)


def profile_modules(
    model: nn.Module, explained: Explanation, run: Callable[[], object], runs: int
) -> Profile:
    """The profile of a model whose layers were swapped: its layers, and all else together.

    Args:
        model: the converted model.
        explained: what `explain` says of it.
        run: calls it.
        runs: how many to time.
    """
    layers = dict(model.named_modules())
    steps = [_Step(row.layer, row.kernel, row) for row in explained]
    spans: _Spans = []
    begun: list[int] = []

    def before(*_: Any) -> None:
        begun.append(time.perf_counter_ns())

    def after(place: int) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: Any, output: Any) -> None:
            spans.append((place, begun.pop(), time.perf_counter_ns()))
            if isinstance(output, Tensor):
                steps[place].count(output.numel())

        return hook

    def watched() -> _Spans:
        spans.clear()
        handles = []
        for place, row in enumerate(explained):
            layer = layers[row.layer]
            handles.append(layer.register_forward_pre_hook(before))
            handles.append(layer.register_forward_hook(after(place)))
        try:
            run()
        finally:
            for handle in handles:
                handle.remove()
        return list(spans)

    return _profile(steps, watched, run, runs)


class _Watcher(fx.Interpreter):
    """Runs a graph and notes when each call, and each step of a native program, began and ended."""

    def __init__(
        self, module: fx.GraphModule, place_of: Callable[[fx.Node, str], int], steps: list[_Step]
    ) -> None:
        super().__init__(module)
        self.place_of = place_of
        self.steps = steps
        self.spans: _Spans = []

    def run_node(self, n: fx.Node) -> Any:
        """One node; only the call itself is timed."""
        if not n.op.startswith("call_") or n.target is operator.getitem:
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        program = n.meta[SEGMENT].program_for(args) if SEGMENT in n.meta else None
        if program is not None:
            return self.run_native(program, args)
        call = getattr(self, n.op)
        begin = time.perf_counter_ns()
        result = call(n.target, args, kwargs)
        end = time.perf_counter_ns()
        place = self.place_of(n, "torch")
        self.spans.append((place, begin, end))
        if isinstance(result, Tensor):
            self.steps[place].count(result.numel())
        return result

    def run_native(self, program: Any, args: Sequence[Any]) -> Any:
        """A native program, step by step."""
        begun = time.perf_counter_ns()
        result, spans = program.watch(args)
        for (node, floats), (begin, end) in zip(program.steps, spans, strict=True):
            place = self.place_of(node, "native")
            self.spans.append((place, begun + begin, begun + end))
            self.steps[place].count(floats)
        return result


def _profile(
    steps: list[_Step], watched: Callable[[], _Spans], run: Callable[[], object], runs: int
) -> Profile:
    if runs < 1:
        raise OptionError(explain_mismatch("runs", "at least 1", runs))
    times: list[tuple[int, int, _Spans]] = []
    plain: list[int] = []
    with torch.inference_mode():
        run()
        watched()
        for _ in range(runs):
            begin = time.perf_counter_ns()
            run()
            middle = time.perf_counter_ns()
            spans = watched()
            end = time.perf_counter_ns()
            plain.append(middle - begin)
            times.append((end - middle, middle, spans))
    times.sort(key=lambda item: item[0])
    total, begun, spans = times[(len(times) - 1) // 2]
    us = [0.0] * len(steps)
    for place, begin, end in spans:
        us[place] += (end - begin) / 1e3
    rows = [_row(step, own, total / 1e3) for step, own in zip(steps, us, strict=True)]
    rest = total / 1e3 - sum(us)
    rows.append(ProfileRow(_BETWEEN, "", None, rest, 1e3 * rest / total))
    shifted = [(place, (a - begun) / 1e3, (b - begun) / 1e3) for place, a, b in spans]
    return Profile(rows, shifted, total / 1e3, statistics.median(plain) / 1e3)


def _row(step: _Step, us: float, total_us: float) -> ProfileRow:
    share = us / total_us
    if step.row is None:
        return ProfileRow(step.layer, step.kernel, None, us, share)
    size = math.prod(step.row.shape)
    nonzeros = round(step.row.density * size)
    rate = 2e-3 * step.columns / us if us else 0.0
    return ProfileRow(step.layer, step.kernel, nonzeros, us, share, nonzeros * rate, size * rate)


def _cells(row: ProfileRow) -> tuple[str, ...]:
    return (
        row.layer or "(model)",
        row.kernel,
        "-" if row.nonzeros is None else f"{row.nonzeros}",
        f"{row.us:.1f}",
        f"{100 * row.share:.1f} %",
        "-" if row.gflops is None else f"{row.gflops:.1f}",
        "-" if row.dense_gflops is None else f"{row.dense_gflops:.1f}",
    )
