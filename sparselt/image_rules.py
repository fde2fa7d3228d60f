# SPDX-License-Identifier: Apache-2.0
"""Which kernel a layer runs where values lie with the images of a batch innermost.

By rule: what a kernel takes in this layout, its times in torch's do not tell. The network as a
whole is timed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sparselt.plan import DENSE, Facts, KernelInfo, Plan, candidates

__all__ = ["plan_in_images"]

# Operations of kernels that can, best first.
_OPERATIONS = ("code", "panel")


def plan_in_images(facts: Facts, kernels: Sequence[KernelInfo]) -> Plan:
    """The kernel for a layer whose values lie with the images innermost; dense where there is none.

    Args:
        facts: the layer; its number of columns does not matter.
        kernels: the registry, best first.

    Example:
        >>> plan_in_images(Facts("linear", (64, 64), nnz=64 * 64), ()).kernel
        'dense'
    """
    considered = candidates(replace(facts, columns=None), kernels)
    wanted = "sell" if facts.block == (1, 1) else "bsell"
    operations = {kernel.name: kernel.op for kernel in kernels}
    able = [
        c
        for c in considered
        if c.applies and c.format == wanted and operations[c.kernel] in _OPERATIONS
    ]
    if facts.density == 1 or facts.groups > 1 or not able:
        return Plan(DENSE, DENSE, "stays dense: it has no zeros, or no kernel for images innermost")
    best = min(able, key=lambda c: _OPERATIONS.index(operations[c.kernel]))
    reason = f"{best.kernel} in a network with the images of a batch innermost"
    return Plan(best.kernel, best.format, reason, block=best.block)
