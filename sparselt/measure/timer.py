# SPDX-License-Identifier: Apache-2.0
"""Wall-clock timing with warm-up, interleaved rounds and a noise floor.

Callables that are compared take turns in short rounds, so that a machine that slows down for a
while slows all of them. The even rounds of a callable against its odd rounds is an A-against-A
comparison of identical code: a difference smaller than that is no difference.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparselt.errors import OptionError

__all__ = ["Flush", "Timing", "Watched", "burst", "interleave", "measure", "speedup"]

# One sample spans several calls where a call is shorter than this: reading the clock (about 0.1 us)
# then costs less than a thousandth of what is measured.
_SAMPLE_US = 200.0
_ROUND_SAMPLES = 5
_WARMUP_CALLS = 3
# A call as long as this has warmed up within itself.
_LONG_CALL_US = 3e5


@dataclass(frozen=True)
class Timing:
    """Times of one callable, in microseconds a call, grouped by round.

    Attributes:
        rounds: one tuple of samples for each round; a sample is the mean of `calls` calls.
        calls: calls in one sample.
        cache: "warm", or "flushed" if the caches were emptied before every call.

    Example:
        >>> Timing(rounds=((1.0, 3.0), (2.0,))).median_us
        2.0
    """

    rounds: tuple[tuple[float, ...], ...]
    calls: int = 1
    cache: str = "warm"

    @property
    def samples_us(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """All samples, in the order they were taken."""
        return np.array([sample for samples in self.rounds for sample in samples], dtype=np.float64)

    def quantile_us(self, share: float) -> float:
        """The time that `share` (0 to 1) of the samples do not exceed."""
        return float(np.quantile(self.samples_us, share))

    @property
    def median_us(self) -> float:
        """The middle sample: what the tables print."""
        return self.quantile_us(0.5)

    @property
    def iqr_us(self) -> float:
        """Distance between the quartiles."""
        return self.quantile_us(0.75) - self.quantile_us(0.25)

    @property
    def noise(self) -> float:
        """Relative difference of the even and odd rounds' medians; 0 for a single round."""
        even = [sample for samples in self.rounds[0::2] for sample in samples]
        odd = [sample for samples in self.rounds[1::2] for sample in samples]
        if not odd:
            return 0.0
        return abs(float(np.median(even)) / float(np.median(odd)) - 1.0)

    def as_json(self) -> dict[str, Any]:
        """A plain dictionary with the summary and the median of every round."""
        return {
            "median_us": self.median_us,
            "p10_us": self.quantile_us(0.1),
            "p90_us": self.quantile_us(0.9),
            "iqr_us": self.iqr_us,
            "min_us": float(self.samples_us.min()),
            "samples": int(self.samples_us.size),
            "calls_per_sample": self.calls,
            "noise": self.noise,
            "cache": self.cache,
            "rounds_us": [round(float(np.median(samples)), 3) for samples in self.rounds],
        }


class Flush:
    """Pushes everything out of the caches this process can use, by rewriting a larger buffer.

    Args:
        size_bytes: size of the buffer; take at least twice the last-level cache share.

    Example:
        >>> flush = Flush(1 << 16)
        >>> flush()
    """

    def __init__(self, size_bytes: int) -> None:
        if size_bytes < 1:
            raise OptionError(f"size_bytes: expected at least 1, got {size_bytes}")
        self._buffer = np.zeros(size_bytes, dtype=np.uint8)

    def __call__(self) -> None:
        np.add(self._buffer, 1, out=self._buffer)


@contextmanager
def _collector_off() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class Watched:
    """A callable of which a part counts: it returns the microseconds that this part took.

    Args:
        function: runs all of it.

    Example:
        >>> measure(Watched(lambda: 3.0), repeats=5, seconds=0.0).median_us
        3.0
    """

    def __init__(self, function: Callable[[], float]) -> None:
        self.function = function

    def __call__(self) -> float:
        return self.function()


def burst(
    function: Callable[[], object],
    samples: int,
    calls: int = 1,
    flush: Callable[[], object] | None = None,
) -> tuple[float, ...]:
    """Take `samples` samples of `function`, each the mean of `calls` calls, in microseconds.

    With `flush`, it runs before every call and outside the timed span, and a sample is one call.
    """
    times: list[float] = []
    clock = time.perf_counter_ns
    repeat = range(1 if flush is not None else calls)
    with _collector_off():
        for _ in range(samples):
            if flush is not None:
                flush()
            if isinstance(function, Watched):
                times.append(sum(function() for _ in repeat) / len(repeat))
                continue
            start = clock()
            for _ in repeat:
                function()
            times.append((clock() - start) / 1e3 / len(repeat))
    return tuple(times)


