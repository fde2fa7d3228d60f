# SPDX-License-Identifier: Apache-2.0
"""How a layer's weight is cut for a kernel: slices, blocks, and columns of a block."""

from __future__ import annotations

import math

from sparselt.cuda_rules import BLOCK_FORMATS
from sparselt.registry import Facts, KernelInfo

__all__ = ["block_for"]

# Columns of a SELL block: 128 rows of x, one panel wide, fill 2/3 of a 48 KiB first-level cache and
# all of a 32 KiB one; where few weights are kept, fewer and larger blocks pay off, since each costs
# a pass over the sums.
_BLOCK_COLS = 128
_SPARSE_BLOCK_COLS = 192
# Rows of a panel of one vector are a quarter as long. Blocks four times as wide were 5 to 8 %
# faster on 2 x 2 maps, and a sum of few blocks is as exact as torch's, one of many 1.3 times off.
_ONE_VECTOR = 16
_NARROW_BLOCK_COLS = 512
_SPARSE_BELOW = 0.08
_ANY_HEIGHT = 4  # slice height for a kernel that takes any

# Rows of a BSELL slice, best first, and the columns of its blocks: a row of x serves all rows of a
# slice, so that it may come from the second-level cache, and fewer passes over the sums gain more.
_BLOCK_HEIGHTS = (16, 8, 4)
_BLOCK_ROW_COLS = 192
_SPARSE_BLOCK_ROW_COLS = 384
_BLOCK_ROW_SPARSE_BELOW = 0.3

# The x of a spmv kernel is small enough that one block may hold all columns of the weight, up to
# what 15-bit indices reach; signs take one of the bits.
_SPMV_HEIGHT = 8  # for a kernel that takes any; the AVX2 kernel's, so that the two share a packing
_SPMV_BLOCK_COLS = 2**15 - 1
_SIGN_BLOCK_COLS = 2**14 - 1

# Generated code goes through few rows at a time, so its blocks fill an L2, not an L1.
_CODE_BLOCK_COLS = 256


def block_for(facts: Facts, kernel: KernelInfo) -> tuple[int, int]:
    """The blocks (rows, cols) that a kernel wants a layer's weight packed in; (1, 1) for none.

    Args:
        facts: the layer; its density and columns set the column blocks of SELL, its density and
            blocks those of BSELL.
        kernel: its tile sets the slice height of SELL.
    """
    row, density = max(1, math.prod(facts.shape[1:])), facts.density
    if kernel.format == "bsell":
        height = next((h for h in _BLOCK_HEIGHTS if facts.block_rows % h == 0), _BLOCK_HEIGHTS[-1])
        if kernel.op == "spmv":
            return (height, min(row, _SPMV_BLOCK_COLS))
        few = density < _BLOCK_ROW_SPARSE_BELOW
        return (height, _SPARSE_BLOCK_ROW_COLS if few else _BLOCK_ROW_COLS)
    if kernel.format not in ("sell", "sign"):
        return facts.block if kernel.format in BLOCK_FORMATS else (1, 1)
    height, cols = _ANY_HEIGHT, _SPARSE_BLOCK_COLS if density < _SPARSE_BELOW else _BLOCK_COLS
    if kernel.op == "spmv":
        most = _SIGN_BLOCK_COLS if kernel.format == "sign" else _SPMV_BLOCK_COLS
        height, cols = _SPMV_HEIGHT, min(row, most)
    elif kernel.op == "code":
        cols = _CODE_BLOCK_COLS
    elif facts.columns is not None and facts.columns <= _ONE_VECTOR:
        cols = _NARROW_BLOCK_COLS
    return (kernel.tile_rows if kernel.tile_rows > 1 else height, cols)
