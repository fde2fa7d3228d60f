# SPDX-License-Identifier: Apache-2.0
"""The file of a compiled program: graphs, weights and choices, and nothing that could run.

One safetensors file. Weights are plain tensors, or one bit a weight and the kept values. The JSON
header holds the captured graphs as lists of operators, each of which must be in a list of harmless
ones here, and the plans made for each size. Torch's own file of an exported graph unpickles; this
one does not, and cannot hold every graph in return.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from sparselt import ops
from sparselt.capture import Captured
from sparselt.errors import (
    OptionError,
    ProgramFileError,
    SparseltError,
    TicketFileError,
    explain_mismatch,
)
from sparselt.family import Bucket, Family
from sparselt.graph_text import GraphTextError, read_graph, read_structure, text_of, write_structure
from sparselt.images import IMAGES
from sparselt.plan import DENSE, Plan
from sparselt.shelf import Shelf
from sparselt.tickets.file import count_bits, pack_bits, read_safetensors, replace_file
from sparselt.tune import machine

__all__ = ["FORMAT", "VERSION", "Loaded", "read_program", "write_program"]

FORMAT = "sparselt.program"
VERSION = "1"
_PLAIN = (bool, int, float, str, type(None))
_TYPES = {str(d).removeprefix("torch."): d for d in (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool,
)}  # fmt: skip


@dataclass
class Loaded:
    """One graph of a file.

    Attributes:
        captured: the graph.
        plans: as saved, by bucket and node name; empty where they are another machine's.
        together: by bucket, how many samples run at a time, where not all do.
        prepacked: the buckets that run dense with prepacked weights.
        seen: the shapes that the program had run before it was saved, one a call.
    """

    captured: Captured
    plans: dict[Bucket, dict[str, Plan]] = field(default_factory=dict)
    together: dict[Bucket, int] = field(default_factory=dict)
    prepacked: set[Bucket] = field(default_factory=set)
    seen: list[list[tuple[int, ...] | None]] = field(default_factory=list)


def write_program(path: Path, families: Sequence[Family], title: str) -> None:
    """Writes graphs, weights and plans; the weights must be out of the shelf.

    Raises:
        OptionError: a graph holds what the file cannot.
    """
    parts: dict[str, Tensor] = {}
    tensors: list[dict[str, Any]] = []
    places: dict[int, int] = {}
    texts = []
    for family in families:
        captured = family.captured
        for tensor in captured.constants:
            if id(tensor) not in places:
                places[id(tensor)] = len(tensors)
                tensors.append(_put(parts, str(len(tensors)), tensor))
        texts.append(_text(family, [places[id(tensor)] for tensor in captured.constants]))
    header = {
        "title": title,
        "machine": machine(),
        "tensors": tensors,
        "graphs": texts,
    }
    text = json.dumps(header, allow_nan=False)
    digest = _digest(text, parts)
    metadata = {"format": FORMAT, "version": VERSION, "sparselt": text, "sha256": digest}
    replace_file(path, safetensors.torch.save(parts, metadata=metadata))


def read_program(path: Path, shelf: Shelf) -> tuple[str, list[Loaded]]:
    """The title and the graphs of a file; weights that are not stored plainly are on the shelf.

    Raises:
        ProgramFileError: there is no such file, or it is damaged, hostile or of another version.
    """
    if not path.is_file():
        raise ProgramFileError(f"{path}: there is no such file")
    try:
        parts, metadata = read_safetensors(path)
    except TicketFileError as error:  # which names the file
        raise ProgramFileError(str(error)) from error
    try:
        return _read(parts, metadata, shelf)
    except (SparseltError, GraphTextError) as error:
        raise ProgramFileError(f"{path}: {error}") from error
    except Exception as error:
        # Whatever the header of a hostile file trips over, the file is what is wrong.
        kind = type(error).__name__
        raise ProgramFileError(f"{path}: the header is not readable: {kind}: {error}") from error


def _read(
    parts: dict[str, Tensor], metadata: Mapping[str, str], shelf: Shelf
) -> tuple[str, list[Loaded]]:
    for key, want in (("format", FORMAT), ("version", VERSION)):
        if metadata.get(key) != want:
            raise ProgramFileError(explain_mismatch(key, want, metadata.get(key)))
    text = metadata.get("sparselt", "")
    if metadata.get("sha256") != _digest(text, parts):
        raise ProgramFileError("the checksum does not match; the file was altered")
    header = json.loads(text)
    tensors = [_take(parts, str(i), entry, shelf) for i, entry in enumerate(header["tensors"])]
    if parts:
        raise ProgramFileError("tensors that the header does not name")
    same = header["machine"] == machine()
    loaded = [_loaded(graph, tensors, same) for graph in header["graphs"]]
    if not loaded:
        raise ProgramFileError("no graph")
    return str(header["title"]), loaded


def _text(family: Family, constants: list[int]) -> dict[str, Any]:
    """One graph as JSON."""
    captured = family.captured
    names = [node.name for node in captured.module.graph.nodes]
    if any(not isinstance(other, _PLAIN) for other in captured.others):
        raise OptionError("save: an argument of the call is neither a tensor nor a plain value")
    try:
        nodes = text_of(captured.module.graph)
        structures = [write_structure(s) for s in (captured.input_spec, captured.output_spec)]
    except GraphTextError as error:
        raise OptionError(f"save: {error}; save the model and compile it where it runs") from error
    plans = [
        [
            bucket,
            {str(names.index(node)): _plan_text(plan) for node, plan in found.plans.items()},
            found.together,
            found.prepacked,
        ]
        for bucket, found in family.planned.items()
    ]
    return {
        "nodes": nodes,
        "constants": constants,
        "names": captured.names,
        "input": structures[0],
        "output": structures[1],
        "shapes": captured.shapes,
        "types": [None if t is None else str(t).removeprefix("torch.") for t in captured.types],
        "others": captured.others,
        "bound": captured.bound,
        "seen": sorted(family.seen, key=str),
        "plans": plans,
    }


def _loaded(text: Mapping[str, Any], tensors: Sequence[Tensor], same_machine: bool) -> Loaded:
    constants = [tensors[_index(i)] for i in text["constants"]]
    shapes = [None if s is None else [_size(n) for n in s] for s in text["shapes"]]
    others = [_plain(other) for other in text["others"]]
    types = [None if name is None else _TYPES[name] for name in text["types"]]
    names = [str(name) for name in text["names"]]
    seen = [[None if s is None else tuple(map(_index, s)) for s in one] for one in text["seen"]]
    if not len(shapes) == len(types) == len(others) or len(names) != len(constants):
        raise ProgramFileError("the header's lists differ in length")
    graph = read_graph(text["nodes"], len(constants) + len(shapes))
    bound = bool(text["bound"])
    captured = Captured(
        graph,
        constants,
        names,
        shapes,
        types,
        read_structure(text["output"]),
        _Seen(seen) if bound else None,
        read_structure(text["input"]),
        others,
        bound,
    )
    plans: dict[Bucket, dict[str, Plan]] = {}
    together: dict[Bucket, int] = {}
    prepacked: set[Bucket] = set()
    for bucket, entries, samples, is_prepacked in text["plans"] if same_machine else ():
        key = tuple(tuple(map(_index, part)) for part in bucket)
        plans[key] = {f"n{int(node)}": _plan(entry) for node, entry in entries.items()}
        if _together(samples):
            together[key] = samples
        if is_prepacked:
            prepacked.add(key)
    return Loaded(captured, plans, together, prepacked, seen)


class _Seen:
    """Stands in for the conditions of a graph that depends on sizes: only known ones pass."""

    def __init__(self, seen: Sequence[Any]) -> None:
        self.seen = seen

    def __call__(self, *leaves: Any) -> None:
        """Raises AssertionError for sizes that the program had not run before it was saved."""
        if _shapes(leaves) not in self.seen:
            raise AssertionError("sizes that the saved program had not run")


def _shapes(leaves: Sequence[Any]) -> list[tuple[int, ...] | None]:
    return [tuple(leaf.shape) if isinstance(leaf, Tensor) else None for leaf in leaves]


def _put(parts: dict[str, Tensor], name: str, tensor: Tensor) -> dict[str, Any]:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in _TYPES:
        raise OptionError(f"save: a weight of type {dtype} has no place in the file")
    plain = tensor.detach().cpu().contiguous()
    kept = plain != 0
    saved = (plain.numel() - int(kept.count_nonzero())) * plain.element_size()
    if saved > (plain.numel() + 7) // 8:
        parts[f"{name}.bits"], parts[f"{name}.values"] = pack_bits(kept), plain[kept].clone()
    else:
        parts[name] = plain.clone()
    return {"shape": list(tensor.shape), "dtype": dtype}


def _take(parts: dict[str, Tensor], name: str, entry: Mapping[str, Any], shelf: Shelf) -> Tensor:
    shape, dtype = [_index(n) for n in entry["shape"]], _TYPES[entry["dtype"]]
    if name in parts:
        tensor = parts.pop(name)
    else:
        bits, values = parts.pop(f"{name}.bits"), parts.pop(f"{name}.values")
        if values.shape != (count_bits(bits, math.prod(shape)),):
            raise ProgramFileError(f"tensor {name}: its bits and its values disagree")
        tensor = shelf.adopt(bits, values, shape)
    if list(shelf.outline(tensor).shape) != shape or tensor.dtype is not dtype:
        raise ProgramFileError(explain_mismatch(f"tensor {name}", entry, tuple(tensor.shape)))
    return tensor


def _plan_text(plan: Plan) -> dict[str, Any]:
    text = asdict(plan)
    del text["candidates"]
    return text


def _plan(text: Mapping[str, Any]) -> Plan:
    kernel, block = text["kernel"], tuple(map(_index, text["block"]))
    known = {info.name: info.format for info in ops.kernels() if info.usable}
    if {DENSE: DENSE, **known}.get(kernel) != text["format"] or len(block) != 2 or 0 in block:
        raise ProgramFileError(f"a plan with kernel {kernel!r}, which is none of this machine's")
    dense_us, sparse_us = (
        None if text[key] is None else float(text[key]) for key in ("dense_us", "sparse_us")
    )
    reason, shape = str(text["reason"]), (block[0], block[1])
    return Plan(kernel, text["format"], reason, (), dense_us, sparse_us, shape)


def _together(value: Any) -> int:
    if type(value) is not int or value not in (0, 1, IMAGES):
        want = f"0 (all of a batch), 1 or {IMAGES}"
        raise ProgramFileError(explain_mismatch("samples at a time", want, value))
    return value


def _plain(value: Any) -> Any:
    if not isinstance(value, _PLAIN):
        raise ProgramFileError("an argument that is no plain value")
    return value


def _index(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ProgramFileError(explain_mismatch("a number of the header", "a natural one", value))
    return value


def _size(value: Any) -> int | None:
    return None if value is None else _index(value)


def _digest(header: str, parts: Mapping[str, Tensor]) -> str:
    """SHA-256 over the header, and over names, types, shapes and bytes of the tensors."""
    total = hashlib.sha256(header.encode())
    for name in sorted(parts):
        tensor = parts[name].contiguous()
        total.update(f"|{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
