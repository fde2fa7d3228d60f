# SPDX-License-Identifier: Apache-2.0
"""The layers of DLMC, each with the kernel that the library chooses, against the best dense engine.

Each layer runs at its own map size, as a product of row-major matrices and as a convolution. The
choice is `Tuner`'s, as in `convert` and `compile`: nothing here picks a winner afterwards. Before
each timed call the second-level caches are filled with something else, then the input is read:
weights are cold, activations are as the layer before leaves them. Outputs are checked against
float64, large ones in part.
"""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from sparselt import ops
from sparselt.cpu_timer import measure
from sparselt.errors import OptionError
from sparselt.extension import multiply_add_rate
from sparselt.formats import pack
from sparselt.measure.layers import SPIN_SECONDS, apply_dense, equal_numpy_threads
from sparselt.measure.machine import Others, header, is_busy, one_line
from sparselt.measure.report import Column, rich_table, write_json
from sparselt.measure.suites import DLMC, Layer, random_mask, real_mask
from sparselt.measure.timer import Timing, interleave
from sparselt.nn import SPARSE_LAYERS
from sparselt.plan import DENSE, Facts, Plan, candidates, choose
from sparselt.tune import Tuner

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["GRIDS", "bench_dlmc", "chosen_layers", "dlmc_summary", "dlmc_table"]

Grid: TypeAlias = tuple[tuple[float, ...], tuple[int, ...], tuple[int, ...]]
# Densities, batches and numbers of threads: of everything, and of a quick look.
GRIDS: tuple[Grid, Grid] = (((0.2, 0.1, 0.05), (1, 32), (1, 2)), ((0.1,), (1,), (2,)))
_REPEATS = 20
_CHECKED_COLUMNS = 64
# A matrix of im2col for a batch would be larger than everything else together; no library makes it.
_IM2COL_BATCH = 1


@dataclass(frozen=True)
class _Work:
    """A layer at a batch: its kind and its input."""

    layer: Layer
    op: str
    x: Tensor

    @property
    def part(self) -> str:
        """The group of layers that it counts in."""
        if self.layer.kernel:
            return f"conv2d {self.layer.kernel}x{self.layer.kernel}"
        if self.layer.name.startswith("transformer"):
            return "spmm transformer"
        return "spmm 3x3 (im2col)" if self.layer.name.endswith("conv2") else "spmm 1x1"

    @property
    def columns(self) -> int:
        """N of the product: output pixels of all images; the layers here keep the map's size."""
        return self.x.numel() // self.layer.cols


def chosen_layers(only: Sequence[str] = ()) -> tuple[Layer, ...]:
    """The suite's layers whose name or part contains one of the given words; all without words.

    Raises:
        OptionError: no layer is left.

    Example:
        >>> {layer.kernel for layer in chosen_layers(["conv2"])}
        {0, 3}
    """
    found = tuple(x for x in DLMC if not only or any(word in x.case for word in only))
    if not found:
        names = ", ".join(sorted({layer.name for layer in DLMC}))
        raise OptionError(f"--only: expected parts of {names}, got {' '.join(only)}")
    return found


