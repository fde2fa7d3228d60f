# SPDX-License-Identifier: Apache-2.0
"""Layers whose zeros come in blocks of 4, 8 or 16 output channels, with the chosen kernel."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from sparselt.measure.chosen import CALL, PROGRAM, bench_work, peak, weights_of, work_on
from sparselt.measure.dlmc import geometric_mean, slower
from sparselt.measure.report import Column, microseconds, rich_table
from sparselt.measure.suites import Layer
from sparselt.measure.sweep import Item, Row, Sweep, caption, timed

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["SWEEP", "blocks_items", "blocks_table"]

_DENSITY = 0.1
_BLOCKS = ((1, 1), (4, 1), (8, 1), (16, 1))
_CASES = (
    *(
        (Layer("conv3x3", width, width, kernel=3, size=size), batch)
        for width, size in ((64, 56), (128, 28), (256, 14), (512, 7))
        for batch in (1, 32)
    ),
    *((Layer("conv1x1", 256, 1024, kernel=1, size=14), batch) for batch in (1, 32)),
    *((Layer("linear", 4096, 4096), batch) for batch in (1, 32, 128)),
)


def blocks_items(quick: bool = False) -> list[Item]:
    """A measurement for each layer, batch and block; quick: 4x1 and 16x1."""
    return [
        Item(f"{layer.case}, batch {batch}, {_told(block)}", partial(_bench, layer, batch, block))
        for layer, batch in _CASES
        for block in (_BLOCKS[1::2] if quick else _BLOCKS)
    ]


def _told(block: tuple[int, int]) -> str:
    return "single weights" if block == (1, 1) else f"{block[0]}x{block[1]}"


def _bench(layer: Layer, batch: int, block: tuple[int, int]) -> list[Row]:
    op = "" if layer.kernel else "linear"
    weights = [weights_of(layer, _DENSITY, block)]
    rows = bench_work(work_on(layer, batch, op), weights, (CALL, PROGRAM))
    told = _told(block)
    return [row | {"case": f"{layer.case}, {told}", "block": told} for row in rows]


_COLUMNS = (
    Column("layer", lambda row: f"{row['case']}, batch {row['batch']}", right=False),
    Column("run by", lambda row: "a program" if row["way"] == PROGRAM else "a call", right=False),
    Column("kernel", lambda row: str(row["kernel"]), right=False, whole=True),
    Column("time", lambda row: microseconds(row["median_us"])),
    Column("of peak", lambda row: f"{row['share']:.0%}"),
    Column("x best dense", lambda row: f"{row['speedup']:.1f}"),
)


def blocks_table(result: dict[str, Any]) -> Table:
    """A row each, and below it the means of all with more columns than one image of a vector."""
    rows = timed(result["rows"])
    means = []
    for block in dict.fromkeys(row["block"] for row in rows):
        own = [r for r in rows if r["block"] == block and r["way"] == PROGRAM and not _is_vector(r)]
        share = geometric_mean(row["share"] for row in own)
        gain = geometric_mean(row["speedup"] for row in own)
        means.append(f"{block} {share:.0%} of peak and {gain:.1f} x best dense")
    told = f"Means in a program, batch 1 of linear layers aside: {'; '.join(means)}"
    return rich_table("", _COLUMNS, rows, caption(result, told, slower(rows)))


def _is_vector(row: Row) -> bool:
    return bool(row["op"] == "linear" and row["batch"] == 1)


def _peaks() -> dict[str, Any]:
    count = torch.get_num_threads()
    return {"peaks": {str(count): peak(count)}}


SWEEP = Sweep("blocks", blocks_items, blocks_table, _peaks)
