# SPDX-License-Identifier: Apache-2.0
"""Single layers with the kernel that the library chooses, against the best dense engine.

The choice is `Tuner`'s, as in `convert` and `compile`: nothing here picks a winner afterwards.
Before each timed call the second-level caches are filled with something else, then the input is
read: weights are cold, activations are as the layer before leaves them. Outputs are checked against
float64, large ones in part. Dense engines multiply by the zeros, so they are timed once for all
densities, in turns with these.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparselt import ops
from sparselt.cpu_timer import measure
from sparselt.extension import multiply_add_rate
from sparselt.facts import facts_of
from sparselt.formats import pack
from sparselt.measure.in_program import MiddleLayer
from sparselt.measure.layers import SPIN_SECONDS, apply_dense, equal_numpy_threads
from sparselt.measure.suites import Layer, random_mask, real_mask
from sparselt.measure.sweep import Row
from sparselt.measure.timer import Timing, Watched, interleave
from sparselt.nn import SPARSE_LAYERS
from sparselt.plan import DENSE, Plan, candidates, choose
from sparselt.tune import Tuner

__all__ = [
    "CALL",
    "IMAGES",
    "PROGRAM",
    "Weights",
    "Work",
    "bench_work",
    "is_right",
    "module_of",
    "peak",
    "weights_of",
    "work_on",
]

# How a layer is run: by a call with row-major input and output, or between others in a program,
# which may keep the images of a batch innermost.
CALL, PROGRAM, IMAGES = "call", "program", "images"
_CSR = "torch_csr"
_REPEATS = 20
# Of a batch, whose calls are long enough to differ little.
_BATCH_REPEATS = 10
_SECONDS = 0.005
_CHECKED_COLUMNS = 64


@dataclass(frozen=True)
class Work:
    """A layer at a batch, as "spmm", "linear" or "conv2d" of an input."""

    layer: Layer
    op: str
    batch: int
    x: Tensor

    @property
    def columns(self) -> int:
        """N of the product: output pixels of all images; the layers here keep the map's size."""
        return self.x.numel() // self.layer.cols // self.layer.stride**2


@dataclass(frozen=True)
class Weights:
    """Values and zeros of a layer."""

    density: float
    values: Tensor
    mask: Tensor
    pattern: str  # of a "pruned" network, or "random"

    @property
    def name(self) -> str:
        """What tells it apart in a table of engines."""
        return f"@{self.density:g}"


@cache
def peak(threads: int) -> float:
    """GFLOP/s of multiply-adds on so many threads, which torch must have now."""
    return multiply_add_rate()


def work_on(layer: Layer, batch: int, op: str = "") -> Work:
    """A layer with a random input.

    Args:
        layer: the shape.
        batch: images; of a product, times its columns.
        op: "linear" for a product whose input has a row a column; by default as the layer is.
    """
    op = op or ("conv2d" if layer.kernel else "spmm")
    shapes = {
        "conv2d": (batch, layer.cols, layer.size, layer.size),
        "spmm": (layer.cols, layer.columns * batch),
        "linear": (layer.columns * batch, layer.cols),
    }
    return Work(layer, op, batch, torch.randn(shapes[op], generator=_generator(1)))


