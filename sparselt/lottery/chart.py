# SPDX-License-Identifier: Apache-2.0
"""Line charts of experiments, in colours that colour-blind readers can tell apart."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sparselt.errors import MissingDependencyError
from sparselt.tickets.file import replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Line", "Panel", "draw_chart"]

# Okabe and Ito's colours.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_STYLES = ("o-", "s--", "^-.", "D:", "v-", "x--")
_GREY = "#666666"


@dataclass(frozen=True)
class Line:
    """One line: at each x the mean of its values, and a band from the least to the largest.

    Attributes:
        label: In the legend.
        points: Values at each x, at least one.
    """

    label: str
    points: Mapping[float, Sequence[float]]


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        title, x_label, y_label: With units.
        lines: At most six.
        marks: Horizontal lines by label.
        even: Whether the x positions are spread evenly whatever their values.
        bottom: Where the y axis starts; None leaves it to the data.
        shrinking: Whether the x axis is logarithmic and runs from large to small, as for weights
            remaining.
    """

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    marks: Mapping[str, float] = field(default_factory=dict)
    even: bool = False
    bottom: float | None = None
    shrinking: bool = False


def draw_chart(panels: Sequence[Panel], caption: str, path: str | Path) -> None:
    """Draws the panels side by side and saves one PNG, an existing file being replaced whole.

    Args:
        panels: At least one.
        caption: Below them: what was run.
        path: The file to write.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "the picture needs matplotlib, which is not installed: pip install 'sparselt[report]'"
        ) from error
    figure = Figure(figsize=(5.2 * len(panels), 4.2), dpi=140, layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw(axes, panel)
    figure.supxlabel(caption, fontsize=7, color=_GREY)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    replace_file(Path(path), buffer.getvalue())


def _draw(axes: Axes, panel: Panel) -> None:
    ticks = sorted({x for line in panel.lines for x in line.points})
    places = {x: float(index) if panel.even else x for index, x in enumerate(ticks)}
    for line, colour, style in zip(panel.lines, _COLOURS, _STYLES, strict=False):
        xs = sorted(line.points)
        groups = [line.points[x] for x in xs]
        at = [places[x] for x in xs]
        means = [sum(values) / len(values) for values in groups]
        axes.plot(at, means, style, color=colour, label=line.label, markersize=4)
        low, high = [min(values) for values in groups], [max(values) for values in groups]
        axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
    for index, (label, height) in enumerate(panel.marks.items()):
        axes.axhline(height, color=_GREY, linestyle=(":", "--", "-.")[index % 3], label=label)
    if panel.even:
        axes.set_xticks(list(places.values()), [f"{tick:g}" for tick in ticks])
    elif panel.shrinking:
        axes.set_xscale("log")
        axes.invert_xaxis()
        axes.set_xticks(_thinned(ticks), [f"{tick:.3g}" for tick in _thinned(ticks)])
        axes.minorticks_off()
    if panel.bottom is not None:
        axes.set_ylim(bottom=panel.bottom)
    axes.set_title(panel.title, fontsize=10)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _thinned(ticks: Sequence[float], most: int = 8) -> list[float]:
    """At most ``most`` of the ticks, the largest among them."""
    step = -(-len(ticks) // most)
    return sorted(list(ticks)[::-1][::step])
