# SPDX-License-Identifier: Apache-2.0
"""Linear layers at batch 1, read from memory: against dense, and against the memory's rate.

Copies of the weight take turns, as many as fill more than any cache, so that each call reads its
own from memory: emptying the caches near a core would leave the weight in the last-level one.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparselt.extension import read_rate
from sparselt.measure.chosen import Weights, is_right, module_of, weights_of, work_on
from sparselt.measure.report import Column, microseconds, rich_table
from sparselt.measure.suites import Layer
from sparselt.measure.sweep import Item, Row, Sweep, caption, threads, timed
from sparselt.measure.timer import interleave
from sparselt.nn import SparseLinear
from sparselt.tune import Tuner

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["SWEEP", "vector_items", "vector_table"]

# Servers have last-level caches of hundreds of MiB, which a virtual machine may have to itself.
_BUFFER_BYTES = 1 << 30
_DENSITIES = (0.5, 0.2, 0.1, 0.05)
_LAYERS = (
    Layer("linear", 4096, 4096),
    Layer("linear", 1024, 4096),
    Layer("linear", 1000, 2048),
    Layer("linear", 1024, 1024),
)
_THREADS = (2, 1)


def vector_items(quick: bool = False) -> list[Item]:
    """A measurement for each layer, share of zeros and number of threads; quick: the largest."""
    return [
        Item(
            f"{layer.rows}x{layer.cols} density {density:g}, threads {count}",
            partial(_bench, layer, density, count),
        )
        for count in _THREADS[: 1 if quick else None]
        for layer in _LAYERS[: 1 if quick else None]
        for density in _DENSITIES
    ]


def _bench(layer: Layer, density: float, count: int) -> list[Row]:
    with threads(count), torch.inference_mode():
        return [_row(layer, weights_of(layer, density), count)]


def _row(layer: Layer, weights: Weights, count: int) -> Row:
    work = work_on(layer, 1, "linear")
    module = module_of(work, weights)
    assert isinstance(module, nn.Linear)
    plan = Tuner(weight_bytes=1 << 60).plan(module, weights.mask, [work.x])
    row: Row = {
        "case": layer.case,
        "density": weights.density,
        "pattern": weights.pattern,
        "batch": 1,
        "threads": count,
        "engine": "sparselt",
        "kernel": plan.kernel,
        "status": "ok",
    }
    layers: list[nn.Module] = [module]
    nbytes = dense_bytes = weights.values.numel() * weights.values.element_size()
    if not plan.is_dense:
        sparse = SparseLinear(module, plan, weights.mask)
        nbytes = sparse.weight.nbytes
        layers = [sparse, *(copy.deepcopy(sparse) for _ in _more(nbytes))]
    dense = [module, *(copy.deepcopy(module) for _ in _more(dense_bytes))]
    runs = {"sparselt": _in_turns(layers if not plan.is_dense else dense, work.x)}
    runs["torch_dense"] = _in_turns(dense, work.x)
    wrong = [name for name, run in runs.items() if not is_right(work, weights.values, run())]
    if wrong:
        return row | {"status": "FAIL", "reason": f"wrong output: {', '.join(wrong)}"}
    times = interleave(runs, repeats=60, seconds=0.05, warmup_seconds=0.02)
    own, other = times["sparselt"].median_us, times["torch_dense"].median_us
    rate = median(read_rate(_BUFFER_BYTES) for _ in range(3))
    return row | {
        "median_us": own,
        "noise": times["sparselt"].noise,
        "dense_us": {"torch_dense": other},
        "speedup": other / own,
        "weight_bytes": nbytes,
        "bytes_a_nonzero": nbytes / int(weights.mask.sum()),
        "gbytes": nbytes / own / 1e3,
        "read_rate": rate,
        "share": nbytes / own / 1e3 / rate,
    }


def _more(nbytes: int) -> range:
    """A copy more for each further time that the weight fits the buffer."""
    return range(_BUFFER_BYTES // nbytes)


def _in_turns(layers: Sequence[nn.Module], x: Tensor) -> Callable[[], Any]:
    forwards = itertools.cycle([layer.forward for layer in layers])
    return lambda: next(forwards)(x)


_COLUMNS = (
    Column("layer", lambda row: str(row["case"]), right=False, whole=True),
    Column("threads", lambda row: str(row["threads"])),
    Column("zeros", lambda row: f"{1 - row['density']:.0%}"),
    Column("kernel", lambda row: str(row["kernel"]), right=False, whole=True),
    Column("time", lambda row: microseconds(row["median_us"])),
    Column("x torch dense", lambda row: f"{row['speedup']:.1f}"),
    Column("bytes a nonzero", lambda row: f"{row['bytes_a_nonzero']:.2f}"),
    Column("GB/s", lambda row: f"{row['gbytes']:.1f}"),
    Column("of the read rate", lambda row: f"{row['share']:.0%}"),
)


def vector_table(result: dict[str, Any]) -> Table:
    """A row each."""
    return rich_table("", _COLUMNS, timed(result["rows"]), caption(result))


SWEEP = Sweep("vector", vector_items, vector_table)
