# SPDX-License-Identifier: Apache-2.0
"""Captured graphs as plain lists, and back, for the file of a program.

Torch writes a graph out as Python source to run it, so nothing of a file may reach that source
unchecked: names are made anew, and operators, their keywords and their constants are looked up.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

__all__ = ["GraphTextError", "read_graph", "read_structure", "text_of", "write_structure"]

# Operators of inference that read nothing but their arguments.
_ATEN_NAMES = """
_assert_tensor_metadata _softmax _to_copy abs adaptive_avg_pool1d adaptive_avg_pool2d
adaptive_max_pool2d add add_ addmm alias amax amin any arange argmax argmin avg_pool1d
avg_pool2d baddbmm batch_norm bmm broadcast_tensors cat celu channel_shuffle chunk clamp clamp_
clamp_max clamp_min clone concat constant_pad_nd contiguous conv1d conv2d convolution cos cumsum
detach detach_ div div_ dropout dropout_ einsum elu elu_ embedding eq erf exp expand expand_as
feature_dropout flatten floor full full_like ge gelu glu group_norm gt hardsigmoid hardsigmoid_
hardswish hardswish_ hardtanh hardtanh_ instance_norm layer_norm le leaky_relu leaky_relu_
lift_fresh_copy linear log log_softmax logical_and logical_not logical_or lt masked_fill matmul
max max_pool1d max_pool2d maximum mean min minimum mish mish_ mm movedim mul mul_ narrow ne neg
new_ones new_zeros numpy_T ones ones_like pad permute pixel_shuffle pixel_unshuffle pow prelu
reciprocal relu relu6 relu6_ relu_ repeat repeat_interleave reshape rms_norm roll rsqrt
scalar_tensor scaled_dot_product_attention select selu selu_ sigmoid sigmoid_ silu silu_ sin
slice softmax softplus split split_with_sizes sqrt square squeeze stack sub sub_ sum swapaxes
sym_size t tanh tanh_ tile to transpose tril triu unbind unflatten unsqueeze upsample_bilinear2d
upsample_nearest2d var view view_as where zeros zeros_like
"""
_ATEN = frozenset(_ATEN_NAMES.split())
_PYTHON: dict[str, Callable[..., Any]] = {
    name: getattr(operator, name)
    for name in ("add", "sub", "mul", "floordiv", "mod", "neg", "truediv", "getitem")
}
_CONSTANTS: dict[str, Any] = {
    str(value): value
    for value in (
        *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
        *(torch.contiguous_format, torch.channels_last, torch.preserve_format, torch.strided),
    )
}
_DEEPEST = 32


class GraphTextError(Exception):
    """A graph cannot be written, or its text is not one that was written here."""


def text_of(graph: fx.Graph) -> list[dict[str, Any]]:
    """A graph as JSON values, its nodes in order.

    Raises:
        GraphTextError: it calls an operator that is not in the list of harmless ones, or holds a
            constant that has no text.
    """
    places = {node: i for i, node in enumerate(graph.nodes)}
    lines: list[dict[str, Any]] = []
    for node in graph.nodes:
        if node.op == "placeholder":
            lines.append({"op": "placeholder"})
        elif node.op == "output":
            lines.append({"op": "output", "args": _write(node.args, places)})
        else:
            target = _name(node)
            kwargs = {key: _write(value, places) for key, value in node.kwargs.items()}
            lines.append({"op": target, "args": _write(node.args, places), "kwargs": kwargs})
    return lines


def read_graph(lines: Sequence[Mapping[str, Any]], inputs: int) -> fx.GraphModule:
    """The inverse of `text_of`; the nodes are called n0, n1 ...

    Args:
        lines: the nodes.
        inputs: how many placeholders there must be.

    Raises:
        GraphTextError: the text is not one of a graph.
    """
    graph = fx.Graph()
    nodes: list[fx.Node] = []
    for i, line in enumerate(lines):
        kind, name = line["op"], f"n{i}"
        if kind == "placeholder":
            if i >= inputs:
                raise GraphTextError("the graph has more inputs than the header says")
            nodes.append(graph.create_node("placeholder", name, name=name))
            continue
        args = _read(line["args"], nodes)
        if not isinstance(args, tuple):
            raise GraphTextError("the arguments of a call are no tuple")
        if kind == "output":
            if i != len(lines) - 1 or len(args) != 1:
                raise GraphTextError("the result is not the last node")
            graph.output(args[0])
            break
        target, keywords = _target(kind)
        kwargs = {key: _read(value, nodes) for key, value in line["kwargs"].items()}
        if not set(kwargs) <= keywords:
            raise GraphTextError(f"{kind} takes no such keywords")
        numbers = (fx.Node, int, float)
        if kind.startswith("operator.") and not all(isinstance(arg, numbers) for arg in args):
            raise GraphTextError(f"{kind} of something that is no number")
        nodes.append(graph.create_node("call_function", target, args, kwargs, name))
    if sum(node.op == "placeholder" for node in nodes) != inputs or len(nodes) != len(lines) - 1:
        raise GraphTextError("the graph is not whole")
    if [node.name for node in nodes] != [f"n{i}" for i in range(len(nodes))]:
        raise GraphTextError("the nodes' names are taken")
    graph.lint()
    return fx.GraphModule({}, graph)


def write_structure(spec: pytree.TreeSpec) -> Any:
    """How nested tuples, lists and dictionaries hold a flat list, as JSON values.

    Raises:
        GraphTextError: another kind of container.
    """
    return _write_nest(pytree.tree_unflatten([None] * spec.num_leaves, spec))


def read_structure(text: Any) -> pytree.TreeSpec:
    """The inverse of `write_structure`."""
    return pytree.tree_structure(_read_nest(text))


def _write_nest(value: Any) -> Any:
    if value is None:
        return None
    if type(value) in (tuple, list):
        return {type(value).__name__: [_write_nest(item) for item in value]}
    if type(value) is dict and all(isinstance(key, str) for key in value):
        return {"dict": [[key, _write_nest(item)] for key, item in value.items()]}
    kind = type(value).__name__
    raise GraphTextError(f"a {kind} among arguments or results has no place in the file")


def _read_nest(text: Any, depth: int = 0) -> Any:
    if text is None:
        return None
    if depth > _DEEPEST:
        raise GraphTextError("nested too deep")
    ((kind, items),) = text.items()
    if kind == "dict":
        return {str(key): _read_nest(item, depth + 1) for key, item in items}
    nested = [_read_nest(item, depth + 1) for item in items]
    if kind not in ("tuple", "list"):
        raise GraphTextError(f"an unknown container {kind!r}")
    return tuple(nested) if kind == "tuple" else nested


def _name(node: fx.Node) -> str:
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        name = str(target)
        space, _, rest = name.partition(".")
        if space == "aten" and rest.partition(".")[0] in _ATEN:
            return name
    for name, function in _PYTHON.items():
        if target is function:
            return f"operator.{name}"
    raise GraphTextError(f"the operation {target} is not among those that a program's file holds")


def _target(name: Any) -> tuple[Callable[..., Any], set[str]]:
    """The function of a name, and the keywords that it takes."""
    space, *rest = str(name).split(".")
    if space == "operator" and len(rest) == 1 and rest[0] in _PYTHON:
        return _PYTHON[rest[0]], set()
    if space != "aten" or len(rest) != 2 or rest[0] not in _ATEN:
        raise GraphTextError(f"an unknown operation {name!r}")
    packet = getattr(torch.ops.aten, rest[0])
    if rest[1] not in packet.overloads():
        raise GraphTextError(f"an unknown operation {name!r}")
    target = getattr(packet, rest[1])
    return target, {argument.name for argument in target._schema.arguments}


def _write(value: Any, places: Mapping[fx.Node, int]) -> Any:
    if isinstance(value, fx.Node):
        return {"node": places[value]}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, tuple):
        return {"tuple": [_write(item, places) for item in value]}
    if isinstance(value, list):
        return [_write(item, places) for item in value]
    if str(value) in _CONSTANTS:
        return {"constant": str(value)}
    if isinstance(value, torch.device) and value.type == "cpu":
        return {"device": "cpu"}
    raise GraphTextError(f"the constant {value!r} of a graph has no place in the file")


def _read(text: Any, nodes: Sequence[fx.Node], depth: int = 0) -> Any:
    if depth > _DEEPEST:
        raise GraphTextError("nested too deep")
    if isinstance(text, list):
        return [_read(item, nodes, depth + 1) for item in text]
    if not isinstance(text, dict):
        return text
    ((kind, value),) = text.items()
    if kind == "node" and type(value) is int and 0 <= value < len(nodes):
        return nodes[value]
    if kind == "tuple":
        return tuple(_read(item, nodes, depth + 1) for item in value)
    if kind == "float" and value in ("inf", "-inf", "nan"):
        return float(value)
    if kind == "constant" and value in _CONSTANTS:
        return _CONSTANTS[value]
    if kind == "device" and value == "cpu":
        return torch.device("cpu")
    raise GraphTextError(f"an unknown constant {str(text)[:80]}")
