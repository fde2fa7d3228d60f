# SPDX-License-Identifier: Apache-2.0
"""Times of calls on the CPU, for choosing between them on a machine that does other things too."""

from __future__ import annotations

import math
import resource
import statistics
import time
from collections.abc import Callable, Mapping

import torch

__all__ = ["is_settled", "measure"]

# Rounds and time spent on the candidates of one layer.
_BUDGET_MS = 6.0
_MIN_ROUNDS = 3
_MIN_UNDISTURBED = 2
_MAX_ROUNDS = 40
# Where other programs disturb the clock, at least so many rounds, and up to so many budgets.
_DOUBTFUL_ROUNDS = 5
_PATIENCE = 4
_STEADY = 1.3
# From this length of a call on, its spread is small against it and fewer rounds do.
_LONG_CALL_US = 3000.0
# A long call is interrupted on the quietest machine too, about so often.
_QUIET_US = 50_000.0


def measure(
    calls: Mapping[str, Callable[[], object]],
    *,
    prepare: Callable[[], object] | None = None,
    finish: Callable[[], object] | None = None,
    budget_ms: float = _BUDGET_MS,
    spent: dict[str, list[float]] | None = None,
) -> dict[str, float]:
    """Times several calls in turns, under inference mode and at torch's current thread count.

    Args:
        calls: what to time, by name.
        prepare: run before every timed call, untimed; for example to make caches cold.
        finish: run after every call and timed with it; waits for a device that works on its own.
        budget_ms: timed milliseconds to spend on all calls together, up to four times as many
            where the times scatter too much to tell which is best. At least three rounds are run,
            two where a call takes milliseconds, five where the times scatter, and at most forty.
        spent: filled with the microseconds of the single calls, by name; calls from which the
            system took a core away for other programs are left out.

    Returns:
        The median microseconds of each call, by name; the least where other programs left hardly
        one undisturbed.

    Example:
        >>> sorted(measure({"a": lambda: None, "b": lambda: None}))
        ['a', 'b']
    """
    spent = {} if spent is None else spent
    spent.update({name: [] for name in calls})
    least_us = dict.fromkeys(calls, math.inf)
    order = list(calls.items())
    with torch.inference_mode():
        for _, call in order:
            call()
        if finish is not None:
            finish()
        total, rounds = 0.0, 0
        while rounds < _MAX_ROUNDS:
            # Every second round runs backwards: the one that comes first is not always the same.
            for name, call in order if rounds % 2 == 0 else reversed(order):
                if prepare is not None:
                    prepare()
                interruptions = _interruptions()
                begin = time.perf_counter_ns()
                call()
                if finish is not None:
                    finish()
                us = (time.perf_counter_ns() - begin) / 1e3
                if _interruptions() - interruptions <= us / _QUIET_US:
                    spent[name].append(us)
                least_us[name] = min(least_us[name], us)
                total += us
            rounds += 1
            settled = is_settled(list(spent.values()))
            least = _MIN_ROUNDS - (total / rounds > _LONG_CALL_US) if settled else _DOUBTFUL_ROUNDS
            if rounds >= least and total >= 1e3 * budget_ms * (1 if settled else _PATIENCE):
                break
    return {
        name: statistics.median(times) if len(times) >= _MIN_UNDISTURBED else least_us[name]
        for name, times in spent.items()
    }


def _interruptions() -> int:
    """How often the system took a core away from a thread of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def is_settled(times: list[list[float]]) -> bool:
    """Whether more rounds would change nothing.

    Either every median is near its best, which it is not where other programs disturb the calls,
    or one candidate's worst is better than all others' best.

    Args:
        times: of each candidate, those of its undisturbed calls.
    """
    if any(len(own) < _MIN_UNDISTURBED for own in times):
        return False
    if all(statistics.median(own) <= _STEADY * min(own) for own in times):
        return True
    first, *others = sorted(times, key=max)
    return all(max(first) < min(other) for other in others)
