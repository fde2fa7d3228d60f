# SPDX-License-Identifier: Apache-2.0
"""What ``sparselt find`` does: tickets by any method, record, verdicts, advice, stability."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from sparselt.errors import MissingDependencyError, OptionError, explain_mismatch
from sparselt.lottery import distributed
from sparselt.lottery.advice import Advice, advise
from sparselt.lottery.data import Data, load_data
from sparselt.lottery.dead_units import Activity, idle_channels, relu_activity
from sparselt.lottery.edge_popup import FROZEN_WEIGHTS
from sparselt.lottery.figures import draw_levels
from sparselt.lottery.methods import METHODS, Request
from sparselt.lottery.networks import build, factory_of
from sparselt.lottery.progress import progress_bars
from sparselt.lottery.recipe import Recipe
from sparselt.lottery.recipes import RECIPES, recipe_of
from sparselt.lottery.record import TICKET, Row, write_record
from sparselt.lottery.stability import sweep
from sparselt.lottery.stability_record import StabilityRow, draw_stability, write_stability
from sparselt.lottery.structured import shrunk_ticket
from sparselt.lottery.verdict import Verdict, judge, spread_of
from sparselt.tickets import Ticket

__all__ = ["add_flags", "check_flags", "find", "recipe_from", "seeds_of"]

_TICKETS = tuple(f"--method {name}" for name in METHODS)
# What looks at a flag that not everything looks at.
_LOOKED_AT = {
    "controls": _TICKETS,
    "processes": ("--method imp",),
    "diagnose": ("--method imp",),
    "dead_units": _TICKETS,
    "density": ("--method edge_popup", "--method at_initialisation"),
    "budget": ("--method at_initialisation",),
    "frozen_weights": ("--method edge_popup",),
    "scaled": ("--method edge_popup",),
    "batches": ("--frontier",),
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds everything that ``sparselt find`` takes to ``parser``."""
    add = parser.add_argument
    methods = "; ".join(f"{name}: {method.summary}" for name, method in METHODS.items())
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument(
        "--method", choices=METHODS, default="imp", help=f"{methods} (default: %(default)s)"
    )
    ways.add_argument(
        "--stability", nargs="+", type=int, metavar="ITERATION",
        help="no ticket, but whether two runs parted at each of these iterations end in one valley",
    )  # fmt: skip
    ways.add_argument(
        "--frontier", nargs="+", metavar="STRUCTURE",
        help="no ticket, but accuracy against latency on this machine: 1x1 16x1 2:4 channels ...",
    )  # fmt: skip
    add("--recipe", metavar="NAME", help=f"where to start: {', '.join(RECIPES)}, or a JSON file")
    add("--out", default="ticket.safetensors", metavar="FILE", help="default: %(default)s")
    add("--runs", metavar="FOLDER", help="keep the run there, and resume it")
    add("--record", metavar="FILE.json", help="write the record there, and as .csv and .png")
    defaults = ", ".join(f"{' '.join(m.controls) or 'none'} of {n}" for n, m in METHODS.items())
    add("--controls", nargs="*", metavar="NAME", help=f"trained beside it (default: {defaults})")
    add("--seeds", nargs="+", type=int, metavar="INT", help="several searches, the first is kept")
    add("--processes", type=int, metavar="INT", help="searches of imp at a time (default: 2)")
    add("--data-folder", metavar="FOLDER", help="of the data's files (default: SPARSELT_DATA)")
    add("--diagnose", action="store_true", help="say what to try next if no ticket of imp wins")
    add(
        "--dead-units", choices=("report", "remove"),
        help="look for units of the ticket that never fire on the training data, or remove them",
    )  # fmt: skip
    add(
        "--density", type=float, metavar="FLOAT",
        help="share kept by at_initialisation (default: 0.1) or edge_popup (default: 0.5)",
    )  # fmt: skip
    add("--budget", metavar="NAME", help="of at_initialisation: global (default), uniform or erk")
    add("--frozen-weights", metavar="NAME", help=f"of edge_popup: {' or '.join(FROZEN_WEIGHTS)}")
    add("--scaled", action="store_true", help="edge_popup scales weights by kept inputs only")
    add("--batches", nargs="+", type=int, metavar="INT", help="of --frontier (default: 1 64)")
    Recipe.add_flags(parser)


