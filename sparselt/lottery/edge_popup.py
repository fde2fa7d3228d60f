# SPDX-License-Identifier: Apache-2.0
"""Edge-popup: finds a subnetwork of a randomly weighted network, without training any weight.

Each weight has a score. The forward pass uses the weights whose scores are largest in magnitude, an
exact share of each layer; the backward pass goes straight through that choice to the scores, which
are all that is trained. Weights are drawn once and frozen, biases are 0, and batch norm has neither
scale nor shift.

Source: Ramanujan et al. 2020, "What's hidden in a randomly weighted neural network?"
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from sparselt.errors import DataError, OptionError, explain_mismatch
from sparselt.lottery.batch_norm import batch_norms
from sparselt.lottery.data import Data
from sparselt.lottery.networks import Factory, build, factory_of
from sparselt.lottery.recipe import Recipe
from sparselt.lottery.seeds import derived_seed, generator
from sparselt.lottery.training import Step, Training, train
from sparselt.tickets import Ticket

__all__ = [
    "FROZEN_WEIGHTS",
    "Supermask",
    "add_supermasks",
    "find_supermask",
    "read_supermasks",
]

_ORIGINAL, _SCORES = "parametrizations.weight.original", "parametrizations.weight.0.scores"


def signed_constant(shape: tuple[int, ...], deviation: float, source: torch.Generator) -> Tensor:
    """Plus or minus the deviation of Kaiming's normal distribution, by the sign of a draw."""
    constant = torch.full(shape, deviation)
    return torch.where(torch.rand(shape, generator=source) < 0.5, -constant, constant)


def kaiming_normal(shape: tuple[int, ...], deviation: float, source: torch.Generator) -> Tensor:
    """Normal with the deviation that keeps variance through a ReLU (He et al. 2015)."""
    return torch.randn(shape, generator=source) * deviation


FROZEN_WEIGHTS: dict[str, Callable[[tuple[int, ...], float, torch.Generator], Tensor]] = {
    "signed_constant": signed_constant,
    "kaiming_normal": kaiming_normal,
}


class Supermask(nn.Module):
    """The parametrisation of a frozen weight: what is kept of it, by trained scores.

    Args:
        shape: Shape of the weight, (out, in, ...).
        keep: Number of weights kept, exactly.
        source: Draws the first scores, uniform within 1 / sqrt(fan in).

    Raises:
        OptionError: ``keep`` is not from 1 to the number of weights.

    Example:
        >>> supermask = Supermask((2, 3), 2, torch.Generator().manual_seed(0))
        >>> int(supermask.mask().sum())
        2
    """

    def __init__(self, shape: tuple[int, ...], keep: int, source: torch.Generator) -> None:
        super().__init__()
        if not 1 <= keep <= math.prod(shape):
            raise OptionError(
                explain_mismatch(
                    "kept weights of a layer", f"from 1 to {math.prod(shape)}", keep,
                    "choose another keep_fraction",
                )
            )  # fmt: skip
        self.keep = keep
        bound = 1 / math.sqrt(_fan_in(shape))
        self.scores = nn.Parameter((2 * torch.rand(shape, generator=source) - 1) * bound)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight where it is kept, 0.0 elsewhere."""
        kept: Tensor = _StraightThrough.apply(  # type: ignore[no-untyped-call]
            self.scores.abs(), self.keep
        )
        return weight * kept

    def mask(self) -> Tensor:
        """What is kept, bool; among equal scores the earlier position is."""
        return _largest(self.scores.detach().abs(), self.keep)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"keep={self.keep} of {self.scores.numel()}"


class _StraightThrough(torch.autograd.Function):
    """1.0 for the largest scores and 0.0 for others; its gradient is handed on unchanged."""

    @staticmethod
    def forward(scores: Tensor, keep: int) -> Tensor:
        return _largest(scores, keep).to(scores.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        """Nothing of the forward pass is needed."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _largest(scores: Tensor, keep: int) -> Tensor:
    """Mask of exactly the ``keep`` largest scores, the earlier of equals; without sorting.

    Raises:
        DataError: Scores are NaN.
    """
    flat = scores.reshape(-1)
    limit = torch.kthvalue(flat, flat.numel() - keep + 1).values
    chosen = flat >= limit
    surplus = int(chosen.count_nonzero()) - keep
    if surplus < 0:
        raise DataError("scores: expected finite numbers, got NaN; lower the learning rate")
    if surplus:
        ties = (flat == limit).nonzero()[:, 0]
        chosen[ties[len(ties) - surplus :]] = False
    return chosen.reshape(scores.shape)


