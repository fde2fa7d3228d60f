# SPDX-License-Identifier: Apache-2.0
"""A native program in the making: the values of a graph's nodes, and their shapes.

Values are contiguous float32 tensors, of which the program knows the size and this module the
shape; so views cost nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, fx, nn

from sparselt.extension import NativeProgram

__all__ = [
    "AFFINE",
    "LAYER",
    "AffineStep",
    "Builder",
    "DenseStep",
    "NotNativeError",
    "Shape",
    "Shaped",
    "operation",
]

# Where lowering leaves what a node computes: a SparseLayer or a DenseStep.
LAYER = "sparselt_layer"
# Likewise an AffineStep, where a batch norm folds into no layer.
AFFINE = "sparselt_affine"

Shape = tuple[int, ...]


class NotNativeError(Exception):
    """A node, at these shapes, is torch's to run."""


class Packs(Protocol):
    """Packed weights of a linear layer; a `sparselt.packed_rows.PackedRows`."""

    def packed(self, rows: int) -> Tensor | None:
        """The weight for inputs of so many rows; None where there is none, or none is wanted."""


@dataclass(frozen=True)
class DenseStep:
    """A layer that torch computes, and the clamp after it; `name` is that of its first node.

    A linear layer may have packed weights too.
    """

    name: str
    module: nn.Module
    lower: float | None
    upper: float | None
    packs: Packs | None = None


@dataclass(frozen=True)
class AffineStep:
    """A factor and a term a channel, (C,) float32 each, and the clamp after them."""

    scale: Tensor
    shift: Tensor
    lower: float | None
    upper: float | None


@dataclass(frozen=True)
class Shaped:
    """A value of a program: its number there, and its shape."""

    number: int
    shape: Shape

    @property
    def floats(self) -> int:
        """How many."""
        return math.prod(self.shape)


def operation(node: fx.Node) -> str:
    """The name of what a node calls: "relu" for torch.relu, aten.relu.default and Tensor.relu."""
    packet = getattr(node.target, "overloadpacket", node.target)
    return str(getattr(packet, "__name__", packet))


class Builder:
    """The state of a program in the making: which values there are, and of what shapes.

    Args:
        program: empty.
        trial: whether it is only to tell what has a native step.

    Attributes:
        names: what each step of the program belongs to, in order.
        kept: tensors that the program points into.
    """

    def __init__(self, program: NativeProgram, trial: bool = False) -> None:
        self.program = program
        self.trial = trial
        self.values: dict[fx.Node, Shaped] = {}
        self.numbers: dict[fx.Node, int] = {}
        self.names: list[fx.Node] = []
        self.kept: list[Tensor] = []
        self._own: set[int] = set()

    def add_input(self, node: fx.Node, value: Shape | int) -> None:
        """A value from outside: the shape of a tensor, or a whole number."""
        if isinstance(value, int):
            self.numbers[node] = value
        else:
            self.values[node] = Shaped(self.program.add_input(math.prod(value)), value)

    def add(self, node: fx.Node, result: Shaped) -> None:
        """Notes what the steps that have just been added to the program compute."""
        self.values[node] = result
        self.names += [node] * (self.program.num_steps - len(self.names))

    def has_empty(self) -> bool:
        """Whether some value has no elements."""
        return any(value.floats == 0 for value in self.values.values())

    def add_output(self, node: fx.Node) -> Shape:
        """Makes a node's value a result of the program, and returns its shape."""
        value = self.values[node]
        number = value.number
        if number not in self._own:
            number = self.new(value.shape).number
            self.program.add_copy(value.number, number, 1, *[value.floats] * 3)
            self.names.append(node)
        self._own.discard(number)
        self.program.add_output(number)
        return value.shape

    def new(self, shape: Sequence[int], by_torch: bool = False) -> Shaped:
        """A new value; `by_torch` where torch allocates it."""
        number = self.program.add_value(math.prod(shape))
        if not by_torch:
            self._own.add(number)
        return Shaped(number, tuple(shape))

    def constant(self, tensor: Tensor) -> Shaped:
        """A value that is known now, and contiguous."""
        self.kept.append(tensor)
        number = self.program.add_constant(tensor.data_ptr(), tensor.numel())
        return Shaped(number, tuple(tensor.shape))

    def tensor(self, node: Any) -> Shaped:
        """The value of a node."""
        if not isinstance(node, fx.Node) or node not in self.values:
            raise NotNativeError("an operand is no tensor of the program")
        if not self.values[node].shape:
            raise NotNativeError("an operand without dimensions")
        return self.values[node]

    def whole(self, value: Any) -> int:
        """A whole number, known or the value of a node."""
        value = self.numbers.get(value, value) if isinstance(value, fx.Node) else value
        if isinstance(value, bool) or not isinstance(value, int):
            raise NotNativeError("an argument is no whole number")
        return value

    def pair(self, value: Any) -> tuple[int, int]:
        """One whole number for both axes, or two."""
        numbers = value if isinstance(value, (list, tuple)) else [value]
        if len(numbers) not in (1, 2):
            raise NotNativeError("an argument is no pair")
        return self.whole(numbers[0]), self.whole(numbers[-1])

    def lay_in(self, part: Shaped, whole: Shaped, offset: int) -> bool:
        """Whether a value could be made a part of another, so that no copy is needed."""
        if part.number not in self._own:
            return False
        fits = self.program.lay_in(part.number, whole.number, offset)
        if fits:
            self._own.discard(part.number)
        return fits