def recipe_from(arguments: argparse.Namespace) -> Recipe:
    """The recipe that the flags ask for: a named one or a JSON file, changed by single flags.

    Raises:
        OptionError: No such recipe, or a value out of its range.
    """
    start = arguments.recipe
    if start is None:
        base = Recipe()
    elif start.endswith(".json"):
        try:
            base = Recipe.from_json(Path(start).read_text())
        except OSError as error:
            raise OptionError(f"recipe: expected a readable JSON file, got {error}") from error
    else:
        base = recipe_of(start)
    return Recipe.from_flags(arguments, base)


def find(arguments: argparse.Namespace) -> dict[str, Any]:
    """Searches, writes the ticket and the record, and prints what can be claimed.

    Args:
        arguments: From a parser with :func:`add_flags`, without ``--frontier``.

    Returns:
        Plain values for JSON: the recipe, one row a training, verdicts, advice, activity; for
        ``--stability`` the recipe and one row a pair of runs.

    Raises:
        OptionError: Flags that do not go together, or a value out of its range.
        DataError: The data are absent, or training diverged.
    """
    check_flags(arguments)
    recipe = recipe_from(arguments)
    seeds = seeds_of(arguments, recipe)
    if distributed.join() and len(seeds) > 1:
        raise OptionError(explain_mismatch("seeds", "one under torchrun", seeds))
    recipe = replace(recipe, seed=seeds[0])
    data = load_data(recipe.data, arguments.data_folder)
    if arguments.stability:
        return _find_stability(arguments, recipe, seeds, data)
    method = METHODS[arguments.method]
    kept = nullcontext(arguments.runs) if arguments.runs else tempfile.TemporaryDirectory()
    with kept as runs:
        rows, ticket = method.find(_request(arguments, recipe, seeds, data, Path(runs)))
    judged = method.judged and any(row.level for row in rows)
    verdicts = judge(rows) if judged else []
    advice = advise(rows, recipe) if arguments.diagnose and verdicts else []
    activity: tuple[Activity, ...] = ()
    if arguments.dead_units:
        activity, ticket = _look_for_dead_units(ticket, recipe, data, arguments.dead_units)
    if distributed.is_leader():
        ticket.save(arguments.out)
        if arguments.record:
            write_record(rows, recipe, arguments.record)
            _draw(lambda picture: draw_levels(rows, _title(recipe, seeds), picture), arguments)
        _print(rows, verdicts, recipe, advice, activity)
        Console().print(f"Wrote {arguments.out}.", highlight=False)
    return {
        "recipe": asdict(recipe),
        "rows": [asdict(row) for row in rows],
        "verdicts": [{**asdict(verdict), "wins": verdict.wins} for verdict in verdicts],
        "advice": [asdict(item) for item in advice],
        "activity": [asdict(row) for row in activity],
    }


def seeds_of(arguments: argparse.Namespace, recipe: Recipe) -> list[int]:
    """The seeds asked for, or the recipe's.

    Raises:
        OptionError: The same seed twice.
    """
    seeds = list(arguments.seeds or [recipe.seed])
    if len(set(seeds)) < len(seeds):
        raise OptionError(explain_mismatch("seeds", "different numbers", seeds))
    return seeds


def check_flags(arguments: argparse.Namespace) -> None:
    """Refuses flags that what was asked for would not look at.

    Raises:
        OptionError: There is one.
    """
    study = "--stability" if arguments.stability else "--frontier" if arguments.frontier else ""
    asked = study or f"--method {arguments.method}"
    for name, ways in _LOOKED_AT.items():
        if getattr(arguments, name) not in (None, False) and asked not in ways:
            flag = f"--{name.replace('_', '-')}"
            raise OptionError(f"{flag}: expected {' or '.join(ways)} with it, got {asked}")


def _request(
    arguments: argparse.Namespace, recipe: Recipe, seeds: Sequence[int], data: Data, runs: Path
) -> Request:
    method = METHODS[arguments.method]
    controls = arguments.controls
    return Request(
        recipe=recipe,
        seeds=seeds,
        data=data,
        controls=method.controls if controls is None else controls,
        runs=runs,
        kept=bool(arguments.runs),
        processes=2 if arguments.processes is None else arguments.processes,
        density=method.density if arguments.density is None else arguments.density,
        budget=arguments.budget or "global",
        frozen_weights=arguments.frozen_weights or next(iter(FROZEN_WEIGHTS)),
        scaled=arguments.scaled,
    )


