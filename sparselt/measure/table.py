# SPDX-License-Identifier: Apache-2.0
"""The table of whole networks: every network, batch and share of zeros against every dense engine.

One run takes a while, so it is kept after each case and goes on where it was stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from sparselt.errors import DataError, OptionError
from sparselt.measure.baselines import BASELINES
from sparselt.measure.machine import header, is_busy
from sparselt.measure.model import bench_variants, merged
from sparselt.measure.networks import example_inputs, has_real_masks, pruned_network
from sparselt.measure.report import Column, microseconds, read_json, write_json

__all__ = ["CASES", "TABLE_COLUMNS", "Case", "absent", "bench_table", "chosen_cases", "summary"]

# Columns that are named for themselves: what torch alone offers, which a user has already.
_TORCH = ("torch_eager", "torch_channels_last", "torch_compile")
_ENGINES = [name for name in BASELINES if name != "sparselt_convert"]


@dataclass(frozen=True)
class Case:
    """One network at one batch, with the sets of zeros that are timed together.

    Attributes:
        network: a name in `networks.NETWORKS`.
        batch: images a call.
        densities: shares of kept weights.
        also: a further name with the same layers and other zeros; left out if it has no data here.
    """

    network: str
    batch: int
    densities: tuple[float, ...]
    also: str = ""

    @property
    def name(self) -> str:
        """`network@batch`, as it is chosen on the command line and found in a result."""
        return f"{self.network}@{self.batch}"

    def names(self) -> list[str]:
        """The networks of which there are weights and zeros here."""
        return [self.network] + [self.also] * bool(self.also and has_real_masks())


_PRUNED = (0.2, 0.1, 0.05)
_BARELY = (1.0, 0.7, 0.5)
# First those that are pruned for speed, then those that must not become slower.
CASES: tuple[Case, ...] = (
    *(Case("resnet50", batch, _PRUNED, "resnet50_dlmc") for batch in (1, 32)),
    *(Case("vgg19", batch, _PRUNED) for batch in (1, 64)),
    *(Case("resnet20", batch, _PRUNED) for batch in (1, 64)),
    *(Case("mlp", batch, _PRUNED) for batch in (1, 32)),
    *(Case("lenet", batch, _PRUNED) for batch in (1, 64)),
    *(
        Case(network, batch, _BARELY)
        for network in ("mobilenet", "resnet18", "signal", "wide_resnet", "vit", "uneven")
        for batch in (1, 16)
    ),
)


def chosen_cases(words: Sequence[str], quick: bool = False) -> list[Case]:
    """The cases that are asked for.

    Args:
        words: names of networks or cases, such as "vgg19" or "vgg19@64"; none for all.
        quick: one share of zeros of each: the middle one.

    Raises:
        OptionError: a word that names no case.

    Example:
        >>> [case.name for case in chosen_cases(["lenet", "mlp@32"])]
        ['mlp@32', 'lenet@1', 'lenet@64']
    """
    known = {word for case in CASES for word in (case.network, case.name)}
    unknown = [word for word in words if word not in known]
    if unknown:
        names = ", ".join(dict.fromkeys(case.network for case in CASES))
        raise OptionError(
            f"--only: expected some of {names}, or one with its batch as in vgg19@64, got "
            f"{', '.join(unknown)}"
        )
    found = [case for case in CASES if not words or {case.network, case.name} & set(words)]
    if quick:
        found = [Case(case.network, case.batch, case.densities[1:2], case.also) for case in found]
    return found


def bench_table(
    cases: Sequence[Case],
    *,
    path: str | Path | None = None,
    resume: bool = False,
    rounds: int = 8,
    threads: int | None = None,
    engines: Sequence[str] | None = None,
    progress: Callable[[int, str], None] | None = None,
) -> dict[str, Any]:
    """Time all cases, one after the other; those that were kept by an earlier run are not repeated.

    Args:
        cases: what to time.
        path: of the JSON result, written anew after every case.
        resume: go on with the result in `path` if there is one.
        rounds: turns each engine gets in a case.
        threads: for every engine alike; by default torch's present number.
        engines: names from `BASELINES`; by default all, those that are not installed as absent.
        progress: called with the number of cases done and a short sentence on each step.

    Returns:
        A result of kind "model" with one entry in "cases" for each network, batch and density.

    Raises:
        DataError: the result to resume is of another machine, number of threads or commit.
    """
    say = progress or (lambda done, text: None)
    results: list[dict[str, Any]] = []
    if resume and path is not None and Path(path).exists():
        results.append(read_json(path))
        # Before minutes are spent, and again with what was measured.
        chosen = {} if threads is None else {"threads": threads}
        _check_same(results, {"machine": header() | chosen})
    for done, case in enumerate(cases):
        found = _bench_case(
            case,
            results,
            rounds,
            threads,
            engines or _ENGINES,
            partial(_say, say, done, case),
        )
        for result in found:
            _check_same(results, result)
            results.append(result)
        if found and path is not None:
            write_json(path, merged(results))
    say(len(cases), "done")
    return merged(results)


def _say(say: Callable[[int, str], None], done: int, case: Case, text: str) -> None:
    say(done, f"{case.name}: {text}")


def _bench_case(
    case: Case,
    results: Sequence[dict[str, Any]],
    rounds: int,
    threads: int | None,
    engines: Sequence[str],
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """The results of one case, one for each density; none if all of it was kept before."""
    kept = {
        (entry["case"], entry["batch"], entry["asked"])
        for result in results
        for entry in result["cases"]
    }
    variants = [(name, density) for name in case.names() for density in case.densities]
    if all((name, case.batch, density) in kept for name, density in variants):
        return []
    models: dict[str, nn.Module] = {}
    shape: tuple[int, ...] = ()
    for name, density in variants:
        say(f"building {name} with {1 - density:.0%} zeros")
        built = pruned_network(name, density=density)
        models[f"{name}@{density:g}"], shape = built.model, built.shape
    reports = bench_variants(
        models,
        example_inputs(shape, case.batch),
        [name for name in engines if name != "torch_channels_last" or len(shape) == 3],
        rounds=rounds,
        threads=threads,
        progress=say,
    )
    for report in reports:
        report.name, _, asked = report.name.rpartition("@")
        report.facts["asked"] = float(asked)
    return [report.as_json() for report in reports]


def _check_same(results: Sequence[dict[str, Any]], more: dict[str, Any]) -> None:
    """Refuses to put figures of different machines or code in one table."""
    if not results:
        return
    old, new = results[0]["machine"], more["machine"]
    names = ("cpu", "isa", "threads", "commit", "dirty", "versions")
    differ = [name for name in names if old.get(name) != new.get(name)]
    if differ:
        raise DataError(
            f"--resume: expected a result of the same {', '.join(differ)}, got "
            f"{[old.get(name) for name in differ]} before and {[new.get(name) for name in differ]} "
            "now; name another file, or measure all of it again without --resume"
        )


def summary(result: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each network, batch and share of zeros, for `TABLE_COLUMNS`.

    Args:
        result: of `bench_table`.
    """
    found = []
    for case in result["cases"]:
        rows = {
            row["engine"]: row
            for row in result["rows"]
            if all(row[key] == case[key] for key in ("case", "batch", "density"))
        }
        timed = {name: row["median_us"] for name, row in rows.items() if "median_us" in row}
        ours = rows.get("sparselt", {})
        torch_us = min((timed[name] for name in _TORCH if name in timed), default=None)
        dense_us = timed.get(case["best_dense"])
        us = timed.get("sparselt")
        found.append(
            {
                "case": case["case"],
                "batch": case["batch"],
                "zeros": 1 - case["asked"],
                "best_dense": case["best_dense"],
                "dense_us": dense_us,
                "torch_us": torch_us,
                "sparselt_us": us,
                "speedup": dense_us / us if us and dense_us else None,
                "torch_speedup": torch_us / us if us and torch_us else None,
                "error": ours.get("error"),
                "torch_error": case["torch_error"],
                "note": _note(case, rows.values()),
            }
        )
    return found


