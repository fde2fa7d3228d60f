# SPDX-License-Identifier: Apache-2.0
"""What a layer can compute beside its product: a batch norm, an addition, a clamp.

`follow` looks along a graph for what comes right after a linear or convolution node and can be done
in the kernel's one pass over its output; `fold_batch_norm` is the arithmetic of the first of these.
Graphs of torch.export (aten operators) and of Dynamo (torch functions) are read alike.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

__all__ = [
    "BatchNorm",
    "Fusion",
    "argument",
    "clamp_bounds",
    "fold_batch_norm",
    "follow",
    "is_mutating",
    "read_batch_norm",
]

aten = torch.ops.aten

# Arguments of a batch norm after its input, by dialect.
_BATCH_NORM: dict[Any, tuple[str, ...]] = {
    aten.batch_norm.default: ("weight", "bias", "running_mean", "running_var", "training"),
    F.batch_norm: ("running_mean", "running_var", "weight", "bias", "training"),
}
_EPS_POSITION = 7
# Folded at once.
_ROWS = 64

_RELU = {
    aten.relu.default,
    aten.relu_.default,
    torch.relu,
    torch.relu_,
    F.relu,
    "relu",
    "relu_",
}
_RELU6 = {aten.relu6.default, aten.relu6_.default, F.relu6}
# Name of the bounds and their defaults.
_CLAMPS: dict[Any, tuple[tuple[str, str], tuple[float | None, float | None]]] = {
    aten.hardtanh.default: (("min_val", "max_val"), (-1.0, 1.0)),
    aten.hardtanh_.default: (("min_val", "max_val"), (-1.0, 1.0)),
    F.hardtanh: (("min_val", "max_val"), (-1.0, 1.0)),
    aten.clamp.default: (("min", "max"), (None, None)),
    aten.clamp_.default: (("min", "max"), (None, None)),
    torch.clamp: (("min", "max"), (None, None)),
    "clamp": (("min", "max"), (None, None)),
    "clamp_": (("min", "max"), (None, None)),
}
_ADD = {aten.add.Tensor, torch.add, operator.add, "add"}
_ADD_IN_PLACE = {aten.add_.Tensor, operator.iadd, "add_"}


@dataclass(frozen=True)
class BatchNorm:
    """An eval-mode batch norm: y = (x - mean) / sqrt(var + eps) * weight + bias, each (C,)."""

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float


@dataclass
class Fusion:
    """What a layer's kernel does beside the product.

    Attributes:
        end: the node whose value the kernel writes.
        chain: the nodes that become superfluous, the layer's own first, `end` last.
        batch_norm: folded into weight and bias before packing.
        residual: node of what is added, of the result's shape.
        lower, upper: bounds of the clamp.
        sources: placeholders that the batch norm was read from.
    """

    end: fx.Node
    chain: list[fx.Node]
    batch_norm: BatchNorm | None = None
    residual: fx.Node | None = None
    lower: float | None = None
    upper: float | None = None
    sources: list[fx.Node] = field(default_factory=list)

    def describe(self) -> str:
        """What is fused, for a reader; empty if nothing is."""
        parts = []
        if self.batch_norm is not None:
            parts.append("batch norm")
        if self.residual is not None:
            parts.append("residual")
        if self.lower is not None or self.upper is not None:
            parts.append("clamp")
        return ", ".join(parts)


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call, given by position or by name."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def fold_batch_norm(
    weight: Tensor, bias: Tensor | None, norm: BatchNorm
) -> tuple[Tensor, Tensor] | None:
    """Weight and bias of the layer that computes `norm(layer(x))`.

    Each output channel's weights are scaled, so a zero stays a zero. Computed in float64.

    Args:
        weight: (C, ...).
        bias: (C,) or None.
        norm: over C channels.

    Returns:
        Weight and bias in the weight's type; None where a scale is not finite.

    Example:
        >>> import torch
        >>> ones = torch.ones(2)
        >>> norm = BatchNorm(ones, 4 * ones, None, None, 0.0)
        >>> fold_batch_norm(torch.eye(2), None, norm)[1]
        tensor([-0.5000, -0.5000])
    """
    scale = (norm.var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.mean.double() if bias is None else bias.double() - norm.mean.double()
    shift = shift * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    if not bool(torch.isfinite(scale).all()):
        return None
    scaled = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    factors = scale.view(-1, *[1] * (weight.dim() - 1))
    # A few rows at a time: a large weight in float64 would be the most that loading takes.
    for i in range(0, len(weight), _ROWS):
        scaled[i : i + _ROWS] = weight[i : i + _ROWS].double() * factors[i : i + _ROWS]
    return scaled, shift.to(weight.dtype)


def follow(
    node: fx.Node,
    constant: Callable[[Any], Tensor | None],
    channels_last: bool = False,
    residual: bool = True,
) -> Fusion:
    """Walks from a layer along nodes that only its result reaches, as far as they can be fused.

    The fused kernel runs where the last of them stood, so nothing on the way may change a tensor in
    place, apart from the chain itself. Nodes need `meta["val"]`, see FakeTensorProp.

    Args:
        node: the layer.
        constant: value of a node that is a known weight; None for any other node.
        channels_last: whether the result's channels are its last dimension (a linear layer), so
            that a batch norm only fits a result of two dimensions.
        residual: whether the layer can add one.
    """
    fusion = Fusion(node, [node])
    while len(fusion.end.users) == 1:
        user = next(iter(fusion.end.users))
        if user.op not in ("call_function", "call_method") or _mutation_between(node, user, fusion):
            break
        clamped = fusion.lower is not None or fusion.upper is not None
        if clamped or not (
            _take_batch_norm(user, fusion, constant, channels_last)
            or (residual and _take_residual(user, fusion))
            or _take_clamp(user, fusion)
        ):
            break
        fusion.end = user
        fusion.chain.append(user)
    return fusion


def clamp_bounds(node: fx.Node) -> tuple[float | None, float | None] | None:
    """The bounds that a node clamps its first argument to; None for any other node.

    Args:
        node: of a graph of torch.export or Dynamo.
    """
    lower: Any
    upper: Any
    if not node.args:
        return None
    if node.target in _RELU:
        lower, upper = 0.0, None
    elif node.target in _RELU6:
        lower, upper = 0.0, 6.0
    elif node.target in _CLAMPS:
        names, defaults = _CLAMPS[node.target]
        lower, upper = (argument(node, i + 1, names[i], defaults[i]) for i in range(2))
    else:
        return None
    if any(isinstance(bound, fx.Node) for bound in (lower, upper)):
        return None
    lower = None if lower is None else float(lower)
    upper = None if upper is None else float(upper)
    # Torch lets the upper bound win where the bounds cross; the kernels refuse such bounds.
    crossed = lower is not None and upper is not None and not lower <= upper
    if crossed or any(bound is not None and math.isnan(bound) for bound in (lower, upper)):
        return None
    return lower, upper


def is_mutating(node: fx.Node) -> bool:
    """Whether a node may change one of its arguments in place; True where that is not known."""
    if node.op == "call_method":
        name = str(node.target)
        return (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"
    if node.op == "call_function":
        schema = getattr(node.target, "_schema", None)
        if schema is not None:
            return bool(schema.is_mutable)
        name = getattr(node.target, "__name__", "_")
        if node.target is operator.setitem or name.startswith("__i") or name.endswith("_"):
            return True
        in_place = getattr(operator, name, None) is node.target and name[0] == "i" and name != "is_"
        flags = [*node.args, *node.kwargs.values()]
        return in_place or "out" in node.kwargs or any(flag is True for flag in flags)
    return node.op == "call_module"


def _mutation_between(first: fx.Node, last: fx.Node, fusion: Fusion) -> bool:
    node = first.next
    while node is not last:
        if node not in fusion.chain and is_mutating(node):
            return True
        node = node.next
    return False


def _take_batch_norm(
    user: fx.Node,
    fusion: Fusion,
    constant: Callable[[Any], Tensor | None],
    channels_last: bool,
) -> bool:
    if fusion.batch_norm or fusion.residual or not user.args or user.args[0] is not fusion.end:
        return False
    found = read_batch_norm(user, constant)
    if found is None or (channels_last and _rank(fusion.end) != 2):
        return False
    fusion.batch_norm, fusion.sources = found
    return True


def read_batch_norm(
    node: fx.Node, constant: Callable[[Any], Tensor | None]
) -> tuple[BatchNorm, list[fx.Node]] | None:
    """A node's eval-mode batch norm and the nodes of its constants; None for any other node.

    Args:
        node: of a graph of torch.export or Dynamo.
        constant: value of a node that is a known weight; None for any other node.
    """
    names = _BATCH_NORM.get(node.target)
    if names is None:
        return None
    given = {name: argument(node, i + 1, name) for i, name in enumerate(names)}
    training, eps = given.pop("training"), argument(node, _EPS_POSITION, "eps", 1e-5)
    values = {name: constant(other) for name, other in given.items()}
    known = all(values[name] is not None for name in given if given[name] is not None)
    mean, var = values["running_mean"], values["running_var"]
    if training or not known or mean is None or var is None or not isinstance(eps, float):
        return None
    norm = BatchNorm(mean, var, values["weight"], values["bias"], eps)
    return norm, [other for other in given.values() if isinstance(other, fx.Node)]


def _take_residual(user: fx.Node, fusion: Fusion) -> bool:
    if user.target not in _ADD | _ADD_IN_PLACE or fusion.residual or len(user.args) != 2:
        return False
    if user.kwargs.get("alpha", 1) != 1:
        return False
    first, second = user.args
    other = second if first is fusion.end else first
    # `other += layer(x)` changes `other`, which somebody else may still read.
    if other is fusion.end or (user.target in _ADD_IN_PLACE and first is not fusion.end):
        return False
    if not isinstance(other, fx.Node) or _shape(other) is None:
        return False
    if _shape(other) != _shape(fusion.end) or _type(other) != _type(fusion.end):
        return False
    fusion.residual = other
    return True


def _take_clamp(user: fx.Node, fusion: Fusion) -> bool:
    bounds = clamp_bounds(user)
    if bounds is None or user.args[0] is not fusion.end:
        return False
    fusion.lower, fusion.upper = bounds
    return True


def _value(node: fx.Node) -> Tensor | None:
    value = node.meta.get("val")
    return value if isinstance(value, Tensor) else None


def _shape(node: fx.Node) -> Sequence[int] | None:
    value = _value(node)
    return None if value is None else tuple(value.shape)


def _type(node: fx.Node) -> torch.dtype | None:
    value = _value(node)
    return None if value is None else value.dtype


def _rank(node: fx.Node) -> int:
    shape = _shape(node)
    return -1 if shape is None else len(shape)
