# SPDX-License-Identifier: Apache-2.0
"""What runs a captured graph at one size, and what `explain` and a profile read of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from sparselt.builder import operation
from sparselt.cuda_graph import GraphedRun
from sparselt.lowering import Lowered
from sparselt.native import Segment, is_of_segment
from sparselt.plan import Plan
from sparselt.samples import first_samples

__all__ = ["Planned", "Run", "Straight"]

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
        each: whether samples run one after the other; planned for one of them.
        prepacked: whether all layers run dense with prepacked weights.
    """

    lowered: Lowered
    module: fx.GraphModule
    constants: list[Tensor]
    run: Run
    note: str = ""
    plans: dict[str, Plan] = field(default_factory=dict)
    each: bool = False
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
        sample = first_samples(leaves) if self.each else None
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
