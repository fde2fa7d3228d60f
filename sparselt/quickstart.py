# SPDX-License-Identifier: Apache-2.0
"""The whole path on handwritten digits: find a ticket, save it, load it, run it sparse, compare.

This is what `make demo` and `sparselt quickstart` run. Everything in it is also the example of how
the pieces fit: `lottery.run_levels` finds, `Ticket.save` and `load_ticket` keep, `convert` packs.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

import sparselt
from sparselt import lottery
from sparselt.measure import report
from sparselt.measure.baselines import BASELINES, Run
from sparselt.measure.inspection import kilobytes
from sparselt.measure.machine import header, is_busy, one_line
from sparselt.measure.model import double_reference
from sparselt.measure.picture import draw_quickstart
from sparselt.measure.timer import Timing, interleave, speedup
from sparselt.measure.worker import output_error
from sparselt.tickets.file import replace_file

__all__ = ["Case", "Settings", "columns", "run", "table_rows", "verdicts"]

CONTROL = "reinit"
_TOLERANCE = 1e-4
_LARGEST_DENSITY = 0.10
# A ticket counts as matching the dense network within this many points of accuracy.
_MATCH_POINTS = 0.2


@dataclass(frozen=True)
class Case:
    """One network of the quickstart; `cost` is its relative time an iteration."""

    network: str
    title: str
    short: str
    iterations: int
    cost: float


@dataclass(frozen=True)
class Settings:
    """How much is done: everything, or a smoke test's share of it."""

    cases: tuple[Case, ...]
    seeds: int
    levels: int
    rate: float
    batches: tuple[int, ...]
    seconds: float
    dense_engines: tuple[str, ...]


_LENET = Case("lenet_300_100", "LeNet 64-300-100-10", "LeNet", 800, 1.0)
_CONV = Case("conv_small", "small conv net", "conv net", 400, 3.0)
FULL = Settings(
    cases=(_LENET, _CONV),
    seeds=3,
    levels=7,
    rate=0.35,
    batches=(1, 256),
    seconds=0.5,
    dense_engines=("torch_eager", "torch_channels_last", "torch_compile"),
)
FAST = Settings(
    cases=(replace(_LENET, iterations=60), replace(_CONV, iterations=60)),
    seeds=1,
    levels=2,
    rate=0.75,
    batches=(1, 64),
    seconds=0.02,
    dense_engines=("torch_eager", "torch_channels_last"),
)


def run(
    out: str | Path, *, seed: int = 0, fast: bool = False, settings: Settings | None = None
) -> dict[str, Any]:
    """Find tickets for two small networks, run them sparse, print one table and save one picture.

    Args:
        out: folder for the tickets, `quickstart.json` and `quickstart.png`; made if absent.
        seed: of the first run; further runs take the next ones.
        fast: a few seconds instead of a few minutes; the figures then mean little.
        settings: overrides both.

    Returns:
        {"kind": "quickstart", "machine": header, "settings", "rows": one for each network}.

    Raises:
        MissingDependencyError: scikit-learn or matplotlib is not installed.

    Example:
        >>> result = run("my-quickstart", fast=True)  # doctest: +SKIP
    """
    from rich.console import Console

    chosen = settings or (FAST if fast else FULL)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    console = Console()
    data = lottery.load_data("digits")
    machine = header()
    console.print(
        f"Finding tickets: {len(chosen.cases)} networks, {chosen.seeds} seeds, {chosen.levels} "
        f"levels, with controls{'' if fast else '; about two minutes on two free cores'}."
    )
    rows = []
    with _progress(chosen) as advance:
        for case in chosen.cases:
            runs = [_search(case, chosen, data, seed + k, advance) for k in range(chosen.seeds)]
            rows.append(_row(case, chosen, data, runs, out, advance))
    result = {
        "kind": "quickstart",
        "machine": machine,
        "settings": {"seeds": chosen.seeds, "seed": seed, "fast": fast, "control": CONTROL},
        "rows": rows,
    }
    report.write_json(out / "quickstart.json", result)
    draw_quickstart(rows, one_line(machine), out / "quickstart.png")
    console.print(report.rich_table("", columns(rows), table_rows(rows), one_line(machine)))
    for sentence in verdicts(result):
        console.print(sentence, highlight=False)
    console.print(f"\nTickets, picture and all figures are in {out}/", highlight=False)
    return result


Advance = Callable[[str, float, str], None]


