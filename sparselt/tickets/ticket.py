# SPDX-License-Identifier: Apache-2.0
"""A winning ticket: which weights are kept, what they became, and what they were at the start."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparselt.errors import DtypeError, FormatError, ShapeError, explain_mismatch

__all__ = ["LayerSummary", "Ticket"]


@dataclass(frozen=True)
class LayerSummary:
    """How much of one prunable tensor a ticket keeps.

    Attributes:
        name: The tensor's name in the network's state dict.
        shape: Its dense shape.
        kept: Number of weights the mask keeps, whatever their values.
    """

    name: str
    shape: tuple[int, ...]
    kept: int

    @property
    def total(self) -> int:
        """Number of weights of the dense tensor."""
        return math.prod(self.shape)

    @property
    def density(self) -> float:
        """``kept / total``; an empty tensor has density 1."""
        return self.kept / self.total if self.total else 1.0


@dataclass(frozen=True, repr=False)
class Ticket:
    """Masks, trained weights, original weights and metadata of one subnetwork.

    The mask decides what is kept, not the value: a kept weight that is 0.0 stays kept. Weights
    outside their mask are set to 0.0 when a ticket is made, so ``weights`` can be used as it is.

    Attributes:
        masks: Per prunable tensor a bool tensor of the tensor's shape, True where the weight is
            kept.
        weights: The whole trained state dict (biases and buffers included); empty for a ticket of
            masks only.
        initial: Original weights of masked tensors, 0.0 where pruned; may be empty.
        meta: Anything JSON can hold: recipe, seed, metrics, source.

    Raises:
        FormatError: A mask is not bool, or ``initial`` names a tensor without a mask.
        ShapeError: A mask and its weights differ in shape.

    Example:
        >>> mask = torch.tensor([[True, False], [False, True]])
        >>> ticket = Ticket({"weight": mask}, {"weight": torch.ones(2, 2)})
        >>> ticket.density, ticket.weights["weight"].tolist()
        (0.5, [[1.0, 0.0], [0.0, 1.0]])
    """

    masks: dict[str, Tensor]
    weights: dict[str, Tensor] = field(default_factory=dict)
    initial: dict[str, Tensor] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, mask in self.masks.items():
            if mask.dtype is not torch.bool:
                raise FormatError(
                    explain_mismatch(
                        f"mask of {name}", "a bool tensor", mask.dtype, "convert it with mask != 0"
                    )
                )
        object.__setattr__(self, "weights", _masked(self.weights, self.masks, "weights"))
        stray = sorted(set(self.initial) - set(self.masks))
        if stray:
            raise FormatError(
                explain_mismatch(
                    "initial weights", "names that have a mask", stray, "leave the others out"
                )
            )
        object.__setattr__(self, "initial", _masked(self.initial, self.masks, "initial weights"))

    def __repr__(self) -> str:
        kept = sum(layer.kept for layer in self.layers())
        total = sum(layer.total for layer in self.layers())
        return (
            f"Ticket(density={self.density:.4f}, kept={kept} of {total} prunable weights in "
            f"{len(self.masks)} tensors)"
        )

    @property
    def density(self) -> float:
        """Kept weights over prunable weights, where prunable means: has a mask."""
        layers = self.layers()
        total = sum(layer.total for layer in layers)
        return sum(layer.kept for layer in layers) / total if total else 1.0

    def layers(self) -> tuple[LayerSummary, ...]:
        """Name, shape and kept count of every masked tensor, in the network's order."""
        return tuple(
            LayerSummary(name, tuple(mask.shape), int(mask.count_nonzero()))
            for name, mask in self.masks.items()
        )

    def save(self, path: str | Path) -> None:
        """Writes the ticket as one safetensors file: bitmasks and kept values only.

        The file is written beside ``path`` and then renamed, so a failed save leaves no
        half-written file.

        Args:
            path: The file to write; an existing file is replaced.

        Raises:
            TicketFileError: The metadata is not JSON, or a name collides with a part of another
                tensor.
        """
        from sparselt.tickets.file import write_ticket

        write_ticket(self, Path(path))

    def apply(self, model: nn.Module) -> nn.Module:
        """Loads the ticket's weights into ``model``, in place; a ticket of masks only zeroes pruned
        weights.

        A ticket of a network with fewer channels says so in ``meta["architecture"]``; the original
        network is then made as small first. Its parameters are new objects, so make an optimiser
        afterwards.

        Args:
            model: A network whose state dict has exactly the ticket's names and shapes (for a
                ticket of masks only: at least the masked names), or the original network of a
                ticket with fewer channels.

        Returns:
            The same model.

        Raises:
            FormatError: Names are missing on either side, or ``meta["architecture"]`` is damaged.
            ShapeError: A tensor has another shape; the model is left as it was.
        """
        state = model.state_dict()
        wanted = {**self.masks, **self.weights}
        _check_names(wanted, state, partial=not self.weights)
        expected, delta = state, None
        differs = any(tensor.shape != state[name].shape for name, tensor in wanted.items())
        if differs and "architecture" in self.meta:
            from sparselt.tickets.architecture import Delta, shrink

            delta = Delta.from_json(self.meta["architecture"])
            expected = delta.slice(state)
        for name, tensor in wanted.items():
            if tensor.shape != expected[name].shape:
                raise ShapeError(
                    explain_mismatch(
                        name,
                        tuple(tensor.shape),
                        tuple(expected[name].shape),
                        "build the network the ticket was found in",
                    )
                )
        if delta is not None:
            state = shrink(model, delta).state_dict()
        with torch.no_grad():
            for name, target in state.items():
                if name in self.weights:
                    target.copy_(self.weights[name])
                elif name in self.masks:
                    target.masked_fill_(~self.masks[name].to(target.device), 0.0)
        return model


def _masked(
    tensors: Mapping[str, Tensor], masks: Mapping[str, Tensor], what: str
) -> dict[str, Tensor]:
    """Detached copies of ``tensors`` with exact zeros outside the masks."""
    result = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise DtypeError(
                explain_mismatch(f"{what} of {name}", "a tensor", type(tensor).__name__)
            )
        mask = masks.get(name)
        if mask is None:
            result[name] = tensor.detach().clone()
            continue
        if mask.shape != tensor.shape:
            raise ShapeError(
                explain_mismatch(f"mask of {name}", tuple(tensor.shape), tuple(mask.shape))
            )
        result[name] = tensor.detach().masked_fill(~mask.to(tensor.device), 0.0)
    return result


def _check_names(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor], partial: bool) -> None:
    unknown = [name for name in wanted if name not in state]
    absent = [] if partial else [name for name in state if name not in wanted]
    if unknown or absent:
        raise FormatError(
            explain_mismatch(
                "network for this ticket",
                f"tensors named {_some(wanted)}",
                f"{_some(state)}; only in the ticket: {_some(unknown)}; only in the network: "
                f"{_some(absent)}",
                "build the network the ticket was found in",
            )
        )


def _some(names: Any, limit: int = 4) -> str:
    names = list(names)
    shown = ", ".join(names[:limit]) or "none"
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")
