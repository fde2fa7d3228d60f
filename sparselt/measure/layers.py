# SPDX-License-Identifier: Apache-2.0
"""Single layers: every kernel that fits, against torch and numpy, inside one process.

Outputs are checked against float64 with the dot-product bound before anything is timed, and the
candidates take turns. One process is fair here because all of them run in torch's thread pool.
numpy brings its own threads, which spin for some 25 ms after a call and would slow whoever comes
next: it is timed after the others, and left out where its threads cannot be made equal.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from sparselt import ops
from sparselt.errors import OptionError, SparseltError
from sparselt.facts import is_of_one_magnitude
from sparselt.formats import SparseWeight, pack
from sparselt.measure.machine import cache_bytes, header
from sparselt.measure.suites import Layer, random_mask, real_mask
from sparselt.measure.timer import Flush, Timing, interleave, speedup
from sparselt.plan import Facts, KernelInfo
from sparselt.rules import block_for, misfit

__all__ = [
    "SPIN_SECONDS",
    "Contender",
    "Problem",
    "apply_dense",
    "bench_layers",
    "contenders",
    "equal_numpy_threads",
    "problem",
]

_UNIT_ROUNDOFF = 2.0**-24
SPIN_SECONDS = 0.05
_LARGEST_FLUSH_BYTES = 256 << 20


@dataclass(frozen=True)
class Problem:
    """One layer with its numbers: weight, mask, input, the float64 output and its bound."""

    layer: Layer
    op: str
    weight: Tensor
    mask: Tensor
    block: tuple[int, int]
    x: Tensor
    expected: Tensor
    bound: Tensor

    @property
    def multiplications(self) -> int:
        """Dense multiply-adds of one call."""
        per_output = self.weight[0].numel()
        return self.expected.numel() * per_output

    def error(self, y: Tensor) -> tuple[float, bool]:
        """(largest error relative to the largest output, whether every element is in its bound)."""
        difference = (y.double() - self.expected).abs()
        scale = max(float(self.expected.abs().max()), 1e-30)
        within = y.shape == self.expected.shape and bool((difference <= self.bound).all())
        return float(difference.max()) / scale, within


@dataclass(frozen=True)
class Contender:
    """One way to run a problem: `run` gives the output, `weight_bytes` what it reads."""

    name: str
    dense: bool
    run: Callable[[], Any]
    weight_bytes: int
    pack_us: float = 0.0
    absent: str = ""


def apply_dense(op: str, layer: Layer, weight: Tensor, x: Tensor) -> Tensor:
    """Torch's own "spmm", "linear" or "conv2d" of a layer, in the tensors' type."""
    if op == "spmm":
        return weight @ x
    if op == "linear":
        return functional.linear(x, weight)
    return functional.conv2d(x, weight, stride=layer.stride, padding=layer.kernel // 2)


def problem(
    layer: Layer,
    density: float,
    batch: int = 1,
    block: tuple[int, int] = (1, 1),
    seed: int = 0,
    mask: Tensor | None = None,
    signs: bool = False,
) -> Problem:
    """Draw a layer's weight, mask and input, and compute what must come out.

    Args:
        layer: the shape; with `columns` > 1 it is y = W x, else a linear layer or a convolution.
        density: share of kept weights; ignored where `mask` is given.
        batch: images, rows of a linear layer's input, or times `columns`.
        block: the kept weights come in blocks of (rows, cols).
        seed: of everything random.
        mask: a pattern to use instead of a random one, of the weight's shape.
        signs: the weights are 1 or -1.

    Example:
        >>> from sparselt.measure.suites import Layer
        >>> problem(Layer("fc", 4, 6), 0.5).expected.shape
        torch.Size([1, 4])
    """
    side = layer.kernel
    op = "conv2d" if side else ("spmm" if layer.columns > 1 else "linear")
    shape = (layer.rows, layer.cols, side, side) if side else (layer.rows, layer.cols)
    kept = random_mask(shape, density, block, seed) if mask is None else mask.reshape(shape)
    generator = torch.Generator().manual_seed(seed + 1)
    weight = torch.randn(shape, generator=generator)
    weight = (weight.sign() if signs else weight) * kept
    sizes = {
        "spmm": (layer.cols, layer.columns * batch),
        "linear": (batch, layer.cols),
        "conv2d": (batch, layer.cols, layer.size, layer.size),
    }
    x = torch.randn(sizes[op], generator=generator)
    terms = float(kept.flatten(1).sum(1).max()) + 2 if kept.numel() else 2.0
    growth = terms * _UNIT_ROUNDOFF / (1 - terms * _UNIT_ROUNDOFF)
    expected = apply_dense(op, layer, weight.double(), x.double())
    bound = growth * apply_dense(op, layer, weight.double().abs(), x.double().abs()) + 1e-30
    return Problem(layer, op, weight, kept, block, x, expected, bound)


def _dense_contenders(case: Problem) -> Iterator[Contender]:
    weight, x, layer = case.weight, case.x, case.layer
    size = weight.numel() * weight.element_size()
    yield Contender("torch_dense", True, lambda: apply_dense(case.op, layer, weight, x), size)
    if case.op == "conv2d":
        last = torch.channels_last
        w, z = weight.contiguous(memory_format=last), x.contiguous(memory_format=last)
        yield Contender(
            "torch_channels_last", True, lambda: apply_dense(case.op, layer, w, z), size
        )
        return
    a, b = weight.numpy(), x.numpy()
    product = (lambda: a @ b) if case.op == "spmm" else (lambda: b @ a.T)
    yield Contender("numpy_dense", True, product, size)
    yield _torch_csr(case)


def _torch_csr(case: Problem) -> Contender:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says on every use that its CSR is in beta
        start = time.perf_counter()
        csr = case.weight.to_sparse_csr()
        pack_us = 1e6 * (time.perf_counter() - start)
    size = sum(
        part.numel() * part.element_size()
        for part in (csr.crow_indices(), csr.col_indices(), csr.values())
    )
    x = case.x
    product = (lambda: csr @ x) if case.op == "spmm" else (lambda: (csr @ x.T).T)
    return Contender("torch_csr", False, product, size, pack_us)


def _kernel_run(case: Problem, weight: SparseWeight, kernel: str) -> Callable[[], Tensor]:
    x, layer = case.x, case.layer
    if case.op == "spmm":
        return lambda: ops.spmm(weight, x, kernel=kernel)
    if case.op == "linear":
        return lambda: ops.linear(x, weight, kernel=kernel)
    stride, padding = layer.stride, layer.kernel // 2
    return lambda: ops.conv2d(x, weight, stride=stride, padding=padding, kernel=kernel)


def contenders(
    case: Problem, only: Sequence[str] = (), kernels: Sequence[KernelInfo] | None = None
) -> list[Contender]:
    """Everything that can be timed on a problem: dense and CSR of torch, numpy, and our kernels.

    Args:
        case: the problem.
        only: names to keep; empty keeps all.
        kernels: the registry, by default `sparselt.ops.kernels()`.
    """
    found = list(_dense_contenders(case))
    packed: dict[tuple[str, tuple[int, int]], tuple[SparseWeight, float]] = {}
    registry_op = "conv2d" if case.op == "conv2d" else "spmm"
    facts = Facts(
        case.op,
        tuple(case.weight.shape),
        int(case.mask.sum()),
        block=case.block,
        one_magnitude=is_of_one_magnitude(case.weight, case.mask),
    )
    for info in ops.kernels() if kernels is None else kernels:
        if registry_op not in info.operations or info.device != "cpu":
            continue
        if misfit(facts, info):
            continue
        if not info.usable:
            found.append(Contender(info.name, False, lambda: None, 0, absent=info.reason))
            continue
        block = block_for(facts, info)
        if (info.format, block) not in packed:
            start = time.perf_counter()
            wanted = None if block == (1, 1) else block
            weight = pack(case.weight, case.mask, format=info.format, block=wanted)
            packed[info.format, block] = (weight, 1e6 * (time.perf_counter() - start))
        weight, pack_us = packed[info.format, block]
        run = _kernel_run(case, weight, info.name)
        if info.op == "code":  # generated by the first call
            start = time.perf_counter()
            with contextlib.suppress(RuntimeError, SparseltError):  # told when it is checked
                run()
            pack_us += 1e6 * (time.perf_counter() - start)
        nbytes = weight.nbytes + ops.code_bytes(weight.parts())
        found.append(Contender(info.name, False, run, nbytes, pack_us))
    return [item for item in found if not only or item.name in only]


def equal_numpy_threads() -> tuple[AbstractContextManager[object], str]:
    """A context in which numpy uses as many threads as torch, or why there is none."""
    try:
        threadpoolctl = importlib.import_module("threadpoolctl")
    except ImportError:
        if torch.get_num_threads() == os.cpu_count():
            return nullcontext(), ""
        return nullcontext(), "numpy's threads cannot be set without threadpoolctl"
    limits: AbstractContextManager[object] = threadpoolctl.threadpool_limits(
        torch.get_num_threads(), user_api="blas"
    )
    return limits, ""


def _row(case: Problem, density: float, batch: int, item: Contender) -> dict[str, Any]:
    row: dict[str, Any] = {
        "case": case.layer.case,
        "op": case.op,
        "density": density,
        "batch": batch,
        "engine": item.name,
        "dense": item.dense,
        "status": "absent" if item.absent else "ok",
        "reason": item.absent,
        "weight_bytes": item.weight_bytes,
        "pack_us": item.pack_us,
    }
    if item.absent:
        return row
    try:
        with torch.inference_mode():
            y = item.run()
        row["error"], within = case.error(torch.from_numpy(y) if isinstance(y, np.ndarray) else y)
    except (RuntimeError, SparseltError) as error:
        return row | {"status": "FAIL", "reason": str(error).splitlines()[0]}
    if not within:
        row |= {"status": "FAIL", "reason": f"wrong output: error {row['error']:.2g}"}
    return row


def _rates(row: dict[str, Any], case: Problem, timing: Timing) -> None:
    kept = float(case.mask.sum()) / max(case.mask.numel(), 1)
    useful = 2e-3 * case.multiplications * kept
    row |= timing.as_json()
    row["gflops"] = useful / timing.median_us
    row["dense_gflops"] = 2e-3 * case.multiplications / timing.median_us


def _bench_one(
    case: Problem, density: float, batch: int, seconds: float, cold: bool
) -> list[dict[str, Any]]:
    limits, reason = equal_numpy_threads()
    items = contenders(case)
    rows = [_row(case, density, batch, item) for item in items]
    for row in rows:
        if row["engine"] == "numpy_dense" and reason:
            row |= {"status": "absent", "reason": reason}
    runs = {
        item.name: item.run for item, row in zip(items, rows, strict=True) if row["status"] == "ok"
    }
    flush = Flush(_flush_bytes()) if cold else None
    apart = {name: runs.pop(name) for name in ("numpy_dense",) if name in runs}
    time.sleep(SPIN_SECONDS if apart else 0.0)
    with limits, torch.inference_mode():
        times = interleave(runs, seconds=seconds, flush=flush) if runs else {}
        times |= interleave(apart, seconds=seconds, flush=flush) if apart else {}
    dense = [row["engine"] for row in rows if row["dense"] and row["engine"] in times]
    best = min(dense, key=lambda name: times[name].median_us) if dense else ""
    for row in rows:
        if row["engine"] in times:
            _rates(row, case, times[row["engine"]])
            row["best_dense"] = best
            if best:
                ratio = speedup(times[best], times[row["engine"]])
                row["speedup"], row["speedup_low"], row["speedup_high"] = ratio
    return rows


def _flush_bytes() -> int:
    return min(2 * max(cache_bytes().values(), default=32 << 20), _LARGEST_FLUSH_BYTES)


def bench_layers(
    layers: Sequence[Layer],
    densities: Sequence[float] = (0.1,),
    *,
    batch: int = 1,
    block: tuple[int, int] = (1, 1),
    seconds: float = 0.3,
    cold: bool = False,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Time every kernel that fits on every layer, against torch and numpy.

    Zeros are random, or those of a pruned ResNet-50 where `suites.real_mask` finds them.

    Args:
        layers: shapes, for instance `suites.SUITES["resnet50"]`.
        densities: shares of kept weights, 0 to 1.
        batch: see `problem`.
        block: (rows, cols) in which the kept weights come; other than (1, 1) brings in BSR.
        seconds: least measured time of each contender on each layer.
        cold: empty the caches before every call.
        seed: of patterns and values.
        progress: called with the case that is timed now.

    Returns:
        {"kind": "layers", "machine": header, "rows": one dictionary for each contender and case};
        a contender with a wrong output has status "FAIL" and no times.

    Raises:
        OptionError: for a density outside 0 to 1, a batch below 1, or no layers.
    """
    if not layers or not densities or batch < 1 or min(block) < 1:
        raise OptionError(
            f"bench_layers: expected layers, densities, batch >= 1 and block >= (1, 1), got "
            f"{len(layers)} layers, {len(densities)} densities, batch={batch}, block={block}"
        )
    rows: list[dict[str, Any]] = []
    for layer in layers:
        for density in densities:
            if progress is not None:
                progress(f"{layer.case}, density {density:g}")
            mask = real_mask(layer, density) if block == (1, 1) else None
            case = problem(layer, density, batch, block, seed, mask)
            pattern = "random" if mask is None else "pruned"
            found = _bench_one(case, density, batch, seconds, cold)
            rows += [{**row, "pattern": pattern} for row in found]
    return {"kind": "layers", "machine": header(), "rows": rows}
