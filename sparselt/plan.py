# SPDX-License-Identifier: Apache-2.0
"""Which kernel a layer runs, decided from facts alone.

Nothing here times, packs or runs anything: `choose` is a pure function of what is known about a
layer, the kernels at hand and, where somebody measured them, their times. It can therefore be
tested without the extension, and a plan can always say why it is what it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from sparselt import cuda_rules
from sparselt.cuda_rules import SEMI_STRUCTURED
from sparselt.errors import KernelError, OptionError
from sparselt.formats import FORMATS
from sparselt.registry import Facts, KernelInfo
from sparselt.rules import RULES, block_for, misfit

__all__ = [
    "DENSE",
    "FORMAT_CHOICES",
    "SEMI_STRUCTURED",
    "Candidate",
    "Facts",
    "KernelInfo",
    "Plan",
    "candidates",
    "choose",
    "is_asked_for",
]

DENSE = "dense"
FORMAT_CHOICES = ("auto", *FORMATS, SEMI_STRUCTURED, DENSE)

# Which kernels of the registry serve an operation: linear is spmm, conv1d is conv2d with H = 1.
_KERNEL_OP = {"spmm": "spmm", "linear": "spmm", "conv1d": "conv2d", "conv2d": "conv2d"}

# Densities in place of the format's own, for kernels that do less well than its others.
_PAYS_BELOW_SCALAR = 0.05
_PAYS_BELOW_ONE_COLUMN = 0.15

# These kernels read the weight once for each tile of columns; twice pays for a few columns more. Of
# twice as many, a call gains yet: but in a program panels are neither made nor taken apart, and the
# MLP 1024-4096-4096-1024 with 90 % zeros takes 1.36 instead of 1.1 ms at batch 32.
_SPMV_TURNS = 1.5

# Generated code takes its time to read, so it wants many columns to be run for.
_CODE_COLUMNS = 512

# Less than the clock tells of a call from Python.
_AS_FAST_US = 0.25

# A dot product shorter than this (a depthwise filter, a 3-channel first convolution) leaves a
# sparse kernel too little to skip.
_SHORTEST_ROW = 32


@dataclass(frozen=True)
class Candidate:
    """A kernel that was considered, and what became of it.

    Attributes:
        kernel: its name, or "dense".
        format: the weight format it reads, or "dense".
        applies: whether it could run the layer.
        verdict: a short sentence: why it does not apply, or what it took.
        block: (rows, cols) of the blocks it wants the weight packed in; (1, 1) for none.
        us: measured microseconds a call; None when not measured.
    """

    kernel: str
    format: str
    applies: bool
    verdict: str
    block: tuple[int, int] = (1, 1)
    us: float | None = None


@dataclass(frozen=True)
class Plan:
    """The choice for one layer.

    Attributes:
        kernel: the chosen kernel's name, or "dense".
        format: the chosen weight format, or "dense".
        reason: one sentence that says why.
        candidates: everything that was considered, in registry order, dense last.
        dense_us: measured microseconds of torch's dense operator; None when not measured.
        sparse_us: measured microseconds of the chosen kernel, or of the best sparse kernel where
            dense was chosen; None when not measured.
        block: (rows, cols) of the chosen format's blocks; (1, 1) when it has none.
    """

    kernel: str
    format: str
    reason: str
    candidates: tuple[Candidate, ...] = ()
    dense_us: float | None = None
    sparse_us: float | None = None
    block: tuple[int, int] = (1, 1)

    @property
    def is_dense(self) -> bool:
        """Whether the layer stays torch's own dense operator."""
        return self.kernel == DENSE

    def explain(self) -> str:
        """The reason, then a line for every candidate.

        Example:
            >>> print(Plan("dense", "dense", "stays dense: no zeros").explain())
            stays dense: no zeros
        """
        width = max((len(item.kernel) for item in self.candidates), default=0)
        lines = [f"  {item.kernel:<{width}}  {item.verdict}" for item in self.candidates]
        return "\n".join([self.reason, *lines])


def candidates(facts: Facts, kernels: Sequence[KernelInfo]) -> tuple[Candidate, ...]:
    """Every kernel of the operation with a verdict, in registry order, and dense at the end.

    On CUDA torch's own 2:4 product comes before dense.

    Kernels of another operation are left out; kernels that do not apply say why.

    Raises:
        OptionError: `facts.op` is not a known operation.
    """
    if facts.op not in _KERNEL_OP:
        raise OptionError(f"op: expected one of {sorted(_KERNEL_OP)}, got {facts.op!r}")
    wanted = _KERNEL_OP[facts.op]
    found = []
    for kernel in kernels:
        if wanted in kernel.operations:
            refusal = _refusal(facts, kernel)
            verdict, block = refusal or "applies", block_for(facts, kernel)
            found.append(Candidate(kernel.name, kernel.format, not refusal, verdict, block))
    if facts.device == "cuda":
        refusal = facts.obstacle or cuda_rules.semi_structured_refusal(facts)
        verdict = refusal or "applies"
        found.append(Candidate(SEMI_STRUCTURED, SEMI_STRUCTURED, not refusal, verdict))
    found.append(Candidate(DENSE, DENSE, True, "always applies"))
    return tuple(found)


