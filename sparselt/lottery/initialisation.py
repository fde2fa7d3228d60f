# SPDX-License-Identifier: Apache-2.0
"""Pruning before training: a ticket out of the network's initial weights.

The criteria are those of :mod:`sparselt.lottery.criteria` that look at the weights training starts
from. Beside what they promise stands what later work found: shuffling such a mask within its layers
or drawing the weights anew hardly changes the result (Frankle et al. 2020, "Pruning neural networks
at initialization: why are we missing the mark?"), so always train those controls too.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparselt.errors import OptionError, explain_mismatch
from sparselt.lottery.budgets import budget_groups
from sparselt.lottery.criteria import CRITERIA, Subject, criterion_of
from sparselt.lottery.data import Data
from sparselt.lottery.masks import Group, full_masks, prune
from sparselt.lottery.networks import Factory, build, factory_of
from sparselt.lottery.recipe import Recipe
from sparselt.lottery.seeds import derived_seed, generator
from sparselt.lottery.structures import Blocks, NOfM, parse_structure
from sparselt.tickets import Ticket

__all__ = ["prune_at_initialisation"]


def prune_at_initialisation(
    network: str | nn.Module | Factory,
    data: Data,
    criterion: str,
    density: float,
    *,
    budget: str = "global",
    structure: str = "1x1",
    ignore: Sequence[str] = (),
    seed: int = 0,
) -> Ticket:
    """Chooses a mask before any training.

    Args:
        network: A key of ``NETWORKS``, a function that builds your network (called with torch's
            global generator seeded), or a module, which is copied. The same seed gives the same
            weights as :func:`sparselt.lottery.find_ticket`.
        data: The training split alone is looked at, and by synflow only its shape.
        criterion: A key of ``CRITERIA`` that ranks weights before training: snip, grasp, synflow,
            random or magnitude_at_start.
        density: Kept over prunable units over all layers, from 0 to 1; met exactly, rounded to
            whole units. N:M keeps N of M in every layer, so it has to be N / M there (channels that
            are no multiple of M keep a little more), and the budget ``global``.
        budget: ``global`` (layers compete by score), or the layers' shares: ``uniform``, ``erk``.
        structure: Unit of pruning: ``RxC``, ``N:M`` or ``filter``.
        ignore: Name patterns of weights that are never pruned.
        seed: Of the weights and of every random choice.

    Returns:
        A ticket whose weights and original weights are the initial ones; train it with
        ``train(ticket.apply(model), data, Training(recipe), ticket.masks)``.

    Raises:
        OptionError: An unknown name, a criterion that needs a trained network, a density outside
            0 to 1, or one that N:M cannot keep.

    Example:
        >>> x, y = torch.randn(80, 4), torch.arange(80) % 2
        >>> data = Data((x, y), (x, y), (x, y), classes=2)
        >>> network = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
        >>> prune_at_initialisation(network, data, "synflow", 0.25).density
        0.25
    """
    chosen, units = criterion_of(criterion), parse_structure(structure)
    if not chosen.before_training:
        known = ", ".join(name for name, found in CRITERIA.items() if found.before_training)
        raise OptionError(
            explain_mismatch("criterion before training", f"one of {known}", criterion)
        )
    factory = factory_of(network, data.shape, data.classes)
    model = (
        copy.deepcopy(network)
        if isinstance(network, nn.Module)
        else build(factory, derived_seed(seed, "weights"))
    )
    state = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
    masks = full_masks(model, Recipe(ignore=tuple(ignore)))
    start = {name: state[name] for name in masks}
    shapes = {name: tuple(mask.shape) for name, mask in masks.items()}
    groups = (
        _n_of_m_groups(units, shapes, density, budget)
        if isinstance(units, NOfM)
        else budget_groups(budget, shapes, density, units)
    )
    for step in range(1, chosen.steps + 1):
        source = generator(seed, "criterion", step)
        scores = chosen.score(Subject(_masked(model, masks), start, masks, data, source))
        masks = prune(scores, masks, _partly(groups, masks, units, step / chosen.steps), units)
    meta: dict[str, Any] = {
        "criterion": criterion,
        "budget": budget,
        "density": density,
        "structure": structure,
        "ignore": list(ignore),
        "seed": seed,
    }
    return Ticket(masks, state, start, {"initialisation": meta})


def _n_of_m_groups(
    units: NOfM, shapes: Mapping[str, tuple[int, ...]], density: float, budget: str
) -> list[Group]:
    """Every layer keeps N of M; anything else is refused rather than rounded."""
    name = f"{units.n}:{units.m}"
    if budget != "global":
        hint = f"{name} keeps the same share of every layer"
        raise OptionError(explain_mismatch(f"budget of {name}", "global", budget, hint))
    if round(density * units.m, 6) != units.n:
        raise OptionError(
            explain_mismatch(f"density of {name}", f"{units.n} / {units.m}", f"{density:g}")
        )
    return [Group((n,), units.count([shape], 0.0, units.m)) for n, shape in shapes.items()]


def _masked(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    with torch.no_grad():
        for name, mask in masks.items():
            weight = model.get_parameter(name)
            weight.masked_fill_(~mask.to(weight.device), 0.0)
    return model


def _partly(
    groups: Sequence[Group], masks: Mapping[str, Tensor], units: Blocks, share: float
) -> list[Group]:
    """The groups after ``share`` of an exponential way from everything to what they keep."""
    result = []
    for group in groups:
        total = sum(units.collapse(torch.ones_like(masks[name])).numel() for name in group.names)
        left = round(total * (group.keep / total) ** share) if group.keep else group.keep
        shapes = [tuple(masks[name].shape) for name in group.names]
        result.append(Group(group.names, units.at_least(shapes, max(left, group.keep))))
    return result
