# SPDX-License-Identifier: Apache-2.0
"""Results as tables on the terminal, Markdown for a README, and JSON for machines.

A result is a dictionary {"kind": ..., "machine": header, "rows": [...]}; a table is a list of
columns over its rows, so the terminal and the README cannot disagree.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparselt.errors import DataError
from sparselt.measure.machine import one_line
from sparselt.tickets.file import replace_file

if TYPE_CHECKING:
    from rich.console import JustifyMethod
    from rich.table import Table

__all__ = [
    "LAYER_COLUMNS",
    "MODEL_COLUMNS",
    "Column",
    "compare",
    "fill_markers",
    "layer_summary",
    "layer_tables",
    "markdown",
    "microseconds",
    "model_table",
    "read_json",
    "rich_table",
    "sparse_verdict",
    "write_json",
    "write_text",
]

SCHEMA = 1
# A smaller difference is never called a gain or a loss.
SMALLEST_GAIN = 0.05


@dataclass(frozen=True)
class Column:
    """One column: its heading, and how a row's cell is written."""

    title: str
    cell: Callable[[dict[str, Any]], str]
    right: bool = True
    whole: bool = False  # never broken over lines on a narrow terminal


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
    if abs(value) >= 999.5:
        return f"{value:.0f}"
    return f"{value:#.3g}".removesuffix(".") if value else "0"


def _status(row: dict[str, Any]) -> str:
    return "" if row["status"] == "ok" else f"{row['status']}: {row['reason']}"


def _time(row: dict[str, Any]) -> str:
    return microseconds(row.get("median_us"))


def _spread(row: dict[str, Any]) -> str:
    """Distance between the quartiles as a share of the median."""
    return f"{row['iqr_us'] / row['median_us']:.0%}" if "iqr_us" in row else "-"


def _speedup(row: dict[str, Any]) -> str:
    return f"{row['speedup']:.2f}x" if "speedup" in row else "-"


def _error(row: dict[str, Any]) -> str:
    return "-" if row.get("error") is None else f"{row['error']:.1e}"


def _rate(key: str) -> Callable[[dict[str, Any]], str]:
    return lambda row: _three_digits(row[key]) if key in row else "-"


MODEL_COLUMNS = (
    Column("engine", lambda row: str(row["engine"]), right=False, whole=True),
    Column("median", _time),
    Column("IQR", _spread),
    Column("speed-up", _speedup),
    Column("max error", _error),
    Column("note", _status, right=False),
)
LAYER_COLUMNS = (
    Column("engine", lambda row: str(row["engine"]), right=False, whole=True),
    Column("median", _time),
    Column("IQR", _spread),
    Column("GFLOP/s", _rate("gflops")),
    Column("speed-up", _speedup),
    Column("max error", _error),
    Column("note", _status, right=False),
)
SUMMARY_COLUMNS = (
    Column("layer", lambda row: str(row["case"]).split(" ")[0], right=False, whole=True),
    Column("shape", lambda row: str(row["case"]).partition(" ")[2], right=False),
    Column("density", lambda row: f"{row['density']:g}"),
    Column("best dense", lambda row: f"{microseconds(row['dense_us'])} {row['dense']}"),
    Column("best kernel", lambda row: f"{microseconds(row['sparse_us'])} {row['sparse']}"),
    Column("speed-up", lambda row: f"{row['speedup']:.2f}x"),
)


