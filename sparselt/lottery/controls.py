# SPDX-License-Identifier: Apache-2.0
"""The controls that make a ticket a claim: the same counts with another mask, or the same mask with
other weights.

Each control is proven to differ from the ticket and to keep as much before it is trained: a control
that silently equals its ticket has made published comparisons meaningless. To add one, write a
function from a :class:`Basis` to an :class:`Arm` and add one line to ``CONTROLS``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sparselt.errors import DataError, OptionError, explain_mismatch
from sparselt.lottery.masks import Group, prune
from sparselt.lottery.networks import Factory, build
from sparselt.lottery.seeds import derived_seed, generator
from sparselt.lottery.structures import Blocks

__all__ = ["CONTROLS", "Arm", "Basis", "make_control"]

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Arm:
    """What one training starts from.

    Attributes:
        state: The whole state dict, not yet masked.
        masks: By tensor name.
        start: Iteration that training starts at.
    """

    state: State
    masks: Mapping[str, Tensor]
    start: int


@dataclass(frozen=True)
class Basis:
    """What controls are made from.

    Attributes:
        ticket: What the ticket's own training starts from.
        previous: Masks of the level before.
        scores: Scores that chose the ticket's mask out of ``previous``.
        original: State dict before any training.
        factory: Builds the network with new weights.
        structure: Unit of pruning; controls keep it.
        seed: Of this control at this level.
    """

    ticket: Arm
    previous: Mapping[str, Tensor]
    scores: Mapping[str, Tensor]
    original: State
    factory: Factory
    structure: Blocks
    seed: int


def reinit(basis: Basis) -> Arm:
    """The ticket's mask on newly drawn weights, trained from iteration 0."""
    fresh = build(basis.factory, derived_seed(basis.seed, "weights")).state_dict()
    return Arm(fresh, basis.ticket.masks, 0)


def shuffle(basis: Basis) -> Arm:
    """The ticket's weights under a mask whose units are shuffled within each layer."""
    source, masks = generator(basis.seed), {}
    for name, mask in basis.ticket.masks.items():
        kept, shape = basis.structure.collapse(mask), tuple(mask.shape)
        masks[name] = basis.structure.spread(basis.structure.shuffle(kept, shape, source), shape)
    return Arm(basis.ticket.state, masks, basis.ticket.start)


def random(basis: Basis) -> Arm:
    """The ticket's weights under a random mask of the same total, layers not respected."""
    source = generator(basis.seed)
    scores = {n: torch.rand(m.shape, generator=source) for n, m in basis.ticket.masks.items()}
    everything = {n: torch.ones_like(m) for n, m in basis.ticket.masks.items()}
    kept = sum(int(basis.structure.collapse(m).sum()) for m in basis.ticket.masks.values())
    groups = [Group(tuple(basis.ticket.masks), kept)]
    masks = prune(scores, everything, groups, basis.structure)
    return Arm(basis.ticket.state, masks, basis.ticket.start)


def inverted(basis: Basis) -> Arm:
    """The ticket's weights under the mask of the smallest scores, with its counts by layer."""
    groups = [
        Group((name,), int(basis.structure.collapse(mask).sum()))
        for name, mask in basis.ticket.masks.items()
    ]
    scores = {name: -score for name, score in basis.scores.items()}
    masks = prune(scores, basis.previous, groups, basis.structure)
    return Arm(basis.ticket.state, masks, basis.ticket.start)


def noise(basis: Basis) -> Arm:
    """The ticket with Gaussian noise on its weights, of half their deviation in each layer."""
    source, state = generator(basis.seed), dict(basis.ticket.state)
    for name in basis.ticket.masks:
        weight = state[name]
        drawn = torch.randn(weight.shape, generator=source).to(weight)
        state[name] = weight + 0.5 * weight.std() * drawn
    return Arm(state, basis.ticket.masks, basis.ticket.start)


def reset(basis: Basis) -> Arm:
    """The ticket's mask on the original weights, from iteration 0: what continued training is held
    against.
    """
    return Arm(basis.original, basis.ticket.masks, 0)


CONTROLS: dict[str, Callable[[Basis], Arm]] = {
    "reinit": reinit,
    "shuffle": shuffle,
    "random": random,
    "inverted": inverted,
    "noise": noise,
    "reset": reset,
}


def make_control(name: str, basis: Basis) -> Arm:
    """Makes the control ``name`` (``reinit#2`` is a second one, seeded apart) and proves that it is
    one.

    Raises:
        OptionError: There is no such control.
        DataError: It equals the ticket, as when nothing was pruned, or keeps another number of
            weights.
    """
    kind = name.partition("#")[0]
    if kind not in CONTROLS:
        raise OptionError(explain_mismatch("control", f"one of {', '.join(CONTROLS)}", name))
    arm = CONTROLS[kind](basis)
    ticket = basis.ticket
    if _units(arm.masks, basis.structure) != _units(ticket.masks, basis.structure):
        raise DataError(f"control {name} keeps another number of weights than the ticket")
    same_mask = all(torch.equal(arm.masks[n], mask) for n, mask in ticket.masks.items())
    same_weights = all(torch.equal(arm.state[n], ticket.state[n]) for n in ticket.masks)
    if same_mask and same_weights:
        raise DataError(
            f"control {name} is the ticket itself; prune more, or leave this control out at this "
            "level"
        )
    return arm


def _units(masks: Mapping[str, Tensor], structure: Blocks) -> int:
    return sum(int(structure.collapse(mask).sum()) for mask in masks.values())
