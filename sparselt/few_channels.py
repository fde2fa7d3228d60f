# SPDX-License-Identifier: Apache-2.0
"""Dense convolutions of few input channels, the first of most networks, by a panel kernel.

Torch's are slow for want of channels, and a compiled program has to stop for each of them. A dense
weight is one of blocks, all of which are kept.
"""

from __future__ import annotations

import torch
from torch import nn

from sparselt.neighbours import is_depthwise
from sparselt.nn import SparseConv2d
from sparselt.ops import kernels
from sparselt.plan import Facts, Plan
from sparselt.rules import block_for

__all__ = ["few_channels_in_panels"]

_MOST_CHANNELS = 4
# Rows of a block, best first.
_HEIGHTS = (8, 4)
# On ResNet-50's first layer they reach 75 to 77 % of a core's peak, as oneDNN does with AVX2; with
# AVX-512 it reaches half.
_KERNELS = ("bsell_panel_avx512", "bsell_panel_avx2")
# With images innermost, the same layer, 16 images, two threads: 70 % of the peak against 53 %.
_CODE = "sell_code_avx512"


def few_channels_in_panels(
    module: nn.Module, images_innermost: bool = False
) -> SparseConv2d | None:
    """The layer that computes what a module does, without a clamp; None where torch shall.

    Args:
        module: any layer that stays dense.
        images_innermost: how its program keeps values.

    Example:
        >>> few_channels_in_panels(nn.Conv2d(64, 64, 3)) is None
        True
    """
    if (
        not isinstance(module, nn.Conv2d)
        or module.in_channels > _MOST_CHANNELS
        or module.groups != 1
        or module.weight.dtype != torch.float32
        or module.weight.device.type != "cpu"
        or is_depthwise(module)
    ):
        return None
    height = next((rows for rows in _HEIGHTS if module.out_channels % rows == 0), 0)
    usable = {known.name: known for known in kernels() if known.usable}
    in_code = images_innermost and _CODE in usable
    kernel = usable[_CODE] if in_code else next((usable[k] for k in _KERNELS if k in usable), None)
    if not height or kernel is None:
        return None
    shape, block = tuple(module.weight.shape), (1, 1) if in_code else (height, 1)
    facts = Facts("conv2d", shape, nnz=module.weight.numel(), block=block)
    plan = Plan(kernel.name, kernel.format, "few channels", block=block_for(facts, kernel))
    return SparseConv2d(module, plan, torch.ones(shape, dtype=torch.bool))