def bench_dlmc(
    layers: Sequence[Layer] = DLMC,
    densities: Sequence[float] = GRIDS[0][0],
    batches: Sequence[int] = GRIDS[0][1],
    threads: Sequence[int] = GRIDS[0][2],
    *,
    seconds: float = 0.005,
    path: str | Path | None = None,
    progress: Callable[[float, str], None] | None = None,
) -> dict[str, Any]:
    """Times every layer at every density, batch and number of threads.

    Args:
        layers: see `chosen_layers`.
        densities: shares of kept weights; DLMC has 0.2, 0.1 and 0.05.
        batches: images, or sequences of 128 tokens.
        threads: numbers of torch's threads.
        seconds: least measured time of each engine on each case.
        path: a file to keep the rows in, written after each layer and batch.
        progress: called with the share that is done (0 to 1) and the layer that is timed next.

    Returns:
        {"kind": "dlmc", "machine": header, "peaks": GFLOP/s by number of threads, "rows": one
        dictionary a case}; a wrong output has status "FAIL" and no times.

    Raises:
        OptionError: no layers, densities, batches or threads, or any of them out of range.
    """
    sizes = (*batches, *threads)
    if not layers or not densities or min(sizes, default=0) < 1 or not batches or not threads:
        raise OptionError(
            "bench_dlmc: expected layers, densities, and batches and threads of at least 1, got "
            f"{len(layers)} layers, {densities}, {batches}, {threads}"
        )
    peaks: dict[int, float] = {}
    for count in threads:
        with _threads(count):
            peaks[count] = multiply_add_rate()
    result: dict[str, Any] = {
        "kind": "dlmc",
        "machine": header() | {"threads": max(threads)},
        "peaks": {str(count): peak for count, peak in peaks.items()},
        "rows": [],
    }
    works = [(layer, batch) for batch in batches for layer in layers if _is_made(layer, batch)]
    for done, (layer, batch) in enumerate(works):
        others = Others([os.getpid()])
        if progress is not None:
            progress(done / len(works), f"{layer.case}, batch {batch}")
        work = _work(layer, batch)
        for density in densities:
            weight, mask, pattern = _weight(layer, density)
            for count in threads:
                with _threads(count):
                    row = _bench(work, weight, mask, seconds, peaks[count])
                about = {"density": density, "pattern": pattern, "batch": batch, "threads": count}
                result["rows"].append({"case": layer.case, "part": work.part, **about, **row})
        busy = others.cores()
        for row in result["rows"][-len(densities) * len(threads) :]:
            row["busy_cores"] = busy
        if path is not None:
            write_json(path, result)
    if progress is not None:
        progress(1.0, "done")
    return result


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _is_made(layer: Layer, batch: int) -> bool:
    return layer.kernel > 0 or not layer.name.endswith("conv2") or batch <= _IM2COL_BATCH


def _work(layer: Layer, batch: int) -> _Work:
    generator = torch.Generator().manual_seed(1)
    if layer.kernel:
        shape: tuple[int, ...] = (batch, layer.cols, layer.size, layer.size)
    else:
        shape = (layer.cols, layer.columns * batch)
    x = torch.randn(shape, generator=generator)
    return _Work(layer, "conv2d" if layer.kernel else "spmm", x)


def _weight(layer: Layer, density: float) -> tuple[Tensor, Tensor, str]:
    """Values, mask, and whether the mask is a pruned network's or random."""
    shape = (layer.rows, layer.cols) + (layer.kernel, layer.kernel) * bool(layer.kernel)
    found = real_mask(layer, density)
    mask = random_mask(shape, density) if found is None else found.reshape(shape)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    return values * mask, mask, "random" if found is None else "pruned"


def _bench(
    work: _Work, weight: Tensor, mask: Tensor, seconds: float, peak: float
) -> dict[str, Any]:
    """One row: the library's choice against everything else."""
    tuner = Tuner(weight_bytes=1 << 60)  # of a network that fits no cache
    select = _choose_conv if work.layer.kernel else _choose_product
    plan, chosen = select(tuner, work, weight, mask)
    with torch.inference_mode():
        engines = dict(_dense_engines(work, weight))
        runs = {"sparselt": chosen or engines["torch_dense"], **engines}
        if work.op == "spmm":
            runs["torch_csr"] = _csr_engine(work, weight)
        row: dict[str, Any] = {"engine": "sparselt", "kernel": plan.kernel, "status": "ok"}
        wrong = [name for name, run in runs.items() if not _is_right(work, weight, run())]
        if wrong:
            return row | {"status": "FAIL", "reason": f"wrong output: {', '.join(wrong)}"}
        times = _times(work, weight, runs, tuner.cool(work.x), seconds)
    dense = {name: times[name].median_us for name in times if name not in ("sparselt", "torch_csr")}
    best = min(dense, key=dense.__getitem__)
    own = times["sparselt"]
    gflops = 2e-3 * int(mask.sum()) * work.columns / own.median_us
    return row | {
        "kept": int(mask.sum()) / mask.numel(),
        "median_us": own.median_us,
        "noise": own.noise,
        "gflops": gflops,
        "share": gflops / peak,
        "dense_us": dense,
        "best_dense": best,
        "speedup": dense[best] / own.median_us,
        "csr_us": times["torch_csr"].median_us if "torch_csr" in times else None,
    }


