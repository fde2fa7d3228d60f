# SPDX-License-Identifier: Apache-2.0
"""The quickstart's picture: accuracy against weights remaining, and latency beside it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparselt.errors import MissingDependencyError
from sparselt.measure.report import microseconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_quickstart"]

# Okabe and Ito's colours, which colour-blind readers can tell apart.
_TICKET, _CONTROL, _DENSE, _SPARSE = "#0072B2", "#D55E00", "#666666", "#009E73"


def draw_quickstart(rows: list[dict[str, Any]], caption: str, path: str | Path) -> None:
    """Draw one accuracy panel for each network and one latency panel for all, and save a PNG.

    Args:
        rows: the rows of `quickstart.run`: network, dense_accuracy, levels, batches.
        caption: the machine, in one line.
        path: the PNG to write; an existing file is replaced only by a whole one.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "the picture needs matplotlib, which is not installed: pip install 'sparselt[demo]'"
        ) from error
    figure = Figure(figsize=(4.3 * (len(rows) + 1), 4.4), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(rows) + 1, squeeze=False)[0]
    for panel, row in zip(panels, rows, strict=False):
        _draw_accuracy(panel, row)
    _draw_latency(panels[-1], rows)
    figure.supxlabel(caption, fontsize=7, color="#666666")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(dir=path.parent, suffix=".png")
    os.close(handle)
    try:
        figure.savefig(beside, format="png", metadata={"Software": None})
        os.chmod(beside, 0o644)
        os.replace(beside, path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise


def _draw_accuracy(panel: Axes, row: dict[str, Any]) -> None:
    remaining = [100 * level["density"] for level in row["levels"]]
    for arm, label, colour, style in (
        ("ticket", "ticket (original weights)", _TICKET, "o-"),
        ("control", "control (reinitialised)", _CONTROL, "s--"),
    ):
        points = [
            (x, [100 * y for y in level[f"{arm}_accuracies"]])
            for x, level in zip(remaining, row["levels"], strict=True)
            if level[f"{arm}_accuracies"]
        ]
        places = [x for x, _ in points]
        means = [sum(ys) / len(ys) for _, ys in points]
        panel.plot(places, means, style, color=colour, label=label, markersize=4)
        low, high = [min(ys) for _, ys in points], [max(ys) for _, ys in points]
        panel.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
    panel.axhline(100 * row["dense_accuracy"], color=_DENSE, linestyle=":", label="dense", zorder=0)
    panel.set_xscale("log")
    panel.invert_xaxis()
    ticks = [tick for tick in (100, 50, 20, 10, 5, 2, 1, 0.5) if tick >= min(remaining) * 0.9]
    panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.minorticks_off()
    panel.set_xlabel("weights remaining (%, log scale)")
    panel.set_ylabel("test accuracy (%)")
    panel.set_title(row["title"], fontsize=10)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8, loc="lower left")


def _draw_latency(panel: Axes, rows: list[dict[str, Any]]) -> None:
    bars = [(row["short"], found) for row in rows for found in row["batches"]]
    for place, (_, found) in enumerate(bars):
        for shift, key, colour in ((-0.2, "dense_us", _DENSE), (0.2, "sparse_us", _SPARSE)):
            label = {"dense_us": "best dense torch", "sparse_us": "sparselt"}[key]
            panel.barh(place + shift, found[key], 0.36, color=colour, label=label)
            text = microseconds(found[key])
            if key == "sparse_us":
                text += f"  ({found['speedup']:.2f}x)"
            _write_beside(panel, found[key], place + shift, text)
    times = [found[key] for _, found in bars for key in ("dense_us", "sparse_us")]
    panel.set_xscale("log")
    panel.set_xlim(min(times) / 3, max(times) * 30)  # room for the figures beside the bars
    names = [f"{network}\nbatch {found['batch']}" for network, found in bars]
    panel.set_yticks(range(len(bars)), names)
    panel.set_ylim(len(bars) - 0.4, -1.1)
    panel.set_xlabel("time of one call (us, log scale)")
    panel.set_title("Dense against sparse: shorter is better", fontsize=10)
    handles, labels = panel.get_legend_handles_labels()
    panel.legend(handles[:2], labels[:2], fontsize=8, loc="upper right", ncols=2)
    panel.grid(axis="x", alpha=0.3)


def _write_beside(panel: Axes, x: float, y: float, text: str) -> None:
    panel.annotate(text, (x, y), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8)