def weights_of(layer: Layer, density: float, block: tuple[int, int] = (1, 1)) -> Weights:
    """Random values, with the zeros of a pruned network where there are any."""
    shape = (layer.rows, layer.cols) + (layer.kernel, layer.kernel) * bool(layer.kernel)
    found = real_mask(layer, density) if block == (1, 1) else None
    mask = random_mask(shape, density, block) if found is None else found.reshape(shape)
    values = torch.randn(shape, generator=_generator(2)) * mask
    return Weights(density, values, mask, "random" if found is None else "pruned")


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bench_work(
    work: Work,
    weights: Sequence[Weights],
    ways: Sequence[str] = (CALL,),
    *,
    csr: bool = False,
) -> list[Row]:
    """A row for each weight and way: the library's choice against everything else.

    Args:
        work: the layer and its input.
        weights: of any densities.
        ways: of `CALL`, `PROGRAM` and `IMAGES`.
        csr: time torch's CSR product as well.

    Returns:
        Rows with the case, density, pattern, way, kernel and times; a wrong output has status
        "FAIL" and no times.
    """
    threads = torch.get_num_threads()
    flush = Tuner(weight_bytes=1 << 60).cool(work.x)
    with torch.inference_mode():
        dense = dict(_dense_engines(work, weights[0].values))
        runs: dict[str, Callable[[], Any]] = {}
        rows = []
        wrong = [k for k, run in dense.items() if not is_right(work, weights[0].values, run())]
        for weight in weights:
            others = {_CSR: _csr_engine(work, weight.values)} if csr else {}
            for way in ways:
                plan, run, in_panels = _chosen(work, weight, way)
                others[way] = run
                rows.append(_row(work, weight, way, plan, threads, in_panels))
            named = {f"{name}{weight.name}": run for name, run in others.items()}
            wrong += [k for k, run in named.items() if not is_right(work, weight.values, run())]
            runs |= named
        if wrong:
            told = {"status": "FAIL", "reason": f"wrong output: {', '.join(wrong)}"}
            return [row | told for row in rows]
        times = _times(work, weights[0].values, runs | dense, flush)
    for row, weight in zip(rows, [w for w in weights for _ in ways], strict=True):
        _add_times(row, work, weight, times)
    return rows


def _row(work: Work, weight: Weights, way: str, plan: Plan, threads: int, in_panels: int) -> Row:
    return {
        "case": work.layer.case,
        "layer": work.layer.name,
        "op": work.op,
        "way": way,
        "density": weight.density,
        "pattern": weight.pattern,
        "batch": work.batch,
        "threads": threads,
        "engine": "sparselt" if way == CALL else f"sparselt {way}",
        "kernel": plan.kernel,
        "in_panels": in_panels,
        "status": "ok",
    }


def _add_times(row: Row, work: Work, weight: Weights, times: Mapping[str, Timing]) -> None:
    dense = {name: timing.median_us for name, timing in times.items() if "@" not in name}
    best = min(dense, key=dense.__getitem__)
    own, csr = times[row["way"] + weight.name], times.get(_CSR + weight.name)
    kept = int(weight.mask.sum())
    gflops = 2e-3 * kept * work.columns / own.median_us
    row |= {
        "kept": kept / weight.mask.numel(),
        "median_us": own.median_us,
        "noise": own.noise,
        "gflops": gflops,
        "share": gflops / peak(row["threads"]),
        "dense_us": dense,
        "best_dense": best,
        "speedup": dense[best] / own.median_us,
        "csr_us": csr.median_us if csr else None,
    }


def _chosen(work: Work, weight: Weights, way: str) -> tuple[Plan, Callable[[], Any], int]:
    """The plan, its call, and how many of the layer's values are in panels."""
    if work.op == "spmm":
        return (*_chosen_product(work, weight), 0)
    module = module_of(work, weight)
    # Of a network that fits no cache.
    tuner = Tuner(weight_bytes=1 << 60, in_program=way != CALL)
    if way == IMAGES:
        tuner = tuner.in_images()
    plan = tuner.plan(module, weight.mask, [work.x])
    if way != CALL:
        program = MiddleLayer(module, weight.mask, plan, work.x, way == IMAGES)
        return plan, program, program.in_panels
    if plan.is_dense:
        return plan, lambda: apply_dense(work.op, work.layer, weight.values, work.x), 0
    sparse = SPARSE_LAYERS[type(module)](module, plan, weight.mask)
    return plan, lambda: sparse(work.x), 0


def module_of(work: Work, weight: Weights) -> nn.Linear | nn.Conv2d:
    """The dense layer; of a product, the linear layer that computes its transpose."""
    layer = work.layer
    module: nn.Linear | nn.Conv2d
    if work.op != "conv2d":
        module = nn.Linear(layer.cols, layer.rows, bias=False)
    else:
        module = nn.Conv2d(
            layer.cols, layer.rows, layer.kernel, layer.stride, layer.kernel // 2, bias=False
        )
    module.weight = nn.Parameter(weight.values, requires_grad=False)
    return module


