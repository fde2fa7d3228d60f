# SPDX-License-Identifier: Apache-2.0
"""What ``sparselt find`` does: one seed or several, tickets, record, verdicts, and advice."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sparselt.errors import DataError, OptionError
from sparselt.lottery import distributed
from sparselt.lottery.advice import advise
from sparselt.lottery.data import Data, load_data
from sparselt.lottery.folder import RunFolder
from sparselt.lottery.progress import progress_bars
from sparselt.lottery.recipe import Recipe
from sparselt.lottery.recipes import RECIPES, recipe_of
from sparselt.lottery.record import TICKET, Row, rows_of, write_record
from sparselt.lottery.replicates import run_replicates
from sparselt.lottery.schedules import number_of_levels
from sparselt.lottery.search import run_levels
from sparselt.lottery.verdict import Verdict, judge
from sparselt.tickets import Ticket

__all__ = ["add_flags", "find", "recipe_from"]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds everything that ``sparselt find`` takes to ``parser``."""
    add = parser.add_argument
    add("--recipe", metavar="NAME", help=f"where to start: {', '.join(RECIPES)}, or a JSON file")
    add("--out", default="ticket.safetensors", metavar="FILE", help="default: %(default)s")
    add("--runs", metavar="FOLDER", help="keep the run there, and resume it")
    add("--record", metavar="FILE", help="write the record there, as .json and .csv")
    add("--controls", nargs="*", default=["reinit"], metavar="NAME", help="default: reinit")
    add("--seeds", nargs="+", type=int, metavar="INT", help="several searches, the first is kept")
    add("--processes", type=int, default=2, metavar="INT", help="searches at a time (default: 2)")
    add("--data-folder", metavar="FOLDER", help="of the data's files (default: SPARSELT_DATA)")
    add("--diagnose", action="store_true", help="say what to try next if no ticket wins")
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
        arguments: From a parser with :func:`add_flags`.

    Returns:
        Plain values for JSON: the recipe, one row a training, verdicts, advice.
    """
    recipe = recipe_from(arguments)
    seeds = list(arguments.seeds or [recipe.seed])
    recipe = replace(recipe, seed=seeds[0])
    data = load_data(recipe.data, arguments.data_folder)
    kept = nullcontext(arguments.runs) if arguments.runs else tempfile.TemporaryDirectory()
    with kept as runs:
        search = _search_one if len(seeds) == 1 else _search_several
        rows, ticket = search(recipe, seeds, data, Path(runs), arguments)
    verdicts = judge(rows) if any(row.level for row in rows) else []
    advice = advise(rows, recipe) if arguments.diagnose and verdicts else []
    if distributed.is_leader():
        ticket.save(arguments.out)
        if arguments.record:
            write_record(rows, recipe, arguments.record)
        console = Console()
        console.print(_table(rows, verdicts, recipe))
        for item in advice:
            console.print(f"{item.problem}: {item.proposal}", highlight=False)
        console.print(f"Wrote {arguments.out}.", highlight=False)
    return {
        "recipe": asdict(recipe),
        "rows": [asdict(row) for row in rows],
        "verdicts": [{**asdict(verdict), "wins": verdict.wins} for verdict in verdicts],
        "advice": [asdict(item) for item in advice],
    }


def _search_one(
    recipe: Recipe, seeds: Sequence[int], data: Data, runs: Path, arguments: argparse.Namespace
) -> tuple[list[Row], Ticket]:
    """In this process; under torchrun in all of them together."""
    folder = runs if arguments.runs else None
    with progress_bars(len(arguments.controls)) as report:
        levels = list(
            run_levels(
                recipe.network,
                data,
                recipe,
                controls=arguments.controls,
                folder=folder,
                progress=lambda now: report(recipe.seed, now),
            )
        )
    return rows_of(levels, recipe.seed), levels[-1].ticket


def _search_several(
    recipe: Recipe, seeds: Sequence[int], data: Data, runs: Path, arguments: argparse.Namespace
) -> tuple[list[Row], Ticket]:
    """In processes of their own; the first seed's ticket is the one that is kept."""
    with progress_bars(len(arguments.controls)) as report:
        rows = run_replicates(
            recipe.network,
            data,
            recipe,
            seeds,
            controls=arguments.controls,
            folder=runs,
            processes=arguments.processes,
            progress=report,
        )
    ticket = RunFolder(runs, recipe).read_ticket(number_of_levels(recipe) - 1)
    if ticket is None:
        raise DataError(f"{runs}: the ticket of seed {recipe.seed} is gone; run the search again")
    return rows, ticket


def _table(rows: Sequence[Row], verdicts: Sequence[Verdict], recipe: Recipe) -> Table:
    seeds = len({row.seed for row in rows})
    plural = "s" if seeds > 1 else ""
    table = Table(title=f"{recipe.network} on {recipe.data}, {seeds} seed{plural}")
    kinds = list(dict.fromkeys(row.kind for row in rows if row.arm != TICKET))
    for title in ("weights", "ticket", *kinds):
        table.add_column(title, justify="right")
    table.add_column("verdict")
    dense = [row.test_accuracy for row in rows if row.level == 0]
    table.add_row(
        "100.0 %", f"{100 * sum(dense) / len(dense):.2f} %", *["" for _ in kinds], "dense"
    )
    for verdict in verdicts:
        accuracies = [verdict.ticket, *(verdict.controls[kind] for kind in kinds)]
        table.add_row(
            f"{100 * verdict.density:.1f} %",
            *(f"{100 * spread.mean:.2f} %" for spread in accuracies),
            "wins" if verdict.wins else "; ".join(verdict.reasons),
        )
    return table
