# SPDX-License-Identifier: Apache-2.0
"""A pruned network as one callable.

`compile` captures the model with torch.export, lowers what gains, and runs the rest in torch. Each
new set of input shapes is checked against the captured graph on first use: the graph is planned
again for it (for a power of two of sizes at a time), or captured again, and the result is kept.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparselt import dynamo as _dynamo  # noqa: F401  registers the backend
from sparselt.capture import Captured, CaptureError, capture
from sparselt.conversion import as_call, convert, densify, prepare
from sparselt.errors import OptionError
from sparselt.explanation import Explanation, explain
from sparselt.family import Family, Planned, Run
from sparselt.shelf import Shelf
from sparselt.tune import Tuner

__all__ = ["Program", "compile"]

# Graphs kept for different shapes; the oldest goes when one more is captured.
_MAX_CAPTURES = 16
_MAX_ROUTES = 4096


class Program:
    """A compiled network; call it as the model. Made by `sparselt.compile`.

    Inputs of any batch, size and type that the model takes are right: the first call with a new
    size takes longer. May be called from several threads at once. The weights are those of the
    moment it was compiled.

    Attributes:
        notes: sentences on what was captured and what was not, for `explain`.
    """

    notes: list[str]

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        """See `sparselt.compile`."""
        self._prepared = densify(prepare(model).model)
        self._args, self._kwargs = as_call(example_inputs)
        parameters = self._prepared.parameters()
        self._tuner = Tuner(weight_bytes=sum(p.numel() * p.element_size() for p in parameters))
        self._shelf = Shelf()
        self._families: list[Family] = []
        self._routes: dict[tuple[Any, ...], Run] = {}
        self._converted: nn.Module | None = None
        self._lock = threading.RLock()
        self.notes = []
        try:
            with torch.no_grad():
                self._expected = self._prepared(*self._args, **self._kwargs)
        except Exception as error:
            kind = type(error).__name__
            raise OptionError(
                f"example_inputs: the model fails on them: {kind}: {error}"
            ) from error
        leaves, spec = pytree.tree_flatten((self._args, self._kwargs))
        self._add_route(_signature(leaves, spec), leaves, spec)
        del self._expected

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's result, computed under inference mode."""
        # Entering the mode costs a microsecond, as much as a small layer.
        if torch.is_inference_mode_enabled():
            return self._call(args, kwargs)
        with torch.inference_mode():
            return self._call(args, kwargs)

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if len(args) == 1 and not kwargs and type(args[0]) is Tensor:
            x = args[0]
            run = self._routes.get((x.shape, x.dtype))
            if run is not None:
                return run(args)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        key = _signature(leaves, spec)
        run = self._routes.get(key)
        return (run or self._add_route(key, leaves, spec))(leaves)

    def __reduce__(self) -> NoReturn:
        """A program is bound to this process and CPU: it is neither copied nor pickled."""
        raise OptionError(
            "a Program cannot be copied or pickled: save the model, or the result of "
            "sparselt.convert, and compile it where it is to run"
        )

    def explanation(self) -> Explanation:
        """The layers as planned for the example inputs, and what runs in torch."""
        if not self._families:
            assert self._converted is not None
            return Explanation(explain(self._converted).rows, self.notes)
        planned = next(iter(self._families[0].planned.values()))
        notes = [*self.notes, planned.note, _rest(planned)]
        return Explanation(planned.lowered.rows, [note for note in notes if note])

    def __repr__(self) -> str:
        return f"Program of {type(self._prepared).__name__}: {self.explanation().summary()}"

    def _add_route(self, key: tuple[Any, ...], leaves: list[Any], spec: pytree.TreeSpec) -> Run:
        """Plans for a new signature; safe to call from several threads."""
        with self._lock:
            known = self._routes.get(key)
            if known is not None:
                return known
            # Tensors made under inference mode cannot be traced; copies made outside of it can.
            with torch.inference_mode(False), torch.no_grad():
                own = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
                with self._shelf.out():
                    run = self._run_for(own, spec)
                    self._shelf.keep(tensor for f in self._families for tensor in f.read())
                self._shelve()
            if len(self._routes) >= _MAX_ROUTES:
                self._routes.clear()
            self._routes[key] = run
            return run

    def _shelve(self) -> None:
        """Puts away the dense weights that only packed copies of are read."""
        read = {id(tensor) for family in self._families for tensor in family.read()}
        for family in self._families:
            for tensor in family.packed_weights():
                if id(tensor) not in read and tensor.numel():
                    self._shelf.put(tensor)
        self._shelf.trim()

    def _run_for(self, leaves: list[Any], spec: pytree.TreeSpec) -> Run:
        for family in self._families:
            if family.captured.accepts(leaves, spec):
                return family.run_for(leaves)
        if self._converted is not None and not self._families:
            return self._fall_back("", spec)
        try:
            family = Family(self._capture(leaves, spec), self._tuner, self._shelf)
            run = family.run_for(leaves)
            if not self._families:
                self._check(run(leaves))
        except CaptureError as error:
            return self._fall_back(str(error), spec)
        self._families.append(family)
        if len(self._families) > _MAX_CAPTURES:
            # The first one stays: it is what `explain` shows.
            dropped = self._families.pop(1)
            runs = {planned.run for planned in dropped.planned.values()}
            self._routes = {key: run for key, run in self._routes.items() if run not in runs}
        return run

    def _capture(self, leaves: list[Any], spec: pytree.TreeSpec) -> Captured:
        """A graph with as many free sizes as possible: the batch, and what has varied before."""
        varying = _varying(leaves, [family.captured for family in self._families])
        doubled = [
            torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) and leaf.shape[:1] == (1,) else leaf
            for leaf in leaves
        ]
        # Tracing with a size of 1 would fix it at 1.
        attempts: list[tuple[list[Any], Any]] = [
            (doubled, varying),
            (leaves, varying),
            (leaves, None),
        ]
        reason = ""
        for examples, free in attempts:
            args, kwargs = pytree.tree_unflatten(examples, spec)
            try:
                captured = capture(self._prepared, args, kwargs, free)
            except CaptureError as error:
                reason = reason or str(error)
                continue
            if captured.accepts(leaves, spec):
                return captured
        raise CaptureError(reason or "the captured graph does not take its own example")

    def _check(self, result: Any) -> None:
        """Compares the program's result on the examples with the model's."""
        want, got = pytree.tree_leaves(self._expected), pytree.tree_leaves(result)
        for a, b in zip(got, want, strict=True):
            if isinstance(b, Tensor) and b.is_floating_point():
                scale = float(b.abs().nan_to_num(0.0, 0.0, 0.0).max()) if b.numel() else 0.0
                if not torch.allclose(a, b, 1e-3, 1e-3 * scale, equal_nan=True):
                    raise CaptureError("the captured graph's result differs from the model's")

    def _fall_back(self, reason: str, spec: pytree.TreeSpec) -> Run:
        """The model with its layers swapped, for what cannot be captured."""
        if self._converted is None:
            example: Any = self._kwargs if self._kwargs and not self._args else self._args
            converted = convert(self._prepared, None if self._kwargs and self._args else example)
            self._converted = converted
            self.notes.append(f"runs layer by layer, not as one graph: {reason}")
        model = self._converted

        def run(leaves: Sequence[Any]) -> Any:
            args, kwargs = pytree.tree_unflatten(list(leaves), spec)
            return model(*args, **kwargs)

        return run


