# SPDX-License-Identifier: Apache-2.0
"""Results as tables on the terminal, Markdown for a README, and JSON for machines.

A result is a dictionary {"kind": ..., "machine": header, "rows": [...]}; a table is a list of
columns over its rows, so the terminal and the README cannot disagree.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparselt.errors import DataError
from sparselt.measure.machine import one_line

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "LAYER_COLUMNS",
    "MODEL_COLUMNS",
    "Column",
    "compare",
    "fill_markers",
    "markdown",
    "microseconds",
    "read_json",
    "rich_table",
    "write_json",
    "write_text",
]

SCHEMA = 1


@dataclass(frozen=True)
class Column:
    """One column: its heading, and how a row's cell is written."""

    title: str
    cell: Callable[[dict[str, Any]], str]
    right: bool = True


def microseconds(value: float | None) -> str:
    """A time with the unit and the digits that mean something.

    Example:
        >>> microseconds(3.14159), microseconds(1234.5), microseconds(98765.4), microseconds(None)
        ('3.14 us', '1.23 ms', '98.8 ms', '-')
    """
    if value is None:
        return "-"
    for unit, scale in (("us", 1.0), ("ms", 1e3), ("s", 1e6)):
        if value < 999.5 * scale or unit == "s":
            return f"{_three_digits(value / scale)} {unit}"
    raise AssertionError("unreachable: the loop ends with seconds")


def _three_digits(value: float) -> str:
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def _status(row: dict[str, Any]) -> str:
    return "" if row["status"] == "ok" else f"{row['status']}: {row['reason']}"


def _time(row: dict[str, Any]) -> str:
    return microseconds(row.get("median_us"))


def _spread(row: dict[str, Any]) -> str:
    if "p10_us" not in row:
        return "-"
    return f"{microseconds(row['p10_us'])} - {microseconds(row['p90_us'])}"


def _speedup(row: dict[str, Any]) -> str:
    return f"{row['speedup']:.2f}x" if "speedup" in row else "-"


def _error(row: dict[str, Any]) -> str:
    return "-" if row.get("error") is None else f"{row['error']:.1e}"


def _rate(key: str) -> Callable[[dict[str, Any]], str]:
    return lambda row: _three_digits(row[key]) if key in row else "-"


MODEL_COLUMNS = (
    Column("engine", lambda row: str(row["engine"]), right=False),
    Column("median", _time),
    Column("p10 - p90", _spread),
    Column("vs best dense", _speedup),
    Column("max error", _error),
    Column("note", _status, right=False),
)
LAYER_COLUMNS = (
    Column("layer", lambda row: str(row["case"]), right=False),
    Column("density", lambda row: f"{row['density']:g}"),
    Column("engine", lambda row: str(row["engine"]), right=False),
    Column("median", _time),
    Column("GFLOP/s", _rate("gflops")),
    Column("dense-equivalent", _rate("dense_gflops")),
    Column("vs best dense", _speedup),
    Column("max error", _error),
    Column("note", _status, right=False),
)


