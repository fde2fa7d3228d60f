# SPDX-License-Identifier: Apache-2.0
"""A whole experiment in one call: replicates with controls, record, picture, verdicts, advice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparselt.errors import MissingDependencyError
from sparselt.lottery.advice import Advice, advise
from sparselt.lottery.data import Data
from sparselt.lottery.figures import draw_levels
from sparselt.lottery.networks import Factory
from sparselt.lottery.recipe import Recipe
from sparselt.lottery.record import Row, write_record
from sparselt.lottery.replicates import run_replicates
from sparselt.lottery.search import Progress
from sparselt.lottery.verdict import Verdict, judge

__all__ = ["Experiment", "run_experiment"]


@dataclass(frozen=True)
class Experiment:
    """What an experiment found.

    Attributes:
        rows: The record, one row a training.
        verdicts: One a level from 1.
        advice: What to try next; empty if a ticket wins.
        files: What was written.
    """

    rows: list[Row]
    verdicts: list[Verdict]
    advice: list[Advice]
    files: list[Path]

    @property
    def smallest_win(self) -> Verdict | None:
        """The verdict of the smallest ticket that wins, if any does."""
        wins = [verdict for verdict in self.verdicts if verdict.wins]
        return min(wins, key=lambda verdict: verdict.density, default=None)


def run_experiment(
    recipe: Recipe,
    out: str | Path,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    controls: Sequence[str] = ("reinit", "shuffle"),
    network: str | Factory | None = None,
    data: str | Data | None = None,
    runs: str | Path | None = None,
    processes: int = 2,
    progress: Callable[[int, Progress], None] | None = None,
) -> Experiment:
    """Runs a recipe under several seeds and writes down what can be claimed.

    Args:
        recipe: Settings of the search.
        out: Folder for everything: runs (which go on where a killed call stopped), ``<name>.json``
            and ``.csv``, and ``<name>.png`` where matplotlib is installed, ``<name>`` being the
            recipe's folder name.
        seeds: One search each; fewer than 3 can win nothing.
        controls: Trained at every level from 1.
        network: By default the recipe's.
        data: By default the recipe's.
        runs: Folder of the runs; by default ``runs`` within ``out``.
        processes: How many searches run at a time.
        progress: Called with (seed, progress).

    Raises:
        OptionError: The recipe, seeds or controls make no sense.
        DataError: The data are absent, or training diverged.
    """
    out = Path(out)
    rows = run_replicates(
        network or recipe.network,
        data or recipe.data,
        recipe,
        seeds,
        controls=controls,
        folder=runs or out / "runs",
        processes=processes,
        progress=progress,
    )
    record = out / f"{recipe.folder_name()}.json"
    write_record(rows, recipe, record)
    files = [record, record.with_suffix(".csv")]
    picture = record.with_suffix(".png")
    try:
        draw_levels(rows, _caption(recipe, seeds), picture)
        files.append(picture)
    except MissingDependencyError:
        pass
    verdicts = judge(rows) if len({row.level for row in rows}) > 1 else []
    return Experiment(rows, verdicts, advise(rows, recipe) if verdicts else [], files)


def _caption(recipe: Recipe, seeds: Sequence[int]) -> str:
    return (
        f"{recipe.network} on {recipe.data}, {recipe.iterations} iterations a level, "
        f"{len(seeds)} seeds; recipe {recipe.hash()}"
    )
