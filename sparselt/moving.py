# SPDX-License-Identifier: Apache-2.0
"""What a sparse layer runs after it has moved to another device, or changed its type there.

Formats and kernels belong to a device. A layer that moves takes the plan that it had where it goes;
where it never was, a rule chooses, and the weight is packed anew if it has to be.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import replace
from typing import ClassVar, NamedTuple, Protocol

from torch import Tensor

from sparselt import ops
from sparselt.cuda_rules import BLOCK_FORMATS, FEW_COLUMNS_FORMATS
from sparselt.errors import KernelError
from sparselt.facts import sparse_plan
from sparselt.formats import FORMATS
from sparselt.packed import PackedWeight, zero_block
from sparselt.plan import Facts, Plan, candidates

__all__ = ["Movable", "Place", "place_of", "plan_at"]


class Place(NamedTuple):
    """Where one plan is right: a device and, on CUDA, a type of values.

    On the CPU one kernel serves all types: others are converted on the way.
    """

    device: str
    dtype: str
    device_index: int


_PLANNED = ("cpu", "cuda")
_COMPUTED = ("float32", "float16", "bfloat16")


def place_of(values: Tensor) -> Place:
    """The place of a weight's values."""
    device = values.device.type
    dtype = "" if device == "cpu" else str(values.dtype).removeprefix("torch.")
    return Place(device, dtype, max(values.get_device(), 0))


class Movable(Protocol):
    """What a plan needs to know of a sparse layer; a convolution has `groups` beside these."""

    op: ClassVar[str]
    kernel: str


def plan_at(
    known: MutableMapping[Place, Plan], place: Place, layer: Movable, weight: PackedWeight
) -> Plan:
    """The plan of a layer that goes to a place; always sparse.

    Args:
        known: the plans that it had, by place; a new one is added.
        place: of `place_of`.
        layer: with the kernel that it ran before.
        weight: still where the layer was.

    Raises:
        KernelError: no kernel of the place runs the layer.
    """
    if weight.device.type not in _PLANNED:
        return Plan("", weight.format, "its values were on no device", block=weight.block)
    if place not in known:
        usable = {kernel.name for kernel in ops.kernels(place.device_index) if kernel.usable}
        twins = (
            plan
            for other, plan in known.items()
            if (other.device, other.dtype) == (place.device, place.dtype) and plan.kernel in usable
        )
        known[place] = next(twins, None) or _by_rule(place, layer, weight)
    return known[place]


def _by_rule(place: Place, layer: Movable, weight: PackedWeight) -> Plan:
    device, dtype, index = place
    reason = f"moved to {' in '.join(filter(None, place[:2]))} after planning"
    if device not in _PLANNED or (device == "cuda" and dtype not in _COMPUTED):
        # Torch computes float64 on the dense weight, and a meta tensor not at all.
        rows = ("csr", (1, 1))  # what every operation has a kernel for
        linear = layer.op == "linear"
        portable, block = FORMATS[weight.format].portable(weight.block) if linear else rows
        return Plan("", portable, f"{reason}: the first kernel that fits", block=block)
    mask = weight.packed().mask()
    facts = Facts(
        layer.op,
        weight.shape,
        int(mask.sum()),
        # A kernel for few columns tells that there are few.
        columns=1 if _is_for_few(layer.kernel, weight.format) else None,
        block=weight.block if weight.format in BLOCK_FORMATS else zero_block(mask, device),
        groups=int(getattr(layer, "groups", 1)),
        one_magnitude=weight.format == "sign" and device == "cpu",
        device=device,
        device_index=index,
        dtype=dtype or "float32",
    )
    found = [(c.format, c.block) for c in candidates(facts, ops.kernels(index)) if c.applies]
    # Any pattern is right for compressed rows; another format was chosen for the pattern.
    kept = weight.format != "csr" and (weight.format, weight.block) in found
    try:
        plan = sparse_plan(facts, weight.format if kept else "auto")
    except KernelError as error:
        raise KernelError(
            f"a sparse {layer.op} layer cannot move to {device} in {facts.dtype}: {error}; move "
            "its to_dense(), or convert the model there"
        ) from error
    return replace(plan, reason=f"{plan.kernel}: {reason}, chosen by rule")


def _is_for_few(kernel: str, format: str) -> bool:
    spmv = any(known.name == kernel and known.op == "spmv" for known in ops.kernels())
    return spmv or format in FEW_COLUMNS_FORMATS
