# SPDX-License-Identifier: Apache-2.0
"""Times calls on a CUDA device by events, with weights as cold as a network finds them.

Before each timed call a buffer of twice the second-level cache is written, which puts weights out
of it and keeps the device busy while the call is launched: what is timed is the device's work, not
the launch. Then the input is read, which the layer before would have just written.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["measure_on_cuda"]

_ROUNDS = 15
# A program replays a graph from its second call on, and records it in that one.
_WARM_UPS = 3


def measure_on_cuda(
    calls: Mapping[str, Callable[[], object]], inputs: Sequence[Tensor], cold: bool = True
) -> dict[str, float]:
    """The median microseconds of each call on the device, taken in turns under inference mode.

    Args:
        calls: what to time, by name. One that fails, as a kernel may that does not take a shape,
            takes infinitely long.
        inputs: of the calls, on the device; at least one.
        cold: whether weights are to come from memory; else they are read by one untimed call.
    """
    device = inputs[0].device
    size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    with torch.inference_mode(), torch.cuda.device(device):
        flush = torch.empty(size, dtype=torch.uint8, device=device)
        times: dict[str, list[float]] = {name: [] for name in calls if _warm_up(calls[name])}
        for turn in range(_ROUNDS):
            events = {}
            for name in times if turn % 2 == 0 else reversed(times):
                flush.zero_()
                for x in inputs:
                    x.sum()
                if not cold:
                    calls[name]()
                events[name] = begin, end = _event(), _event()
                begin.record()
                calls[name]()
                end.record()
            torch.cuda.synchronize(device)
            for name, (begin, end) in events.items():
                times[name].append(1e3 * begin.elapsed_time(end))
    measured = {name: statistics.median(spent) for name, spent in times.items()}
    return {name: measured.get(name, math.inf) for name in calls}


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _warm_up(call: Callable[[], object]) -> bool:
    """Whether a call runs at all."""
    try:
        for _ in range(_WARM_UPS):
            call()
    except RuntimeError:
        return False
    return True
