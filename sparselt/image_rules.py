# SPDX-License-Identifier: Apache-2.0
"""Which kernel a layer runs where values lie with the images of a batch innermost.

By rule: what a kernel takes in this layout, its times in torch's do not tell. The network as a
whole is timed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from sparselt.plan import DENSE, Facts, KernelInfo, Plan, candidates

__all__ = ["plan_in_images"]

# Operations of kernels that can. Code is best, 1.1 to 1.5 times as fast as panels in 3x3 layers and
# 1.2 times in 1x1 layers, but for those of so many times as many rows as columns, whose time goes
# into storing y: there panels, which store from registers, are 5 to 10 % faster (ResNet-50's layers
# at 90 % zeros, 16 images, two threads).
_OPERATIONS = ("code", "panel")
_TALL = 4


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
    is_tall = facts.shape[0] >= _TALL * math.prod(facts.shape[1:])
    order = _OPERATIONS[::-1] if is_tall else _OPERATIONS
    best = min(able, key=lambda c: order.index(operations[c.kernel]))
    reason = f"{best.kernel} in a network with the images of a batch innermost"
    return Plan(best.kernel, best.format, reason, block=best.block)
