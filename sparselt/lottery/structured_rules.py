# SPDX-License-Identifier: Apache-2.0
"""What each operation does to channels: one rule an operation.

To teach an operation, write a function ``(walk, node, arguments) -> Stream | None`` and add its
names to ``RULES``. Operations without a rule keep every channel they read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from sparselt.lottery.structured_graph import Stream, Walk, shape_of

__all__ = ["RULES", "apply_rule"]

Arguments = Mapping[str, Any]
Rule = Callable[[Walk, Any, Arguments], "Stream | None"]


class _StaysError(Exception):
    """A rule does not cover this use of its operation; says why."""


def apply_rule(walk: Walk, node: Any) -> None:
    """Follows the channels through ``node``; keeps all it reads where no rule covers it."""
    name, pointwise = _operation(node)
    if name.startswith("_assert"):
        return
    rule = _elementwise if pointwise and name not in RULES else RULES.get(name)
    if rule is None:
        walk.fix_all(node, f"{name} ({node.name}) mixes or counts channels")
        return
    try:
        stream = rule(walk, node, _arguments(node))
    except _StaysError as why:
        walk.fix_all(node, f"{name} ({node.name}) {why}")
        return
    if stream is None:
        walk.fix_parameters(node, f"{name} ({node.name}) computes with its weights")
    else:
        walk.streams[node] = stream


def convolution(walk: Walk, node: Any, arguments: Arguments) -> Stream:
    """A filter is a channel of the output; its kernels follow the channels of the input."""
    source, weight = arguments["input"], _parameter(walk, arguments["weight"])
    shape, groups = shape_of(arguments["weight"]), int(arguments["groups"])
    out_axis = len(shape_of(node)) - len(shape) + 1
    rows = walk.axis(weight, 0, shape[0])
    _tie_bias(walk, arguments.get("bias"), rows)
    stream = walk.streams.get(source)
    if stream is not None and stream.axis != out_axis:
        raise _StaysError("reads another axis than channels")
    if groups == 1:
        if stream is not None:
            walk.tie(stream.labels, walk.axis(weight, 1, shape[1]))
        return Stream(rows, out_axis)
    # A grouped convolution must keep groups of one size, so a whole group is one channel;
    # a depthwise one is the case of one input a group.
    blocks = rows.reshape(groups, -1)
    walk.tie(blocks[:, :-1].reshape(-1), blocks[:, 1:].reshape(-1))
    if stream is None:
        walk.fix(rows, f"its {groups} groups read channels that stay")
    else:
        inputs = stream.labels.reshape(groups, -1)
        walk.tie(inputs.reshape(-1), np.repeat(blocks[:, 0], inputs.shape[1]))
    return Stream(rows, out_axis)


def linear(walk: Walk, node: Any, arguments: Arguments) -> Stream:
    """A row is a channel of the output; columns follow the channels of the input."""
    source, weight = arguments["input"], _parameter(walk, arguments["weight"])
    rows, columns = shape_of(arguments["weight"])
    stream, last = walk.streams.get(source), len(shape_of(source)) - 1
    if stream is not None and stream.axis != last:
        raise _StaysError("reads another axis than channels")
    if stream is not None:
        walk.tie(stream.labels, walk.axis(weight, 1, columns))
    labels = walk.axis(weight, 0, rows)
    _tie_bias(walk, arguments.get("bias"), labels)
    return Stream(labels, last)


def normalisation(walk: Walk, node: Any, arguments: Arguments) -> Stream | None:
    """Batch and instance norm treat each channel of axis 1 alone."""
    stream = walk.streams.get(arguments["input"])
    if stream is None:
        return None
    if stream.axis != 1:
        raise _StaysError("normalises another axis than channels")
    for part in ("weight", "bias", "running_mean", "running_var"):
        _tie_bias(walk, arguments.get(part), stream.labels)
    return stream


def prelu(walk: Walk, node: Any, arguments: Arguments) -> Stream | None:
    """One slope for all, or one a channel of axis 1."""
    stream = walk.streams.get(arguments["self"])
    if stream is None or math.prod(shape_of(arguments["weight"])) == 1:
        return stream
    if stream.axis != 1:
        raise _StaysError("has its slopes on another axis than channels")
    _tie_bias(walk, arguments["weight"], stream.labels)
    return stream


def same(walk: Walk, node: Any, arguments: Arguments) -> Stream | None:
    """Leaves every channel where it is: dropout, copies."""
    return walk.streams.get(node.args[0])


def over_space(walk: Walk, node: Any, arguments: Arguments) -> Stream | None:
    """Works within a channel: pooling, upsampling."""
    stream = walk.streams.get(node.args[0])
    trailing = int(_operation(node)[0][-2])
    if stream is not None and stream.axis >= len(shape_of(node)) - trailing:
        raise _StaysError("works across channels")
    return stream


def padding(walk: Walk, node: Any, arguments: Arguments) -> Stream | None:
    """Padding of height and width; padded channels are counted in the network's own code."""
    source, amounts = arguments["self"], list(arguments["pad"])
    stream = walk.streams.get(source)
    if stream is None:
        return None
    index = 2 * (len(shape_of(source)) - 1 - stream.axis)
    if any(amounts[index : index + 2]):
        raise _StaysError("adds channels, so their number must stay")
    return stream