def calls_for(function: Callable[[], object], warmup_seconds: float) -> int:
    """Warm `function` up and say how many calls make a sample long enough for the clock."""
    end = time.perf_counter() + warmup_seconds
    fastest = float("inf")
    count = 0
    while (
        count == 0
        or time.perf_counter() < end
        or (count < _WARMUP_CALLS and fastest < _LONG_CALL_US)
    ):
        fastest = min(fastest, burst(function, 1)[0])
        count += 1
    return max(1, int(np.ceil(_SAMPLE_US / max(fastest, 0.01))))


def interleave(
    functions: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 20,
    seconds: float = 0.5,
    warmup_seconds: float = 0.1,
    flush: Callable[[], object] | None = None,
) -> dict[str, Timing]:
    """Time several callables in turns.

    Every round gives each callable an untimed call and then a few samples; the order rotates from
    round to round. Rounds go on until each has `repeats` samples and `seconds` of measured time.

    Args:
        functions: callables without arguments, by name; of a `Watched` one, the part counts.
        repeats: least number of samples of each.
        seconds: least measured time of each, in seconds.
        warmup_seconds: time spent calling each before anything counts.
        flush: called before every timed call, outside the timed span, for cold caches.

    Returns:
        One `Timing` for each name, in the given order.

    Raises:
        OptionError: without callables, or with repeats below 1.

    Example:
        >>> times = interleave({"sum": lambda: sum(range(9))}, repeats=5, seconds=0.0)
        >>> times["sum"].median_us > 0
        True
    """
    if not functions or repeats < 1:
        raise OptionError(
            f"interleave: expected callables and repeats >= 1, got {len(functions)} callables and "
            f"repeats={repeats}"
        )
    calls = {name: calls_for(function, warmup_seconds) for name, function in functions.items()}
    rounds: dict[str, list[tuple[float, ...]]] = {name: [] for name in functions}
    spent_us = dict.fromkeys(functions, 0.0)
    names = list(functions)
    turn = 0
    while (
        min(len(rounds[n]) for n in names) * _ROUND_SAMPLES < repeats
        or min(spent_us.values()) < 1e6 * seconds
    ):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            functions[name]()
            samples = burst(functions[name], _ROUND_SAMPLES, calls[name], flush)
            rounds[name].append(samples)
            spent_us[name] += sum(samples) * (1 if flush else calls[name])
        turn += 1
    cache = "flushed" if flush else "warm"
    return {name: Timing(tuple(rounds[name]), 1 if flush else calls[name], cache) for name in names}


def measure(
    function: Callable[[], object],
    *,
    repeats: int = 20,
    seconds: float = 0.5,
    warmup_seconds: float = 0.1,
    flush: Callable[[], object] | None = None,
) -> Timing:
    """Time one callable; the arguments are those of `interleave`.

    Example:
        >>> measure(lambda: None, repeats=5, seconds=0.0).cache
        'warm'
    """
    return interleave(
        {"": function},
        repeats=repeats,
        seconds=seconds,
        warmup_seconds=warmup_seconds,
        flush=flush,
    )[""]


def speedup(dense: Timing, sparse: Timing, seed: int = 0) -> tuple[float, float, float]:
    """How many times faster `sparse` is than `dense`, with a 95 % bootstrap interval over rounds.

    Returns:
        (ratio of the medians, lower end, upper end).

    Example:
        >>> speedup(Timing(((4.0,),)), Timing(((2.0,),)))
        (2.0, 2.0, 2.0)
    """
    generator = np.random.default_rng(seed)
    ratios = np.median(_resampled(dense.rounds, generator), axis=1) / np.median(
        _resampled(sparse.rounds, generator), axis=1
    )
    low, high = np.quantile(ratios, (0.025, 0.975))
    return dense.median_us / sparse.median_us, float(low), float(high)


def _resampled(
    rounds: Sequence[Sequence[float]], generator: np.random.Generator, count: int = 500
) -> np.ndarray[Any, np.dtype[np.float64]]:
    medians = np.array([np.median(samples) for samples in rounds])
    return medians[generator.integers(0, len(medians), (count, len(medians)))]
