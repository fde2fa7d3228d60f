# SPDX-License-Identifier: Apache-2.0
"""The pictures of lottery experiments, drawn from records alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from sparselt.lottery.chart import Line, Panel, draw_chart
from sparselt.lottery.record import Row
from sparselt.lottery.stability import STABLE, Stability

__all__ = ["draw_levels", "draw_paths", "draw_stability"]


def draw_levels(rows: Sequence[Row], caption: str, path: str | Path) -> None:
    """Accuracy and early-stop iteration against weights remaining, tickets against controls.

    Each line is the mean over the seeds, its band runs from the least to the largest.

    Args:
        rows: The record of one recipe, all seeds.
        caption: Below the picture: what was run.
        path: The PNG to write.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    dense = [row for row in rows if row.level == 0]
    accuracy = sum(100 * row.test_accuracy for row in dense) / max(len(dense), 1)
    panels = [
        Panel(
            "accuracy at the end of training",
            "weights remaining (%)",
            "test accuracy (%)",
            _lines(rows, lambda row: 100 * row.test_accuracy),
            {"dense": accuracy} if dense else {},
            shrinking=True,
        ),
        Panel(
            "how soon training gets there",
            "weights remaining (%)",
            "iteration of least validation loss",
            _lines(rows, lambda row: float(row.early_stop_iteration)),
            shrinking=True,
        ),
    ]
    draw_chart(panels, caption, path)


def draw_stability(
    dense: Sequence[Stability], tickets: Sequence[Stability], caption: str, path: str | Path
) -> None:
    """Instability against the rewinding iteration, dense network and tickets.

    Args:
        dense: Of the dense network, one or more a rewinding iteration.
        tickets: Of the tickets.
        caption: Below the picture: what was run.
        path: The PNG to write.
    """
    lines = []
    for label, cases in (("dense", dense), ("ticket", tickets)):
        points: dict[float, list[float]] = defaultdict(list)
        for case in cases:
            points[float(case.start)].append(100 * case.instability)
        if points:
            lines.append(Line(label, points))
    panel = Panel(
        "instability to the order of the data",
        "rewinding iteration",
        "instability (% of error)",
        lines,
        {"stable below": 100 * STABLE},
        even=True,
    )
    draw_chart([panel], caption, path)


def draw_paths(cases: Sequence[Stability], caption: str, path: str | Path) -> None:
    """Error along the line between two runs, one line a case (at most six).

    Args:
        cases: Each labelled by its rewinding iteration and density.
        caption: Below the picture: what was run.
        path: The PNG to write.
    """
    lines = [
        Line(
            f"k = {case.start}, {100 * case.density:.1f} %",
            {
                index / (len(case.errors) - 1): [100 * error]
                for index, error in enumerate(case.errors)
            },
        )
        for case in cases
    ]
    panel = Panel("between two runs", "share of the way", "test error (%)", lines)
    draw_chart([panel], caption, path)


def _lines(rows: Sequence[Row], value: Callable[[Row], float]) -> list[Line]:
    """One line a kind of arm, tickets first; x is the density of the level in percent."""
    densities: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        densities[row.level].append(100 * row.density)
    kinds = list(dict.fromkeys(row.kind for row in rows))
    lines = []
    for kind in kinds:
        points: dict[float, list[float]] = defaultdict(list)
        for row in rows:
            if row.kind == kind:
                here = densities[row.level]
                points[sum(here) / len(here)].append(value(row))
        lines.append(Line(kind, points))
    return lines
