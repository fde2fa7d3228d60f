# SPDX-License-Identifier: Apache-2.0
"""The layers of DLMC, each with the kernel that the library chooses, against the best dense engine.

Each layer runs at its own map size: as a product of row-major matrices, as a convolution or linear
layer, and as a compiled program holds it, in the middle of a program whose values are in panels
wherever its kernel can have them so. See `chosen` for how a layer is timed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from sparselt.measure.chosen import CALL, IMAGES, PROGRAM, bench_work, peak, weights_of, work_on
from sparselt.measure.report import Column, rich_table
from sparselt.measure.suites import DLMC, Layer
from sparselt.measure.sweep import Item, Row, Sweep, caption, threads, timed

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["SWEEP", "dlmc_items", "dlmc_summary", "dlmc_table", "geometric_mean", "slower"]

_DENSITIES = (0.2, 0.1, 0.05)
_BATCHES = (1, 16, 32)
_THREADS = (2, 1)
# On one thread, and of torch's slow CSR product, smaller batches tell enough.
_LARGEST_IN_PART = 16
# A matrix of im2col for a batch would be larger than everything else together; no library makes it.
_IM2COL_BATCH = 1
# From so many images on, programs may keep them innermost.
_LEAST_IMAGES = 16
_SLOWER = 0.95
_KINDS = {PROGRAM: "in a program", IMAGES: "with images innermost"}


def dlmc_items(
    quick: bool = False,
    layers: Sequence[Layer] = DLMC,
    densities: Sequence[float] = _DENSITIES,
    batches: Sequence[int] = _BATCHES,
    counts: Sequence[int] = _THREADS,
) -> list[Item]:
    """A measurement for each layer, batch and number of threads.

    Args:
        quick: the middle density, one image, and the first number of threads only.
        layers: products and convolutions.
        densities: shares of kept weights; DLMC has 0.2, 0.1 and 0.05.
        batches: images, or sequences of 128 tokens.
        counts: numbers of torch's threads.
    """
    if quick:
        densities, batches, counts = densities[len(densities) // 2 :][:1], (1,), counts[:1]
    items = []
    for count in counts:
        for batch in batches:
            if count == 1 and batch > _LARGEST_IN_PART:
                continue
            for layer in layers:
                for op in _operations(layer, batch):
                    name = f"{layer.case}{' linear' * (op == 'linear')}, batch {batch}"
                    run = partial(_bench, layer, op, batch, count, densities)
                    items.append(Item(f"{name}, threads {count}", run))
    return items


def _operations(layer: Layer, batch: int) -> tuple[str, ...]:
    if layer.kernel:
        return ("conv2d",)
    if layer.name.startswith("transformer"):
        return ("spmm", "linear")
    return ("spmm",) * (not layer.name.endswith("conv2") or batch <= _IM2COL_BATCH)


def _bench(layer: Layer, op: str, batch: int, count: int, densities: Sequence[float]) -> list[Row]:
    ways = {"conv2d": (CALL, PROGRAM), "linear": (PROGRAM,), "spmm": (CALL,)}[op]
    if op == "conv2d" and batch >= _LEAST_IMAGES:
        ways += (IMAGES,)
    weights = [weights_of(layer, density) for density in densities]
    csr = op == "spmm" and batch <= _LARGEST_IN_PART
    with threads(count):
        rows = bench_work(work_on(layer, batch, op), weights, ways, csr=csr)
    return [row | {"part": _part(layer, op, row["way"])} for row in rows]


def _part(layer: Layer, op: str, way: str) -> str:
    """The group of layers that a row counts in."""
    if layer.name.startswith("transformer"):
        return "transformer in a program" if way == PROGRAM else "transformer spmm"
    size = layer.kernel or (3 if layer.name.endswith("conv2") else 1)
    plain = op if layer.kernel or size == 1 else "spmm of im2col"
    return f"{size}x{size} {_KINDS.get(way, plain)}"


def _peaks() -> dict[str, Any]:
    found = {}
    for count in _THREADS:
        with threads(count):
            found[str(count)] = peak(count)
    return {"peaks": found}


def geometric_mean(values: Iterable[float]) -> float:
    """Of positive numbers; not a number without any.

    Example:
        >>> geometric_mean([2.0, 8.0])
        4.0
    """
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def slower(rows: Iterable[Row]) -> str:
    """A note that names the rows slower than the best dense engine."""
    found = [
        f"{row['case']} at {1 - row['density']:.0%}, batch {row['batch']}: {row['speedup']:.2f}"
        for row in timed(rows)
        if row["speedup"] < _SLOWER
    ]
    return f"Slower than the best dense engine: {'; '.join(found) or 'none'}"


def dlmc_summary(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Geometric means over the layers of each part, batch, number of threads and density.

    "resnet50" are the layers as `ops.spmm` runs them; "resnet50 in a program" all of them, 3x3 too,
    and so are those "with images innermost".
    A layer in a program is held against torch's CSR product of the same layer and batch.
    """
    rows = timed(result["rows"])
    csr = {_key(row): row["csr_us"] for row in rows if row["csr_us"]}
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        about = row["batch"], row["threads"], row["density"]
        kind = _KINDS.get(row["way"], "")
        wholes = [f"resnet50 {kind}".strip()]
        is_whole = kind or row["op"] == "spmm"
        if row["layer"].startswith("transformer") or not is_whole:
            wholes = []
        for part in (row["part"], *wholes):
            groups.setdefault((part, *about), []).append(row)
    order = sorted(groups.items(), key=lambda group: (*group[0][:3], -group[0][3]))
    return [_summary_row(key, members, csr) for key, members in order]