@contextmanager
def _progress(settings: Settings) -> Iterator[Advance]:
    """A bar with what is done now, the level, the accuracy, and the time left."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    trainings = settings.seeds * (1 + 2 * settings.levels)
    total = sum(case.iterations * case.cost * trainings * 1.1 for case in settings.cases)
    console = Console(stderr=True)
    text = TextColumn("{task.description}")
    accuracy = TextColumn("{task.fields[accuracy]}")
    left = TimeRemainingColumn(elapsed_when_finished=True)
    with Progress(text, BarColumn(), accuracy, left, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=total, accuracy="")

        def advance(what: str, units: float, accuracy: str) -> None:
            bar.update(task, description=what, advance=units, accuracy=accuracy)

        yield advance


def _search(
    case: Case, settings: Settings, data: lottery.Data, seed: int, advance: Advance
) -> list[lottery.Level]:
    """Iterative magnitude pruning with reset to the original weights, control beside it."""
    recipe = lottery.Recipe(
        network=case.network,
        data="digits",
        seed=seed,
        lr=2.5e-3,
        iterations=case.iterations,
        levels=settings.levels,
        rate=settings.rate,
        conv_rate=settings.rate,
        evaluate_every=min(100, case.iterations),
    )

    def progress(now: lottery.Progress) -> None:
        arm = "ticket" if now.arm == "ticket" else "control"
        text = f"{case.title}: seed {seed}, level {now.level} of {now.levels - 1}, {arm}"
        accuracy = f"accuracy {now.step.validation_accuracy:.1%}"
        advance(text, recipe.evaluate_every * case.cost, accuracy)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # layers this small only lose by being split
    try:
        return list(
            lottery.run_levels(case.network, data, recipe, controls=(CONTROL,), progress=progress)
        )
    finally:
        torch.set_num_threads(threads)


def _row(
    case: Case,
    settings: Settings,
    data: lottery.Data,
    runs: list[list[lottery.Level]],
    out: Path,
    advance: Advance,
) -> dict[str, Any]:
    """Everything about one network: accuracies over the seeds, then the first seed's ticket run."""
    levels = [_level_row([levels[i] for levels in runs]) for i in range(len(runs[0]))]
    place = next(
        (i for i, level in enumerate(levels) if level["density"] < _LARGEST_DENSITY),
        len(levels) - 1,
    )
    ticket, dense = runs[0][place].ticket, runs[0][0].ticket
    file = out / f"{case.network}.safetensors"
    ticket.save(file)
    dense_file = out / f"{case.network}-dense.safetensors"
    replace_file(dense_file, save(dict(dense.weights)))
    model = lottery.NETWORKS[case.network](data.shape, data.classes)
    sparselt.load_ticket(file).apply(model).eval()
    row: dict[str, Any] = {
        "network": case.network,
        "title": case.title,
        "short": case.short,
        "status": "ok",
        "reason": "",
        "kept": sum(layer.kept for layer in ticket.layers()),
        "total": sum(layer.total for layer in ticket.layers()),
        **levels[place],
        "dense_accuracy": levels[0]["ticket_accuracy"],
        "dense_accuracies": levels[0]["ticket_accuracies"],
        "levels": levels,
        "dense_bytes": dense_file.stat().st_size,
        "ticket_bytes": file.stat().st_size,
        "batches": [],
    }
    for batch in settings.batches:
        work = case.iterations * case.cost * settings.seeds * (1 + 2 * settings.levels) * 0.1
        advance(f"{case.title}: timing batch {batch}", work / len(settings.batches), "")
        found = _time(model, data.test[0][:batch].contiguous(), settings)
        row["batches"].append(found)
        if found["error"] > _TOLERANCE:
            row["status"] = "FAIL"
            row["reason"] = f"wrong output at batch {batch}: error {found['error']:.2g}"
    return row


def _level_row(levels: list[lottery.Level]) -> dict[str, Any]:
    """One level over all seeds: accuracies of ticket and control, each and their mean."""
    tickets = [level.outcome.test_accuracy for level in levels]
    controls = [
        level.controls[CONTROL].test_accuracy for level in levels if CONTROL in level.controls
    ]
    return {
        "density": statistics.mean(level.density for level in levels),
        "ticket_accuracy": statistics.mean(tickets),
        "ticket_accuracies": tickets,
        "control_accuracy": statistics.mean(controls) if controls else None,
        "control_accuracies": controls,
    }


def _time(model: nn.Module, x: Tensor, settings: Settings) -> dict[str, Any]:
    """Best dense torch against sparselt on one batch, in turns, the output checked first."""
    reference, _ = double_reference(model, [x])
    engines = [
        name
        for name in settings.dense_engines
        if not BASELINES[name].usable() and (x.ndim == 4 or name != "torch_channels_last")
    ]
    sparse = BASELINES["sparselt"].load(model, (x,))
    error = output_error(sparse(x), reference)
    runs = {"sparselt": sparse}
    for name in engines:
        try:
            run = BASELINES[name].load(model, (x,))
            if output_error(run(x), reference) <= _TOLERANCE:
                runs[name] = run
        except Exception as failure:  # a broken C++ compiler must not end the demonstration
            print(f"{name} is left out: {str(failure).splitlines()[0]}")
    engines = [name for name in engines if name in runs]
    calls = {name: _bound(run, x) for name, run in runs.items()}
    times = interleave(calls, seconds=settings.seconds, repeats=40)
    best = min(engines, key=lambda name: times[name].median_us)
    return _batch_row(len(x), best, times, error)


def _bound(run: Run, x: Tensor) -> Callable[[], object]:
    return lambda: run(x)