def along_axis(walk: Walk, node: Any, arguments: Arguments) -> Stream | None:
    """Slices, selects, sums or averages along axes other than that of the channels."""
    source = node.args[0]
    stream, rank = walk.streams.get(source), len(shape_of(source))
    if stream is None:
        return None
    given = arguments.get("dim")
    # No axes, or an empty list of them, means all.
    axes = [given % rank] if isinstance(given, int) else [axis % rank for axis in given or ()]
    axes = axes or list(range(rank))
    if stream.axis in axes:
        raise _StaysError("works across channels")
    vanish = len(shape_of(node)) < rank
    return Stream(stream.labels, stream.axis - sum(axis < stream.axis for axis in axes) * vanish)


def concatenation(walk: Walk, node: Any, arguments: Arguments) -> Stream | None:
    """Channels side by side; along another axis the same channels."""
    sources = list(arguments["tensors"])
    streams = [walk.streams.get(source) for source in sources]
    known = [stream for stream in streams if stream is not None]
    if not known:
        return None
    axis = known[0].axis
    if any(stream.axis != axis for stream in known):
        raise _StaysError("joins channels that lie on different axes")
    if int(arguments["dim"]) % len(shape_of(node)) != axis:
        if len(known) < len(streams):
            raise _StaysError("joins channels with channels that stay")
        for stream in known[1:]:
            walk.tie(known[0].labels, stream.labels)
        return known[0]
    labels = []
    for source, found in zip(sources, streams, strict=True):
        if found is None:
            outside = walk.fresh(shape_of(source)[axis])
            walk.fix(outside, f"{node.name} joins channels that stay")
            labels.append(outside)
        else:
            labels.append(found.labels)
    return Stream(np.concatenate(labels), axis)


def permutation(walk: Walk, node: Any, arguments: Arguments) -> Stream | None:
    """Axes in another order."""
    source = node.args[0]
    stream, rank = walk.streams.get(source), len(shape_of(source))
    if stream is None:
        return None
    order = list(range(rank))
    if "dims" in arguments:
        order = [axis % rank for axis in arguments["dims"]]
    else:
        first, second = arguments["dim0"] % rank, arguments["dim1"] % rank
        order[first], order[second] = second, first
    return Stream(stream.labels, order.index(stream.axis))


def reshaping(walk: Walk, node: Any, arguments: Arguments) -> Stream | None:
    """A flatten gives each channel several positions; other axes may change as they like."""
    stream = walk.streams.get(node.args[0])
    if stream is None:
        return None
    old, new = shape_of(node.args[0]), shape_of(node)
    # The new axis holds the old axes from `first` up to, not including, `end`, channels among them.
    for first in range(stream.axis, -1, -1):
        for end in range(stream.axis + 1, len(old) + 1):
            for axis, size in enumerate(new):
                same_start = math.prod(new[:axis]) == math.prod(old[:first])
                if same_start and size == math.prod(old[first:end]):
                    inner = math.prod(old[stream.axis + 1 : end])
                    outer = math.prod(old[first : stream.axis])
                    return Stream(np.tile(np.repeat(stream.labels, inner), outer), axis)
    raise _StaysError(f"splits channels: {old} becomes {new}")


