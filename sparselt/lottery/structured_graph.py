# SPDX-License-Identifier: Apache-2.0
"""Which channels of a network can only be removed together, from its traced graph.

Every position along every axis of every parameter is an atom. Walking the graph (torch.export, so
functional calls count too) ties atoms that carry the same channel: a filter, its bias, its batch
norm, both sides of a residual sum, the columns that read it behind a concatenation or a flatten.
What is tied is removed together; what meets an operation that mixes or counts channels stays. The
idea of dependency groups is that of Fang et al., DepGraph (arXiv 2301.12900).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sparselt.errors import FormatError, OptionError, explain_mismatch
from sparselt.tickets.architecture import ChannelGroup, Slot

__all__ = ["Channels", "Labels", "Stream", "Walk", "call_of", "shape_of", "trace_channels"]

Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Channels:
    """The channels of a network, as far as they can be removed.

    Attributes:
        groups: Removable channels, in the network's order.
        fixed: Why the output channels of a layer must stay, by the layer's name.
    """

    groups: tuple[ChannelGroup, ...]
    fixed: Mapping[str, str]


@dataclass(frozen=True)
class Stream:
    """Where the channels of one value of the graph lie.

    Attributes:
        labels: (size of the axis,) atom of each position.
        axis: The axis that holds channels.
    """

    labels: Labels
    axis: int


@dataclass
class Walk:
    """What one walk over a graph has found: atoms, ties between them, and atoms that must stay.

    Attributes:
        parameters: Tensor name of each graph node that is a parameter or buffer.
        streams: The channels of each node; absent where none are removable.
    """

    parameters: dict[Any, str] = field(default_factory=dict)
    streams: dict[Any, Stream] = field(default_factory=dict)
    _axes: dict[tuple[str, int], Labels] = field(default_factory=dict)
    _ties: list[tuple[Labels, Labels]] = field(default_factory=list)
    _fixed: list[tuple[Labels, str]] = field(default_factory=list)
    _count: int = 0

    def axis(self, name: str, axis: int, size: int) -> Labels:
        """The atoms along one axis of one tensor; the same at every call."""
        if (name, axis) not in self._axes:
            self._axes[name, axis] = self.fresh(size)
        return self._axes[name, axis]

    def fresh(self, size: int) -> Labels:
        """``size`` atoms that belong to no tensor."""
        self._count += size
        return np.arange(self._count - size, self._count, dtype=np.int64)

    def tie(self, first: Labels, second: Labels) -> None:
        """Says that these atoms, pair by pair, go together."""
        self._ties.append((first, second))

    def fix(self, labels: Labels, reason: str) -> None:
        """Says that these atoms stay."""
        self._fixed.append((labels, reason))

    def fix_all(self, node: Any, reason: str) -> None:
        """Keeps every channel that ``node`` reads, and every axis of its parameters."""
        for source in node.all_input_nodes:
            if source in self.streams:
                self.fix(self.streams[source].labels, reason)
        self.fix_parameters(node, reason)

    def fix_parameters(self, node: Any, reason: str) -> None:
        """Keeps every axis of the parameters that ``node`` reads."""
        for source in node.all_input_nodes:
            if source in self.parameters:
                for axis, size in enumerate(shape_of(source)):
                    self.fix(self.axis(self.parameters[source], axis, size), reason)

    def classes(self) -> tuple[Labels, dict[int, str]]:
        """(atoms,) number of the class each atom belongs to, and the classes that stay."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        empty = np.empty(0, np.int64)
        first = np.concatenate([empty, *(pair[0] for pair in self._ties)])
        second = np.concatenate([empty, *(pair[1] for pair in self._ties)])
        shape = (self._count, self._count)
        graph = coo_array((np.ones(len(first), np.int8), (first, second)), shape=shape)
        _, numbers = connected_components(graph, directed=False)
        stay: dict[int, str] = {}
        for labels, reason in self._fixed:
            for number in np.unique(numbers[labels]):
                stay.setdefault(int(number), reason)
        return numbers, stay

    def axes(self) -> Mapping[tuple[str, int], Labels]:
        """Atoms of every axis seen, in the network's order."""
        return self._axes