def _key(row: Row) -> tuple[Any, ...]:
    return row["layer"], row["batch"], row["threads"], row["density"]


def _summary_row(
    key: tuple[Any, ...], rows: Sequence[Row], csr: dict[tuple[Any, ...], float]
) -> dict[str, Any]:
    part, batch, count, density = key
    against_csr = [csr[_key(row)] / row["median_us"] for row in rows if _key(row) in csr]
    return {
        "part": part,
        "batch": batch,
        "threads": count,
        "density": density,
        "layers": len(rows),
        "gflops": geometric_mean(row["gflops"] for row in rows),
        "share": geometric_mean(row["share"] for row in rows),
        "speedup": geometric_mean(row["speedup"] for row in rows),
        "least": min(row["speedup"] for row in rows),
        "csr": geometric_mean(against_csr) if against_csr else None,
        "least_csr": min(against_csr, default=None),
    }


def _or_dash(key: str) -> Callable[[dict[str, Any]], str]:
    return lambda row: "-" if row[key] is None else f"{row[key]:.1f}"


_COLUMNS = (
    Column("layers", lambda row: f"{row['part']} ({row['layers']})", right=False, whole=True),
    Column("batch", lambda row: str(row["batch"])),
    Column("threads", lambda row: str(row["threads"])),
    Column("zeros", lambda row: f"{1 - row['density']:.0%}"),
    Column("GFLOP/s", lambda row: f"{row['gflops']:.0f}"),
    Column("of peak", lambda row: f"{row['share']:.0%}"),
    Column("x best dense", _or_dash("speedup")),
    Column("least", _or_dash("least")),
    Column("x torch CSR", _or_dash("csr")),
    Column("least", _or_dash("least_csr")),
)


def dlmc_table(result: dict[str, Any]) -> Table:
    """The summary as it is printed, with the layers that are slower than dense by name."""
    random = sum(row["pattern"] == "random" for row in result["rows"])
    peaks = ", ".join(f"{rate:.0f} on {count}" for count, rate in result["peaks"].items())
    notes = caption(
        result,
        f"Peak of multiply-adds, GFLOP/s by threads: {peaks}",
        slower(result["rows"]),
        f"{random} cases have random zeros: SPARSELT_DATA holds no dlmc" if random else "",
    )
    return rich_table("", _COLUMNS, dlmc_summary(result), notes)


SWEEP = Sweep("dlmc", dlmc_items, dlmc_table, _peaks)