def _elementwise(walk: Walk, node: Any, arguments: Arguments) -> Stream | None:
    """Ties the channels of all operands; parameters of one value a channel go with them."""
    rank = len(shape_of(node))
    operands = [operand for operand in node.all_input_nodes if shape_of(operand)]
    streams = [(walk.streams[o], rank - len(shape_of(o))) for o in operands if o in walk.streams]
    if not streams:
        return None
    labels, axis = streams[0][0].labels, streams[0][0].axis + streams[0][1]
    for stream, shift in streams:
        if stream.axis + shift != axis or len(stream.labels) != len(labels):
            raise _StaysError("combines channels that lie on different axes")
        walk.tie(labels, stream.labels)
    for operand in operands:
        own = axis - (rank - len(shape_of(operand)))
        if operand in walk.streams or own < 0 or shape_of(operand)[own] == 1:
            continue
        if operand not in walk.parameters:
            raise _StaysError("combines channels with values whose number stays")
        walk.tie(labels, walk.axis(walk.parameters[operand], own, len(labels)))
    return Stream(labels, axis)


def _parameter(walk: Walk, node: Any) -> str:
    if node not in walk.parameters:
        raise _StaysError("has a weight that is computed; bake pruning and parametrizations first")
    return walk.parameters[node]


def _tie_bias(walk: Walk, node: Any, labels: Any) -> None:
    """Ties a tensor of one value a channel, where it is there."""
    if node is None:
        return
    walk.tie(labels, walk.axis(_parameter(walk, node), 0, len(labels)))


def _operation(node: Any) -> tuple[str, bool]:
    """Name without overload, as ``conv2d``; and whether it works element by element."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return str(getattr(node.target, "__name__", node.target)), False
    return schema.name.partition("::")[2].rstrip("_"), torch.Tag.pointwise in node.target.tags


def _arguments(node: Any) -> Arguments:
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {}
    values = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    values.update(zip((a.name for a in schema.arguments), node.args, strict=False))
    return {**values, **node.kwargs}


RULES: dict[str, Rule] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), convolution),
    "linear": linear,
    **dict.fromkeys(("batch_norm", "instance_norm"), normalisation),
    "prelu": prelu,
    **dict.fromkeys(("dropout", "feature_dropout", "alpha_dropout"), same),
    **dict.fromkeys(("clone", "contiguous", "detach", "alias", "lift_fresh_copy", "to"), same),
    **dict.fromkeys(("max_pool1d", "max_pool2d", "max_pool3d"), over_space),
    **dict.fromkeys(("avg_pool1d", "avg_pool2d", "avg_pool3d"), over_space),
    **dict.fromkeys(("adaptive_avg_pool1d", "adaptive_avg_pool2d"), over_space),
    **dict.fromkeys(("adaptive_avg_pool3d",), over_space),
    **dict.fromkeys(("upsample_nearest1d", "upsample_nearest2d"), over_space),
    **dict.fromkeys(("upsample_bilinear2d", "upsample_bicubic2d"), over_space),
    **dict.fromkeys(("pad", "constant_pad_nd"), padding),
    **dict.fromkeys(("slice", "select", "mean", "sum", "amax"), along_axis),
    **dict.fromkeys(("cat", "concat"), concatenation),
    **dict.fromkeys(("permute", "transpose"), permutation),
    **dict.fromkeys(("view", "reshape", "flatten", "squeeze", "unsqueeze"), reshaping),
    **dict.fromkeys(("_unsafe_view",), reshaping),
    # Element by element, though torch does not tag them so.
    **dict.fromkeys(("expand", "hardswish", "log_sigmoid"), _elementwise),
}
