# SPDX-License-Identifier: Apache-2.0
"""The picture of a search, drawn from its record alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from sparselt.lottery.chart import Line, Panel, draw_chart
from sparselt.lottery.record import Row

__all__ = ["draw_levels"]


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
