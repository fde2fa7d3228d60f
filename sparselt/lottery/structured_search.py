# SPDX-License-Identifier: Apache-2.0
"""Structured tickets by the same loop: train, rank channels, remove them, rewind, train again.

From level 1 on the network that trains is physically smaller. Its original weights are those of the
channels that are left, so it is a lottery ticket in the sense of Frankle and Carbin, of whole
channels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparselt.errors import OptionError, explain_mismatch
from sparselt.lottery import distributed
from sparselt.lottery.data import Data, load_data
from sparselt.lottery.filters import filter_criterion_of
from sparselt.lottery.folder import RunFolder
from sparselt.lottery.networks import Factory, build, factory_of
from sparselt.lottery.recipe import Recipe
from sparselt.lottery.schedules import keep_fraction, number_of_levels
from sparselt.lottery.scratch import BUDGETS, scratch_control
from sparselt.lottery.seeds import derived_seed
from sparselt.lottery.structured import choose_channels, structured_ticket
from sparselt.lottery.structured_graph import trace_channels
from sparselt.lottery.training import Outcome, Step, Training, train
from sparselt.tickets import Ticket
from sparselt.tickets.architecture import Delta, shrink

__all__ = ["STRUCTURE", "StructuredLevel", "run_structured_levels"]

# The name of this structure in a recipe; masks cannot express it.
STRUCTURE = "channels"
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class StructuredLevel:
    """One level of a search over whole channels.

    Attributes:
        index: 0 for the original network.
        ticket: The small network's weights and original weights; ``meta["architecture"]`` is the
            delta.
        outcome: Of the ticket.
        density: Weights of rank 2 and more that are left, over those of the original network.
        controls: Outcome of each control, by name; empty at level 0.
    """

    index: int
    ticket: Ticket
    outcome: Outcome
    density: float
    controls: dict[str, Outcome] = field(default_factory=dict)

    @property
    def delta(self) -> Delta:
        """What rebuilds the network of this level."""
        return Delta.from_json(self.ticket.meta["architecture"])


def run_structured_levels(
    network: str | Factory,
    data: str | Data,
    recipe: Recipe | None = None,
    *,
    criterion: str = "l1",
    multiple: int = 1,
    controls: Sequence[str] = (),
    folder: str | Path | None = None,
    progress: Callable[[int, str, Step], None] | None = None,
    loss: Loss = F.cross_entropy,
    device: str | torch.device = "cpu",
) -> Iterator[StructuredLevel]:
    """Runs a search over whole channels, level by level; level 0 is the original network.

    Under torchrun all processes run the one search together, and the first of them writes.

    Args:
        network: A key of ``NETWORKS``, or a function that builds your network.
        data: A key of ``DATASETS``, or your tensors.
        recipe: Settings of the search; ``rate`` is the share of the remaining channels removed a
            round in every layer, ``scope`` and ``rewind`` mean what they mean for masks.
        criterion: A key of ``FILTER_CRITERIA``.
        multiple: Channels left are rounded up to a multiple of this.
        controls: Keys of ``BUDGETS``: the same architecture from newly drawn weights.
        folder: Where runs are kept and go on; without it nothing is written.
        progress: Called with (level, arm, step) at every look at the validation split.
        loss: From outputs (n, classes) and labels (n,) to a scalar.
        device: Where to train.

    Yields:
        One level after another, as soon as it is trained.

    Raises:
        DataError: The data are absent, or training diverged.
        FormatError: The network cannot be traced or shrunk.
        OptionError: The recipe, the criterion or ``controls`` name something unknown.

    Example:
        >>> x, y = torch.randn(80, 4), torch.arange(80) % 2
        >>> data = Data((x, y), (x, y), (x, y), classes=2)
        >>> make = lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> recipe = Recipe(network="tiny", data="noise", iterations=2, levels=2, rate=0.5)
        >>> [level.density for level in run_structured_levels(make, data, recipe)]
        [1.0, 0.5, 0.25]
    """
    distributed.join()
    recipe = replace(recipe or Recipe(), structure=STRUCTURE, criterion=criterion)
    unknown = [name for name in controls if name not in BUDGETS]
    if unknown:
        raise OptionError(explain_mismatch("control", f"one of {', '.join(BUDGETS)}", unknown))
    if recipe.restart != "rewind":
        raise OptionError(explain_mismatch("restart", "rewind", recipe.restart))
    filter_criterion_of(criterion)
    loaded = load_data(data) if isinstance(data, str) else data
    factory = factory_of(network, loaded.shape, loaded.classes)
    search = _Search(factory, loaded, recipe, folder, torch.device(device))
    search.multiple, search.loss = multiple, loss
    search.progress = progress if distributed.is_leader() else None
    for index in range(number_of_levels(recipe)):
        yield search.run_level(index, controls)


class _Search:
    """What stays the same over the levels, and what one level hands to the next."""

    multiple: int
    progress: Callable[[int, str, Step], None] | None
    loss: Loss

    def __init__(
        self,
        factory: Factory,
        data: Data,
        recipe: Recipe,
        folder: str | Path | None,
        device: torch.device,
    ) -> None:
        self.factory, self.recipe, self.device = factory, recipe, device
        self.data = data.to(device)
        self.folder = RunFolder(folder, recipe)
        self.model = build(factory, derived_seed(recipe.seed, "weights"))
        self.original = {n: t.clone() for n, t in self.model.state_dict().items()}
        self.shapes = {name: tensor.shape for name, tensor in self.original.items()}
        self.ranked = {n: t.numel() for n, t in self.original.items() if t.dim() > 1}
        self.channels = trace_channels(self.model, data.train[0][:2].cpu())
        self.rewound = None if recipe.rewind else self.original
        self.delta = Delta()
        self.trained = self.original

    def run_level(self, index: int, controls: Sequence[str]) -> StructuredLevel:
        """Trains the ticket of one level and its controls, or reads what is already on disk."""
        if index:
            self._remove(index)
        ticket, outcome = self._ticket(index)
        self.trained = self.delta.expand(ticket.weights, self.shapes)
        left = sum(mask.numel() for mask in ticket.masks.values())
        results = {name: self._control(index, name) for name in (controls if index else ())}
        return StructuredLevel(index, ticket, outcome, left / sum(self.ranked.values()), results)

    def _remove(self, index: int) -> None:
        recipe = self.recipe
        self.model.load_state_dict(self.trained)
        self.delta = choose_channels(
            self.model,
            self.channels,
            keep_fraction(recipe, recipe.rate, index),
            recipe.criterion,
            recipe.scope,
            multiple=self.multiple,
            seed=derived_seed(recipe.seed, "filters", index),
            within=self.delta,
        )
        kept = dict(enumerate(self.delta.kept))
        distributed.check_same({str(n): torch.tensor(k) for n, k in kept.items()}, "channels left")

    def _ticket(self, index: int) -> tuple[Ticket, Outcome]:
        done = self.folder.read_ticket(index)
        outcome = self.folder.read_outcome(index, "ticket")
        if self.rewound is None:
            self.rewound = self.folder.read_rewind()
        if done is None or outcome is None or self.rewound is None:
            model = copy.deepcopy(self.model)
            if index:
                assert self.rewound is not None, "level 0 has passed the rewinding iteration"
                model.load_state_dict(self.rewound)
            outcome = self._train(index, "ticket", shrink(model, self.delta), self.recipe)
            done = self._make_ticket(index, model, outcome)
            self.folder.write_outcome(index, "ticket", outcome)
            self.folder.write_ticket(index, done)
        return done, outcome

    def _make_ticket(self, index: int, model: nn.Module, outcome: Outcome) -> Ticket:
        metrics = {k: v for k, v in outcome.to_values().items() if k not in ("history", "seconds")}
        start = self.original if not index or self.rewound is None else self.rewound
        initial = {name: start[name] for name in self.ranked}
        meta = {
            "recipe": asdict(self.recipe),
            "run": self.recipe.hash(),
            "seed": self.recipe.seed,
            "level": index,
            "metrics": metrics,
        }
        return structured_ticket(model, self.delta, initial, meta)

    def _control(self, index: int, name: str) -> Outcome:
        outcome = self.folder.read_outcome(index, name)
        if outcome is None:
            seed = derived_seed(self.recipe.seed, "control", name, index)
            shape = self.data.shape
            control = scratch_control(self.factory, self.delta, self.recipe, shape, name, seed=seed)
            outcome = self._train(index, name, control.model, control.recipe)
            self.folder.write_outcome(index, name, outcome)
        return outcome

    def _train(self, index: int, arm: str, model: nn.Module, recipe: Recipe) -> Outcome:
        def observe(iteration: int, trained: nn.Module) -> None:
            if recipe.rewind and iteration == recipe.rewind:
                state = trained.state_dict()
                self.rewound = {n: t.detach().cpu().clone() for n, t in state.items()}
                self.folder.write_rewind(self.rewound)

        report = self.progress
        how = Training(
            recipe,
            start=recipe.rewind if index else 0,
            order_seed=derived_seed(self.recipe.seed, "order"),
            loss=self.loss,
            observe=None if index else observe,
            progress=report and (lambda step: report(index, arm, step)),
            checkpoint=self.folder.checkpoint(index, arm),
        )
        return train(model.to(self.device), self.data, how)