def _choose_conv(
    tuner: Tuner, work: _Work, weight: Tensor, mask: Tensor
) -> tuple[Plan, Callable[[], object] | None]:
    """The plan that `convert` makes, and its call; None where the layer stays dense."""
    layer = work.layer
    module = nn.Conv2d(
        layer.cols, layer.rows, layer.kernel, layer.stride, layer.kernel // 2, bias=False
    )
    module.weight.data = weight
    plan = tuner.plan(module, mask, [work.x])
    if plan.is_dense:
        return plan, None
    sparse = SPARSE_LAYERS[nn.Conv2d](module, plan, mask)
    return plan, lambda: sparse(work.x)


def _choose_product(
    tuner: Tuner, work: _Work, weight: Tensor, mask: Tensor
) -> tuple[Plan, Callable[[], object] | None]:
    """The same for y = W x, which no layer of torch computes."""
    facts = Facts("spmm", tuple(weight.shape), int(mask.sum()), work.columns)
    kernels = ops.kernels()
    calls: dict[str, Callable[[], object]] = {DENSE: lambda: weight @ work.x}
    for item in tuner.worth_timing(candidates(facts, kernels), kernels):
        packed = pack(weight, mask, item.format, None if item.block == (1, 1) else item.block)
        calls[item.kernel] = partial(ops.spmm, packed, work.x, kernel=item.kernel)
    plan = choose(facts, kernels, measure(calls, prepare=tuner.cool(work.x)))
    return plan, None if plan.is_dense else calls[plan.kernel]