def _chosen_product(work: Work, weight: Weights) -> tuple[Plan, Callable[[], Any]]:
    """The same for y = W x, which no layer of torch computes."""
    tuner = Tuner(weight_bytes=1 << 60)
    facts = replace(facts_of(module_of(work, weight), weight.mask, work.columns), op="spmm")
    kernels = ops.kernels()
    calls: dict[str, Callable[[], Any]] = {DENSE: lambda: weight.values @ work.x}
    for item in tuner.worth_timing(candidates(facts, kernels), kernels):
        block = None if item.block == (1, 1) else item.block
        packed = pack(weight.values, weight.mask, item.format, block)
        calls[item.kernel] = partial(ops.spmm, packed, work.x, kernel=item.kernel)
    plan = choose(facts, kernels, measure(calls, prepare=tuner.cool(work.x)))
    return plan, calls[plan.kernel]


def _dense_engines(work: Work, weight: Tensor) -> Iterator[tuple[str, Callable[[], Any]]]:
    x, layer = work.x, work.layer
    yield "torch_dense", lambda: apply_dense(work.op, layer, weight, x)
    if work.op != "conv2d":
        return
    if layer.kernel == 1 and layer.stride == 1:
        matrix, shape = weight.flatten(1), (-1, layer.rows, layer.size, layer.size)
        yield "torch_matmul", lambda: (matrix @ x.flatten(2)).view(shape)
    last = torch.channels_last
    w, z = weight.contiguous(memory_format=last), x.contiguous(memory_format=last)
    yield "torch_channels_last", lambda: apply_dense(work.op, layer, w, z)
    if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        # oneDNN's own layout for weights, input and output: what a network in it would meet.
        geometry = [layer.kernel // 2] * 2, [layer.stride] * 2, [1, 1], 1
        reordered = torch._C._nn.mkldnn_reorder_conv2d_weight(weight.to_mkldnn(), *geometry)
        blocked = x.to_mkldnn()
        yield "torch_mkldnn", lambda: apply_dense(work.op, layer, reordered, blocked)


def _csr_engine(work: Work, weight: Tensor) -> Callable[[], Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says on every use that its CSR is in beta
        csr = weight.to_sparse_csr()
    if work.op == "linear":
        return lambda: functional.linear(work.x, csr)
    return lambda: csr @ work.x


def is_right(work: Work, weight: Tensor, y: object) -> bool:
    """Whether some columns, or the last image, are within the dot product's rounding of float64."""
    assert isinstance(y, Tensor)
    y = y.to_dense() if y.is_mkldnn else y
    if work.op == "conv2d":
        x, y = work.x[-1:], y[-1:]
    else:
        take = torch.linspace(0, work.columns - 1, _CHECKED_COLUMNS).long()
        axis = int(work.op == "spmm")
        x, y = work.x.index_select(axis, take), y.index_select(axis, take)
    terms = float(weight.flatten(1).count_nonzero(1).max()) + 2
    expected = apply_dense(work.op, work.layer, weight.double(), x.double())
    scale = apply_dense(work.op, work.layer, weight.double().abs(), x.double().abs())
    return bool(((y - expected).abs() <= terms * 2.0**-23 * scale + 1e-30).all())


def _times(
    work: Work,
    weight: Tensor,
    runs: dict[str, Callable[[], object]],
    flush: Callable[[], object],
) -> dict[str, Timing]:
    """In turns; numpy apart from the others, because its threads spin after a call."""
    repeats = _REPEATS if work.batch == 1 else _BATCH_REPEATS
    options: dict[str, Any] = {"repeats": repeats, "seconds": _SECONDS, "warmup_seconds": 0.0}
    watched = {k: Watched(r.step_us) if isinstance(r, MiddleLayer) else r for k, r in runs.items()}
    times = interleave(watched, flush=flush, **options)
    limits, reason = equal_numpy_threads()
    if work.op != "conv2d" and not reason:
        a, b = weight.numpy(), work.x.numpy()
        run = (lambda: a @ b) if work.op == "spmm" else (lambda: b @ a.T)
        with limits:
            times |= interleave({"numpy_dense": run}, flush=flush, **options)
        time.sleep(SPIN_SECONDS)
    return times
