# SPDX-License-Identifier: Apache-2.0
"""Many small measurements, one after the other: chosen by name, kept on the way, resumed.

A sweep is what one command of `sparselt bench` measures. Each is a module of this package with a
`SWEEP`, and a line in the command line's table.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparselt.errors import DataError, OptionError
from sparselt.measure.machine import Others, header, is_busy, one_line
from sparselt.measure.report import read_json, write_json

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "Item",
    "Row",
    "Sweep",
    "caption",
    "chosen_items",
    "run_sweep",
    "sweep",
    "threads",
    "timed",
]

Row = dict[str, Any]


@dataclass(frozen=True)
class Item:
    """One measurement: its name, by which it is chosen, and what gives its rows.

    Each row has "case" and "status": "ok", or "FAIL" with a "reason" and without times.
    """

    name: str
    run: Callable[[], list[Row]]


@dataclass(frozen=True)
class Sweep:
    """What one command measures.

    Attributes:
        kind: the command, and the kind of its result.
        items: the measurements; fewer where asked to be quick.
        table: a result as it is printed.
        facts: more for a result's head, such as the machine's rates.
    """

    kind: str
    items: Callable[[bool], Sequence[Item]]
    table: Callable[[dict[str, Any]], Table]
    facts: Callable[[], dict[str, Any]] = dict


def sweep(kind: str) -> Sweep:
    """What a command measures: the `SWEEP` of the module of that name."""
    found: Sweep = importlib.import_module(f"sparselt.measure.{kind}").SWEEP
    return found


def chosen_items(measured: Sweep, only: Sequence[str] = (), quick: bool = False) -> list[Item]:
    """The measurements whose names contain one of the given words; all without words.

    Raises:
        OptionError: none does.
    """
    items = measured.items(quick)
    found = [item for item in items if not only or any(word in item.name for word in only)]
    if not found:
        # Cases repeat at every batch and number of threads; what comes before a comma differs.
        names = "; ".join(dict.fromkeys(item.name.partition(",")[0] for item in items))
        got = f"{names}; got {' '.join(only)}"
        raise OptionError(f"--only: expected parts of names like {items[-1].name!r}, of {got}")
    return found


def run_sweep(
    measured: Sweep,
    only: Sequence[str] = (),
    *,
    quick: bool = False,
    path: str | Path | None = None,
    resume: bool = False,
    progress: Callable[[float, str], None] | None = None,
) -> dict[str, Any]:
    """Measure what is chosen.

    Args:
        measured: what there is to measure.
        only: see `chosen_items`.
        quick: ask for fewer.
        path: a file to keep the result in, written after each measurement.
        resume: go on with the result in `path`, if there is one.
        progress: called with the share that is done (0 to 1) and what is measured next.

    Returns:
        {"kind", "machine": header, "done": names, "rows": ..., and the sweep's facts}.

    Raises:
        OptionError: nothing is chosen.
        DataError: the result to resume is another sweep's, or of another machine or commit.
    """
    items = chosen_items(measured, only, quick)
    result: dict[str, Any] = {
        "kind": measured.kind,
        "machine": header(),
        **measured.facts(),
        "done": [],
        "rows": [],
    }
    if resume and path is not None and Path(path).exists():
        result = _resumed(read_json(path), result)
    for place, item in enumerate(items):
        if item.name in result["done"]:
            continue
        if progress is not None:
            progress(place / len(items), item.name)
        others = Others([os.getpid()])
        rows = item.run()
        busy = others.cores()
        result["rows"] += [row | {"busy_cores": busy} for row in rows]
        result["done"].append(item.name)
        if path is not None:
            write_json(path, result)
    if progress is not None:
        progress(1.0, "done")
    return result


def _resumed(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Refuses to put figures of different machines or code in one table."""
    names = ("cpu", "isa", "threads", "commit", "dirty", "versions")
    differ = [name for name in names if old["machine"].get(name) != new["machine"].get(name)]
    if old.get("kind") != new["kind"] or "done" not in old:
        differ.append("kind")
    if differ:
        raise DataError(
            f"--resume: expected a result of `bench {new['kind']}` of the same machine and commit, "
            f"got another {', '.join(differ)}; name another file, or leave --resume out"
        )
    return old


def caption(result: dict[str, Any], *notes: str) -> str:
    """What stands under a sweep's table: notes, what was disturbed or failed, and the machine."""
    rows = result["rows"]
    busy = sum(map(is_busy, rows))
    lines = [
        *filter(None, notes),
        *([f"BUSY: other work disturbed {busy} of {len(rows)} cases"] if busy else []),
        *(f"FAILED: {row['case']}: {row['reason']}" for row in rows if row["status"] == "FAIL"),
        one_line(result["machine"]),
    ]
    return "\n".join(lines)


def timed(rows: Iterable[Row]) -> list[Row]:
    """The rows that have times."""
    return [row for row in rows if row["status"] == "ok"]


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Torch's number of threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
