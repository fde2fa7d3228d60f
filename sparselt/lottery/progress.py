# SPDX-License-Identifier: Apache-2.0
"""Progress bars for searches: level, arm, step, accuracy, time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sparselt.lottery.search import Progress

__all__ = ["Tally", "progress_bars"]


class Tally:
    """How much of a search is done, from its reports.

    Args:
        controls: Number of controls a level.
    """

    def __init__(self, controls: int) -> None:
        self.controls = controls
        self.trainings = 0
        self._current: tuple[int, str] | None = None

    def share(self, progress: Progress) -> float:
        """Share of all trainings that is done, the present one counted by its steps."""
        if self._current is None or self._current[0] != progress.level:
            # Levels read from disk make no reports, so the level itself says how many are behind.
            self.trainings = progress.level + self.controls * max(progress.level - 1, 0)
        elif self._current != (progress.level, progress.arm):
            self.trainings += 1
        self._current = (progress.level, progress.arm)
        total = progress.levels + self.controls * (progress.levels - 1)
        within = progress.step.iteration / progress.step.iterations
        return min((self.trainings + within) / total, 1.0)


@contextmanager
def progress_bars(controls: int = 0) -> Iterator[Callable[[int, Progress], None]]:
    """Shows one bar a seed on the terminal.

    Args:
        controls: Number of controls a level.

    Yields:
        A function of (seed, progress); for one search alone use ``lambda now: report(0, now)``.
    """
    from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    bars = Bars(
        TextColumn("seed {task.fields[seed]}"),
        TextColumn("level {task.fields[level]}"),
        TextColumn("{task.fields[arm]}"),
        BarColumn(),
        TextColumn("{task.fields[step]}"),
        TextColumn("{task.fields[accuracy]}"),
        TimeRemainingColumn(),
    )
    tasks: dict[int, TaskID] = {}
    tallies: dict[int, Tally] = {}

    def report(seed: int, now: Progress) -> None:
        share = tallies.setdefault(seed, Tally(controls)).share(now)
        shown: dict[str, Any] = {
            "seed": seed,
            "level": f"{now.level}/{now.levels - 1}",
            "arm": now.arm,
            "step": f"{now.step.iteration}/{now.step.iterations}",
            "accuracy": f"{100 * now.step.validation_accuracy:.1f} %",
        }
        if seed not in tasks:
            tasks[seed] = bars.add_task("", total=1.0, **shown)
        bars.update(tasks[seed], completed=share, **shown)

    with bars:
        yield report
