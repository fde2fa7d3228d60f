# SPDX-License-Identifier: Apache-2.0
"""Structured pruning that shrinks the network: whole filters and channels, truly removed.

Rank channels (:mod:`sparselt.lottery.filters`), choose how many stay, and remove the rest through
batch norm, residual sums, concatenation, flatten and depthwise layers. The outcome is an ordinary
dense network, and a delta that rebuilds it from the original factory.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from sparselt.errors import DataError, FormatError, OptionError, explain_mismatch
from sparselt.lottery.filters import filter_criterion_of
from sparselt.lottery.seeds import generator
from sparselt.lottery.structured_graph import Channels, call_of, trace_channels
from sparselt.tickets import Ticket
from sparselt.tickets.architecture import ChannelGroup, Delta, shrink

__all__ = [
    "Shrunk",
    "choose_channels",
    "drop_masked",
    "prune_filters",
    "remove_channels",
    "shrunk_ticket",
    "structured_ticket",
    "zeroed",
]

Density = float | Mapping[str, float]


@dataclass(frozen=True)
class Shrunk:
    """A physically smaller network, and how it follows from the original.

    Attributes:
        model: The small network, a copy.
        delta: What :func:`sparselt.tickets.architecture.shrink` needs to rebuild it.
    """

    model: nn.Module
    delta: Delta


def prune_filters(
    model: nn.Module,
    example_inputs: Any,
    density: Density,
    criterion: str = "l1",
    scope: str = "layer",
    *,
    multiple: int = 1,
    least: int = 1,
    seed: int = 0,
) -> Shrunk:
    """Removes the lowest-ranked filters of ``model`` and all that goes with them.

    Args:
        model: The network; not changed.
        example_inputs: What it is called with: a tensor, a tuple or a dictionary of arguments.
        density: Share of the channels that stay, above 0 and at most 1: one for all layers, or one
            a pattern of layer names (layers that match none stay whole; the first match counts).
        criterion: A key of ``FILTER_CRITERIA``.
        scope: ``layer`` keeps that share in each group of layers, rounded down; ``global`` over all
            of them, scores divided by their mean in the group.
        multiple: Kept channels are rounded up to a multiple of this, as kernels like it.
        least: Channels that stay in each group whatever the scores say.
        seed: For random scores.

    Returns:
        The small network and its delta.

    Raises:
        FormatError: The network cannot be traced or shrunk.
        OptionError: An option is out of range, or a pattern names layers that must stay whole.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> prune_filters(model, torch.zeros(1, 4), density=0.5).model[0]
        Linear(in_features=4, out_features=4, bias=True)
    """
    channels = trace_channels(model, example_inputs)
    delta = choose_channels(
        model,
        channels,
        density,
        criterion,
        scope,
        multiple=multiple,
        least=least,
        seed=seed,
    )
    return remove_channels(model, delta, example_inputs)


def choose_channels(
    model: nn.Module,
    channels: Channels,
    density: Density,
    criterion: str = "l1",
    scope: str = "layer",
    *,
    multiple: int = 1,
    least: int = 1,
    seed: int = 0,
    within: Delta | None = None,
) -> Delta:
    """Ranks channels and says which stay; see :func:`prune_filters`.

    Args:
        model: The network, with the weights that are ranked.
        channels: Of that network.
        density: As for :func:`prune_filters`, of all channels whatever ``within`` says.
        criterion: A key of ``FILTER_CRITERIA``.
        scope: ``layer`` or ``global``.
        multiple: Kept channels are rounded up to a multiple of this.
        least: Channels that stay in each group.
        seed: For random scores.
        within: What an earlier round left: channels it removed do not come back.

    Raises:
        DataError: A score is not finite.
        OptionError: As for :func:`prune_filters`.
    """
    for name, value in (("multiple", multiple), ("least", least)):
        if value < 1:
            raise OptionError(explain_mismatch(name, "at least 1", value))
    if scope not in ("layer", "global"):
        raise OptionError(explain_mismatch("scope", "layer or global", scope))
    shares = _shares(channels, density)
    score, tensors = filter_criterion_of(criterion), model.state_dict()
    ranked, source = [], generator(seed, "filters")
    for group, share in zip(channels.groups, shares, strict=True):
        scores = score(group, tensors, source) if share < 1 else torch.ones(group.channels)
        if not bool(torch.isfinite(scores).all()):
            raise DataError(f"scores of {', '.join(group.layers)}: expected finite numbers")
        ranked.append(scores.cpu().float())
    _forget(ranked, channels.groups, within)
    counts = [int(g.channels * s + 1e-9) for g, s in zip(channels.groups, shares, strict=True)]
    floors = [min(least, group.channels) for group in channels.groups]
    if scope == "global":
        rivals = [index for index, share in enumerate(shares) if share < 1]
        total = sum(counts[index] for index in rivals)
        for index, count in _global_counts(ranked, rivals, total, floors).items():
            counts[index] = count
    kept = []
    for scores, count, floor in zip(ranked, counts, floors, strict=True):
        rounded = -(-max(count, floor) // multiple) * multiple
        kept.append(_best(scores, min(rounded, int(torch.isfinite(scores).sum()))))
    return _delta(channels.groups, kept)


def remove_channels(model: nn.Module, delta: Delta, example_inputs: Any) -> Shrunk:
    """Shrinks a copy of ``model``, and proves that it computes what the original does without the
    removed channels.

    Raises:
        FormatError: The small network does not run, or computes something else: its own code counts
            channels.
    """
    small = shrink(copy.deepcopy(model), delta)
    expected = _outputs(zeroed(model, delta), example_inputs)
    try:
        got = _outputs(small, example_inputs)
    except Exception as error:
        raise FormatError(
            "the network does not run without these channels; its own code probably counts them: "
            f"{str(error).partition(chr(10))[0]}"
        ) from error
    for wanted, found in zip(expected, got, strict=True):
        if wanted.is_meta:
            continue
        if not torch.allclose(wanted, found, rtol=1e-3, atol=1e-3 * _largest(wanted)):
            raise FormatError(
                "the network without these channels computes something else than with them set to "
                "zero; an operation in it mixes channels"
            )
    return Shrunk(small, delta)


def zeroed(model: nn.Module, delta: Delta) -> nn.Module:
    """A copy of ``model`` of the original size that computes what the shrunk one does.

    Filters, biases, batch-norm scales and shifts of removed channels are 0.0, and so are the
    weights that read them. A zero filter alone would not do: its bias or batch norm would go on
    emitting a constant.
    """
    full = copy.deepcopy(model)
    named: dict[str, Tensor] = dict(full.named_parameters(remove_duplicate=False))
    named.update(full.named_buffers(remove_duplicate=False))
    with torch.no_grad():
        for name, axes in delta.masks({n: t.shape for n, t in named.items()}).items():
            # Running statistics stay: the variance of a removed channel must not become 0.
            if isinstance(named[name], nn.Parameter):
                for axis, mask in axes.items():
                    gone = (~mask).nonzero().reshape(-1).to(named[name].device)
                    named[name].index_fill_(axis, gone, 0.0)
    return full


def drop_masked(model: nn.Module, channels: Channels, masks: Mapping[str, Tensor]) -> Delta:
    """The channels whose filters a ticket's masks prune whole, in every layer that is summed.

    This is what turns a ticket of ``structure="filter"`` into a smaller network. Their biases and
    batch norms go too.

    Args:
        model: The ticket's network; its weights do not matter.
        channels: Of that network.
        masks: By tensor name; a tensor without one is kept whole.
    """
    ranks = {name: tensor.dim() for name, tensor in model.state_dict().items()}
    kept = []
    for group in channels.groups:
        alive = torch.zeros(group.channels, dtype=torch.bool)
        for slot in group.slots:
            if slot.axis or ranks[slot.tensor] < 2:
                continue
            mask = masks.get(slot.tensor)
            if mask is None:
                alive[:] = True
            else:
                alive |= mask.cpu().flatten(1).any(1)[slot.positions(group.channels)].any(1)
        if not bool(alive.any()):
            alive[0] = True
        kept.append(alive.nonzero().reshape(-1))
    return _delta(channels.groups, kept)


def structured_ticket(
    small: nn.Module,
    delta: Delta,
    initial: Mapping[str, Tensor],
    meta: Mapping[str, Any] | None = None,
) -> Ticket:
    """A ticket of a shrunk network: dense masks, its weights, and the delta in ``meta``.

    Args:
        small: The shrunk network, trained.
        delta: How it was shrunk.
        initial: Original weights of the *original* network's prunable tensors, by name.
        meta: Anything further that JSON can hold.

    Returns:
        A ticket whose ``meta["architecture"]`` rebuilds the network from its factory: shrink what
        the factory builds, then apply the ticket.
    """
    state = {name: t.detach().cpu().clone() for name, t in small.state_dict().items()}
    original = delta.slice(initial)
    masks = {name: torch.ones(state[name].shape, dtype=torch.bool) for name in initial}
    return Ticket(masks, state, original, {**(meta or {}), "architecture": delta.to_json()})


def shrunk_ticket(ticket: Ticket, delta: Delta) -> Ticket:
    """The same ticket without the channels that ``delta`` removes.

    After removing idle units this makes a sparse ticket of a smaller network.

    Args:
        ticket: Of the original network.
        delta: What to remove.

    Raises:
        FormatError: The ticket is already one of a shrunk network.
        ShapeError: The delta belongs to another network.
    """
    if "architecture" in ticket.meta:
        raise FormatError("ticket: expected one of the original network, got one already shrunk")
    return Ticket(
        delta.slice(ticket.masks),
        delta.slice(ticket.weights),
        delta.slice(ticket.initial),
        {**ticket.meta, "architecture": delta.to_json()},
    )


def _delta(groups: Sequence[ChannelGroup], kept: Sequence[Tensor]) -> Delta:
    """A delta of the groups that lose something."""
    smaller = [
        (g, tuple(k.tolist())) for g, k in zip(groups, kept, strict=True) if len(k) < g.channels
    ]
    return Delta(tuple(g for g, _ in smaller), tuple(k for _, k in smaller))


def _forget(scores: Sequence[Tensor], groups: Sequence[ChannelGroup], within: Delta | None) -> None:
    """Ranks what an earlier round removed below everything."""
    left = {} if within is None else dict(zip(within.groups, within.kept, strict=True))
    for group, ranked in zip(groups, scores, strict=True):
        if group in left:
            gone = torch.ones(group.channels, dtype=torch.bool)
            gone[list(left[group])] = False
            ranked[gone] = -torch.inf


def _best(scores: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` largest, increasing; among equals the earlier."""
    return torch.sort(scores, descending=True, stable=True).indices[:count].sort().values


