# SPDX-License-Identifier: Apache-2.0
"""What a plan needs to know of a dense layer, and the plan of one that must be sparse."""

from __future__ import annotations

import os
from dataclasses import replace

from torch import Tensor, nn

from sparselt import ops
from sparselt.errors import KernelError, OptionError, explain_mismatch
from sparselt.packed import zero_block
from sparselt.plan import DENSE, Facts, KernelInfo, Plan, candidates, choose

__all__ = ["LAYER_OPS", "facts_of", "forced_kernel", "sparse_plan"]

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
    """
    weight = module.weight
    assert isinstance(weight, Tensor)
    for kind, op in LAYER_OPS.items():
        if isinstance(module, kind):
            return Facts(
                op=op,
                shape=tuple(weight.shape),
                nnz=int(kept.sum()),
                columns=columns,
                block=zero_block(kept),
                groups=int(getattr(module, "groups", 1)),
                device=weight.device.type,
                dtype=str(weight.dtype).removeprefix("torch."),
            )
    kinds = ", ".join(kind.__name__ for kind in LAYER_OPS)
    raise OptionError(explain_mismatch("module", f"one of {kinds}", type(module).__name__))


def sparse_plan(facts: Facts, format: str, forced: str) -> Plan:
    """The plan of a layer that is to be sparse whether or not it gains.

    Args:
        facts: of the layer.
        format: "auto", "csr" or "bsr".
        forced: name of a kernel that must run; empty for none.

    Raises:
        KernelError: no kernel applies, or the forced one does not.
    """
    # The values are widened when packed and the result narrowed after, so half precision fits.
    if facts.dtype in ("float16", "bfloat16"):
        facts = replace(facts, dtype="float32")
    kernels = ops.kernels()
    named = next((kernel for kernel in kernels if kernel.name == forced), None)
    format = _format_for(facts, format, named)
    if format == "bsr" and facts.block == (1, 1):
        facts = replace(facts, block=(4, 1))
    plan = choose(facts, kernels, format=format, forced=forced)
    if not plan.is_dense:
        return plan
    if forced == DENSE:
        raise KernelError("SPARSELT_KERNEL=dense does not fit a sparse layer; unset it")
    for item in candidates(facts, kernels):
        if item.applies and item.format == format:
            reason = f"{item.kernel}: a sparse layer was asked for"
            return Plan(
                item.kernel, format, reason, plan.candidates, block=_block_of(facts, format)
            )
    raise KernelError(plan.reason.removeprefix("stays dense: "))


def _format_for(facts: Facts, format: str, named: KernelInfo | None) -> str:
    if format != "auto":
        return format
    if named is not None:
        return named.format
    # Convolutions have no block kernel yet.
    return "bsr" if facts.op == "linear" and facts.block != (1, 1) else "csr"


def _block_of(facts: Facts, format: str) -> tuple[int, int]:
    return facts.block if format == "bsr" else (1, 1)