def rich_table(
    title: str, columns: Sequence[Column], rows: Iterable[dict[str, Any]], caption: str = ""
) -> Table:
    """A table for `rich.console.Console.print`."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=title, caption=caption or None, title_justify="left", caption_justify="left"
    )
    for column in columns:
        table.add_column(column.title, justify="right" if column.right else "left")
    for row in rows:
        table.add_row(*(escape(column.cell(row)) for column in columns))
    return table


def markdown(columns: Sequence[Column], rows: Iterable[dict[str, Any]]) -> str:
    """The same table in Markdown.

    Example:
        >>> print(markdown([Column("a", lambda row: str(row["a"]))], [{"a": 1}]))
        | a |
        | ---: |
        | 1 |
    """
    lines = [
        "| " + " | ".join(column.title for column in columns) + " |",
        "| " + " | ".join("---:" if column.right else "---" for column in columns) + " |",
    ]
    for row in rows:
        cells = (column.cell(row).replace("|", "\\|") for column in columns)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_text(path: str | Path, text: str) -> None:
    """Write a file beside and then rename it, so that it is never half written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: str | Path, result: dict[str, Any]) -> None:
    """Write a result dictionary, with the schema's number."""
    text = json.dumps({"schema": SCHEMA, **result}, indent=1, allow_nan=False)
    # A list of plain numbers belongs on one line, whatever indent says.
    text = re.sub(r"\[[\s\d.,eE+-]+\]", lambda found: " ".join(found[0].split()), text)
    write_text(path, text + "\n")


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a result that `write_json` wrote.

    Raises:
        DataError: if the file is missing, not JSON, or not a result.
    """
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: expected a JSON result of sparselt, got {error}") from error
    good = isinstance(result, dict) and isinstance(result.get("rows"), list)
    if not good or result.get("schema") != SCHEMA or not isinstance(result.get("machine"), dict):
        raise DataError(
            f"{path}: expected a result of sparselt with schema {SCHEMA}, machine and rows; write "
            "one with `sparselt bench ... --json FILE`"
        )
    return dict(result)


def fill_markers(text: str, name: str, body: str) -> str:
    r"""Replace what stands between `<!-- table: name -->` and `<!-- end: name -->`.

    Raises:
        DataError: if the markers are not there exactly once.

    Example:
        >>> fill_markers("<!-- table: t -->old<!-- end: t -->", "t", "new")
        '<!-- table: t -->\nnew\n<!-- end: t -->'
    """
    begin, end = f"<!-- table: {name} -->", f"<!-- end: {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise DataError(f"markers: expected one {begin} followed by one {end}")
    head, rest = text.split(begin)
    tail = rest.split(end)[1]
    return f"{head}{begin}\n{body}\n{end}{tail}"


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(row.get(name, "")) for name in ("case", "density", "batch", "engine"))


def compare(before: dict[str, Any], after: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """Join two results row by row.

    Returns:
        (rows with case, engine, density, before_us, after_us, ratio and verdict; a warning if the
        two were not measured on the same machine and threads, else "").

    Raises:
        DataError: if no row is in both.
    """
    old = {_key(row): row for row in before["rows"] if row.get("median_us")}
    rows = []
    for row in after["rows"]:
        if not row.get("median_us") or _key(row) not in old:
            continue
        was = old[_key(row)]
        ratio = was["median_us"] / row["median_us"]
        noise = max(0.05, float(was.get("noise", 0.0)), float(row.get("noise", 0.0)))
        verdict = "faster" if ratio > 1 + noise else "slower" if ratio < 1 / (1 + noise) else "same"
        rows.append(
            {
                **{name: row.get(name, "") for name in ("case", "density", "batch", "engine")},
                "before_us": was["median_us"],
                "after_us": row["median_us"],
                "ratio": ratio,
                "verdict": verdict,
            }
        )
    if not rows:
        raise DataError("compare: no case and engine has a time in both files")
    one, two = (result["machine"] for result in (before, after))
    differ = [name for name in ("cpu", "isa", "threads") if one.get(name) != two.get(name)]
    warning = ""
    if differ:
        warning = (
            f"not the same {' and '.join(differ)}: {one_line(one)} against {one_line(two)}; the "
            "ratios compare machines, not code"
        )
    return rows, warning


COMPARE_COLUMNS = (
    Column("case", lambda row: str(row["case"]), right=False),
    Column("density", lambda row: str(row["density"])),
    Column("engine", lambda row: str(row["engine"]), right=False),
    Column("before", lambda row: microseconds(row["before_us"])),
    Column("after", lambda row: microseconds(row["after_us"])),
    Column("speed-up", lambda row: f"{row['ratio']:.2f}x"),
    Column("verdict", lambda row: str(row["verdict"]), right=False),
)