def trace_channels(model: nn.Module, example_inputs: Any) -> Channels:
    """Traces ``model`` and groups the channels that can only be removed together.

    Args:
        model: A network that torch.export can capture; not changed.
        example_inputs: What it is called with: a tensor, a tuple of arguments or a dictionary of
            keyword arguments. The sizes do not matter as long as the network accepts them.

    Returns:
        Groups, and the layers whose channels must stay with the reason.

    Raises:
        FormatError: The network cannot be traced, or nothing in it can be removed.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> channels = trace_channels(model, torch.zeros(1, 4))
        >>> [(group.layers, group.channels) for group in channels.groups]
        [(('0',), 3)]
    """
    from sparselt.lottery.structured_rules import apply_rule

    program = _export(model, example_inputs)
    walk = Walk()
    names = {
        **program.graph_signature.inputs_to_parameters,
        **program.graph_signature.inputs_to_buffers,
    }
    for node in program.graph.nodes:
        if node.op == "placeholder":
            if node.name in names:
                walk.parameters[node] = names[node.name]
        elif node.op == "output":
            walk.fix_all(node, "its channels are the network's output")
        else:
            apply_rule(walk, node)
    channels = _grouped(walk, _same_tensors(model))
    if not channels.groups:
        reasons = "; ".join(f"{layer}: {why}" for layer, why in channels.fixed.items())
        raise FormatError(f"no channel of this network can be removed: {reasons or 'no layers'}")
    return channels


def shape_of(node: Any) -> tuple[int, ...]:
    """Shape of the tensor that ``node`` yields; () where it yields none."""
    value = node.meta.get("val")
    return tuple(int(size) for size in value.shape) if isinstance(value, Tensor) else ()


def call_of(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as positional and keyword arguments of a network."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def _export(model: nn.Module, example_inputs: Any) -> Any:
    if not isinstance(model, nn.Module):
        raise OptionError(explain_mismatch("model", "a torch.nn.Module", type(model).__name__))
    given, named = call_of(example_inputs)
    try:
        with torch.no_grad():
            return torch.export.export(copy.deepcopy(model).eval(), given, named, strict=False)
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        raise FormatError(
            f"the network cannot be traced by torch.export, so its channels are unknown: {first}"
        ) from error


def _same_tensors(model: nn.Module) -> dict[str, list[str]]:
    """Every name of each tensor, by any of its names."""
    named = [*model.named_parameters(remove_duplicate=False)]
    named += model.named_buffers(remove_duplicate=False)  # type: ignore[arg-type]
    by_identity: dict[int, list[str]] = {}
    for name, tensor in named:
        by_identity.setdefault(id(tensor), []).append(name)
    return {name: names for names in by_identity.values() for name in names}


def _grouped(walk: Walk, same: Mapping[str, list[str]]) -> Channels:
    numbers, stay = walk.classes()
    fixed: dict[str, str] = {}
    members: dict[int, dict[tuple[str, int], list[int]]] = {}
    for (name, axis), labels in walk.axes().items():
        for position, number in enumerate(numbers[labels].tolist()):
            if number not in stay:
                members.setdefault(number, {}).setdefault((name, axis), []).append(position)
            elif axis == 0:
                fixed.setdefault(name.rpartition(".")[0], stay[number])
    sizes = {key: len(labels) for key, labels in walk.axes().items()}
    alike: dict[tuple[tuple[str, int, int], ...], list[dict[tuple[str, int], list[int]]]] = {}
    for places in members.values():
        signature = tuple((*key, len(positions)) for key, positions in places.items())
        if any(axis == 0 for _, axis in places):
            alike.setdefault(signature, []).append(places)
    groups: list[ChannelGroup] = []
    for classes in alike.values():
        together = _slots(classes, sizes, same)
        if together is not None:
            groups.append(ChannelGroup(len(classes), together))
            continue
        for name, axis in classes[0]:
            if axis == 0:
                fixed.setdefault(name.rpartition(".")[0], "its channels follow no regular step")
    return Channels(tuple(groups), fixed)


def _slots(
    classes: list[dict[tuple[str, int], list[int]]],
    sizes: Mapping[tuple[str, int], int],
    same: Mapping[str, list[str]],
) -> tuple[Slot, ...] | None:
    """The slots of these channels, or None where their positions follow no regular step."""
    slots: list[Slot] = []
    for name, axis in classes[0]:
        table = np.array([places[name, axis] for places in classes])
        breaks = np.flatnonzero((np.diff(table, axis=1) != 1).any(0)) + 1
        for run in np.split(table, breaks, axis=1):
            steps = np.unique(np.diff(run[:, 0]))
            if len(steps) > 1 or (len(run) > 1 and steps[0] < run.shape[1]):
                return None
            step = int(steps[0]) if len(steps) else run.shape[1]
            offset, width = int(run[0, 0]), run.shape[1]
            slots += [
                Slot(each, axis, sizes[name, axis], offset, step, width) for each in same[name]
            ]
    return tuple(slots)