def _batch_row(batch: int, best: str, times: dict[str, Timing], error: float) -> dict[str, Any]:
    ratio, low, high = speedup(times[best], times["sparselt"])
    return {
        "batch": batch,
        "best_dense": best,
        "dense_us": times[best].median_us,
        "sparse_us": times["sparselt"].median_us,
        "speedup": ratio,
        "speedup_low": low,
        "speedup_high": high,
        "noise": max(times[name].noise for name in (best, "sparselt")),
        "error": error,
        "engines": {name: timing.as_json() for name, timing in times.items()},
    }


def columns(rows: list[dict[str, Any]]) -> list[report.Column]:
    """One column for each network, after the one that says what is measured."""

    def cell(index: int) -> Callable[[dict[str, Any]], str]:
        return lambda row: str(row["cells"][index])

    first = report.Column("", lambda row: str(row["what"]), right=False)
    return [first, *(report.Column(row["title"], cell(i)) for i, row in enumerate(rows))]


def _percent(accuracies: list[float]) -> str:
    mean = f"{100 * statistics.mean(accuracies):.1f} %"
    if len(accuracies) < 2:
        return mean
    return f"{mean} (+-{100 * statistics.stdev(accuracies):.1f})"


def table_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table's lines: what is measured, and a cell for each network."""

    def line(what: str, cell: Callable[[dict[str, Any]], str]) -> dict[str, Any]:
        return {"what": what, "cells": [cell(row) for row in rows]}

    seeds = len(rows[0]["ticket_accuracies"])
    over = f" of {seeds} seeds" if seeds > 1 else ""
    lines = [
        line("weights kept", lambda r: f"{r['kept']:,} of {r['total']:,}"),
        line("density", lambda r: f"{r['density']:.1%}"),
        line(f"accuracy{over}, dense", lambda r: _percent(r["dense_accuracies"])),
        line("  ticket", lambda r: _percent(r["ticket_accuracies"])),
        line("  control, reinitialised", lambda r: _percent(r["control_accuracies"])),
        line("size on disk, dense", lambda r: kilobytes(r["dense_bytes"])),
        line("  ticket, with originals", lambda r: kilobytes(r["ticket_bytes"])),
    ]
    for place, found in enumerate(rows[0]["batches"]):

        def at(cell: Callable[[dict[str, Any]], str], place: int = place) -> Any:
            return lambda row: cell(row["batches"][place])

        lines += [
            line(f"batch {found['batch']}: best dense torch", at(_dense_cell)),
            line("  sparselt", at(lambda found: report.microseconds(found["sparse_us"]))),
            line("  speed-up", at(lambda found: f"{found['speedup']:.2f}x")),
            line("  largest error", at(lambda found: f"{found['error']:.0e}")),
        ]
    return lines


def _dense_cell(found: dict[str, Any]) -> str:
    engine = found["best_dense"].removeprefix("torch_").replace("_", " ")
    return f"{report.microseconds(found['dense_us'])} ({engine})"


def verdicts(result: dict[str, Any]) -> list[str]:
    """What the table shows, in words, losses included; one sentence on accuracy, one on speed."""
    sentences = []
    if is_busy(result["machine"]):
        sentences.append("The machine was busy with something else: distrust the times below.")
    for row in result["rows"]:
        if row["status"] != "ok":
            sentences.append(f"{row['title']}: {row['status']}: {row['reason']}.")
            continue
        sentences.append(f"{row['title']}: {_accuracy_verdict(row)}")
        for found in row["batches"]:
            sentence = report.sparse_verdict(
                [{"engine": "sparselt", "dense": False, **found}], found["best_dense"]
            )
            sentences.append(f"  batch {found['batch']}: {sentence}")
    return sentences


def _accuracy_verdict(row: dict[str, Any]) -> str:
    """Whether the ticket wins: it matches dense, and beats its control beyond the seeds."""
    behind = 100 * (row["dense_accuracy"] - row["ticket_accuracy"])
    ahead = 100 * (row["ticket_accuracy"] - (row["control_accuracy"] or 0.0))
    seeds = len(row["ticket_accuracies"])
    figures = (
        f"at {row['density']:.1%} of the weights the ticket is {abs(behind):.1f} points "
        f"{'below' if behind >= 0 else 'above'} the dense network and {abs(ahead):.1f} points "
        f"{'above' if ahead >= 0 else 'below'} the same mask with new weights"
    )
    if seeds < 3:
        return f"{figures} ({seeds} seed: too few to call it a winning ticket or not)."
    spread = 100 * max(
        statistics.stdev(row["ticket_accuracies"]), statistics.stdev(row["control_accuracies"])
    )
    if behind <= _MATCH_POINTS and ahead > spread:
        return f"{figures}: a winning ticket."
    least = row["dense_accuracy"] - _MATCH_POINTS / 100
    matching = [x["density"] for x in row["levels"] if x["ticket_accuracy"] >= least]
    return (
        f"{figures}: not a winning ticket, which must be within {_MATCH_POINTS} points of dense "
        f"and ahead of its control by more than the seeds' spread ({spread:.1f}). Tickets match it "
        f"down to {min(matching):.1%} of the weights."
    )
