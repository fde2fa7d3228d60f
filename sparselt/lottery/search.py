# SPDX-License-Identifier: Apache-2.0
"""Finding a ticket: train, prune, restart, repeat; with controls at every level."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparselt.lottery import distributed
from sparselt.lottery.controls import Arm, Basis, make_control
from sparselt.lottery.criteria import Subject, criterion_of
from sparselt.lottery.data import Data, load_data
from sparselt.lottery.folder import RunFolder
from sparselt.lottery.masks import Group, full_masks, groups_at, layer_rates, prune
from sparselt.lottery.networks import Factory, build, factory_of
from sparselt.lottery.recipe import Recipe
from sparselt.lottery.restarts import restart_of
from sparselt.lottery.schedules import number_of_levels
from sparselt.lottery.seeds import derived_seed, generator
from sparselt.lottery.structures import parse_structure
from sparselt.lottery.training import Outcome, Step, Training, train
from sparselt.tickets import Ticket

__all__ = ["Level", "Progress", "best_level", "find_ticket", "run_levels"]

Loss = Callable[[Tensor, Tensor], Tensor]
State = dict[str, Tensor]


@dataclass(frozen=True)
class Level:
    """One level of a search: the ticket, how it trained, and how its controls did.

    Attributes:
        index: 0 for the dense network.
        ticket: Masks, trained weights, and the weights training started from.
        outcome: Of the ticket.
        arm: What the ticket's training started from, whole.
        controls: Outcome of each control, by name; empty at level 0.
    """

    index: int
    ticket: Ticket
    outcome: Outcome
    arm: Arm = field(repr=False)
    controls: dict[str, Outcome] = field(default_factory=dict)

    @property
    def density(self) -> float:
        """Kept weights over prunable weights."""
        return self.ticket.density


@dataclass(frozen=True)
class Progress:
    """Where a search is.

    Attributes:
        level: Present level, from 0.
        levels: Number of levels, the dense one included.
        arm: ``ticket``, or the name of the control being trained.
        step: Where the training is.
    """

    level: int
    levels: int
    arm: str
    step: Step


def find_ticket(
    network: str | nn.Module | Factory,
    data: str | Data,
    recipe: Recipe | None = None,
    progress: Callable[[Progress], None] | None = None,
    **options: Any,
) -> Ticket:
    """Searches for a ticket and returns that of the last level.

    Args:
        network: A key of ``NETWORKS``, a function that builds your network, or a module.
        data: A key of ``DATASETS``, or your tensors.
        recipe: Settings of the search; by default those published for LeNet-300-100.
        progress: Called now and then during every training.
        **options: ``controls``, ``folder``, ``loss`` and ``device`` of :func:`run_levels`.

    Returns:
        The ticket; ``meta["levels"]`` has one row a level with density and accuracies.

    Raises:
        OptionError: The recipe names something unknown.
        DataError: The data are absent, or training diverged.

    Example:
        >>> x, y = torch.randn(80, 4), torch.arange(80) % 2
        >>> data = Data((x, y), (x, y), (x, y), classes=2)
        >>> recipe = Recipe(network="tiny", data="noise", iterations=2, levels=2, rate=0.5)
        >>> find_ticket(lambda: nn.Linear(4, 2), data, recipe).density
        0.25
    """
    levels = list(run_levels(network, data, recipe, progress=progress, **options))
    last = levels[-1].ticket
    return replace(last, meta={**last.meta, "levels": [_row(level) for level in levels]})


def run_levels(
    network: str | nn.Module | Factory,
    data: str | Data,
    recipe: Recipe | None = None,
    *,
    controls: Sequence[str] = (),
    folder: str | Path | None = None,
    progress: Callable[[Progress], None] | None = None,
    loss: Loss = F.cross_entropy,
    device: str | torch.device = "cpu",
    checkpoint_seconds: float = 30.0,
) -> Iterator[Level]:
    """Runs a search level by level; level 0 is the dense network.

    Under torchrun all processes run the one search together, and the first of them writes.

    Args:
        network: A key of ``NETWORKS``, a function that builds your network, or a module. A function
            is called with torch's global generator seeded from the recipe; a module's present
            weights are the original ones.
        data: A key of ``DATASETS``, or your tensors.
        recipe: Settings of the search.
        controls: Keys of ``CONTROLS`` trained at every level from 1; ``reinit#2`` is a second one
            of its kind.
        folder: Where runs are kept. A run found there (by the recipe's hash) goes on where it
            stopped, in the middle of a training too, to bitwise the same end on the CPU. Without it
            nothing is written.
        progress: Called at every look at the validation split.
        loss: From outputs (n, classes) and labels (n,) to a scalar.
        checkpoint_seconds: Least time between two checkpoints of a training.
        device: Where to train; masks are computed on the CPU, so they do not depend on it.

    Yields:
        One :class:`Level` after another, as soon as it is trained.

    Raises:
        OptionError: The recipe or ``controls`` name something unknown.
        DataError: The data are absent, training diverged, or a control equals its ticket.
    """
    distributed.join()
    recipe = recipe or Recipe()
    loaded = load_data(data) if isinstance(data, str) else data
    search = _Search(network, loaded, recipe, folder, progress, loss, torch.device(device))
    search.checkpoint_seconds = checkpoint_seconds
    for index in range(search.levels):
        yield search.run_level(index, controls)


def best_level(levels: Sequence[Level], tolerance: float = 0.002) -> Level:
    """The smallest level whose validation accuracy is within ``tolerance`` of the dense network's.

    Args:
        levels: From :func:`run_levels`, level 0 first.
        tolerance: As a fraction: 0.002 is 0.2 points.

    Returns:
        That level; level 0 if no other is good enough. The test split is not looked at.
    """
    least = levels[0].outcome.validation_accuracy - tolerance
    good = [level for level in levels if level.outcome.validation_accuracy >= least]
    return min(good, key=lambda level: level.density)


class _Search:
    """What stays the same over the levels, and what one level hands to the next."""

    def __init__(
        self,
        network: str | nn.Module | Factory,
        data: Data,
        recipe: Recipe,
        folder: str | Path | None,
        progress: Callable[[Progress], None] | None,
        loss: Loss,
        device: torch.device,
    ) -> None:
        self.recipe, self.loss, self.device = recipe, loss, device
        self.progress = progress if distributed.is_leader() else None
        self.data = data.to(device)
        self.checkpoint_seconds = 30.0
        self.levels = number_of_levels(recipe)
        self.factory = factory_of(network, data.shape, data.classes)
        self.model = (
            copy.deepcopy(network)
            if isinstance(network, nn.Module)
            else build(self.factory, derived_seed(recipe.seed, "weights"))
        ).to(device)
        self.original = _copied(self.model.state_dict())
        self.rates = layer_rates(self.model, recipe)
        self.structure = parse_structure(recipe.structure)
        self.criterion = criterion_of(recipe.criterion)
        self.restart = restart_of(recipe)
        self.folder = RunFolder(folder, recipe)
        self.masks = full_masks(self.model, recipe)
        self.trained: State = self.original
        self.rewound: State | None = None if recipe.rewind else self.original

    def run_level(self, index: int, controls: Sequence[str]) -> Level:
        """Trains the ticket of one level and its controls, or reads what is already on disk."""
        previous, scores = self.masks, dict[str, Tensor]()
        if index:
            self.masks, scores = self._prune(index)
        arm = self._arm(index)
        ticket, outcome = self._ticket(index, arm)
        self.trained = ticket.weights
        results = {}
        for name in controls if index else ():
            seed = derived_seed(self.recipe.seed, "control", name, index)
            basis = Basis(arm, previous, scores, self.original, self.factory, self.structure, seed)
            results[name] = self._control(index, name, basis)
        return Level(index, ticket, outcome, arm, results)

    def _arm(self, index: int) -> Arm:
        if not index:
            return Arm(self.original, self.masks, 0)
        assert self.rewound is not None
        state = self.rewound if self.restart.rewound else self.trained
        return Arm(state, self.masks, self.restart.start(self.recipe))

    def _ticket(self, index: int, arm: Arm) -> tuple[Ticket, Outcome]:
        done, outcome = self.folder.read_ticket(index), self.folder.read_outcome(index, "ticket")
        if self.rewound is None:
            self.rewound = self.folder.read_rewind()
        if done is None or outcome is None or self.rewound is None:
            outcome = self._train(index, "ticket", arm, observe=None if index else self._observe)
            done = self._make_ticket(index, arm, outcome)
            self.folder.write_outcome(index, "ticket", outcome)
            self.folder.write_ticket(index, done)
        return done, outcome

    def _make_ticket(self, index: int, arm: Arm, outcome: Outcome) -> Ticket:
        metrics = {k: v for k, v in outcome.to_values().items() if k not in ("history", "seconds")}
        meta = {
            "recipe": asdict(self.recipe),
            "run": self.recipe.hash(),
            "seed": self.recipe.seed,
            "level": index,
            "metrics": metrics,
        }
        initial = {name: arm.state[name].cpu() for name in arm.masks}
        return Ticket(dict(arm.masks), _copied(self.model.state_dict()), initial, meta)

    def _control(self, index: int, name: str, basis: Basis) -> Outcome:
        outcome = self.folder.read_outcome(index, name)
        if outcome is None:
            outcome = self._train(index, name, make_control(name, basis))
            self.folder.write_outcome(index, name, outcome)
        return outcome

    def _train(
        self,
        index: int,
        name: str,
        arm: Arm,
        observe: Callable[[int, nn.Module], None] | None = None,
    ) -> Outcome:
        self.model.load_state_dict(arm.state)
        report = self.progress
        how = Training(
            self.recipe,
            start=arm.start,
            # Controls that start over train as long as the dense network did.
            stop=self.restart.stop(self.recipe) if index and arm.start else None,
            order_seed=derived_seed(self.recipe.seed, "order"),
            loss=self.loss,
            observe=observe,
            progress=report and (lambda step: report(Progress(index, self.levels, name, step))),
            checkpoint=self.folder.checkpoint(index, name),
            checkpoint_seconds=self.checkpoint_seconds,
        )
        return train(self.model, self.data, how, arm.masks)

    def _observe(self, iteration: int, model: nn.Module) -> None:
        """Keeps the weights of the rewinding iteration while the dense network trains."""
        if self.recipe.rewind and iteration == self.recipe.rewind:
            self.rewound = _copied(model.state_dict())
            self.folder.write_rewind(self.rewound)

    def _prune(self, index: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Masks of level ``index`` out of those of the level before, and the last scores used."""
        assert self.rewound is not None
        before = self.criterion.before_training
        self.model.load_state_dict(self.rewound if before else self.trained)
        targets = groups_at(self.rates, self.masks, self.recipe, index, self.structure)
        steps, masks, scores = self.criterion.steps, self.masks, dict[str, Tensor]()
        for step in range(1, steps + 1):
            subject = Subject(
                self._masked_model(masks),
                {name: self.rewound[name].cpu() for name in masks},
                masks,
                self.data,
                generator(self.recipe.seed, "criterion", index, step),
            )
            scores = self.criterion.score(subject)
            groups = [self._partly(group, step / steps) for group in targets]
            masks = prune(scores, masks, groups, self.structure)
        distributed.check_same(masks, "masks")
        return masks, scores

    def _partly(self, group: Group, share: float) -> Group:
        """The group's target after ``share`` of the way from the present masks, geometrically."""
        now = sum(int(self.structure.collapse(self.masks[name]).sum()) for name in group.names)
        if not group.keep or share == 1:
            return group
        left = max(group.keep, round(now * (group.keep / now) ** share))
        shapes = [tuple(self.masks[name].shape) for name in group.names]
        return Group(group.names, self.structure.at_least(shapes, left))

    def _masked_model(self, masks: Mapping[str, Tensor]) -> nn.Module:
        with torch.no_grad():
            for name, mask in masks.items():
                self.model.get_parameter(name).masked_fill_(~mask.to(self.device), 0.0)
        return self.model


def _copied(state: Mapping[str, Tensor]) -> State:
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}


def _row(level: Level) -> dict[str, Any]:
    return {
        "level": level.index,
        "density": level.density,
        "test_accuracy": level.outcome.test_accuracy,
        "validation_accuracy": level.outcome.validation_accuracy,
        "early_stop_iteration": level.outcome.early_stop_iteration,
        "controls": {name: outcome.test_accuracy for name, outcome in level.controls.items()},
    }
