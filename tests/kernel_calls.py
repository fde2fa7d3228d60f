# SPDX-License-Identifier: Apache-2.0
"""Calls of the raw operators with a kernel's name, so that nothing above can choose another one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import BLOCKS, ConvCase, kernel_params
from torch import Tensor

from sparselt.formats import SparseWeight
from sparselt.plan import KernelInfo

__all__ = ["CONV2D", "SPMM", "a_block_of", "blocks_of", "conv2d", "spmm", "ungrouped"]

# Decorators: a test runs once for every registered kernel of the operation.
SPMM = pytest.mark.parametrize("kernel", kernel_params("spmm"))
CONV2D = pytest.mark.parametrize("kernel", kernel_params("conv2d"))


def blocks_of(kernel: KernelInfo) -> tuple[tuple[int, int] | None, ...]:
    if kernel.format in ("sell", "sign", "delta"):
        # Column blocks of one column, of a few, and wider than most cases; of deltas, of which a
        # byte holds 254 at most, wider than any.
        widest = 4096 if kernel.format == "delta" else 128
        heights = (kernel.tile_rows,) if kernel.tile_rows > 1 else (1, 2, 3, 4, 7)
        return tuple((height, cols) for height in heights for cols in (1, 5, 16, widest))
    if kernel.format == "bsell":
        return tuple((height, cols) for height in (4, 8, 16) for cols in (1, 5, 16, 384))
    return BLOCKS if kernel.format == "bsr" else (None,)


def ungrouped(kernel: KernelInfo, case: ConvCase) -> ConvCase:
    """The case as the kernel can run it: no row of blocks lies in two groups."""
    whole = case.groups == 1 or case.filters // case.groups % 16 == 0
    return case if kernel.format != "bsell" or whole else replace(case, groups=1)


def a_block_of(kernel: KernelInfo, case: object) -> tuple[int, int] | None:
    """One block shape for a case, so that the table as a whole meets all of them."""
    blocks = blocks_of(kernel)
    return blocks[len(str(case)) % len(blocks)]


def spmm(
    kernel: KernelInfo,
    weight: SparseWeight,
    x: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    lower: float | None = None,
    upper: float | None = None,
) -> Tensor:
    return torch.ops.sparselt.spmm(
        x, weight.parts(), weight.meta(), bias, residual, lower, upper, kernel.name
    )


def conv2d(
    kernel: KernelInfo,
    weight: SparseWeight,
    x: Tensor,
    case: ConvCase,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    lower: float | None = None,
    upper: float | None = None,
) -> Tensor:
    geometry = (case.stride, case.padding, case.dilation, case.groups)
    return torch.ops.sparselt.conv2d(
        x, weight.parts(), weight.meta(), bias, residual, *geometry, lower, upper, kernel.name
    )
