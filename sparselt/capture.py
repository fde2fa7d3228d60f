# SPDX-License-Identifier: Apache-2.0
"""Captures a model as a graph by torch.export, for one set of shapes or for a family of them."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from sparselt.errors import SparseltError

if TYPE_CHECKING:
    from torch.export import ExportedProgram

__all__ = ["CaptureError", "Captured", "capture"]

# Torch's modules that log a failed trace.
_TALKATIVE = (
    "torch._export.non_strict_utils",
    "torch._subclasses.fake_tensor",
    "torch.fx.experimental.symbolic_shapes",
)


class CaptureError(SparseltError, RuntimeError):
    """A model cannot be captured as one graph; it is converted layer by layer instead."""


@dataclass
class Captured:
    """A model as a graph without side effects.

    Attributes:
        module: the graph; its placeholders are constants and inputs, in this order.
        constants: the values of the first placeholders.
        names: their names in the model.
        shapes: for each input, its sizes, None where any size is right; None for no tensor.
        types: the inputs' dtypes; None for no tensor.
        output_spec: how the flat outputs make up the model's result.
        guards: raises AssertionError for inputs that the graph was not captured for.
        input_spec: how the flat inputs make up (args, kwargs).
        others: the inputs that are no tensors, None in place of those that are; they are fixed.
        bound: whether `guards` asks for more of the sizes than `shapes` says.
    """

    module: fx.GraphModule
    constants: list[Tensor]
    names: list[str]
    shapes: list[list[int | None] | None]
    types: list[torch.dtype | None]
    output_spec: pytree.TreeSpec
    guards: Any
    input_spec: pytree.TreeSpec
    others: list[Any]
    bound: bool = True

    def accepts(self, leaves: Sequence[Any], spec: pytree.TreeSpec) -> bool:
        """Whether the graph is right for these flat inputs."""
        if spec != self.input_spec or len(leaves) != len(self.shapes):
            return False
        for i, leaf in enumerate(leaves):
            shape = self.shapes[i]
            if shape is None:
                if isinstance(leaf, Tensor) or leaf != self.others[i]:
                    return False
            elif not _fits(leaf, shape, self.types[i]):
                return False
        if self.guards is None:
            return True
        try:
            self.guards(*leaves)
        except AssertionError:
            return False
        return True


def capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    varying: Sequence[set[int]] | None = None,
) -> Captured:
    """The graph of an eval-mode model.

    Args:
        model: parameters and buffers are constants of the graph; not changed.
        args: positional example inputs.
        kwargs: keyword example inputs.
        varying: for each flat input, the dimensions whose size may change from call to call; None
            for none. Those that the model turns out to depend on are fixed nevertheless.

    Raises:
        CaptureError: the model cannot be captured, or changes its buffers or inputs.
    """
    # Imported on use: it takes 70 MiB, which a program from a file does without.
    from torch.export import Dim, ShapesCollection

    leaves, spec = pytree.tree_flatten((args, kwargs))
    shapes = None
    if varying is not None:
        collection = ShapesCollection()  # type: ignore[no-untyped-call]
        for leaf, dims in zip(leaves, varying, strict=True):
            if isinstance(leaf, Tensor) and any(dim < leaf.dim() for dim in dims):
                collection[leaf] = {dim: Dim.AUTO for dim in dims if dim < leaf.dim()}
        shapes = collection.dynamic_shapes(model, args, kwargs)  # type: ignore[no-untyped-call]
    try:
        with torch.no_grad(), _quiet():
            exported = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        # Whatever a model's own code raises under tracing ends here, and is told by `explain`.
        line = str(error).strip().split("\n")[0]
        raise CaptureError(f"torch.export: {type(error).__name__}: {line}") from error
    others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return _read(exported, spec, others)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps torch from printing a failed trace: the failure is reported in a sentence."""
    levels = {logger: logger.level for logger in map(logging.getLogger, _TALKATIVE)}
    for logger in levels:
        logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def _read(exported: ExportedProgram, input_spec: pytree.TreeSpec, others: list[Any]) -> Captured:
    from torch.export.graph_signature import InputKind, OutputKind

    signature = exported.graph_signature
    kinds = {spec.kind for spec in signature.output_specs}
    if kinds - {OutputKind.USER_OUTPUT}:
        raise CaptureError("the model changes its buffers or inputs when it runs")
    constants, names = [], []
    placeholders = [node for node in exported.graph.nodes if node.op == "placeholder"]
    shapes: list[list[int | None] | None] = []
    types: list[torch.dtype | None] = []
    for node, spec in zip(placeholders, signature.input_specs, strict=True):
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            if shapes:
                raise CaptureError("torch.export put an input before a constant")
            name = str(spec.target)
            known = exported.state_dict.get(name, exported.constants.get(name))
            if not isinstance(known, Tensor):
                raise CaptureError(f"{name} is no tensor")
            if any(_changes(user, node) for user in node.users):
                raise CaptureError(f"the model changes {name} when it runs")
            constants.append(known)
            names.append(name)
        elif spec.kind is InputKind.USER_INPUT:
            value = node.meta.get("val")
            tensor = isinstance(value, Tensor)
            sizes = (
                [size if isinstance(size, int) else None for size in value.shape]
                if tensor
                else None
            )
            shapes.append(sizes)
            types.append(value.dtype if tensor else None)
        else:
            raise CaptureError(f"an input of kind {spec.kind.name}")
    guards = getattr(exported.module(), "_guards_fn", None)
    bounded = any(str(bounds.upper) != "int_oo" for bounds in exported.range_constraints.values())
    bound = bounded or bool(getattr(exported, "_guards_code", True))
    output_spec = exported.call_spec.out_spec
    assert output_spec is not None
    return Captured(
        exported.graph_module,
        constants,
        names,
        shapes,
        types,
        output_spec,
        guards,
        input_spec,
        others,
        bound,
    )


def _changes(user: fx.Node, value: fx.Node) -> bool:
    schema = getattr(user.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable) and value in user.args[:1]


def _fits(leaf: Any, shape: Sequence[int | None], dtype: torch.dtype | None) -> bool:
    if not isinstance(leaf, Tensor) or leaf.dim() != len(shape) or leaf.dtype is not dtype:
        return False
    return all(want is None or want == got for want, got in zip(shape, leaf.shape, strict=True))
