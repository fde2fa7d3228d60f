# SPDX-License-Identifier: Apache-2.0
"""The clock that choices are made by, on a machine that others disturb."""

from __future__ import annotations

import statistics
import time

import pytest

from sparselt import cpu_timer
from sparselt.cpu_timer import glance, is_settled, measure


class Machine:
    """A clock and counts of interruptions that only move when a call says so."""

    def __init__(self) -> None:
        self.now_ns = 0
        self.interruptions = 0
        self.waited_us: float | None = 0.0

    def perf_counter_ns(self) -> int:
        return self.now_ns

    def call(self, us: float, interrupted: int = 0, waited_us: float = 0.0) -> None:
        self.now_ns += int(1e3 * us)
        self.interruptions += interrupted
        if self.waited_us is not None:
            self.waited_us += waited_us


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(cpu_timer, "time", machine)
    monkeypatch.setattr(cpu_timer, "_interruptions", lambda: machine.interruptions)
    monkeypatch.setattr(cpu_timer, "_waited_us", lambda: machine.waited_us)
    return machine


def test_calls_take_turns_and_each_is_prepared(machine):
    log = []
    times = measure(
        {"a": lambda: log.append("a"), "b": lambda: log.append("b")},
        prepare=lambda: log.append("-"),
        budget_ms=0.0,
    )
    assert "".join(log) == "ab" + "-a-b" + "-b-a" + "-a-b"
    assert set(times) == {"a", "b"}


def test_a_slow_call_is_told_from_a_fast_one():
    times = measure({"slow": lambda: time.sleep(4e-3), "fast": lambda: None})
    assert times["slow"] > 4000 > times["fast"]


def test_every_undisturbed_time_is_handed_out(machine):
    lengths = iter(range(1, 99))
    spent: dict[str, list[float]] = {}
    times = measure(
        {"a": lambda: machine.call(next(lengths)), "b": lambda: machine.call(next(lengths))},
        budget_ms=0.0,
        spent=spent,
    )
    assert times == {name: statistics.median(own) for name, own in spent.items()}
    assert sorted(spent["a"] + spent["b"]) == list(range(3, 3 + 2 * len(spent["a"])))


def test_calls_that_lost_their_core_do_not_count(machine):
    lost = iter([False, *[True, False, True, False] * 20])

    def disturbed() -> None:
        interrupted = next(lost)
        machine.call(5000.0 if interrupted else 20.0, interrupted, 4980.0 * interrupted)

    spent: dict[str, list[float]] = {}
    times = measure({"disturbed": disturbed, "quiet": lambda: machine.call(30.0)}, spent=spent)
    assert times == {"disturbed": 20.0, "quiet": 30.0}
    assert set(spent["disturbed"]) == {20.0}


def test_where_every_call_lost_its_core_the_shortest_counts_and_nothing_is_settled(machine):
    lengths = iter([0.0, *[9000.0, 40.0, 7000.0] * 20])
    spent: dict[str, list[float]] = {}

    def busy() -> None:
        us = next(lengths)
        machine.call(us, 1, us)

    assert measure({"busy": busy}, spent=spent) == {"busy": 40.0}
    assert not is_settled(spent.values())


def test_a_long_call_may_be_interrupted_if_it_hardly_waits_for_its_core(machine):
    spent: dict[str, list[float]] = {}
    calls = {"long": lambda: machine.call(60_000.0, 30, 600.0)}
    assert measure(calls, spent=spent) == {"long": 60_000.0}
    assert is_settled(spent.values())


def test_short_calls_that_another_program_makes_long_are_not_settled(machine):
    # Two threads that wait for one another, each for its turn on a core.
    spent: dict[str, list[float]] = {}
    calls = {name: lambda us=us: machine.call(us, 2, us) for name, us in (("a", 3e3), ("b", 23e3))}
    measure(calls, spent=spent)
    assert not is_settled(spent.values())


def test_where_nothing_tells_how_long_a_call_waited_its_interruptions_are_counted(machine):
    machine.waited_us = None
    spent: dict[str, list[float]] = {}
    assert measure({"long": lambda: machine.call(60_000.0, 1)}, spent=spent) == {"long": 60_000.0}
    assert is_settled(spent.values())
    measure({"busy": lambda: machine.call(60_000.0, 12)}, spent=spent)
    assert not is_settled([spent["busy"]])


def test_the_system_tells_how_long_threads_waited():
    waited_us = cpu_timer._waited_us()
    assert waited_us is None or waited_us >= 0.0


def test_a_call_that_is_far_behind_is_not_timed_again(machine):
    lengths = {"fast": 1000.0, "slow": 2000.0, "hopeless": 4000.0}
    spent: dict[str, list[float]] = {}
    calls = {name: lambda us=us: machine.call(us) for name, us in lengths.items()}
    assert measure(calls, budget_ms=12.0, spent=spent) == lengths
    assert {name: len(own) for name, own in spent.items()} == {"fast": 4, "slow": 2, "hopeless": 1}
    assert is_settled(spent.values())


def test_a_call_catches_up_when_the_one_that_was_ahead_slows_down(machine):
    lengths = iter([100.0, 100.0, *[500.0] * 50])
    spent: dict[str, list[float]] = {}
    calls = {"slows": lambda: machine.call(next(lengths)), "steady": lambda: machine.call(400.0)}
    times = measure(calls, spent=spent)
    assert times["steady"] < times["slows"]
    assert len(spent["steady"]) > 2


def test_a_glance_tells_only_what_is_clear_and_undisturbed(machine):
    calls = {"first": lambda: machine.call(100.0), "other": lambda: machine.call(160.0)}
    assert glance(calls, 1.5) == {"first": 100.0, "other": 160.0}
    assert glance(calls, 1.7) is None
    lost = iter([False, True, False])
    calls["first"] = lambda: machine.call(100.0, waited_us=50.0, interrupted=next(lost))
    assert glance(calls, 1.5) == {"first": 100.0, "other": 160.0}
    calls["first"] = lambda: machine.call(100.0, interrupted=1, waited_us=50.0)
    assert glance(calls, 1.5) is None


def test_calls_of_seconds_are_timed_no_longer_than_it_takes_to_tell_them_apart(machine):
    lengths = {"first": 400_000.0, "other": 500_000.0, "hopeless": 2e6}
    spent: dict[str, list[float]] = {}
    calls = {name: lambda us=us: machine.call(us) for name, us in lengths.items()}
    assert measure(calls, spent=spent) == lengths
    assert machine.now_ns < 5e9
    busy = {name: lambda us=us: machine.call(us, 1, us) for name, us in lengths.items()}
    machine.now_ns = 0
    assert measure(busy) == lengths
    assert machine.now_ns < 9e9


def test_times_are_settled_where_they_hardly_scatter_or_where_all_agree_on_the_first():
    assert is_settled([[10.0, 11.0, 12.0], [10.0, 10.0, 13.0]])
    assert is_settled([[10.0, 50.0, 90.0], [100.0, 900.0, 900.0]])
    assert not is_settled([[10.0, 50.0, 90.0], [80.0, 900.0, 900.0]])
