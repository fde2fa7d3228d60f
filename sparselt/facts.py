# SPDX-License-Identifier: Apache-2.0
"""What a plan needs to know of a dense layer, and the plan of one that must be sparse."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from sparselt import ops
from sparselt.cuda_rules import FEW_COLUMNS_FORMATS, SEMI_STRUCTURED, preference
from sparselt.errors import KernelError, OptionError, ShapeError, explain_mismatch
from sparselt.formats.sign import row_magnitudes
from sparselt.packed import zero_block
from sparselt.plan import DENSE, Candidate, Facts, KernelInfo, Plan, candidates

__all__ = [
    "LAYER_OPS",
    "facts_of",
    "forced_kernel",
    "is_of_one_magnitude",
    "is_two_of_four",
    "sparse_plan",
]

# The layers that have a sparse counterpart, and the operation each is.
LAYER_OPS: dict[type[nn.Module], str] = {
    nn.Linear: "linear",
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
}


def forced_kernel() -> str:
    """The kernel that SPARSELT_KERNEL asks for; empty if it asks for none."""
    return os.environ.get("SPARSELT_KERNEL", "")


def facts_of(module: nn.Module, kept: Tensor, columns: int | None = None) -> Facts:
    """What a plan needs to know about a dense layer.

    Args:
        module: an nn.Linear, nn.Conv1d or nn.Conv2d.
        kept: bool, the weight's shape: which weights are kept.
        columns: N of the product, where it is known.

    Raises:
        OptionError: another kind of module.
        ShapeError: the mask is not of the weight's shape.
    """
    weight = module.weight
    assert isinstance(weight, Tensor)
    if kept.shape != weight.shape:
        raise ShapeError(explain_mismatch("mask", tuple(weight.shape), tuple(kept.shape)))
    for kind, op in LAYER_OPS.items():
        if isinstance(module, kind):
            return Facts(
                op=op,
                shape=tuple(weight.shape),
                nnz=int(kept.sum()),
                columns=columns,
                block=zero_block(kept),
                groups=int(getattr(module, "groups", 1)),
                one_magnitude=op == "linear" and is_of_one_magnitude(weight, kept),
                device=weight.device.type,
                device_index=max(weight.get_device(), 0),
                dtype=str(weight.dtype).removeprefix("torch."),
                two_of_four=weight.is_cuda and is_two_of_four(kept),
            )
    kinds = ", ".join(kind.__name__ for kind in LAYER_OPS)
    raise OptionError(explain_mismatch("module", f"one of {kinds}", type(module).__name__))


def is_of_one_magnitude(weight: Tensor, kept: Tensor) -> bool:
    """Whether the kept weights of each row differ in sign alone, which format "sign" asks for.

    Args:
        weight: (M, ...); on CUDA, where no kernel reads signs, none is.
        kept: bool, of the same shape.

    Example:
        >>> import torch
        >>> is_of_one_magnitude(torch.tensor([[0.5, -0.5, 3.0]]), torch.tensor([[1, 1, 0]]) > 0)
        True
    """
    if weight.device.type != "cpu":
        return False
    return row_magnitudes(weight.detach().float().flatten(1), kept.flatten(1)) is not None


def is_two_of_four(kept: Tensor) -> bool:
    """Whether of each four weights of a row, in order, at most two are kept.

    Args:
        kept: bool; any other shape than (M, K) with K a multiple of 4 is not.

    Example:
        >>> import torch
        >>> is_two_of_four(torch.tensor([[True, False, True, False]]))
        True
    """
    if kept.dim() != 2 or kept.shape[1] % 4 or not kept.numel():
        return False
    return int(kept.reshape(-1, 4).sum(1).max()) <= 2


def sparse_plan(facts: Facts, format: str, kernel: str = "") -> Plan:
    """The plan of a layer that is to be sparse whether or not it gains.

    Args:
        facts: of the layer.
        format: one of `plan.FORMAT_CHOICES` but "dense".
        kernel: name of the kernel that must run; empty for the first that applies, or for the one
            that SPARSELT_KERNEL names if it serves the operation.

    Raises:
        KernelError: no kernel applies, or the named one is unknown or does not.
    """
    # On the CPU values are widened when packed and the result narrowed after.
    if facts.device == "cpu" and facts.dtype in ("float16", "bfloat16"):
        facts = replace(facts, dtype="float32")
    kernels = ops.kernels(facts.device_index)
    wanted = kernel or forced_kernel()
    named = next((known for known in kernels if known.name == wanted), None)
    if wanted and named is None:
        names = ", ".join(known.name for known in kernels)
        raise KernelError(explain_mismatch("kernel", f"one of {names}", repr(wanted)))
    if named is not None and named.op == "spmv":
        facts = replace(facts, columns=1)  # who names it has few
    format = _format_for(facts, format, named, kernels)
    if format in FEW_COLUMNS_FORMATS or _has_spmv_alone(format, facts, kernels):
        facts = replace(facts, columns=1)
    if format == "bsr" and facts.block == (1, 1):
        facts = replace(facts, block=(4, 1))
    considered = _sparse_candidates(facts, kernels)
    if named is not None and (kernel or any(c.kernel == wanted for c in considered)):
        considered = [c for c in considered if c.kernel == wanted] or [
            Candidate(wanted, named.format, False, f"is a {named.op} kernel")
        ]
    for item in considered:
        if item.applies and item.format == format:
            reason = f"{item.kernel}: a sparse layer was asked for"
            return Plan(item.kernel, format, reason, tuple(considered), block=item.block)
    refusals = "; ".join(f"{c.kernel}: {c.verdict}" for c in considered)
    raise KernelError(f"no {format} kernel fits a {facts.op} layer here ({refusals})")


def _format_for(
    facts: Facts, format: str, named: KernelInfo | None, kernels: Sequence[KernelInfo]
) -> str:
    if format != "auto":
        return format
    if named is not None:
        return named.format
    if facts.device == "cuda":
        applies = [c.format for c in _sparse_candidates(facts, kernels) if c.applies]
        return min(applies, key=partial(preference, facts), default="csr")
    if facts.block == (1, 1):
        return "csr"
    if facts.op == "linear":
        return "bsr"
    # Of block formats only BSELL has kernels for convolutions.
    return "bsell" if facts.block_rows % 4 == 0 else "csr"


def _has_spmv_alone(format: str, facts: Facts, kernels: Sequence[KernelInfo]) -> bool:
    here = (format, facts.device)
    return {kernel.op for kernel in kernels if (kernel.format, kernel.device) == here} == {"spmv"}


def _sparse_candidates(facts: Facts, kernels: Sequence[KernelInfo]) -> list[Candidate]:
    return [c for c in candidates(facts, kernels) if c.kernel not in (DENSE, SEMI_STRUCTURED)]