def _dense_engines(work: _Work, weight: Tensor) -> Iterator[tuple[str, Callable[[], Any]]]:
    x, layer = work.x, work.layer
    yield "torch_dense", lambda: apply_dense(work.op, layer, weight, x)
    if work.op == "spmm":
        return
    last = torch.channels_last
    w, z = weight.contiguous(memory_format=last), x.contiguous(memory_format=last)
    yield "torch_channels_last", lambda: apply_dense(work.op, layer, w, z)
    if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        # oneDNN's own layout for weights, input and output: what a network in it would meet.
        geometry = [layer.kernel // 2] * 2, [layer.stride] * 2, [1, 1], 1
        reordered = torch._C._nn.mkldnn_reorder_conv2d_weight(weight.to_mkldnn(), *geometry)
        blocked = x.to_mkldnn()
        yield "torch_mkldnn", lambda: apply_dense(work.op, layer, reordered, blocked)


def _csr_engine(work: _Work, weight: Tensor) -> Callable[[], Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says on every use that its CSR is in beta
        csr = weight.to_sparse_csr()
    return lambda: csr @ work.x


def _is_right(work: _Work, weight: Tensor, y: object) -> bool:
    """Whether some columns, or the last image, are within the dot product's rounding of float64."""
    assert isinstance(y, Tensor)
    y = y.to_dense() if y.is_mkldnn else y
    if work.op == "spmm":
        take = torch.linspace(0, work.columns - 1, _CHECKED_COLUMNS).long()
        x, y = work.x[:, take], y[:, take]
    else:
        x, y = work.x[-1:], y[-1:]
    terms = float(weight.flatten(1).count_nonzero(1).max()) + 2
    expected = apply_dense(work.op, work.layer, weight.double(), x.double())
    scale = apply_dense(work.op, work.layer, weight.double().abs(), x.double().abs())
    return bool(((y - expected).abs() <= terms * 2.0**-23 * scale + 1e-30).all())


def _times(
    work: _Work,
    weight: Tensor,
    runs: dict[str, Callable[[], object]],
    flush: Callable[[], object],
    seconds: float,
) -> dict[str, Timing]:
    """In turns; numpy apart from the others, because its threads spin after a call."""
    options: dict[str, Any] = {"repeats": _REPEATS, "seconds": seconds, "warmup_seconds": 0.0}
    times = interleave(runs, flush=flush, **options)
    limits, reason = equal_numpy_threads()
    if work.op == "spmm" and not reason:
        a, b = weight.numpy(), work.x.numpy()
        with limits:
            times |= interleave({"numpy_dense": lambda: a @ b}, flush=flush, **options)
        time.sleep(SPIN_SECONDS)
    return times


def _mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def dlmc_summary(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Geometric means over the layers of each part, batch, number of threads and density."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        if row["status"] == "ok":
            about = row["batch"], row["threads"], row["density"]
            for part in (row["part"], f"all {row['part'].split()[0]}"):
                groups.setdefault((part, *about), []).append(row)
    found = []
    for (part, batch, threads, density), rows in sorted(groups.items(), key=lambda g: g[0][:3]):
        csr = [row["csr_us"] / row["median_us"] for row in rows if row["csr_us"]]
        found.append(
            {
                "part": part,
                "batch": batch,
                "threads": threads,
                "density": density,
                "layers": len(rows),
                "gflops": _mean([row["gflops"] for row in rows]),
                "share": _mean([row["share"] for row in rows]),
                "speedup": _mean([row["speedup"] for row in rows]),
                "least": min(row["speedup"] for row in rows),
                "csr": _mean(csr) if csr else None,
            }
        )
    return found


_COLUMNS = (
    Column("layers", lambda row: f"{row['part']} ({row['layers']})", right=False, whole=True),
    Column("batch", lambda row: str(row["batch"])),
    Column("threads", lambda row: str(row["threads"])),
    Column("zeros", lambda row: f"{1 - row['density']:.0%}"),
    Column("GFLOP/s", lambda row: f"{row['gflops']:.0f}"),
    Column("of peak", lambda row: f"{row['share']:.0%}"),
    Column("x best dense", lambda row: f"{row['speedup']:.1f}"),
    Column("least", lambda row: f"{row['least']:.1f}"),
    Column("x torch CSR", lambda row: "-" if row["csr"] is None else f"{row['csr']:.1f}"),
)


def dlmc_table(result: dict[str, Any]) -> Table:
    """The summary as it is printed, with the layers that are slower than dense by name."""
    slower = [
        f"{row['case']} at {1 - row['density']:.0%}, batch {row['batch']}: {row['speedup']:.2f}"
        for row in result["rows"]
        if row.get("speedup", 1.0) < 0.95
    ]
    random = sum(row["pattern"] == "random" for row in result["rows"])
    busy = sum(map(is_busy, result["rows"]))
    notes = [
        f"Peak of multiply-adds: {', '.join(f'{v:.0f}' for v in result['peaks'].values())} GFLOP/s",
        f"Slower than the best dense engine: {'; '.join(slower) or 'none'}",
        *([f"{random} cases have random zeros: SPARSELT_DATA holds no dlmc"] if random else []),
        *([f"BUSY: other work disturbed {busy} of {len(result['rows'])} cases"] if busy else []),
        *(f"FAILED: {row['case']}: {row['reason']}" for row in result["rows"] if "reason" in row),
        one_line(result["machine"]),
    ]
    return rich_table("", _COLUMNS, dlmc_summary(result), "\n".join(notes))
