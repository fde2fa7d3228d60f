# SPDX-License-Identifier: Apache-2.0
"""What became of each layer, and why: rows for programs, a table for people."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from sparselt.conversion import PLAN_ATTRIBUTE
from sparselt.errors import OptionError, explain_mismatch
from sparselt.facts import LAYER_OPS
from sparselt.nn import SparseLayer
from sparselt.plan import DENSE, Plan
from sparselt.semi_structured import SemiStructuredLinear

__all__ = ["Explainable", "Explanation", "Row", "explain", "remember", "row_of"]

# What the backend of torch.compile made of a layer, by its weight: Dynamo keeps no program that one
# could ask.
_COMPILED: Any = WeakTensorKeyDictionary()

_HEADINGS = ("layer", "shape", "density", "format", "kernel", "dense us", "sparse us", "reason")
_RIGHT = {"density", "dense us", "sparse us"}


@dataclass(frozen=True)
class Row:
    """One layer.

    Attributes:
        layer: its qualified name; empty where the model itself is the layer.
        op: "linear", "conv1d" or "conv2d".
        shape: of the dense weight.
        density: kept weights over all weights.
        format: "csr", "bsr", "sell" or "dense".
        kernel: the kernel that runs, or "dense" for torch's own.
        reason: why, in a sentence.
        dense_us: measured microseconds of torch's operator; None when not measured.
        sparse_us: measured microseconds of the kernel, or of the best one where dense won.
        plan: everything that was considered; None for a layer that nobody planned.
    """

    layer: str
    op: str
    shape: tuple[int, ...]
    density: float
    format: str
    kernel: str
    reason: str
    dense_us: float | None = None
    sparse_us: float | None = None
    plan: Plan | None = None


@runtime_checkable
class Explainable(Protocol):
    """Something that is no module and yet has layers, such as a compiled program."""

    def explanation(self) -> Explanation:
        """Its layers and notes."""
        ...


class Explanation(Sequence[Row]):
    """The rows of `explain`; `str()` is a table, `to_dict()` is for JSON.

    Attributes:
        rows: one a layer, in the model's order.
        notes: sentences on the model as a whole.
    """

    def __init__(self, rows: Sequence[Row], notes: Sequence[str] = ()) -> None:
        self.rows = tuple(rows)
        self.notes = tuple(notes)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings: {"layers": [...], "notes": [...], "summary": str}."""
        layers = []
        for row in self.rows:
            entry = asdict(row)
            entry["shape"] = list(row.shape)
            entry["candidates"] = [asdict(c) for c in row.plan.candidates] if row.plan else []
            del entry["plan"]
            layers.append(entry)
        return {"layers": layers, "notes": list(self.notes), "summary": self.summary()}

    def summary(self) -> str:
        """How many layers run sparse, and what was measured of them together."""
        sparse = [row for row in self.rows if row.kernel != DENSE]
        text = f"{len(sparse)} of {len(self.rows)} layers run sparse"
        timed = [row for row in self.rows if row.dense_us is not None]
        dense_us = sum(row.dense_us or 0.0 for row in timed)
        now_us = sum(
            (row.dense_us if row.kernel == DENSE else row.sparse_us) or 0.0 for row in timed
        )
        if not timed or not now_us:
            return text
        return (
            f"{text}; the {len(timed)} measured ones take {now_us:.0f} us together, "
            f"{dense_us:.0f} us all dense ({dense_us / now_us:.2f}x)"
        )

    def __str__(self) -> str:
        table = [_HEADINGS, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in table) for i in range(len(_HEADINGS))]
        lines = []
        for line in table:
            cells = [
                cell.rjust(width) if heading in _RIGHT else cell.ljust(width)
                for cell, width, heading in zip(line, widths, _HEADINGS, strict=True)
            ]
            lines.append("  ".join(cells).rstrip())
        lines.insert(1, "-" * max(len(line) for line in lines))
        return "\n".join([*lines, self.summary(), *self.notes])

    __repr__ = __str__


def explain(model_or_program: Any) -> Explanation:
    """Which kernel each layer runs, why, and what it gained.

    Args:
        model_or_program: a result of `sparselt.convert`, of `sparselt.compile`, or of
            torch.compile with backend="sparselt" that has run; any other module is explained too,
            as what it is: dense.

    Returns:
        One row for every linear and convolution layer; `str()` of it is a table.

    Raises:
        OptionError: something that is neither.

    Example:
        >>> import torch
        >>> from sparselt.conversion import convert
        >>> explain(convert(torch.nn.Linear(8, 4)))[0].reason
        'stays dense: no zeros'
    """
    if isinstance(model_or_program, Explainable):
        return model_or_program.explanation()
    if not isinstance(model_or_program, nn.Module):
        expected = "a torch.nn.Module or a compiled program"
        got = type(model_or_program).__name__
        raise OptionError(explain_mismatch("model_or_program", expected, got))
    # torch.compile wraps a module in one whose only child is the module.
    inner = model_or_program._modules.get("_orig_mod")
    rows = []
    wrapped = inner is not None
    model = model_or_program if inner is None else inner
    for name, module in model.named_modules():
        row = row_of(name, module)
        if row is not None:
            rows.append(_as_compiled(row, module) if wrapped else row)
    notes = ["layers of graphs that Dynamo has not run yet count as dense"] if wrapped else []
    return Explanation(rows, notes if rows else ["no linear or convolution layers"])


def remember(weight: Tensor, row: Row) -> None:
    """Lets `explain` tell what torch.compile made of the layer with this weight.

    Args:
        weight: the layer's parameter; not kept alive.
        row: the layer's row.
    """
    _COMPILED[weight] = row


def _as_compiled(row: Row, module: nn.Module) -> Row:
    known = _COMPILED.get(module.weight) if isinstance(module.weight, Tensor) else None
    return replace(known, layer=row.layer) if isinstance(known, Row) else row


def row_of(name: str, module: nn.Module) -> Row | None:
    """The row of one layer; None for a module that is neither linear nor a convolution.

    Args:
        name: what to call it.
        module: a sparse layer, or a dense one with or without a plan.
    """
    if isinstance(module, SparseLayer):
        plan = module.plan
        shape, density = module.weight.shape, module.weight.density
        kernel = module.kernel or "first that fits"
        return Row(
            name,
            module.op,
            shape,
            density,
            module.weight.format,
            kernel,
            plan.reason,
            plan.dense_us,
            plan.sparse_us,
            plan,
        )
    op = next((op for kind, op in LAYER_OPS.items() if isinstance(module, kind)), None)
    weight = getattr(module, "weight", None)
    if op is None or not isinstance(weight, Tensor):
        return None
    if isinstance(module, SemiStructuredLinear):
        kept, kernel = module.density, module.kernel
    else:
        kept, kernel = int(weight.count_nonzero()) / max(1, weight.numel()), ""
    known = getattr(module, PLAN_ATTRIBUTE, None)
    if not isinstance(known, Plan):
        return Row(name, op, tuple(weight.shape), kept, DENSE, DENSE, "dense: not converted")
    kernel = kernel or known.kernel
    return Row(
        name,
        op,
        tuple(weight.shape),
        kept,
        known.format if kernel == known.kernel else DENSE,
        kernel,
        known.reason,
        known.dense_us,
        known.sparse_us,
        known,
    )


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.layer or "(model)",
        "x".join(map(str, row.shape)),
        f"{row.density:.3f}",
        row.format,
        row.kernel,
        _us(row.dense_us),
        _us(row.sparse_us),
        row.reason,
    )


def _us(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"