def add_supermasks(
    model: nn.Module,
    keep_fraction: float | Mapping[str, float] = 0.5,
    *,
    weights: str = "signed_constant",
    scaled: bool = False,
    seed: int = 0,
) -> nn.Module:
    """Redraws and freezes a network's weights and gives each a score, in place.

    Every linear and convolution layer gets a :class:`Supermask` on its weight; its bias becomes 0
    and is frozen, and so are scale 1 and shift 0 of every batch norm (its running statistics go on
    following the data). Afterwards the scores are all that an optimiser can change.

    Args:
        model: Any network of such layers.
        keep_fraction: Fraction of each layer's weights that is kept (not removed), above 0 to 1; or
            one by pattern of layer name, of which the first that matches counts.
        weights: A key of ``FROZEN_WEIGHTS``.
        scaled: Counts only kept inputs in the fan-in that the weights are scaled by.
        seed: Of weights and scores, drawn layer by layer.

    Returns:
        The same model.

    Raises:
        OptionError: An unknown key, a fraction out of range, a layer that no pattern matches,
            a layer without a kept weight, a model without such layers, or with other parameters.

    Example:
        >>> model = add_supermasks(nn.Linear(4, 2, bias=False), keep_fraction=0.25)
        >>> int(model.weight.count_nonzero()), [name for name, p in model.named_parameters()
        ...     if p.requires_grad]
        (2, ['parametrizations.weight.0.scores'])
    """
    if weights not in FROZEN_WEIGHTS:
        raise OptionError(
            explain_mismatch("weights", f"one of {', '.join(FROZEN_WEIGHTS)}", weights)
        )
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d))
    }
    if not layers:
        raise OptionError("edge-popup: the network has no linear or convolution layer")
    fractions = {name: _fraction_of(name, keep_fraction) for name in layers}
    _freeze_the_rest(model, list(layers.values()))
    for name, layer in layers.items():
        shape, fraction = tuple(layer.weight.shape), fractions[name]
        fan_in = _fan_in(shape) * (fraction if scaled else 1.0)
        draw = FROZEN_WEIGHTS[weights]
        drawn = draw(shape, math.sqrt(2 / fan_in), generator(seed, "frozen", name))
        with torch.no_grad():
            layer.weight.copy_(drawn)
        layer.weight.requires_grad_(False)
        supermask = Supermask(
            shape, round(fraction * math.prod(shape)), generator(seed, "scores", name)
        )
        parametrize.register_parametrization(layer, "weight", supermask.to(layer.weight.device))
    return model


def read_supermasks(model: nn.Module, meta: Mapping[str, Any] | None = None) -> Ticket:
    """The ticket that a network with supermasks has found.

    Args:
        model: From :func:`add_supermasks`, trained or not.
        meta: Metadata of the ticket.

    Returns:
        A ticket with the names of the plain network. Signed constants are saved as one sign bit a
        kept weight and one scale a layer.

    Raises:
        OptionError: The network has no supermask.
    """
    masks: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, Supermask):
            masks[_plain_name(f"{name}.scores")] = module.mask().cpu()
    if not masks:
        raise OptionError("edge-popup: the network has no supermasks; call add_supermasks first")
    weights = {
        _plain_name(name): tensor.detach().cpu().clone()
        for name, tensor in model.state_dict().items()
        if not name.endswith(_SCORES)
    }
    return Ticket(masks, weights, {}, dict(meta or {}))


