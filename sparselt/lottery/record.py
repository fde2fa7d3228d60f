# SPDX-License-Identifier: Apache-2.0
"""The machine-readable record of searches: one row a training, as JSON and as CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from sparselt.errors import DataError
from sparselt.lottery.recipe import Recipe
from sparselt.lottery.search import Level
from sparselt.lottery.structured_search import StructuredLevel
from sparselt.lottery.training import Outcome
from sparselt.tickets.file import replace_file

__all__ = ["TICKET", "Row", "read_record", "rows_of", "write_record"]

TICKET = "ticket"


@dataclass(frozen=True)
class Row:
    """One training of one seed: the ticket's own, or a control's.

    Attributes:
        seed: Of the recipe.
        level: 0 for the dense network.
        arm: ``ticket``, or the name of a control.
        density: Kept weights over prunable weights.
        test_accuracy: At the end, from 0 to 1.
        validation_accuracy: At the end.
        train_accuracy: At the end.
        early_stop_iteration: Where the validation loss was smallest.
        early_stop_test_accuracy: Test accuracy there.
        seconds: Training time.
    """

    seed: int
    level: int
    arm: str
    density: float
    test_accuracy: float
    validation_accuracy: float
    train_accuracy: float
    early_stop_iteration: int
    early_stop_test_accuracy: float
    seconds: float

    @property
    def kind(self) -> str:
        """The arm without the number of a repeated control: ``reinit`` for ``reinit#2``."""
        return self.arm.partition("#")[0]


def rows_of(levels: Iterable[Level | StructuredLevel], seed: int) -> list[Row]:
    """The rows of one search: at each level the ticket first, then its controls."""
    return [
        _row(level, seed, arm, outcome)
        for level in levels
        for arm, outcome in [(TICKET, level.outcome), *level.controls.items()]
    ]


def write_record(rows: Sequence[Row], recipe: Recipe, path: str | Path) -> None:
    """Writes ``path`` as JSON, and the same rows beside it as ``.csv``.

    Args:
        rows: Of one recipe, any number of seeds.
        recipe: The settings; its seed is that of the first.
        path: The JSON file.
    """
    path = Path(path)
    content = {"recipe": asdict(recipe), "rows": [asdict(row) for row in rows]}
    replace_file(path, json.dumps(content, indent=1).encode())
    text = io.StringIO()
    writer = csv.DictWriter(text, [item.name for item in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    replace_file(path.with_suffix(".csv"), text.getvalue().encode())


def read_record(path: str | Path) -> tuple[list[Row], Recipe]:
    """The inverse of :func:`write_record`.

    Raises:
        DataError: The file is no record.
    """
    try:
        content = json.loads(Path(path).read_text())
        rows = [Row(**row) for row in content["rows"]]
        recipe = content["recipe"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: expected a record of searches, got {error}") from error
    return rows, Recipe.from_values(recipe)


def _row(level: Level | StructuredLevel, seed: int, arm: str, outcome: Outcome) -> Row:
    return Row(
        seed=seed,
        level=level.index,
        arm=arm,
        density=level.density,
        test_accuracy=outcome.test_accuracy,
        validation_accuracy=outcome.validation_accuracy,
        train_accuracy=outcome.train_accuracy,
        early_stop_iteration=outcome.early_stop_iteration,
        early_stop_test_accuracy=outcome.early_stop_test_accuracy,
        seconds=outcome.seconds,
    )
