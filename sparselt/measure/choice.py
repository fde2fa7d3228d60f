# SPDX-License-Identifier: Apache-2.0
"""Whether any layer is slower than dense once the library has chosen its kernel.

The layers of the known networks, and shapes that are hard to serve: small and odd ones. From 55 %
zeros on each should be faster than the best dense engine; a layer that stays dense runs torch's
own operator, so it can be slower than numpy or another of torch's layouts.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from sparselt.measure.chosen import bench_work, weights_of, work_on
from sparselt.measure.dlmc import geometric_mean, slower
from sparselt.measure.report import Column, microseconds, rich_table
from sparselt.measure.suites import DLMC, SUITES, Layer
from sparselt.measure.sweep import Item, Row, Sweep, caption, timed

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["LAYERS", "SWEEP", "choice_items", "choice_table"]

_ODD = (
    Layer("odd.linear", 17, 23),
    Layer("odd.classes", 10, 512),
    Layer("odd.tall", 2000, 40, columns=33),
    Layer("odd.conv1x1", 96, 80, kernel=1, size=13),
    Layer("odd.conv3x3", 48, 32, kernel=3, size=9),
    Layer("odd.conv5x5", 32, 32, kernel=5, size=27),
)
# Each shape once.
LAYERS = tuple(
    {
        (layer.rows, layer.cols, layer.columns, layer.kernel, layer.size): layer
        for layer in (*_ODD, *DLMC, *(x for suite in SUITES.values() for x in suite))
    }.values()
)
_DENSITIES = (0.45, 0.2, 0.1, 0.05)
_BATCHES = (1, 16)


def choice_items(quick: bool = False) -> list[Item]:
    """A measurement for each layer and batch; quick: one image."""
    return [
        Item(f"{layer.case}, batch {batch}", partial(_bench, layer, batch))
        for layer in LAYERS
        for batch in _BATCHES[: 1 if quick else None]
        if batch == 1 or not _is_im2col(layer)
    ]


def _is_im2col(layer: Layer) -> bool:
    return layer.name.endswith("conv2") and not layer.kernel


def _bench(layer: Layer, batch: int) -> list[Row]:
    op = "linear" if not layer.kernel and layer.columns == 1 else ""
    return bench_work(work_on(layer, batch, op), [weights_of(layer, d) for d in _DENSITIES])


_COLUMNS = (
    Column("zeros", lambda row: f"{1 - row['density']:.0%}"),
    Column("cases", lambda row: str(row["cases"])),
    Column("stay dense", lambda row: str(row["dense"])),
    Column("x best dense", lambda row: f"{row['speedup']:.2f}"),
    Column("least", lambda row: f"{row['least']['speedup']:.2f}"),
    Column("of", lambda row: _told(row["least"]), right=False),
)


def _told(row: Row) -> str:
    best = min(row["dense_us"].values())
    return (
        f"{row['case']}, batch {row['batch']}: {row['kernel']} {microseconds(row['median_us'])}, "
        f"{row['best_dense']} {microseconds(best)}"
    )


def choice_table(result: dict[str, Any]) -> Table:
    """By share of zeros: the gain, and the least of all, and below it what is slower than dense."""
    rows, summary = timed(result["rows"]), []
    for density in sorted({row["density"] for row in rows}, reverse=True):
        own = [row for row in rows if row["density"] == density]
        summary.append(
            {
                "density": density,
                "cases": len(own),
                "dense": sum(row["kernel"] == "dense" for row in own),
                "speedup": geometric_mean(row["speedup"] for row in own),
                "least": min(own, key=lambda row: float(row["speedup"])),
            }
        )
    return rich_table("", _COLUMNS, summary, caption(result, slower(rows)))


SWEEP = Sweep("choice", choice_items, choice_table)
