# SPDX-License-Identifier: Apache-2.0
"""A pruned network as one callable.

`compile` captures the model with torch.export, lowers what gains, and runs the rest in torch. Each
new set of input shapes is checked against the captured graph on first use: the graph is planned
again for it (for a power of two of sizes at a time), or captured again, and the result is kept.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparselt.capture import Captured, CaptureError, capture
from sparselt.conversion import as_call, convert, densify, prepare, run_once
from sparselt.errors import OptionError, ProgramFileError, ShapeError, explain_mismatch
from sparselt.explanation import Explanation, explain
from sparselt.family import Family
from sparselt.native import SegmentProgram
from sparselt.planned import Run, Straight
from sparselt.portable import Loaded, read_program, write_program
from sparselt.profiling import Profile, profile_graph, profile_modules
from sparselt.shelf import Shelf
from sparselt.tune import Tuner

__all__ = ["Program", "compile", "load_program"]

# Graphs kept for different shapes; the oldest goes when one more is captured.
_MAX_CAPTURES = 16
_MAX_ROUTES, _MAX_STRAIGHT = 4096, 32


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
        # On use: torch.export imports Dynamo anyway, and a program from a file does without.
        from sparselt import dynamo as _dynamo  # noqa: F401  registers the backend

        prepared = densify(prepare(model).model)
        self._begin(prepared, prepared.parameters(), Shelf())
        self._title = type(prepared).__name__
        self._args, self._kwargs = as_call(example_inputs)
        self._expected = run_once(prepared, example_inputs)
        leaves, spec = pytree.tree_flatten((self._args, self._kwargs))
        self._add_route(_signature(leaves, spec), leaves, spec)
        del self._expected

    def _begin(self, model: nn.Module | None, weights: Iterable[Tensor], shelf: Shelf) -> None:
        self._prepared = model
        weight_bytes = sum(p.numel() * p.element_size() for p in weights)
        self._tuner = Tuner(weight_bytes=weight_bytes, in_program=True)
        self._shelf = shelf
        self._families: list[Family] = []
        self._routes: dict[tuple[Any, ...], Run] = {}
        self._straight: dict[torch.Size, SegmentProgram] = {}
        self._converted: nn.Module | None = None
        self._lock = threading.RLock()
        self.notes = []

    @classmethod
    def _load(cls, path: Path) -> Program:
        """See `load_program`."""
        program, shelf = cls.__new__(cls), Shelf()
        program._title, graphs = read_program(path, shelf)
        program._begin(None, map(shelf.outline, graphs[0].captured.constants), shelf)
        for loaded in graphs:
            made = loaded.plans, loaded.together, loaded.prepacked
            program._families.append(Family(loaded.captured, program._tuner, shelf, *made))
        try:
            for loaded in graphs:
                leaves, spec = _example(loaded), loaded.captured.input_spec
                run = program._add_route(_signature(leaves, spec), leaves, spec)
                with torch.inference_mode():
                    run(leaves)
        except Exception as error:
            kind = type(error).__name__
            raise ProgramFileError(f"{path}: its graph fails: {kind}: {error}") from error
        return program

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's result, without gradients."""
        if len(args) == 1 and not kwargs and type(args[0]) is Tensor:
            program = self._straight.get(args[0].shape)
            result = None if program is None else program.straight(args[0])
            if result is not None:
                return result
        # Entering the mode costs a microsecond, as much as a small layer.
        if torch.is_inference_mode_enabled():
            return self._call(args, kwargs)
        with torch.inference_mode():
            return self._call(args, kwargs)

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if len(args) == 1 and not kwargs and type(args[0]) is Tensor:
            x = args[0]
            run = self._routes.get((x.shape, x.dtype))
            if type(run) is Straight:
                self._keep_straight(x, run.segment.program_for(args))
            if run is not None:
                return run(args)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        key = _signature(leaves, spec)
        run = self._routes.get(key)
        return (run or self._add_route(key, leaves, spec))(leaves)

    def _keep_straight(self, x: Tensor, program: SegmentProgram | None) -> None:
        if len(self._straight) >= _MAX_STRAIGHT:
            self._straight.clear()
        if program is not None:
            self._straight[x.shape] = program

    def __reduce__(self) -> NoReturn:
        """A program is bound to this process and CPU: it is neither copied nor pickled."""
        raise OptionError(
            "a Program cannot be copied or pickled: save the model, or the result of "
            "sparselt.convert, and compile it where it is to run, or use Program.save"
        )

    def explanation(self) -> Explanation:
        """The layers as planned for the example inputs, and what runs in torch."""
        if not self._families:
            assert self._converted is not None
            return Explanation(explain(self._converted).rows, self.notes)
        planned = next(iter(self._families[0].planned.values()))
        return Explanation(planned.lowered.rows, [*self.notes, *planned.notes, *planned.rest])

    def profile(self, *args: Any, runs: int = 10, **kwargs: Any) -> Profile:
        """Where the time of a run goes: each layer, each other operation, and the rest.

        Args:
            *args: what the program is called with.
            runs: how many to time; the median one is told.
            **kwargs: likewise.

        Returns:
            One row a step, of one sample where they run one after the other; `str()` is a table,
            and `save_trace(path)` writes a Chrome trace.

        Raises:
            OptionError: `runs` is not positive.

        Example:
            >>> import torch
            >>> program = compile(torch.nn.Linear(8, 4), torch.ones(2, 8))
            >>> [row.kernel for row in program.profile(torch.ones(2, 8))]
            ['dense', '']
        """
        self(*args, **kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        route = self._routes[_signature(leaves, spec)]
        for family in self._families:
            for planned in family.planned.values():
                if planned.run is route:
                    lowered, (values, run) = planned.lowered, planned.to_profile(leaves)
                    rows, calls = lowered.rows, lowered.calls
                    return profile_graph(planned.module, values, rows, calls, run, runs)
        assert self._converted is not None
        return profile_modules(
            self._converted, explain(self._converted), lambda: route(leaves), runs
        )

    def save(self, path: str | Path) -> None:
        """Writes what is portable of the program to one file: graphs, weights and choices.

        No pickle is involved. On the machine it was saved on, and with as many threads, the loaded
        program runs the saved choices; elsewhere its layers are timed anew.

        Args:
            path: of the file, by custom *.safetensors; written beside and then renamed.

        Raises:
            OptionError: the model could not be captured, or its graph holds something that has no
                place in the file. Then save the model, and compile it where it is to run.
        """
        if not self._families:
            reason = self.notes[0] if self.notes else "it was not captured"
            raise OptionError(f"save: there is no graph to save: {reason}")
        with self._lock, self._shelf.out():
            write_program(Path(path), self._families, self._title)

    def __repr__(self) -> str:
        return f"Program of {self._title}: {self.explanation().summary()}"

    def _add_route(self, key: tuple[Any, ...], leaves: list[Any], spec: pytree.TreeSpec) -> Run:
        """Plans for a new signature; safe to call from several threads."""
        with self._lock:
            known = self._routes.get(key)
            if known is not None:
                return known
            # Tensors made under inference mode cannot be traced; copies made outside of it can.
            with torch.inference_mode(False), torch.no_grad():
                own = [_plain_copy(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
                with self._shelf.lent():
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
        if self._prepared is None:
            raise self._unknown(leaves)
        # What is captured or converted is the whole model.
        self._shelf.fill()
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
            self._straight.clear()
        return run

    def _unknown(self, leaves: Sequence[Any]) -> ShapeError:
        """A program from a file has no model that it could be captured from again."""
        graphs = [family.captured for family in self._families]
        known = " or ".join(f"{graph.shapes} of {graph.types}" for graph in graphs)
        got = [(tuple(x.shape), x.dtype) if isinstance(x, Tensor) else x for x in leaves]
        hint = "compile the model to run it, or run these once before saving the program"
        return ShapeError(explain_mismatch("inputs", f"sizes as in {known}", got, hint))

    def _capture(self, leaves: list[Any], spec: pytree.TreeSpec) -> Captured:
        """A graph with as many free sizes as possible: the batch, and what has varied before."""
        assert self._prepared is not None
        varying = _varying(leaves, [family.captured for family in self._families])
        doubled = [
            torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) and leaf.shape[:1] == (1,) else leaf
            for leaf in leaves
        ]
        # Tracing with a size of 1 would fix it at 1.
        attempts: list[Any] = [(doubled, varying), (leaves, varying), (leaves, None)]
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
            assert self._prepared is not None
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
        `sparselt.explain` says what runs, and why. Under autocast sparse layers return float32.

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


def load_program(path: str | Path) -> Program:
    """A program that `Program.save` wrote; needs no code of the model.

    Args:
        path: of the file. Files of others are safe to load: nothing in them is executed but a
            graph of known operators, and everything is checked.

    Returns:
        The program. Sizes that its graphs do not allow are refused, since there is no model to
        capture again.

    Raises:
        ProgramFileError: there is no such file, or it is damaged, hostile or of another version.

    Example:
        >>> import torch
        >>> compile(torch.nn.Linear(8, 4), torch.ones(2, 8)).save("linear.safetensors")
        >>> load_program("linear.safetensors")(torch.ones(5, 8)).shape
        torch.Size([5, 4])
    """
    return Program._load(Path(path))


def _plain_copy(leaf: Tensor) -> Tensor:
    """A copy to plan with; of a subclass without behaviour below torch's functions, a plain one."""
    own = type(leaf).__torch_dispatch__ is not Tensor.__torch_dispatch__
    return leaf.clone() if own else leaf.detach().as_subclass(Tensor).clone()


def _example(loaded: Loaded) -> list[Any]:
    """Inputs of the shapes that a saved program ran first."""
    captured = loaded.captured
    leaves: list[Any] = []
    for shape, dtype, other in zip(loaded.seen[0], captured.types, captured.others, strict=True):
        leaves.append(other if shape is None else torch.zeros(shape, dtype=dtype))
    return leaves


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