def _find_stability(
    arguments: argparse.Namespace, recipe: Recipe, seeds: Sequence[int], data: Data
) -> dict[str, Any]:
    rows: list[StabilityRow] = []
    table = Table(title=f"Instability of {recipe.network} on {recipe.data}")
    for column in ("seed", "runs parted at", "dense", "ticket", "weights", "ticket's accuracy"):
        table.add_column(column, justify="right")
    with progress_bars() as report:
        for seed in seeds:
            found = sweep(
                recipe.network,
                data,
                replace(recipe, seed=seed),
                arguments.stability,
                folder=arguments.runs,
                progress=partial(report, seed),
            )
            for dense, ticket, accuracy in found:
                rows += [StabilityRow("dense", seed, 0, dense)]
                rows += [StabilityRow("ticket", seed, 0, ticket)]
                cells = [f"{100 * case.instability:.2f} points" for case in (dense, ticket)]
                shares = [f"{100 * ticket.density:.1f} %", f"{100 * accuracy:.2f} %"]
                table.add_row(str(seed), str(dense.start), *cells, *shares)
    if arguments.record and distributed.is_leader():
        write_stability(rows, arguments.record, {"recipe": asdict(recipe)})
        title = _title(recipe, seeds)
        _draw(lambda picture: draw_stability(rows, picture, recipe.network, title), arguments)
    if distributed.is_leader():
        Console().print(table)
    return {"recipe": asdict(recipe), "rows": [row.to_values() for row in rows]}


def _look_for_dead_units(
    ticket: Ticket, recipe: Recipe, data: Data, wish: str
) -> tuple[tuple[Activity, ...], Ticket]:
    """Activity of the ticket's network on the training split, and the ticket, shrunk if asked."""
    factory = factory_of(recipe.network, data.shape, data.classes)
    model = ticket.apply(build(factory, 0))
    batches = torch.split(data.train[0], 1000)
    activity = relu_activity(model, batches)
    if wish == "remove":
        delta = idle_channels(model, batches)
        ticket = shrunk_ticket(ticket, delta) if delta.groups else ticket
    return activity, ticket


def _draw(draw: Callable[[Path], None], arguments: argparse.Namespace) -> None:
    """Beside the record; without matplotlib there is no picture."""
    with suppress(MissingDependencyError):
        draw(Path(arguments.record).with_suffix(".png"))


def _title(recipe: Recipe, seeds: Sequence[int]) -> str:
    plural = "s" if len(seeds) > 1 else ""
    return (
        f"{recipe.network} on {recipe.data}, {recipe.iterations} iterations, {len(seeds)} "
        f"seed{plural}; recipe {recipe.hash()}"
    )


def _print(
    rows: Sequence[Row],
    verdicts: Sequence[Verdict],
    recipe: Recipe,
    advice: Sequence[Advice],
    activity: Sequence[Activity],
) -> None:
    console = Console()
    console.print(_table(rows, verdicts, recipe))
    for item in advice:
        console.print(str(item), highlight=False)
    for row in activity:
        console.print(
            f"ReLU {row.name or 'of the network'}: {len(row.dead)} of {row.units} units never "
            f"fire, {row.density:.1%} of its outputs are above 0",
            highlight=False,
        )


def _table(rows: Sequence[Row], verdicts: Sequence[Verdict], recipe: Recipe) -> Table:
    """One row a level: mean accuracies over the seeds, and the verdict where there is one."""
    seeds = len({row.seed for row in rows})
    plural = "s" if seeds > 1 else ""
    table = Table(title=f"{recipe.network} on {recipe.data}, {seeds} seed{plural}")
    kinds = [TICKET, *dict.fromkeys(row.kind for row in rows if row.arm != TICKET)]
    for title in ("weights", *kinds):
        table.add_column(title, justify="right")
    claims = {v.level: "wins" if v.wins else "; ".join(v.reasons) for v in verdicts}
    if claims:
        table.add_column("verdict")
    for level in sorted({row.level for row in rows}):
        here = [row for row in rows if row.level == level]
        share = spread_of(row.density for row in here if row.arm == TICKET).mean
        cells = []
        for kind in kinds:
            found = [row.test_accuracy for row in here if row.kind == kind]
            cells.append(f"{100 * spread_of(found).mean:.2f} %" if found else "")
        claim = [claims.get(level, "dense")] if claims else []
        table.add_row(f"{100 * share:.1f} %", *cells, *claim)
    return table
