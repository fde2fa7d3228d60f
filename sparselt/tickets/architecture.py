# SPDX-License-Identifier: Apache-2.0
"""Physically smaller networks without pickle: which channels stay, as plain numbers.

A delta lists groups of channels that only go together (a filter, its bias and batch norm, and the
columns that read it) and which channels of each group stay. The original network's factory and the
delta rebuild the small network.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from sparselt.errors import FormatError, ShapeError, explain_mismatch

__all__ = ["ChannelGroup", "Delta", "Slot", "shrink"]

VERSION = 1
_SLOT_FIELDS = ("axis", "size", "offset", "step", "width")
Axes = dict[str, dict[int, Tensor]]


@dataclass(frozen=True)
class Slot:
    """Where the channels of a group lie along one axis of one tensor.

    Channel j owns positions ``offset + j * step`` up to that plus ``width - 1``.

    Attributes:
        tensor: Name of a parameter or buffer.
        axis: The axis, from 0.
        size: Length of that axis before anything is removed.
        offset: Position of channel 0; not 0 behind a concatenation.
        step: Distance from one channel to the next.
        width: Positions a channel owns; more than 1 behind a flatten.
    """

    tensor: str
    axis: int
    size: int
    offset: int = 0
    step: int = 1
    width: int = 1

    def positions(self, channels: int) -> Tensor:
        """(channels, width) int64: the positions of each channel."""
        starts = self.offset + self.step * torch.arange(channels)
        return starts[:, None] + torch.arange(self.width)


@dataclass(frozen=True)
class ChannelGroup:
    """Channels of one width that run through several tensors and can only go together.

    Attributes:
        channels: How many there are.
        slots: Where they lie; the first is the axis of output channels of the first layer.
    """

    channels: int
    slots: tuple[Slot, ...]

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that put these channels out, batch norms included, in the network's
        order.
        """
        names = [s.tensor.rpartition(".")[0] for s in self.slots if s.axis == 0]
        return tuple(dict.fromkeys(names))