def rich_table(
    title: str, columns: Sequence[Column], rows: Iterable[dict[str, Any]], caption: str = ""
) -> Table:
    """A table for `rich.console.Console.print`."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=title or None,
        caption=caption or None,
        title_justify="left",
        caption_justify="left",
        title_style="bold",
        caption_style="",
        box=box.SIMPLE_HEAD,
    )
    for column in columns:
        justify: JustifyMethod = "right" if column.right else "left"
        table.add_column(column.title, justify=justify, no_wrap=column.whole, overflow="fold")
    for row in rows:
        table.add_row(*(escape(column.cell(row)) for column in columns))
    return table


def model_table(result: dict[str, Any]) -> Table:
    """The table of one `ModelReport.as_json`, with what was measured and on what under it."""
    case = result["cases"][0]
    title = (
        f"{case['case']}, {case['parameters']:,} parameters, density {case['density']:.3g}, "
        f"batch {case['batch']}"
    )
    caption = one_line(result["machine"])
    verdict = sparse_verdict(result["rows"], case["best_dense"])
    return rich_table(title, MODEL_COLUMNS, result["rows"], f"{verdict}\n{caption}")


def layer_tables(result: dict[str, Any]) -> list[Table]:
    """The tables of a result of `bench_layers`: one for each case, or a summary of many."""
    machine = one_line(result["machine"])
    cases: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        cases.setdefault((row["case"], row["density"]), []).append(row)
    if len(cases) > 3:
        rows = layer_summary(result["rows"])
        mean = math.exp(sum(math.log(row["speedup"]) for row in rows) / len(rows)) if rows else 0.0
        caption = f"Geometric mean of the speed-ups: {mean:.2f}x. {machine}"
        failed = [row for row in result["rows"] if row["status"] == "FAIL"]
        if failed:
            caption += "\nFAILED: " + ", ".join(f"{r['engine']} on {r['case']}" for r in failed)
        return [rich_table("", SUMMARY_COLUMNS, rows, caption)]
    tables = []
    for (case, density), rows in cases.items():
        title = f"{case}, density {density:g} ({rows[0]['pattern']}), batch {rows[0]['batch']}"
        tables.append(rich_table(title, LAYER_COLUMNS, rows))
    tables[-1].caption = machine
    return tables


def layer_summary(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each case: the best dense engine, the best of our kernels, and the speed-up.

    Other people's sparse engines (torch_csr) are not counted as ours.
    """
    cases: dict[tuple[str, float, int], list[dict[str, Any]]] = {}
    for row in rows:
        if "median_us" in row:
            cases.setdefault((row["case"], row["density"], row["batch"]), []).append(row)
    found = []
    for (case, density, batch), timed in cases.items():
        best: dict[bool, dict[str, Any]] = {}
        for row in sorted(timed, key=lambda row: -float(row["median_us"])):
            if row["engine"] != "torch_csr":
                best[row["dense"]] = row
        if len(best) == 2:
            found.append(
                {
                    "case": case,
                    "density": density,
                    "batch": batch,
                    "dense": best[True]["engine"],
                    "dense_us": best[True]["median_us"],
                    "sparse": best[False]["engine"],
                    "sparse_us": best[False]["median_us"],
                    "speedup": best[True]["median_us"] / best[False]["median_us"],
                }
            )
    return found


def sparse_verdict(rows: Sequence[dict[str, Any]], best_dense: str) -> str:
    """One sentence: whether the best sparse engine beats the best dense one, and by how much.

    A difference within 5 % or within the noise of the measurement is called none.

    Example:
        >>> row = {"engine": "sparselt", "dense": False, "speedup": 2.0, "noise": 0.01}
        >>> sparse_verdict([row], "onnxruntime")
        'sparselt is 2.00 times as fast as the best dense engine, onnxruntime.'
    """
    sparse = [row for row in rows if not row["dense"] and "speedup" in row]
    if not sparse:
        return "No sparse engine was timed."
    best = max(sparse, key=lambda row: float(row["speedup"]))
    noise = max(SMALLEST_GAIN, *(float(row.get("noise", 0.0)) for row in rows))
    ratio = float(best["speedup"])
    if ratio > 1 + noise:
        how = f"is {ratio:.2f} times as fast as"
    elif ratio < 1 / (1 + noise):
        how = f"is slower ({1 / ratio:.2f} times the time) than"
    else:
        how = f"differs by no more than the noise ({noise:.0%}) from"
    return f"{best['engine']} {how} the best dense engine, {best_dense}."


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
    replace_file(Path(path), text.encode("utf-8"))


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


# What tells the rows of a result apart.
_KEYS = ("case", "density", "batch", "threads", "engine")


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(row.get(name, "")) for name in _KEYS)


def _drift(
    old: dict[tuple[str, ...], dict[str, Any]], rows: Iterable[dict[str, Any]]
) -> dict[tuple[str, ...], float]:
    """By case: the largest relative change of a dense engine's time."""
    found: dict[tuple[str, ...], float] = {}
    for row in rows:
        key = _key(row)
        if row.get("dense") and row.get("median_us") and key in old:
            ratio = float(old[key]["median_us"]) / float(row["median_us"])
            found[key[:-1]] = max(found.get(key[:-1], 0.0), max(ratio, 1 / ratio) - 1)
    return found


def compare(before: dict[str, Any], after: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """Join two results row by row.

    Dense engines are other people's code and did not change, so their ratio between the two runs
    is what the machine changed: no smaller ratio of the same case is called a gain or a loss.

    Returns:
        (rows with case, engine, density, before_us, after_us, ratio and verdict; a warning if the
        two were not measured on the same machine and threads, else "").

    Raises:
        DataError: if no row is in both.
    """
    old = {_key(row): row for row in before["rows"] if row.get("median_us")}
    drift = _drift(old, after["rows"])
    rows = []
    for row in after["rows"]:
        if not row.get("median_us") or _key(row) not in old:
            continue
        was = old[_key(row)]
        ratio = was["median_us"] / row["median_us"]
        own = max(float(was.get("noise", 0.0)), float(row.get("noise", 0.0)))
        noise = max(SMALLEST_GAIN, own, drift.get(_key(row)[:-1], 0.0))
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
    Column("engine", lambda row: str(row["engine"]), right=False, whole=True),
    Column("before", lambda row: microseconds(row["before_us"])),
    Column("after", lambda row: microseconds(row["after_us"])),
    Column("ratio", lambda row: f"{row['ratio']:.2f}x"),
    Column("verdict", lambda row: str(row["verdict"]), right=False),
)