def compile(model: nn.Module, example_inputs: Any) -> Program:
    """A pruned network as one callable: captured whole, fused, sparse where that is faster.

    Args:
        model: any module; not changed. It is run in eval mode.
        example_inputs: what it is called with: a tensor, a tuple of arguments or a dictionary of
            keyword arguments. Layers are timed at these shapes.

    Returns:
        A callable that takes what the model takes, of any batch and size, and returns what it
        returns. A model that torch.export cannot capture runs with its layers swapped;
        `sparselt.explain` says so, and which kernel each layer runs, and why.

    Raises:
        OptionError: the model is no module, or fails on the example inputs.
        KernelError: SPARSELT_KERNEL names a kernel that is unknown or does not fit a layer.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU())
        >>> fast = compile(model, torch.ones(2, 8))
        >>> fast(torch.ones(5, 8)).shape
        torch.Size([5, 4])
    """
    return Program(model, example_inputs)


def _signature(leaves: Sequence[Any], spec: pytree.TreeSpec) -> tuple[Any, ...]:
    """What a call's route is found by; shape and type alone for a single tensor."""
    if len(leaves) == 1 and spec == _ONE_TENSOR and isinstance(leaves[0], Tensor):
        return leaves[0].shape, leaves[0].dtype
    keys = [
        (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else (type(leaf), repr(leaf))
        for leaf in leaves
    ]
    return (spec, *keys)


_ONE_TENSOR = pytree.tree_structure(((torch.empty(0),), {}))


def _varying(leaves: Sequence[Any], captured: Sequence[Captured]) -> list[set[int]]:
    """The dimensions to leave free: the first, and those in which earlier graphs differ."""
    varying: list[set[int]] = [{0} for _ in leaves]
    for earlier in captured:
        if len(earlier.shapes) != len(leaves):
            continue
        for dims, leaf, shape in zip(varying, leaves, earlier.shapes, strict=True):
            if shape is not None and isinstance(leaf, Tensor) and len(shape) == leaf.dim():
                sizes = zip(shape, leaf.shape, strict=True)
                dims |= {i for i, (want, got) in enumerate(sizes) if want not in (None, got)}
    return varying


def _rest(planned: Planned) -> str:
    others = sorted(planned.lowered.others.items())
    counts = ", ".join(f"{name} ({count})" for name, count in others)
    return f"the rest runs in torch: {counts}" if others else ""