@dataclass(frozen=True)
class Delta:
    """What distinguishes a shrunk network from the one its factory builds.

    Attributes:
        groups: The groups that lose channels.
        kept: Per group the channels that stay, increasing, at least one.

    Raises:
        FormatError: ``kept`` does not fit ``groups``, or a group loses all its channels.

    Example:
        >>> group = ChannelGroup(3, (Slot("0.weight", 0, 3), Slot("2.weight", 1, 3)))
        >>> delta = Delta((group,), ((0, 2),))
        >>> Delta.from_json(delta.to_json()) == delta
        True
    """

    groups: tuple[ChannelGroup, ...] = ()
    kept: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        if len(self.groups) != len(self.kept):
            raise FormatError(
                explain_mismatch("delta: lists of kept channels", len(self.groups), len(self.kept))
            )
        for group, kept in zip(self.groups, self.kept, strict=True):
            ordered = all(a < b for a, b in itertools.pairwise(kept))
            if not kept or not ordered or kept[0] < 0 or kept[-1] >= group.channels:
                raise FormatError(
                    explain_mismatch(
                        "delta: kept channels",
                        f"increasing numbers from 0 to {group.channels - 1}, at least one",
                        f"{len(kept)} of them: {list(kept[:8])}",
                    )
                )

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON, as a ticket's ``meta["architecture"]``."""
        groups = [
            {
                "channels": group.channels,
                "kept": list(kept),
                "slots": [
                    [slot.tensor, *(getattr(slot, name) for name in _SLOT_FIELDS)]
                    for slot in group.slots
                ],
            }
            for group, kept in zip(self.groups, self.kept, strict=True)
        ]
        return {"version": VERSION, "groups": groups}

    @classmethod
    def from_json(cls, values: Any) -> Delta:
        """The inverse of :meth:`to_json`; nothing in ``values`` is trusted.

        Raises:
            FormatError: The values are not those of a delta of this version.
        """
        if not isinstance(values, Mapping) or values.get("version") != VERSION:
            raise FormatError(f"delta: expected an object of version {VERSION}")
        entries = values.get("groups")
        if not isinstance(entries, list):
            raise FormatError("delta: expected a list of groups")
        parsed = [_parsed_group(entry) for entry in entries]
        return cls(tuple(group for group, _ in parsed), tuple(kept for _, kept in parsed))

    def masks(self, shapes: Mapping[str, Sequence[int]]) -> Axes:
        """What stays, per tensor and axis.

        Args:
            shapes: Shapes of the tensors of the original network.

        Returns:
            ``masks[tensor][axis]``: (size,) bool, True where a position stays. Tensors that lose
            nothing are absent.

        Raises:
            FormatError: A tensor does not exist.
            ShapeError: An axis has another length than when the delta was made.
        """
        found: Axes = {}
        for group, kept in zip(self.groups, self.kept, strict=True):
            for slot in group.slots:
                _check_slot(slot, shapes)
            dropped = torch.ones(group.channels, dtype=torch.bool)
            dropped[list(kept)] = False
            for slot in group.slots:
                axes = found.setdefault(slot.tensor, {})
                mask = axes.setdefault(slot.axis, torch.ones(slot.size, dtype=torch.bool))
                mask[slot.positions(group.channels)[dropped].reshape(-1)] = False
        return found

    def slice(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of ``tensors`` (a state dict, masks, original weights) without what is removed.

        Raises:
            ShapeError: An axis has another length than when the delta was made.
        """
        masks = self._masks_of_present({name: tensor.shape for name, tensor in tensors.items()})
        return {name: _cut(tensor, masks.get(name, {})) for name, tensor in tensors.items()}

    def expand(
        self, tensors: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]
    ) -> dict[str, Tensor]:
        """The inverse of :meth:`slice`, with 0 in every place that was removed.

        Args:
            tensors: Of the shrunk network.
            shapes: Of the same tensors in the original network.

        Raises:
            ShapeError: A tensor does not fill the places that stay.
        """
        masks = self._masks_of_present({name: shapes[name] for name in tensors})
        full = {}
        for name, tensor in tensors.items():
            axes, shape = masks.get(name, {}), tuple(shapes[name])
            places = [torch.arange(size) for size in shape]
            for axis, mask in axes.items():
                places[axis] = mask.nonzero().reshape(-1)
            if tuple(tensor.shape) != tuple(len(place) for place in places):
                expected = tuple(len(place) for place in places)
                raise ShapeError(explain_mismatch(name, expected, tuple(tensor.shape)))
            full[name] = tensor.detach().clone() if not axes else tensor.new_zeros(shape)
            if axes:
                full[name][torch.meshgrid(*places, indexing="ij")] = tensor
        return full

    def _masks_of_present(self, shapes: Mapping[str, Sequence[int]]) -> Axes:
        """Masks of the tensors in ``shapes``; others may be absent."""
        groups = [
            ChannelGroup(group.channels, tuple(s for s in group.slots if s.tensor in shapes))
            for group in self.groups
        ]
        return Delta(tuple(groups), self.kept).masks(shapes)


def shrink(model: nn.Module, delta: Delta) -> nn.Module:
    """Removes channels from ``model``, in place: parameters, buffers and the layers' own numbers.

    Args:
        model: The network as its factory builds it. Values do not matter, so it may lie on the meta
            device.
        delta: Which channels stay.

    Returns:
        The same model. Parameters are new objects, so an optimiser has to be made anew.

    Raises:
        FormatError: The delta names a tensor that the model lacks.
        ShapeError: The model is not the one the delta was made for (or is already shrunk), or a
            grouped convolution would lose parts of a group. The model is left as it was.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> slots = (Slot("0.weight", 0, 3), Slot("0.bias", 0, 3), Slot("2.weight", 1, 3))
        >>> shrink(model, Delta((ChannelGroup(3, slots),), ((0, 2),)))[2]
        Linear(in_features=2, out_features=2, bias=True)
    """
    tensors = _tensors(model)
    masks = delta.masks({name: tensor.shape for name, tensor in tensors.items()})
    for name, module in model.named_modules():
        _check_conv_groups(name, module, masks.get(f"{name}.weight" if name else "weight", {}))
    smaller: dict[int, Tensor] = {}
    for name, axes in masks.items():
        old = tensors[name]
        new = _cut(old.detach(), axes)
        smaller[id(old)] = (
            nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
        )
    for module in model.modules():
        changed = False
        for store in (module._parameters, module._buffers):
            for key, tensor in store.items():
                if id(tensor) in smaller:
                    store[key] = smaller[id(tensor)]  # type: ignore[assignment]
                    changed = True
        if changed:
            _renumber(module)
    return model


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    named: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    named.update(model.named_buffers(remove_duplicate=False))
    return named


def _cut(tensor: Tensor, axes: Mapping[int, Tensor]) -> Tensor:
    for axis, mask in axes.items():
        tensor = tensor.index_select(axis, mask.nonzero().reshape(-1).to(tensor.device))
    return tensor.clone() if not axes else tensor


def _check_slot(slot: Slot, shapes: Mapping[str, Sequence[int]]) -> None:
    if slot.tensor not in shapes:
        raise FormatError(
            explain_mismatch(
                "network for this delta",
                f"a tensor named {slot.tensor}",
                "none",
                "build the network the delta was made for",
            )
        )
    shape = tuple(shapes[slot.tensor])
    if slot.axis >= len(shape) or shape[slot.axis] != slot.size:
        raise ShapeError(
            explain_mismatch(
                f"{slot.tensor}, axis {slot.axis}",
                slot.size,
                shape,
                "shrink the original network, and only once",
            )
        )


def _check_conv_groups(name: str, module: nn.Module, axes: Mapping[int, Tensor]) -> None:
    if not isinstance(module, _ConvNd) or not axes:
        return
    if module.transposed:
        raise ShapeError(f"{name}: transposed convolutions cannot be shrunk")
    if module.groups == 1:
        return
    kept = axes.get(0, torch.ones(module.out_channels, dtype=torch.bool))
    per_group = kept.reshape(module.groups, -1)
    if set(axes) != {0} or bool((per_group.any(1) != per_group.all(1)).any()):
        raise ShapeError(
            f"{name}: expected to keep or remove whole groups of its {module.groups} groups, got "
            "parts of a group"
        )


def _renumber(module: nn.Module) -> None:
    """Brings a layer's own record of its widths in line with its tensors."""
    weight = getattr(module, "weight", None)
    if isinstance(module, _ConvNd) and isinstance(weight, Tensor):
        if module.groups > 1:
            module.groups = module.groups * len(weight) // module.out_channels
        module.out_channels = len(weight)
        module.in_channels = weight.shape[1] * module.groups
    elif isinstance(module, nn.Linear) and isinstance(weight, Tensor):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, _NormBase):
        sized = weight if weight is not None else module.running_mean
        assert sized is not None, "a layer without tensors is not changed"
        module.num_features = len(sized)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)


