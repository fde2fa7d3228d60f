# SPDX-License-Identifier: Apache-2.0
"""Does a ticket win? One rule for every experiment, applied to the record and to nothing else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sparselt.errors import DataError
from sparselt.lottery.record import TICKET, Row

__all__ = ["Spread", "Verdict", "judge", "spread_of"]

MARGIN = 0.002
LEAST_SEEDS = 3
LARGEST_DENSITY = 0.1


@dataclass(frozen=True)
class Spread:
    """Mean, least and largest of one number over the seeds."""

    mean: float
    least: float
    largest: float

    @property
    def width(self) -> float:
        """Largest less least."""
        return self.largest - self.least


@dataclass(frozen=True)
class Verdict:
    """What can be claimed of the tickets of one level.

    Attributes:
        level: Of the search.
        density: Mean over the seeds.
        ticket: Test accuracy of the tickets.
        dense: Test accuracy of the dense networks.
        controls: Test accuracy of each kind of control.
        reasons: Why the ticket does not win, in words; empty if it does.
    """

    level: int
    density: float
    ticket: Spread
    dense: Spread
    controls: dict[str, Spread]
    reasons: tuple[str, ...]

    @property
    def wins(self) -> bool:
        """Whether every part of the rule holds."""
        return not self.reasons


def judge(rows: Sequence[Row], margin: float = MARGIN) -> list[Verdict]:
    """Judges every level from 1.

    A ticket wins if (a) its mean accuracy is within ``margin`` of the dense mean over at least 3
    seeds, (b) it beats the reinitialised and the shuffled control at its density by more than the
    spread over the seeds, and (c) it keeps at most 10 % of the weights.

    Args:
        rows: Of one recipe, all seeds.
        margin: As a fraction: 0.002 is 0.2 points.

    Returns:
        One verdict a level, in order.

    Raises:
        DataError: There is no dense level in the rows.
    """
    by_level: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        by_level[row.level].append(row)
    if not any(row.arm == TICKET for row in by_level.get(0, ())):
        raise DataError("record: expected the dense level 0 to compare with, got none")
    dense = spread_of(row.test_accuracy for row in by_level[0])
    return [
        _judge_level(level, by_level[level], dense, margin) for level in sorted(by_level) if level
    ]


def spread_of(values: Iterable[float]) -> Spread:
    """Mean, least and largest of some numbers, at least one."""
    numbers = list(values)
    return Spread(sum(numbers) / len(numbers), min(numbers), max(numbers))


def _judge_level(level: int, rows: list[Row], dense: Spread, margin: float) -> Verdict:
    tickets = [row for row in rows if row.arm == TICKET]
    ticket = spread_of(row.test_accuracy for row in tickets)
    density = spread_of(row.density for row in tickets).mean
    kinds = sorted({row.kind for row in rows} - {TICKET})
    controls = {
        kind: spread_of(row.test_accuracy for row in rows if row.kind == kind) for kind in kinds
    }
    reasons = []
    seeds = len({row.seed for row in tickets})
    if seeds < LEAST_SEEDS:
        reasons.append(f"{seeds} of at least {LEAST_SEEDS} seeds")
    if ticket.mean < dense.mean - margin:
        loss = 100 * (dense.mean - ticket.mean)
        reasons.append(f"{loss:.2f} points below the dense network")
    for kind in ("reinit", "shuffle"):
        reasons += _against(kind, ticket, controls.get(kind))
    if density > LARGEST_DENSITY:
        reasons.append(f"keeps {100 * density:.1f} % of the weights, more than 10 %")
    return Verdict(level, density, ticket, dense, controls, tuple(reasons))


def _against(kind: str, ticket: Spread, control: Spread | None) -> list[str]:
    if control is None:
        return [f"no {kind} control was run"]
    lead, spread = ticket.mean - control.mean, max(ticket.width, control.width)
    if lead > spread:
        return []
    return [
        f"leads the {kind} control by {100 * lead:.2f} points, within the spread of "
        f"{100 * spread:.2f} over the seeds"
    ]
