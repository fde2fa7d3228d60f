# SPDX-License-Identifier: Apache-2.0
"""A captured graph, and how it runs at each size: as a batch or in parts, layer by layer as planned
or dense as a whole.

Layers are timed one at a time, which misses what they do to one another. So the network as planned
is timed against the same network all dense once more, as torch runs it and with prepacked weights,
and the fastest wins. A batch
whose activations do not fit a core's cache is timed against as many runs of the network that is
planned for one sample, and against runs of 16 images, innermost. That choice is made once for all
numbers of threads, since the kernels may round otherwise.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)
from torch.utils import _pytree as pytree

from sparselt.builder import LAYER, operation
from sparselt.capture import Captured, CaptureError
from sparselt.cpu import cache_bytes
from sparselt.cuda_graph import graphed
from sparselt.images import IMAGES, GroupsOfImages, is_worth_grouping
from sparselt.lowering import Lowered, lower
from sparselt.native import nativize
from sparselt.plan import DENSE, Plan
from sparselt.planned import Planned, Run, Straight, as_dense, gains_clearly
from sparselt.prepacked import prepack
from sparselt.samples import EachSample, agree, first_samples, may_run_each, only_segment
from sparselt.shapes import copied, propagate
from sparselt.shelf import Shelf
from sparselt.tune import Tuner, kind_of

__all__ = ["Bucket", "Family"]

Bucket = tuple[tuple[int, ...], ...]

# A network this many times as slow all dense needs no second look.
_CLEAR = 1.5
# Nor a batch by the kernels of one sample that is so many times as slow as in parts.
_CLEAR_PARTS = 1.3
# What a choice is between; the first of them is taken where times are about the same.
_WHOLES = ("planned", "all dense", "prepacked")
_WAYS = ("as a batch", "in parts")
_PARTS = ("one by one", "images innermost")


class Family:
    """A captured graph, and its plans for different sizes.

    Args:
        captured: the graph.
        tuner: plans and times.
        shelf: where weights are that no plan reads as they are.
        known: plans made before, by bucket and node name.
        together: of the buckets that run in parts, how many samples are one.
        prepacked: those that run dense with prepacked weights.
    """

    def __init__(
        self,
        captured: Captured,
        tuner: Tuner,
        shelf: Shelf,
        known: Mapping[Bucket, Mapping[str, Plan]] | None = None,
        together: Mapping[Bucket, int] | None = None,
        prepacked: Collection[Bucket] = (),
    ) -> None:
        self.captured = captured
        self.tuner = tuner
        self.shelf = shelf
        self.known = known or {}
        self.together = together or {}
        self.prepacked = prepacked
        self.packed: dict[tuple[Any, ...], Any] = {}
        self.prepacked_weights: dict[str, Tensor] = {}
        self.planned: dict[Bucket, Planned] = {}
        self.seen: set[tuple[tuple[int, ...] | None, ...]] = set()

    def run_for(self, leaves: Sequence[Any]) -> Run:
        """What runs inputs of these shapes; weights are taken from the shelf as needed."""
        key = self.bucket(leaves)
        self.seen.add(tuple(tuple(x.shape) if isinstance(x, Tensor) else None for x in leaves))
        if key not in self.planned:
            try:
                self.planned[key] = self._plan(key, leaves)
            except (DataDependentOutputException, DynamicOutputShapeException) as error:
                reason = f"a number or a size depends on values ({error.func})"
                raise CaptureError(reason) from error
        return self.planned[key].run

    def bucket(self, leaves: Sequence[Any]) -> Bucket:
        """Shapes that are planned alike: free sizes count by their power of two."""
        key: list[tuple[int, ...]] = []
        for leaf, shape in zip(leaves, self.captured.shapes, strict=True):
            if shape is not None:
                free = (got for want, got in zip(shape, leaf.shape, strict=True) if want is None)
                key.append(tuple((size - 1).bit_length() for size in free))
        return tuple(key)

    def read(self) -> Iterator[Tensor]:
        """The weights that some plan reads as they are."""
        for planned in self._all_planned():
            yield from planned.constants
            for row, index in zip(planned.lowered.rows, planned.lowered.weights, strict=True):
                if index is not None and row.kernel == DENSE:
                    yield self.captured.constants[index]

    def packed_weights(self) -> Iterator[Tensor]:
        """The weights of which some plan reads packed copies."""
        for planned in self._all_planned():
            for row, index in zip(planned.lowered.rows, planned.lowered.weights, strict=True):
                if index is not None and row.kernel != DENSE:
                    yield self.captured.constants[index]

    def _all_planned(self) -> Iterator[Planned]:
        for planned in self.planned.values():
            yield planned
            if planned.besides is not None:
                yield planned.besides

    def _plan(self, key: Bucket, leaves: Sequence[Any]) -> Planned:
        """As a batch, or in parts."""
        sample = first_samples(leaves)
        if sample is None or not self.captured.accepts(sample, self.captured.input_spec):
            return self._plan_layers(key, leaves, self.packed)
        if key in self.known:
            if key not in self.together:
                return self._plan_layers(key, leaves, self.packed)
            one = self._plan_layers(key, sample, self.packed)
            in_images = self.together[key] == IMAGES
            images = self._in_images(one, leaves, self.packed) if in_images else None
            return images or self._one_by_one(one)
        if self.tuner.is_forced or not self._may_run_each(leaves):
            return self._plan_layers(key, leaves, self.packed)
        place = ("samples", self._kind, _sizes(leaves))
        best = self.tuner.known(_WAYS, place)
        if best == _WAYS[0]:
            return self._plan_layers(key, leaves, self.packed)
        own = self.bucket(sample)
        packed = dict(self.packed)
        one = self.planned[own] if own in self.planned else self._plan_layers(own, sample, packed)
        parts = self._in_parts(one, leaves, packed)
        lowered = self._lower(leaves, self.tuner, packed, one.plans)
        alike = self._planned(lowered, leaves)
        if one.prepacked:
            alike = self._prepacked(lowered, dict(self.prepacked_weights)) or alike
        with torch.inference_mode():
            same = agree(alike.run, parts.run, leaves)
        if not same:
            return self._plan_layers(key, leaves, self.packed)
        if best is None and not self._is_clear(parts, alike, place, leaves):
            batch = self._plan_layers(key, leaves, self.packed)
            calls = _calls(_WAYS, (batch, parts), leaves)
            if self.tuner.fastest(calls, place) == _WAYS[0]:
                return batch
        self.packed.update(packed)
        notes = [one.note, parts.note, f"a batch runs in parts: {self.tuner.told(place)}"]
        return replace(parts, note="; ".join(note for note in notes if note))

    def _is_clear(
        self, parts: Planned, alike: Planned, place: object, leaves: Sequence[Any]
    ) -> bool:
        """Whether there is no need to plan the batch; both must have run."""
        calls = _calls(_WAYS[::-1], (parts, alike), leaves)
        return self._gains_clearly(parts.plans.values()) and self.tuner.is_clear(
            calls, place, _CLEAR_PARTS, warm=True
        )

    @cached_property
    def _kind(self) -> str:
        """What the times of the whole depend on, beside sizes and plans: operations and weights."""
        weights = [
            (tuple(self.shelf.outline(x).shape), kind_of(self._density(x)))
            for x in self.captured.constants
        ]
        text = f"{self.captured.module.graph} {weights}"
        return hashlib.sha256(text.encode()).hexdigest()

    def _density(self, constant: Tensor) -> float:
        value = self.shelf.take(constant)
        density = int(value.count_nonzero()) / max(value.numel(), 1)
        self.shelf.back(constant)
        return density

    def _may_run_each(self, leaves: Sequence[Any]) -> bool:
        """Whether there is anything to choose, told from the shapes of all values."""
        module = copied(self.captured.module)
        propagate(module, [*map(self.shelf.outline, self.captured.constants), *leaves])
        count = next(leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor))
        # Images innermost are worth a look however small they are.
        fits = 0 if self._group(leaves) else cache_bytes()
        return may_run_each(module.graph, count, fits)

    def _in_parts(
        self, one: Planned, leaves: Sequence[Any], packed: dict[tuple[Any, ...], Any]
    ) -> Planned:
        """One sample after the other, or images innermost."""
        each = replace(self._one_by_one(one), note="")
        images = self._in_images(one, leaves, packed)
        if images is None:
            return each
        with torch.inference_mode():
            images.run(leaves)  # which generates code
        place = ("images", self._kind, _sizes(leaves))
        best = self.tuner.fastest(_calls(_PARTS, (each, images), leaves), place)
        chosen = images if best == _PARTS[1] else each
        return replace(chosen, note=f"parts are {best}: {self.tuner.told(place)}")

    def _one_by_one(self, one: Planned) -> Planned:
        each = EachSample(one.module, one.constants)
        return replace(one, run=self._as_result(each), together=1)

    @staticmethod
    def _group(leaves: Sequence[Any]) -> list[Any] | None:
        """The first images that would run together; None where they are few."""
        some = first_samples(leaves, IMAGES)
        return some if some is not None and is_worth_grouping(some) else None

    def _in_images(
        self, one: Planned, leaves: Sequence[Any], packed: dict[tuple[Any, ...], Any]
    ) -> Planned | None:
        """In groups of images; None where these are few, or no layer can run so."""
        some = self._group(leaves)
        if some is None:
            return None
        lowered = self._lower(some, self.tuner.in_images(), packed, None)
        if all(row.kernel == DENSE for row in lowered.rows):
            return None
        module = nativize(lowered.module, images_innermost=True)
        _, kept = self._flat(lowered, module)
        each = EachSample(one.module, one.constants)
        run = self._as_result(GroupsOfImages(EachSample(module, kept), each))
        return Planned(lowered, module, kept, run, plans=one.plans, together=IMAGES, besides=one)

    def _plan_layers(
        self, key: Bucket, leaves: Sequence[Any], packed: dict[tuple[Any, ...], Any]
    ) -> Planned:
        """Layer by layer, or dense as a whole."""
        known = self.known.get(key)
        own = dict(packed)
        lowered = self._lower(leaves, self.tuner, own, known)
        if self.tuner.forget_doubtful():
            own = dict(packed)
            lowered = self._lower(leaves, self.tuner, own, known)
        if key in self.prepacked:
            found = self._prepacked(lowered, self.prepacked_weights)
            if found is not None:
                return found
        planned = self._planned(lowered, leaves)
        is_open = known is None and not self.tuner.is_forced
        if is_open and not self._gains_clearly(lowered.plans.values()):
            other = self._faster_whole(leaves, planned, packed)
            if other is not None:
                return other
        packed.update(own)
        return planned

    def _gains_clearly(self, plans: Iterable[Plan]) -> bool:
        """Whether the layers' times leave no doubt about the whole, which takes long to measure."""
        return not self.tuner.is_doubtful and gains_clearly(plans)

    def _faster_whole(
        self, leaves: Sequence[Any], planned: Planned, packed: dict[tuple[Any, ...], Any]
    ) -> Planned | None:
        """The network all dense, where it is faster than as planned; otherwise notes the times."""
        lowered = planned.lowered
        on_cuda = [x for x in leaves if isinstance(x, Tensor) and x.is_cuda]
        kernels = [(name, plan.kernel, plan.block) for name, plan in lowered.plans.items()]
        place = ("whole", self._kind, _sizes(leaves), kernels)
        is_dense = all(row.kernel == DENSE for row in lowered.rows)
        names = _WHOLES[::2] if is_dense else _WHOLES
        # The last of them is not there for every network.
        best = self.tuner.known(names[:-1], place, on_cuda)
        # Not kept unless they win: their weights are dense.
        own: dict[tuple[Any, ...], Any] = {}
        weights = dict(self.prepacked_weights)
        others: dict[str, Planned] = {}
        if best != _WHOLES[0]:
            dense = lowered
            if not is_dense:
                dense = self._lower(leaves, self.tuner.dense(), own, None)
                others[_WHOLES[1]] = self._planned(dense, leaves)
            prepacked = self._prepacked(dense, weights)
            if prepacked is not None:
                others[_WHOLES[2]] = prepacked
            if not others:
                return None
        if best is None:
            calls = _calls((_WHOLES[0], *others), (planned, *others.values()), leaves)
            if not on_cuda:
                self.tuner.is_clear(calls, place, _CLEAR, warm=False)
            best = self.tuner.fastest(calls, place, on_cuda)
        told = self.tuner.told(place)
        if best not in others:
            planned.note = f"the whole network was measured too: {told}"
            return None
        other = others[best]
        packed.update(own if not other.prepacked else {})
        self.prepacked_weights.update(weights if other.prepacked else {})
        other.note = f"the whole network runs dense: {told}"
        return as_dense(other, lowered)

    def _lower(
        self,
        leaves: Sequence[Any],
        tuner: Tuner,
        packed: dict[tuple[Any, ...], Any],
        known: Mapping[str, Plan] | None,
    ) -> Lowered:
        constants = self.captured.constants
        lowered = lower(
            self.captured.module,
            dict(enumerate(constants)),
            [*map(self.shelf.outline, constants), *leaves],
            tuner,
            dict(enumerate(self.captured.names)),
            packed,
            known,
            self.shelf,
        )
        graph = lowered.module.graph
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        for index in lowered.unused:
            if index < len(constants):
                graph.erase_node(placeholders[index])
        lowered.module.recompile()
        return lowered

    def _planned(self, lowered: Lowered, leaves: Sequence[Any]) -> Planned:
        """What runs a lowered graph, with native programs."""
        module = nativize(lowered.module)
        run, kept = self._flat(lowered, module)
        only = only_segment(module.graph)
        if only is not None and only.is_straight and not kept and self._returns_a_tensor():
            run = Straight(only.segment)
        return Planned(lowered, module, kept, graphed(run, leaves), plans=lowered.plans)

    def _prepacked(self, lowered: Lowered, weights: dict[str, Tensor]) -> Planned | None:
        """What runs a lowered graph without sparse layers with prepacked weights, if any gain.

        Args:
            lowered: the graph; not changed.
            weights: prepacked before, and a place to leave new ones.
        """
        module = prepack(lowered.module, weights)
        if module is None:
            return None
        run, kept = self._flat(lowered, module)
        nodes = (node for node in module.graph.nodes if node.op.startswith("call_"))
        others = Counter(operation(node) for node in nodes if LAYER not in node.meta)
        own = replace(lowered, module=module, others=dict(others))
        return Planned(own, module, kept, run, plans=lowered.plans, prepacked=True)

    def _flat(self, lowered: Lowered, module: fx.GraphModule) -> tuple[Run, list[Tensor]]:
        """The flat call: constants that are still read first, and these, then the inputs."""
        unused = set(lowered.unused)
        constants = enumerate(self.captured.constants)
        kept = [self.shelf.take(x) for i, x in constants if i not in unused]
        forward = module.forward
        return self._as_result(lambda leaves: forward(*kept, *leaves)), kept

    def _returns_a_tensor(self) -> bool:
        return self.captured.output_spec == pytree.tree_structure(torch.empty(0))

    def _as_result(self, flat: Run) -> Run:
        """The flat call, with its results put together as the model's."""
        spec = self.captured.output_spec
        if self._returns_a_tensor():
            return lambda leaves: flat(leaves)[0]
        return lambda leaves: pytree.tree_unflatten(flat(leaves), spec)


def _calls(
    names: Sequence[str], plans: Sequence[Planned], leaves: Sequence[Any]
) -> dict[str, Callable[[], object]]:
    return {name: partial(planned.run, leaves) for name, planned in zip(names, plans, strict=True)}


def _sizes(leaves: Sequence[Any]) -> list[Any]:
    return [tuple(x.shape) if isinstance(x, Tensor) else x for x in leaves]