def _global_counts(
    scores: Sequence[Tensor], rivals: Sequence[int], total: int, floors: Sequence[int]
) -> dict[int, int]:
    """How many channels of each rival group are among the best of all, none below its floor."""
    relative = []
    for index in rivals:
        size = scores[index][torch.isfinite(scores[index])].abs().mean()
        relative.append(scores[index] / size.clamp_min(1e-30))
        relative[-1][_best(scores[index], floors[index])] = torch.inf
    owner = torch.cat([torch.full((len(scores[index]),), index) for index in rivals])
    least = sum(floors[index] for index in rivals)
    chosen = owner[_best(torch.cat(relative), max(total, least))].tolist()
    return {index: chosen.count(index) for index in rivals}


def _shares(channels: Channels, density: Density) -> list[float]:
    patterns = {"*": density} if isinstance(density, (int, float)) else dict(density)
    for pattern, share in patterns.items():
        if not 0 < share <= 1:
            raise OptionError(explain_mismatch(f"density of {pattern}", "above 0, up to 1", share))
        free = any(fnmatchcase(n, pattern) for group in channels.groups for n in group.layers)
        stuck = [name for name in channels.fixed if fnmatchcase(name, pattern)]
        if not free:
            hint = f"{stuck[0]} must stay: {channels.fixed[stuck[0]]}" if stuck else ""
            names = ", ".join(group.layers[0] for group in channels.groups[:8])
            raise OptionError(explain_mismatch("density", f"a pattern of {names}", pattern, hint))
    shares = []
    for group in channels.groups:
        found = [s for p, s in patterns.items() if any(fnmatchcase(n, p) for n in group.layers)]
        shares.append(found[0] if found else 1.0)
    return shares


def _outputs(model: nn.Module, example_inputs: Any) -> list[Tensor]:
    given, named = call_of(example_inputs)
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            result = model(*given, **named)
    finally:
        for module, training in was_training.items():
            module.training = training
    leaves = torch.utils._pytree.tree_leaves(result)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0