def find_supermask(
    network: str | nn.Module | Factory,
    data: Data,
    recipe: Recipe | None = None,
    keep_fraction: float | Mapping[str, float] = 0.5,
    *,
    weights: str = "signed_constant",
    scaled: bool = False,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    progress: Callable[[Step], None] | None = None,
    checkpoint: str | Path | None = None,
    device: str | torch.device = "cpu",
) -> Ticket:
    """Finds a subnetwork of a randomly weighted network by training scores.

    Args:
        network: A key of ``NETWORKS``, a function that builds your network, or a module (copied).
        data: The data.
        recipe: Its optimiser, learning rate, batch, iterations and seed are used.
        keep_fraction: Fraction of each layer's weights that is kept, or one by name pattern.
        weights: ``signed_constant`` or ``kaiming_normal``.
        scaled: Counts only kept inputs in the fan-in that the weights are scaled by.
        loss: From outputs (n, classes) and labels (n,) to a scalar.
        progress: Called at every look at the validation split.
        checkpoint: File that a killed search continues from.
        device: Where to train.

    Returns:
        The ticket; ``meta["metrics"]`` has its accuracies.

    Raises:
        OptionError: See :func:`add_supermasks`.
        DataError: Training diverged.

    Example:
        >>> x, y = torch.randn(80, 4), torch.arange(80) % 2
        >>> data = Data((x, y), (x, y), (x, y), classes=2)
        >>> recipe = Recipe(network="tiny", data="noise", iterations=2)
        >>> find_supermask(nn.Linear(4, 2), data, recipe, keep_fraction=0.25).density
        0.25
    """
    recipe = recipe or Recipe()
    model = (
        copy.deepcopy(network)
        if isinstance(network, nn.Module)
        else build(
            factory_of(network, data.shape, data.classes), derived_seed(recipe.seed, "weights")
        )
    )
    add_supermasks(model, keep_fraction, weights=weights, scaled=scaled, seed=recipe.seed)
    how = Training(
        recipe,
        order_seed=derived_seed(recipe.seed, "order"),
        loss=loss,
        progress=progress,
        checkpoint=None if checkpoint is None else Path(checkpoint),
    )
    outcome = train(model.to(device), data.to(device), how)
    metrics = {k: v for k, v in outcome.to_values().items() if k not in ("history", "seconds")}
    shares = keep_fraction if isinstance(keep_fraction, (int, float)) else dict(keep_fraction)
    meta = {
        "recipe": asdict(recipe),
        "seed": recipe.seed,
        "edge_popup": {"keep_fraction": shares, "weights": weights, "scaled": scaled},
        "metrics": metrics,
    }
    return read_supermasks(model, meta)


def _fraction_of(layer: str, keep_fraction: float | Mapping[str, float]) -> float:
    if isinstance(keep_fraction, Mapping):
        found = [share for name, share in keep_fraction.items() if fnmatchcase(layer, name)]
        if not found:
            raise OptionError(
                explain_mismatch(
                    "keep_fraction", f"a pattern that matches {layer!r}", list(keep_fraction),
                    "add '*' for all other layers",
                )
            )  # fmt: skip
        fraction = found[0]
    else:
        fraction = keep_fraction
    if not 0 < fraction <= 1:
        raise OptionError(
            explain_mismatch(
                f"keep_fraction of {layer or 'the layer'}", "above 0 and up to 1", fraction,
                "it is the fraction kept, not removed",
            )
        )  # fmt: skip
    return float(fraction)


def _freeze_the_rest(model: nn.Module, layers: list[nn.Linear | nn.Conv1d | nn.Conv2d]) -> None:
    """Biases 0, batch norm without effect beyond normalising; nothing else may have parameters."""
    known = {id(layer.weight) for layer in layers}
    with torch.no_grad():
        for layer in layers:
            if layer.bias is not None:
                known.add(id(layer.bias.zero_().requires_grad_(False)))
        for norm in batch_norms(model):
            if norm.affine:
                known.add(id(norm.weight.fill_(1.0).requires_grad_(False)))
                known.add(id(norm.bias.zero_().requires_grad_(False)))
    other = [name for name, parameter in model.named_parameters() if id(parameter) not in known]
    if other:
        raise OptionError(
            explain_mismatch(
                "edge-popup network", "linear, convolution and batch-norm layers only",
                f"parameters {', '.join(other)}",
            )
        )  # fmt: skip


def _plain_name(name: str) -> str:
    """The name in the network without parametrisations."""
    for part in (_ORIGINAL, _SCORES):
        if name.endswith(part):
            return name.removesuffix(part) + "weight"
    return name


def _fan_in(shape: tuple[int, ...]) -> int:
    return max(math.prod(shape[1:]), 1)