def _parsed_group(entry: Any) -> tuple[ChannelGroup, tuple[int, ...]]:
    fields = entry if isinstance(entry, Mapping) else {}
    channels, kept, slots = fields.get("channels"), fields.get("kept"), fields.get("slots")
    if not _is_count(channels) or not isinstance(kept, list) or not isinstance(slots, list):
        raise FormatError("delta: expected groups with channels, kept and slots")
    if not slots or not all(_is_count(number) for number in kept):
        raise FormatError("delta: expected slots, and kept channels of at least 0")
    assert isinstance(channels, int)
    return ChannelGroup(channels, tuple(_parsed_slot(s, channels) for s in slots)), tuple(kept)


def _parsed_slot(entry: Any, channels: int) -> Slot:
    whole = isinstance(entry, list) and len(entry) == 1 + len(_SLOT_FIELDS)
    if not whole or not isinstance(entry[0], str) or not all(_is_count(n) for n in entry[1:]):
        raise FormatError(f"delta: expected slots [tensor, {', '.join(_SLOT_FIELDS)}]")
    slot = Slot(*entry)
    if not 1 <= slot.width <= slot.step:
        raise FormatError(f"delta: {slot.tensor}: expected 1 <= width <= step")
    if slot.offset + (channels - 1) * slot.step + slot.width > slot.size:
        raise FormatError(
            f"delta: {slot.tensor}: {channels} channels from position {slot.offset} on do not fit "
            f"an axis of length {slot.size}"
        )
    return slot


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31
