# SPDX-License-Identifier: Apache-2.0
"""When a ticket fails: what to try next, in plain words, with the numbers that led to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from sparselt.lottery.recipe import Recipe
from sparselt.lottery.record import Row
from sparselt.lottery.stability import STABLE, Stability
from sparselt.lottery.verdict import MARGIN, Verdict, judge

__all__ = ["Advice", "advise"]


@dataclass(frozen=True)
class Advice:
    """One thing to try.

    Attributes:
        problem: What was measured, with its numbers.
        proposal: What to do about it.
        recipe: The recipe changed so, or None where it takes more than settings.
    """

    problem: str
    proposal: str
    recipe: Recipe | None = None

    def __str__(self) -> str:
        return f"{self.problem}: {self.proposal}"


def advise(rows: Sequence[Row], recipe: Recipe, stability: Stability | None = None) -> list[Advice]:
    """What to try next, the most telling first; nothing if some level wins.

    Args:
        rows: The record of the searches.
        recipe: Their settings.
        stability: Of the ticket, or of the dense network, at the rewinding point, if it was
            measured.
    """
    verdicts = judge(rows)
    if any(verdict.wins for verdict in verdicts):
        return []
    proposals = [
        _train_longer(rows, recipe),
        _more_seeds(rows),
        _missing_controls(verdicts),
        _rewind_later(verdicts, recipe, stability),
        _lower_rate(verdicts, recipe, stability),
        _prune_slower(verdicts, recipe),
        _iterate(recipe),
        _smaller_unit(verdicts, recipe),
        _prune_further(verdicts, recipe),
    ]
    return [proposal for proposal in proposals if proposal is not None]


def _train_longer(rows: Sequence[Row], recipe: Recipe) -> Advice | None:
    """Tickets are compared at the end of training: a dense network that still improves has not got
    there.
    """
    dense = [row for row in rows if row.level == 0]
    late = [row.early_stop_iteration for row in dense]
    if min(late) < recipe.iterations * 0.98 or min(row.train_accuracy for row in dense) > 0.999:
        return None
    return Advice(
        f"the dense network still improves at its last iteration, {recipe.iterations}",
        f"train {2 * recipe.iterations} iterations",
        replace(recipe, iterations=2 * recipe.iterations),
    )


def _more_seeds(rows: Sequence[Row]) -> Advice | None:
    seeds = len({row.seed for row in rows})
    if seeds >= 3:
        return None
    counted = "1 seed was run" if seeds == 1 else f"{seeds} seeds were run"
    return Advice(counted, "run at least 3, chance alone can decide below that")


def _missing_controls(verdicts: Sequence[Verdict]) -> Advice | None:
    missing = [name for name in ("reinit", "shuffle") if name not in verdicts[-1].controls]
    if not missing:
        return None
    return Advice(
        f"no {' or '.join(missing)} control was run",
        "run them: without a control nothing is known about the mask or the weights",
    )


def _rewind_later(
    verdicts: Sequence[Verdict], recipe: Recipe, stability: Stability | None
) -> Advice | None:
    failing = _failing(verdicts)
    if failing is None or recipe.restart != "rewind":
        return None
    loses = (
        f"at {100 * failing.density:.1f} % of the weights accuracy is {_loss(failing)} below dense"
    )
    if stability is not None:
        if stability.is_stable:
            return None
        problem = (
            f"{loses}, and the network is unstable at iteration {stability.start} "
            f"(instability {100 * stability.instability:.1f} %, stable below {100 * STABLE:.0f} %)"
        )
    elif _beats_controls(failing):
        return None
    else:
        problem = f"{loses}, and no better than its controls"
    later = max(4 * recipe.rewind, recipe.iterations // 50, 1)
    if later >= recipe.iterations // 2:
        return None
    return Advice(problem, f"rewind to iteration {later}", replace(recipe, rewind=later))


def _lower_rate(
    verdicts: Sequence[Verdict], recipe: Recipe, stability: Stability | None
) -> Advice | None:
    """A high learning rate from the first iteration on is what makes early weights unstable."""
    failing = _failing(verdicts)
    if failing is None or recipe.warmup or (stability is not None and stability.is_stable):
        return None
    if _beats_controls(failing) and stability is None:
        return None
    steps = max(recipe.iterations // 10, 1)
    return Advice(
        f"training starts at the full learning rate, {recipe.lr:g}",
        f"warm up over {steps} iterations",
        replace(recipe, warmup=steps),
    )


def _prune_slower(verdicts: Sequence[Verdict], recipe: Recipe) -> Advice | None:
    """A sudden fall between two levels points at the size of the step."""
    falls = [
        (before.ticket.mean - after.ticket.mean, before, after)
        for before, after in pairwise(verdicts)
    ]
    worst = max(falls, default=None, key=lambda fall: fall[0])
    rate = max(recipe.rate, recipe.conv_rate)
    if worst is None or worst[0] < 5 * MARGIN or rate <= 0.1 or recipe.schedule != "geometric":
        return None
    slower = replace(
        recipe, rate=recipe.rate / 2, conv_rate=recipe.conv_rate / 2, levels=2 * recipe.levels
    )
    return Advice(
        f"accuracy falls by {100 * worst[0]:.2f} points in one round, from "
        f"{100 * worst[1].density:.1f} to {100 * worst[2].density:.1f} % of the weights",
        f"prune {100 * rate / 2:.0f} % a round instead of {100 * rate:.0f} %",
        slower,
    )


def _iterate(recipe: Recipe) -> Advice | None:
    if recipe.schedule != "one_shot":
        return None
    return Advice(
        "all was pruned in one round",
        f"prune in {recipe.levels} rounds",
        replace(recipe, schedule="geometric"),
    )


def _smaller_unit(verdicts: Sequence[Verdict], recipe: Recipe) -> Advice | None:
    failing = _failing(verdicts)
    if failing is None or recipe.structure == "1x1":
        return None
    return Advice(
        f"units of {recipe.structure} lose {_loss(failing)} at {100 * failing.density:.1f} %",
        "use smaller units, or single weights to see what the structure costs",
        replace(recipe, structure="1x1"),
    )


def _prune_further(verdicts: Sequence[Verdict], recipe: Recipe) -> Advice | None:
    """Controls only fall behind where the network is small enough."""
    last = verdicts[-1]
    if _failing(verdicts) is not None or last.density <= 0.02 or recipe.schedule == "one_shot":
        return None
    return Advice(
        f"at {100 * last.density:.1f} % of the weights accuracy still holds",
        f"go on for {recipe.levels // 2 + 1} more rounds, controls fall behind later",
        replace(recipe, levels=recipe.levels + recipe.levels // 2 + 1),
    )


def _failing(verdicts: Sequence[Verdict]) -> Verdict | None:
    """The first level that loses accuracy, if it does so above 2 % of the weights."""
    for verdict in verdicts:
        if verdict.ticket.mean < verdict.dense.mean - MARGIN and verdict.density > 0.02:
            return verdict
    return None


def _beats_controls(verdict: Verdict) -> bool:
    leads = [
        verdict.ticket.mean - control.mean > max(verdict.ticket.width, control.width)
        for control in verdict.controls.values()
    ]
    return bool(leads) and all(leads)


def _loss(verdict: Verdict) -> str:
    return f"{100 * (verdict.dense.mean - verdict.ticket.mean):.2f} points"
