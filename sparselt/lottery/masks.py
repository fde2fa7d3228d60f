# SPDX-License-Identifier: Apache-2.0
"""Which weights can be pruned, how many stay, and keeping the pruned ones at exactly 0.0."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from sparselt.errors import DataError, OptionError, explain_mismatch
from sparselt.lottery.recipe import Recipe
from sparselt.lottery.schedules import keep_fraction
from sparselt.lottery.structures import Blocks

__all__ = ["Group", "MaskKeeper", "density", "full_masks", "groups_at", "layer_rates", "prune"]


@dataclass(frozen=True)
class Group:
    """Tensors whose units compete, and how many units of them stay together.

    Attributes:
        names: Tensor names, in the network's order.
        keep: Number of units kept over all of them.
    """

    names: tuple[str, ...]
    keep: int


def layer_rates(model: nn.Module, recipe: Recipe) -> dict[str, float]:
    """Pruning rate of each prunable weight, in the network's order.

    Prunable are the weights of linear and convolution layers that match no pattern of
    ``recipe.ignore``. The output layer is the last linear layer and is pruned at half the rate
    unless the recipe says otherwise. Biases and normalisation are never pruned. A pattern matches a
    weight (``fc.weight``) or its layer (``fc``).

    Raises:
        OptionError: Nothing is prunable, a pattern matches nothing, or an entry of ``recipe.rates``
            is malformed.
    """
    layers = {
        f"{name}.weight" if name else "weight": module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d))
    }
    linear = [name for name, module in layers.items() if isinstance(module, nn.Linear)]
    rates = {
        name: recipe.rate if isinstance(module, nn.Linear) else recipe.conv_rate
        for name, module in layers.items()
    }
    if linear and len(layers) > 1:
        rates[linear[-1]] = recipe.rate / 2 if recipe.output_rate < 0 else recipe.output_rate
    for entry in recipe.rates:
        pattern, rate = _parse_rate(entry)
        rates.update(dict.fromkeys(_matching(rates, pattern, "rates"), rate))
    for pattern in recipe.ignore:
        for name in _matching(rates, pattern, "ignore"):
            del rates[name]
    if not rates:
        raise OptionError("nothing to prune: the network has no linear or convolution layer left")
    return rates


def full_masks(model: nn.Module, recipe: Recipe) -> dict[str, Tensor]:
    """Masks of the dense network: everything is kept."""
    return {
        name: torch.ones(model.get_parameter(name).shape, dtype=torch.bool)
        for name in layer_rates(model, recipe)
    }


def groups_at(
    rates: Mapping[str, float],
    masks: Mapping[str, Tensor],
    recipe: Recipe,
    level: int,
    structure: Blocks,
) -> list[Group]:
    """How many units stay at ``level``, layer by layer or over all layers of the same rate.

    Counts follow from the dense size and the level alone, so rounding does not add up over the
    rounds.
    """
    if recipe.scope == "layer":
        pools: list[tuple[tuple[str, ...], float]] = [
            ((name,), rate) for name, rate in rates.items()
        ]
    else:
        pools = [
            (tuple(name for name in rates if rates[name] == rate), rate)
            for rate in dict.fromkeys(rates.values())
        ]
    groups = []
    for names, rate in pools:
        shapes = [tuple(masks[name].shape) for name in names]
        fraction = keep_fraction(recipe, rate, level)
        groups.append(Group(names, structure.count(shapes, fraction, level)))
    return groups


def prune(
    scores: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    groups: list[Group],
    structure: Blocks,
) -> dict[str, Tensor]:
    """Keeps exactly ``group.keep`` units of each group, those of the largest scores.

    Among equal scores the earlier position stays, so the result is the same on every machine. What
    is pruned stays
    pruned: the new masks lie within the old.

    Args:
        scores: Score of every weight of every masked tensor.
        masks: The masks to prune further.
        groups: From :func:`groups_at`.
        structure: The unit that is kept or pruned as a whole.

    Raises:
        DataError: A kept weight has a score that is not finite, as after a training that diverged.
    """
    result = dict(masks)
    for group in groups:
        units = []
        for name in group.names:
            score, mask = scores[name].detach().cpu().float(), masks[name]
            if not bool(torch.isfinite(score[mask]).all()):
                raise DataError(
                    f"scores of {name}: expected finite numbers, got NaN or infinity; the training "
                    "has probably diverged, lower the learning rate"
                )
            pooled = structure.pool(score.masked_fill(~mask, 0.0))
            units.append(pooled.masked_fill(~structure.collapse(mask), -torch.inf))
        shapes = [tuple(masks[name].shape) for name in group.names]
        chosen = structure.choose(units, shapes, group.keep)
        for name, kept, shape in zip(group.names, chosen, shapes, strict=True):
            result[name] = structure.spread(kept, shape)
    return result


def density(masks: Mapping[str, Tensor]) -> float:
    """Kept weights over prunable weights."""
    total = sum(mask.numel() for mask in masks.values())
    kept = sum(int(mask.count_nonzero()) for mask in masks.values())
    return kept / total if total else 1.0


class MaskKeeper:
    """Holds pruned weights of a model at exactly 0.0 through any optimiser.

    Gradients are masked before a step, so momentum, Adam's moments and weight decay never see a
    pruned weight, and weights are masked after it, whatever the optimiser did.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> keeper = MaskKeeper(model, {"weight": torch.tensor([[True, False]])})
        >>> model.weight[0, 1].item()
        0.0
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        pairs = [
            (model.get_parameter(name), mask)
            for name, mask in masks.items()
            if not bool(mask.all())
        ]
        self._parameters: list[Tensor] = [parameter for parameter, _ in pairs]
        self._masks = [mask.to(parameter) for parameter, mask in pairs]
        with torch.no_grad():
            for parameter, mask in pairs:
                parameter.masked_fill_(~mask.to(parameter.device), 0.0)

    def mask_gradients(self) -> None:
        """Call between the backward pass and the optimiser's step."""
        found = [
            (parameter.grad, mask)
            for parameter, mask in zip(self._parameters, self._masks, strict=True)
            if parameter.grad is not None
        ]
        if found:
            torch._foreach_mul_([grad for grad, _ in found], [mask for _, mask in found])

    def mask_weights(self) -> None:
        """Call after the optimiser's step."""
        if self._parameters:
            with torch.no_grad():
                torch._foreach_mul_(self._parameters, self._masks)


def _parse_rate(entry: str) -> tuple[str, float]:
    pattern, separator, number = entry.rpartition("=")
    try:
        rate = float(number)
    except ValueError:
        rate = -1.0
    if not separator or not 0 <= rate < 1:
        raise OptionError(explain_mismatch("rates", "PATTERN=RATE with 0 <= RATE < 1", entry))
    return pattern, rate


def _matching(rates: Mapping[str, float], pattern: str, option: str) -> list[str]:
    found = [
        name
        for name in rates
        if fnmatchcase(name, pattern) or fnmatchcase(name.removesuffix(".weight"), pattern)
    ]
    if not found:
        raise OptionError(explain_mismatch(option, f"a pattern of {', '.join(rates)}", pattern))
    return found
