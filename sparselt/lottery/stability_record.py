# SPDX-License-Identifier: Apache-2.0
"""The record of stability: one row a pair of runs, as JSON, as CSV and as a picture."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparselt.errors import DataError
from sparselt.lottery.chart import Line, Panel, draw_chart
from sparselt.lottery.stability import STABLE, Stability
from sparselt.tickets.file import replace_file

__all__ = ["StabilityRow", "draw_stability", "read_stability", "write_stability"]

_LISTS = ("errors", "train_errors")


@dataclass(frozen=True)
class StabilityRow:
    """What lay between one pair of runs.

    Attributes:
        arm: ``dense``, ``ticket``, or the name of a control.
        seed: Of the recipe, and so of the original weights.
        pair: Number of the pair of data orders.
        case: The measurement.
    """

    arm: str
    seed: int
    pair: int
    case: Stability

    def to_values(self) -> dict[str, Any]:
        """Plain values, the summary first and the errors along the line last."""
        case = asdict(self.case)
        lists = {name: list(case.pop(name)) for name in _LISTS}
        summary = {
            "instability": self.case.instability,
            "train_instability": self.case.train_instability,
            "mean_end_error": (self.case.errors[0] + self.case.errors[-1]) / 2,
        }
        return {
            "arm": self.arm, "seed": self.seed, "pair": self.pair, **case, **summary, **lists,
        }  # fmt: skip


def write_stability(
    rows: Sequence[StabilityRow], path: str | Path, meta: Mapping[str, Any] | None = None
) -> None:
    """Writes ``path`` as JSON and the same rows, without the lines, beside it as ``.csv``.

    Args:
        rows: At least one.
        path: The JSON file.
        meta: Further keys of the JSON file, such as the recipe and the machine.

    Raises:
        DataError: There are no rows.
    """
    if not rows:
        raise DataError("stability record: expected at least one row, got none")
    path = Path(path)
    values = [row.to_values() for row in rows]
    content = {**(meta or {}), "rows": values}
    replace_file(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
    text = io.StringIO()
    names = [name for name in values[0] if name not in _LISTS]
    writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(values)
    replace_file(path.with_suffix(".csv"), text.getvalue().encode())


def read_stability(path: str | Path) -> tuple[list[StabilityRow], dict[str, Any]]:
    """The inverse of :func:`write_stability`.

    Returns:
        (rows, the further keys).

    Raises:
        DataError: The file is no record of stability.
    """
    try:
        content = json.loads(Path(path).read_text())
        rows = [_row(values) for values in content.pop("rows")]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path}: expected a record of stability, got {error}") from error
    return rows, content


def draw_stability(
    rows: Sequence[StabilityRow], path: str | Path, title: str = "", caption: str = ""
) -> None:
    """Draws instability against the rewinding point, and the error along the lines.

    Args:
        rows: Of one network; at each point the mean is drawn, and a band from the least to the
            largest.
        path: The PNG file.
        title: Of the first panel: the network and the data.
        caption: What was run.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    arms = list(dict.fromkeys(row.arm for row in rows))
    points = sorted({row.case.start for row in rows})
    rising = Panel(
        title,
        "iteration at which the two runs part",
        "instability (points of test error)",
        [Line(arm, _instabilities(rows, arm)) for arm in arms],
        {f"stable below {100 * STABLE:g}": 100 * STABLE},
        even=True,
        bottom=0.0,
    )
    along = Panel(
        f"Error along the line, runs parted at iteration {points[0]}",
        "share of the way from one run's end to the other's",
        "test error (%)",
        [Line(arm, _path(rows, arm, points[0])) for arm in arms],
    )
    draw_chart([rising, along], caption, path)


def _instabilities(rows: Sequence[StabilityRow], arm: str) -> dict[float, list[float]]:
    found: dict[float, list[float]] = {}
    for row in rows:
        if row.arm == arm:
            found.setdefault(row.case.start, []).append(100 * row.case.instability)
    return found


def _path(rows: Sequence[StabilityRow], arm: str, start: int) -> dict[float, list[float]]:
    found: dict[float, list[float]] = {}
    for row in rows:
        if row.arm == arm and row.case.start == start:
            last = len(row.case.errors) - 1
            for index, error in enumerate(row.case.errors):
                found.setdefault(index / last, []).append(100 * error)
    return found


def _row(values: Mapping[str, Any]) -> StabilityRow:
    case = {name: values[name] for name in Stability.__dataclass_fields__}
    lists = {name: tuple(values[name]) for name in _LISTS}
    return StabilityRow(
        values["arm"], values["seed"], values["pair"], Stability(**{**case, **lists})
    )