def _note(case: dict[str, Any], rows: Iterable[dict[str, Any]]) -> str:
    failed = [f"{row['engine']} FAIL: {row['reason']}" for row in rows if row["status"] == "FAIL"]
    busy = [f"BUSY: {case['busy_cores']:g} cores"] if is_busy(case) else []
    return "; ".join(failed + busy)


def absent(result: dict[str, Any]) -> list[str]:
    """A sentence for each engine that is not installed."""
    found = {row["engine"]: row["reason"] for row in result["rows"] if row["status"] == "absent"}
    return [f"{engine} is {reason}" for engine, reason in found.items()]


def _ratio(key: str) -> Callable[[dict[str, Any]], str]:
    return lambda row: "-" if row[key] is None else f"{row[key]:.2f}x"


def _errors(row: dict[str, Any]) -> str:
    if row["error"] is None:
        return "-"
    return f"{row['error']:.1e} / {row['torch_error']:.1e}"


TABLE_COLUMNS = (
    Column("network", lambda row: str(row["case"]), right=False, whole=True),
    Column("batch", lambda row: str(row["batch"])),
    Column("zeros", lambda row: f"{row['zeros']:.0%}"),
    Column("best dense", lambda row: f"{microseconds(row['dense_us'])} {row['best_dense']}"),
    Column("best torch", lambda row: microseconds(row["torch_us"])),
    Column("sparselt", lambda row: microseconds(row["sparselt_us"])),
    Column("to best dense", _ratio("speedup")),
    Column("to best torch", _ratio("torch_speedup")),
    Column("error / torch's", _errors),
    Column("note", lambda row: str(row["note"]), right=False),
)
