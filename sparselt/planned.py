# SPDX-License-Identifier: Apache-2.0
"""What runs a captured graph at one size, and what `explain` and a profile read of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, fx

from sparselt.builder import operation
from sparselt.cuda_graph import GraphedRun
from sparselt.lowering import Lowered
from sparselt.native import Segment, is_of_segment
from sparselt.plan import DENSE, Plan
from sparselt.samples import first_samples

__all__ = ["Planned", "Run", "Straight", "as_dense", "gains_clearly"]

# A network whose layers took so many times as long dense, each by itself and in torch, is faster as
# planned: prepacked they take 0.4 of that at best.
_CLEAR_LAYERS = 2.5

Run = Callable[[Sequence[Any]], Any]


@dataclass
class Planned:
    """A graph planned for inputs of about one size.

    Attributes:
        lowered: what runs, before native programs took the place of its stretches.
        module: what runs.
        constants: the values of the placeholders before the inputs.
        run: the flat call.
        note: what was measured of the whole; empty where nothing was.
        plans: of the layers, by node name, as to be saved.
        together: how many samples run at a time, as it is planned; 0 for all of a batch.
        besides: what runs samples that are left over.
        prepacked: whether all layers run dense with prepacked weights.
    """

    lowered: Lowered
    module: fx.GraphModule
    constants: list[Tensor]
    run: Run
    note: str = ""
    plans: dict[str, Plan] = field(default_factory=dict)
    together: int = 0
    besides: Planned | None = None
    prepacked: bool = False

    def others(self) -> tuple[dict[str, int], dict[str, int]]:
        """How often each operation that is no layer is called, natively and in torch."""
        others = Counter(self.lowered.others)
        nodes = (node for node in self.module.graph.nodes if node.op.startswith("call_"))
        called = Counter(operation(n) for n in nodes if not is_of_segment(n))
        in_torch = others & called
        return dict(others - in_torch), dict(in_torch)

    def to_profile(self, leaves: Sequence[Any]) -> tuple[list[Any], Callable[[], object]]:
        """The placeholders' values to profile the graph with, and the call to time beside it.

        Args:
            leaves: what the program is called with.
        """
        sample = first_samples(leaves, self.together) if self.together else None
        values = [*self.constants, *(sample or leaves)]
        return values, lambda: self.module.forward(*values) if sample else self.run(leaves)

    @property
    def notes(self) -> list[str]:
        """Sentences on the whole, for `explain`."""
        graphs = self.run.note if isinstance(self.run, GraphedRun) else ""
        return [note for note in (self.note, graphs) if note]

    @property
    def rest(self) -> list[str]:
        """What runs beside the layers, for `explain`."""
        counts = (
            ", ".join(f"{name} ({count})" for name, count in sorted(others.items()))
            for others in self.others()
        )
        places = zip(("natively", "in torch"), counts, strict=True)
        told = "; ".join(f"the rest runs {where}: {count}" for where, count in places if count)
        return [told] if told else []


class Straight:
    """The flat call of a network that is one native segment, from one tensor to one.

    Args:
        segment: all of the graph.
    """

    def __init__(self, segment: Segment) -> None:
        self.segment = segment

    def __call__(self, leaves: Sequence[Any]) -> Any:
        """The one result."""
        return self.segment(*leaves)


def gains_clearly(plans: Iterable[Plan]) -> bool:
    """Whether the layers' own times leave no doubt about the whole; measuring it takes a while."""
    dense_us = chosen_us = 0.0
    for plan in plans:
        if plan.dense_us is not None:
            dense_us += plan.dense_us
            chosen_us += plan.dense_us if plan.is_dense else plan.sparse_us or 0.0
        elif not plan.is_dense:
            return False
    return dense_us > _CLEAR_LAYERS * chosen_us


def as_dense(whole: Planned, planned: Lowered) -> Planned:
    """A dense network with the rows and plans of the same as planned, all dense now."""
    reason = "stays dense: the whole network measured no faster with sparse layers"
    # A dense program is to be dense again where it is loaded.
    whole.plans = {name: _dense_plan(plan, reason) for name, plan in planned.plans.items()}
    whole.lowered.rows = [
        row
        if row.kernel == DENSE
        else replace(
            row,
            kernel=DENSE,
            format=DENSE,
            reason=reason,
            plan=None if row.plan is None else replace(row.plan, kernel=DENSE, format=DENSE),
        )
        for row in planned.rows
    ]
    return whole


def _dense_plan(plan: Plan, reason: str) -> Plan:
    return plan if plan.is_dense else replace(plan, kernel=DENSE, format=DENSE, reason=reason)
