# SPDX-License-Identifier: Apache-2.0
"""Times of calls on the CPU, for choosing between them on a machine that does other things too."""

from __future__ import annotations

import math
import resource
import statistics
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch

__all__ = ["glance", "is_settled", "measure"]

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
# A call as long as this is interrupted on a quiet machine too, for moments: less than this share of
# its time; by a busy program, half of it. Where the system tells no times, so often at most.
_QUIET_US = 10_000.0
_WAITED_SHARE = 0.1
# A call whose best is so many times another's worst has lost; the first where either ran once only.
_LOST_AT_ONCE = 3.0
_LOST = 1.5
# The first run of a call of this length is as good as the next: what it prepares takes no time.
_LONG_FIRST_CALL_US = 20_000.0
# From this much time on, doubts are given up.
_MOST_US = 1e6
_GLANCES = 3


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
            A call that is far slower than another drops out after a round or two.
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
        for name, call in order:
            us, undisturbed = _timed(call, finish)
            if undisturbed and us > _LONG_FIRST_CALL_US:
                spent[name].append(us)
                least_us[name] = us
        total, rounds = 0.0, 0
        running = _running(order, spent)
        while rounds < _MAX_ROUNDS:
            # Every second round runs backwards: the one that comes first is not always the same.
            for name, call in running if rounds % 2 == 0 else reversed(running):
                if prepare is not None:
                    prepare()
                us, undisturbed = _timed(call, finish, least_us[name])
                if undisturbed:
                    spent[name].append(us)
                least_us[name] = min(least_us[name], us)
                total += us
            rounds += 1
            running = _running(order, spent)
            settled = is_settled(spent.values())
            least = _MIN_ROUNDS - (total / rounds > _LONG_CALL_US) if settled else _DOUBTFUL_ROUNDS
            enough = min(1e3 * budget_ms * (1 if settled else _PATIENCE), _MOST_US)
            if (rounds >= least or total > _MOST_US) and total >= enough:
                break
    return {
        name: statistics.median(times) if len(times) >= _MIN_UNDISTURBED else least_us[name]
        for name, times in spent.items()
    }


def _timed(
    call: Callable[[], object],
    finish: Callable[[], object] | None = None,
    usual_us: float = math.inf,
) -> tuple[float, bool]:
    """The microseconds of a call, and whether other programs left it alone.

    A call that lost its core is long for that alone: only one that usually is may be interrupted.
    """
    is_long = usual_us >= _QUIET_US
    waited_us = _waited_us() if is_long else None
    interruptions = _interruptions()
    begin = time.perf_counter_ns()
    call()
    if finish is not None:
        finish()
    us = (time.perf_counter_ns() - begin) / 1e3
    interruptions = _interruptions() - interruptions
    if interruptions == 0 or not is_long:
        return us, interruptions == 0
    now_us = _waited_us()
    if waited_us is None or now_us is None:
        return us, interruptions <= us / _QUIET_US
    return us, now_us - waited_us <= _WAITED_SHARE * us


def _interruptions() -> int:
    """How often the system took a core away from a thread of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _waited_us() -> float | None:
    """How long threads of this process were ready and had no core; None where nothing tells."""
    try:
        files = Path("/proc/self/task").glob("*/schedstat")
        waits = [int(file.read_text().split()[1]) for file in files]
    except (OSError, ValueError, IndexError):
        return None
    return sum(waits) / 1e3 if waits else None


def glance(
    calls: Mapping[str, Callable[[], object]], times: float, warm: bool = False
) -> dict[str, float] | None:
    """Times each call once undisturbed; None where there is a doubt that the first is fastest.

    Args:
        calls: what to time, by name.
        times: the others must take so many times as long as the first.
        warm: whether they were called before; else each is, untimed.

    Returns:
        The microseconds of each call, by name.
    """
    us = {}
    with torch.inference_mode():
        for name, call in calls.items():
            if not warm:
                call()
            for _ in range(_GLANCES):
                us[name], undisturbed = _timed(call)
                if undisturbed:
                    break
            else:
                return None
    first, *others = us.values()
    return us if first * times < min(others) else None


_Calls = list[tuple[str, Callable[[], object]]]


def _running(order: _Calls, spent: Mapping[str, list[float]]) -> _Calls:
    return [item for item in order if not _has_lost(spent[item[0]], spent.values())]


def _has_lost(own: list[float], times: Collection[list[float]]) -> bool:
    """Whether the best of a call's undisturbed times is far above the worst of another's."""
    for other in times:
        if own and other:
            once = min(len(own), len(other)) < _MIN_UNDISTURBED
            if min(own) > (_LOST_AT_ONCE if once else _LOST) * max(other):
                return True
    return False


def is_settled(times: Collection[list[float]]) -> bool:
    """Whether more rounds would change nothing.

    Either every median is near its best, which it is not where other programs disturb the calls,
    or one candidate's worst is better than all others' best. Those far behind do not matter.

    Args:
        times: of each candidate, those of its undisturbed calls.
    """
    racing = [own for own in times if not _has_lost(own, times)]
    if any(len(own) < _MIN_UNDISTURBED for own in racing):
        return False
    if all(statistics.median(own) <= _STEADY * min(own) for own in racing):
        return True
    first, *others = sorted(racing, key=max)
    return all(max(first) < min(other) for other in others)
