# SPDX-License-Identifier: Apache-2.0
"""Measured choice: times a layer's candidates, dense included, and hands the times to the plan.

A layer is timed as its network will meet it. Candidates take turns, so that a change of the
machine's speed meets all of them alike, and the median of each counts. Where the network's weights
together exceed the second-level cache, they are cold at every call: before each timed call a
buffer larger than that cache is read, and then the input, which the layer before has just written.

Times are kept on disk (`sparselt.tune_cache`) under everything that they depend on: machine, build,
threads, and the layer's shape, density, pattern and input. Those that were disturbed are not kept.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sparselt import ops
from sparselt.candidate_calls import CandidateCalls, call_us
from sparselt.cpu import cache_bytes, cpu_name
from sparselt.cpu_timer import glance, is_settled, measure
from sparselt.cuda_timer import measure_on_cuda
from sparselt.extension import build_id
from sparselt.facts import facts_of, forced_kernel
from sparselt.image_rules import plan_in_images
from sparselt.neighbours import is_depthwise
from sparselt.packed_rows import packs_rows
from sparselt.plan import (
    DENSE,
    Candidate,
    Facts,
    KernelInfo,
    Plan,
    candidates,
    choose,
    is_asked_for,
)
from sparselt.tune_cache import TimesCache

__all__ = ["Tuner", "kind_of", "machine"]

# A candidate that is not faster by this share does not replace what there is.
_MARGIN = 0.05
# Of a layer's call, what its kernel takes at least.
_LEAST_SHARE = 0.05
_KINDS_A_FACTOR_OF_E, _ROWS_SAMPLED = 20, 128
# Numbers of an input that takes milliseconds, so that what a layer's call costs does not show.
_LARGE_INPUT = 1 << 21


def kind_of(density: float) -> int:
    """The same for densities within 5 % of each other."""
    return round(_KINDS_A_FACTOR_OF_E * math.log(max(density, 1e-9)))


def machine() -> dict[str, Any]:
    """What measured plans depend on: CPU, caches, kernels, threads, and torch's version."""
    return {
        "cpu": cpu_name(),
        "second-level cache": cache_bytes(),
        "kernels": [kernel.name for kernel in ops.kernels() if kernel.usable],
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }


class Tuner:
    """Plans the layers of one network, timing each kind of layer once.

    Args:
        format: one of `plan.FORMAT_CHOICES`.
        weight_bytes: bytes of all dense weights of the network; decides whether they are cold.
        in_program: whether the layers will run in a program, which has dense kernels of its own.

    Attributes:
        cold: whether layers are timed with cold weights.
    """

    def __init__(
        self, format: str = "auto", weight_bytes: int = 0, in_program: bool = False
    ) -> None:
        self.format = format
        self.in_program = in_program
        self.images_innermost = False
        self.weight_bytes = weight_bytes
        self.cold = weight_bytes > cache_bytes()
        self._times: dict[tuple[object, ...], dict[str, float]] = {}
        self._cache = TimesCache()
        self._recalled: set[tuple[object, ...]] = set()
        self._doubtful: set[tuple[object, ...]] = set()
        self._flush = torch.empty(0)
        if self.cold:
            # Each thread reads its share, which must displace all of its core's cache.
            self._flush = torch.zeros(2 * cache_bytes() * torch.get_num_threads() // 4)

    def plan(
        self,
        module: nn.Module,
        mask: Tensor | None = None,
        inputs: Sequence[Tensor] = (),
        obstacle: str = "",
    ) -> Plan:
        """The plan of one layer, measured on `inputs` where there are any.

        Args:
            module: nn.Linear, nn.Conv1d or nn.Conv2d.
            mask: which weights are kept; None for those that are not 0.
            inputs: what the layer is called with, one tensor a call; the times of the calls add up.
                Of a batch that makes long calls, a part is timed.
            obstacle: why the layer must stay dense; empty if it may become sparse.

        Raises:
            KernelError: SPARSELT_KERNEL names a kernel that is unknown or does not fit.
        """
        weight = module.weight
        assert isinstance(weight, Tensor)
        kept = weight != 0 if mask is None else mask != 0
        facts = replace(facts_of(module, kept, _columns(module, inputs)), obstacle=obstacle)
        if self.format == "bsr" and facts.block == (1, 1):
            facts = replace(facts, block=(4, 1))
        kernels, forced = ops.kernels(max(weight.get_device(), 0)), forced_kernel()
        if self.images_innermost:
            return plan_in_images(facts, kernels)
        pool = self.worth_timing(candidates(facts, kernels), kernels)
        if not inputs or not pool or facts.density == 1 or forced or self.format == DENSE:
            return choose(facts, kernels, None, format=self.format, forced=forced)
        parts = [_part(x) for x in inputs]
        key = self._key(module, facts, kept, parts)
        if key not in self._times:
            self._times[key] = self._recall_or_time(key, module, mask, pool, parts)
        share = sum(len(x) for x in inputs) / max(sum(len(x) for x in parts), 1)
        times = {name: us * share for name, us in self._times[key].items()}
        if self.in_program and not inputs[0].is_cuda:
            times = {name: _in_program(name, us, len(inputs)) for name, us in times.items()}
        plan = choose(facts, kernels, times, format=self.format)
        if key in self._recalled:
            plan = replace(plan, reason=f"{plan.reason}, from the cache")
        return plan

    @property
    def is_forced(self) -> bool:
        """Whether SPARSELT_KERNEL or the format leaves nothing to choose."""
        return bool(forced_kernel()) or self.format != "auto"

    @property
    def is_doubtful(self) -> bool:
        """Whether other programs disturbed the times of some layer."""
        return bool(self._doubtful)

    def forget_doubtful(self) -> bool:
        """Drops disturbed times, so that they are taken again; whether there were any."""
        found = bool(self._doubtful)
        while self._doubtful:
            del self._times[self._doubtful.pop()]
        return found

    def dense(self) -> Tuner:
        """A tuner that plans every layer dense, with the times that this one has measured."""
        other = copy.copy(self)
        other.format = DENSE
        return other

    def in_images(self) -> Tuner:
        """A tuner that plans for images innermost, by rule."""
        other = copy.copy(self)
        other.images_innermost = True
        return other

    def known(self, names: Sequence[str], key: object, inputs: Sequence[Tensor] = ()) -> str | None:
        """What `fastest` would answer for calls of these names, if it need not time them."""
        place = ("fastest", str(key))
        times = self._times.get(place) or self._cache.get(self._place(place, inputs), names)
        if times is None:
            return None
        self._times[place] = times
        return _fastest(times, names[0])

    def told(self, key: object) -> str:
        """The microseconds that are known for a key, as text."""
        times = self._times["fastest", str(key)]
        return ", ".join(f"{name} {us:.0f} us" for name, us in times.items())

    def is_clear(
        self, calls: Mapping[str, Callable[[], object]], key: object, times: float, warm: bool
    ) -> bool:
        """Whether a glance tells that the first of several calls on the CPU is fastest.

        Args:
            calls: what to time, by name.
            key: as of `fastest`, which then knows.
            times: the others must take so many times as long.
            warm: whether they were called before.
        """
        us = glance(calls, times, warm)
        if us is not None:
            self._keep(key, us)
        return us is not None

    def fastest(
        self,
        calls: Mapping[str, Callable[[], object]],
        key: object,
        inputs: Sequence[Tensor] = (),
    ) -> str:
        """The name of the fastest of several calls; the first unless another clearly is.

        Args:
            calls: what to time, by name.
            key: everything that the times depend on beside the machine; those of a key met before
                are not timed again.
            inputs: of the calls, where they are on a CUDA device.
        """
        known = self.known(list(calls), key, inputs)
        if known is not None:
            return known
        spent: dict[str, list[float]] = {}
        on_cuda = bool(inputs) and inputs[0].is_cuda
        times = measure_on_cuda(calls, inputs) if on_cuda else measure(calls, spent=spent)
        self._keep(key, times, inputs, is_settled(spent.values()))
        return _fastest(times, next(iter(calls)))

    def _keep(
        self,
        key: object,
        us: dict[str, float],
        inputs: Sequence[Tensor] = (),
        settled: bool = True,
    ) -> None:
        known = ("fastest", str(key))
        self._times[known] = us
        if settled:
            self._cache.put(self._place(known, inputs), us)

    def worth_timing(
        self, considered: Iterable[Candidate], kernels: Iterable[KernelInfo]
    ) -> list[Candidate]:
        """The candidates worth timing: of each format, the one that the registry prefers.

        Of spmv kernels, all but the portable one: what a CPU's gather instruction is worth, on
        which they differ, its instruction sets do not tell. On CUDA all.
        """
        pool = [c for c in considered if c.applies and c.kernel != DENSE]
        infos = {kernel.name: kernel for kernel in kernels}
        first: dict[tuple[object, ...], Candidate] = {}
        for item in reversed([c for c in pool if is_asked_for(c.format, self.format)]):
            info = infos.get(item.kernel)
            if info is None or info.device == "cuda":
                first[item.kernel,] = item
            else:
                differs = item.block if info.op == "spmv" else ()
                first[item.format, info.op, differs] = item
        return list(first.values())

    def _key(
        self, module: nn.Module, facts: Facts, kept: Tensor, inputs: Sequence[Tensor]
    ) -> tuple[object, ...]:
        """Everything that a layer's times depend on. Layers that differ by little are one kind."""
        geometry = [getattr(module, name, None) for name in ("stride", "padding", "dilation")]
        pattern = (kind_of(facts.density), _spread(kept))
        shapes = tuple((tuple(x.shape), x.stride()) for x in inputs)
        bias = module.bias is not None
        return (
            replace(facts, nnz=0),
            pattern,
            str(geometry),
            bias,
            shapes,
            self.format,
            self._is_cold_on(inputs[0].device) if inputs[0].is_cuda else self.cold,
            torch.get_num_threads(),
            self.in_program and (is_depthwise(module) or packs_rows(module)),
        )

    def _recall_or_time(
        self,
        key: tuple[object, ...],
        module: nn.Module,
        mask: Tensor | None,
        pool: list[Candidate],
        inputs: Sequence[Tensor],
    ) -> dict[str, float]:
        """The times of another process, where they were kept; else those measured now."""
        place = self._place(key, inputs)
        times = self._cache.get(place, [DENSE, *(c.kernel for c in pool)])
        if times is not None:
            self._recalled.add(key)
            return times
        times, settled = self._time(module, mask, pool, inputs)
        if settled:
            self._cache.put(place, times)
        else:
            self._doubtful.add(key)
        return times

    @staticmethod
    def _place(key: tuple[object, ...], inputs: Sequence[Tensor] = ()) -> str:
        """A key and the machine, as text."""
        gpu = torch.cuda.get_device_name(inputs[0].device) if inputs and inputs[0].is_cuda else ""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
        return repr((machine(), ops.isa(), build_id(), cores, gpu, key))

    def _time(
        self,
        module: nn.Module,
        mask: Tensor | None,
        pool: list[Candidate],
        inputs: Sequence[Tensor],
    ) -> tuple[dict[str, float], bool]:
        """The times of all candidates, dense included, and whether they are to be trusted."""
        total = dict.fromkeys([DENSE, *(c.kernel for c in pool)], 0.0)
        made = CandidateCalls(module, mask, pool, self.in_program)
        settled = True
        for x in inputs:
            calls = made.on(x)
            spent: dict[str, list[float]] = {}
            if x.is_cuda:
                times = measure_on_cuda(calls, [x], self._is_cold_on(x.device))
            else:
                prepare = self.cool(x) if self.cold else None
                times = measure(calls, prepare=prepare, spent=spent)
            for name, us in times.items():
                total[name] += us
            finite = all(map(math.isfinite, times.values()))
            settled = settled and finite and is_settled(spent.values())
        return total, settled

    def _is_cold_on(self, device: torch.device) -> bool:
        return self.weight_bytes > torch.cuda.get_device_properties(device).L2_cache_size

    def cool(self, x: Tensor) -> Callable[[], object]:
        """What makes weights cold, and `x` warm, as the layer before leaves it."""

        def prepare() -> None:
            self._flush.sum()
            x.sum()

        return prepare


def _part(x: Tensor) -> Tensor:
    """The first samples of a batch, as many as are far more than the caches near a core hold."""
    count = len(x)
    while count % 2 == 0 and x.dim() > 1 and x[:1].numel() * count >= 2 * _LARGE_INPUT:
        count //= 2
    return x[:count]


def _fastest(times: Mapping[str, float], first: str) -> str:
    best = min(times, key=times.__getitem__)
    return best if times[best] <= times[first] * (1 - _MARGIN) else first


def _in_program(name: str, us: float, calls: int) -> float:
    """The time of a candidate without what a program spares: the calls of a sparse layer."""
    return us if name == DENSE else max(us - calls * call_us(), _LEAST_SHARE * us)


def _spread(kept: Tensor) -> float:
    """Standard deviation of the rows' kept weights over their mean, roughly."""
    rows = kept.flatten(1)[:: max(1, kept.shape[0] // _ROWS_SAMPLED)].count_nonzero(1).double()
    return round(float(rows.std(correction=0) / rows.mean()), 1) if rows.any() else 0.0


def _columns(module: nn.Module, inputs: Sequence[Tensor]) -> int | None:
    """N of the first call's product; None without inputs."""
    if not inputs:
        return None
    x = inputs[0]
    if isinstance(module, nn.Linear):
        return math.prod(x.shape[:-1])
    assert isinstance(module, (nn.Conv1d, nn.Conv2d))
    axes = len(module.kernel_size)
    around = module._reversed_padding_repeated_twice[::-1]
    columns = math.prod(x.shape[: -axes - 1])
    for i, size in enumerate(x.shape[-axes:]):
        reach = module.dilation[i] * (module.kernel_size[i] - 1) + 1
        columns *= (size + around[2 * i] + around[2 * i + 1] - reach) // module.stride[i] + 1
    return columns