def is_asked_for(format: str, wanted: str) -> bool:
    """Whether a kernel for `format` serves a user who wants `wanted`, one of `FORMAT_CHOICES`."""
    return wanted in ("auto", format) or (wanted, format) == ("bsr", "bsell")


def choose(
    facts: Facts,
    kernels: Sequence[KernelInfo],
    times: Mapping[str, float] | None = None,
    margin: float = 0.05,
    *,
    format: str = "auto",
    forced: str = "",
) -> Plan:
    """The kernel for one layer: the fastest measured one, or the rule's where nothing was measured.

    A sparse kernel replaces dense only where it takes at most `1 - margin` of dense's time. A
    format asked for by name is used wherever one of its kernels applies and the weight has zeros.
    A forced kernel rules over the layers of its operation; the others are chosen as usual.

    Args:
        facts: the layer.
        kernels: the registry, best first.
        times: microseconds a call by kernel name, "dense" included; None when nothing was measured.
        margin: the share of dense's time that a sparse kernel must gain.
        format: one of `FORMAT_CHOICES`; "bsr" stands for its kernels' own layout "bsell" too.
        forced: a kernel that must be used (SPARSELT_KERNEL); empty for none.

    Raises:
        KernelError: the forced kernel is unknown, not usable here, or does not fit the layer.
        OptionError: the format is unknown or the margin is not in [0, 1).

    Example:
        >>> facts = Facts("linear", (64, 64), nnz=4096)
        >>> choose(facts, ()).reason
        'stays dense: no zeros'
    """
    if format not in FORMAT_CHOICES:
        raise OptionError(f"format: expected one of {FORMAT_CHOICES}, got {format!r}")
    if not 0 <= margin < 1:
        raise OptionError(f"margin: expected a share in [0, 1), got {margin!r}")
    considered = _with_times(candidates(facts, kernels), times)
    plan = _forced(facts, kernels, considered, forced) if forced else None
    if plan is not None:
        return plan
    if format == DENSE:
        return _dense(considered, "stays dense: format='dense' was asked for")
    if facts.obstacle:
        return _dense(considered, f"stays dense: {facts.obstacle}")
    if facts.density >= 1:
        return _dense(considered, "stays dense: no zeros")
    pool = [c for c in considered if c.applies and c.format != DENSE]
    pool = [c for c in pool if is_asked_for(c.format, format)]
    if not pool:
        return _dense(considered, f"stays dense: {_why_none(considered, format)}")
    if format != "auto":
        best = _fastest(pool)
        return _sparse(considered, best, f"{best.kernel}: format={format!r} was asked for")
    if times is None:
        return _by_rule(facts, considered, pool)
    return _by_time(facts, considered, pool, margin)


def _refusal(facts: Facts, kernel: KernelInfo) -> str:
    """Why `kernel` cannot run the layer; empty if it can."""
    if facts.obstacle:
        return facts.obstacle
    if kernel.device != facts.device:
        return f"runs on {kernel.device}, the layer is on {facts.device}"
    if kernel.dtype != facts.dtype:
        return f"computes {kernel.dtype}, the weight is {facts.dtype}"
    if unfit := misfit(facts, kernel):
        return unfit
    most = int(_SPMV_TURNS * kernel.tile_columns)
    if kernel.op == "spmv" and (facts.columns is None or facts.columns > most):
        return f"is for at most {most} columns"
    if kernel.op == "code" and facts.columns is not None and facts.columns < _CODE_COLUMNS:
        return f"is for at least {_CODE_COLUMNS} columns"
    if kernel.format not in FORMATS:
        return f"no layer is packed as {kernel.format} yet"
    if kernel.device == "cuda" and (unfit := cuda_rules.refusal(facts, kernel)):
        return unfit
    if not kernel.usable:
        return kernel.reason or "not usable on this machine"
    return ""


def _with_times(
    considered: tuple[Candidate, ...], times: Mapping[str, float] | None
) -> tuple[Candidate, ...]:
    if not times:
        return considered
    timed = []
    for item in considered:
        us = times.get(item.kernel) if item.applies else None
        if us == math.inf:
            timed.append(replace(item, applies=False, verdict="failed when it was timed"))
            continue
        verdict = item.verdict if us is None else f"{_us(us)} us"
        timed.append(replace(item, verdict=verdict, us=us))
    return tuple(timed)


def _forced(
    facts: Facts, kernels: Sequence[KernelInfo], considered: tuple[Candidate, ...], forced: str
) -> Plan | None:
    """The plan that SPARSELT_KERNEL asks for; None for a layer of another operation."""
    known = {kernel.name for kernel in kernels}
    if forced != DENSE and forced not in known:
        names = ", ".join([*(kernel.name for kernel in kernels), DENSE])
        raise KernelError(f"SPARSELT_KERNEL: expected one of {names}, got {forced!r}")
    reason = "forced by SPARSELT_KERNEL"
    if forced == DENSE:
        return _dense(considered, f"stays dense: {reason}")
    match = next((item for item in considered if item.kernel == forced), None)
    if match is None:
        return None
    if facts.obstacle:
        return _dense(considered, f"stays dense: {facts.obstacle}")
    if not match.applies:
        raise KernelError(
            f"SPARSELT_KERNEL={forced} does not fit a {facts.op} layer of shape "
            f"{tuple(facts.shape)}: {match.verdict}; unset SPARSELT_KERNEL to let the plan choose"
        )
    return _sparse(considered, match, f"{forced}: {reason}")


def _by_time(
    facts: Facts, considered: tuple[Candidate, ...], pool: list[Candidate], margin: float
) -> Plan:
    best = _fastest(pool)
    dense_us = considered[-1].us
    if best.us is None or dense_us is None:
        return _by_rule(facts, considered, pool)
    if best.us <= dense_us * (1 - margin):
        return _sparse(
            considered,
            best,
            f"{best.kernel}: {_us(best.us)} us against dense {_us(dense_us)} us",
        )
    zeros = f"{100 * (1 - facts.density):.0f} % zeros"
    ratio = best.us / dense_us
    if ratio > 1:
        why = f"{zeros}, {best.kernel} measured {ratio:.2g}x slower than dense"
    else:
        why = f"{zeros}, {best.kernel} measured within {100 * margin:.0f} % of dense"
    return _dense(considered, f"stays dense: {why}")


def _by_rule(facts: Facts, considered: tuple[Candidate, ...], pool: list[Candidate]) -> Plan:
    best = _expected_best(facts, pool)
    row = math.prod(facts.shape[1:])
    if row < _SHORTEST_ROW:
        return _dense(
            considered, f"stays dense: not measured, and rows of {row} weights are too short"
        )
    limit = _pays_below(facts, best)
    against = (
        f"density {facts.density:.2g} is %s {limit:g}, below which {best.format} is expected to pay"
    )
    if facts.density < limit:
        return _sparse(considered, best, f"{best.kernel}: not measured, " + against % "below")
    return _dense(considered, "stays dense: not measured, " + against % "not below")


def _expected_best(facts: Facts, pool: list[Candidate]) -> Candidate:
    """The first of the format that pays the earliest: one for a pattern, where it has that one."""
    if facts.device == "cuda":
        return min(pool, key=lambda item: cuda_rules.preference(facts, item.format))
    return max(pool, key=lambda item: _pays_below(facts, item))


def _pays_below(facts: Facts, best: Candidate) -> float:
    if facts.device == "cuda":
        return cuda_rules.pays_below(facts, best.format)
    if best.kernel.endswith("_scalar"):
        return _PAYS_BELOW_SCALAR
    if facts.columns == 1 and best.format == "csr":
        return _PAYS_BELOW_ONE_COLUMN
    return RULES[best.format].pays_below


def _fastest(pool: list[Candidate]) -> Candidate:
    """The fastest of the measured ones, the first of the registry of those that are as fast."""
    us = [math.inf if item.us is None else item.us for item in pool]
    return pool[next(i for i, taken in enumerate(us) if taken <= min(us) + _AS_FAST_US)]


def _best_us(considered: tuple[Candidate, ...]) -> float | None:
    return min((c.us for c in considered[:-1] if c.us is not None), default=None)


def _dense(considered: tuple[Candidate, ...], reason: str) -> Plan:
    return Plan(DENSE, DENSE, reason, considered, considered[-1].us, _best_us(considered))


def _sparse(considered: tuple[Candidate, ...], item: Candidate, reason: str) -> Plan:
    dense_us = considered[-1].us
    return Plan(item.kernel, item.format, reason, considered, dense_us, item.us, item.block)


def _why_none(considered: tuple[Candidate, ...], format: str) -> str:
    """Each reason once, with the kernel where it is the reason of one alone."""
    asked = [c for c in considered if not c.applies and is_asked_for(c.format, format)]
    # Kernels of another device are worth a word only where there are no others.
    here = [c for c in asked if not c.verdict.startswith("runs on ")] or asked
    by_verdict: dict[str, list[str]] = {}
    for item in here:
        by_verdict.setdefault(item.verdict, []).append(item.kernel)
    refusals = [
        f"{names[0]}: {verdict}" if len(names) == 1 else verdict
        for verdict, names in by_verdict.items()
    ]
    kind = "sparse" if format == "auto" else format
    return f"no {kind} kernel applies" + (f" ({'; '.join(refusals)})" if refusals else "")


def _us(value: float) -> str:
    """Microseconds with the digits that mean something: 3.4, 41, 1630."""
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"
