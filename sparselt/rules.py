# SPDX-License-Identifier: Apache-2.0
"""What a plan goes by for each format: which layers it suits, how it is cut, when it pays."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from sparselt.registry import Facts, KernelInfo

__all__ = ["RULES", "Rule", "block_for", "misfit"]

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

# Panels copy the x of each group, which few rows use too little.
_LEAST_GROUP_ROWS = 8

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

# A step over 16 positions takes its time even where nothing is kept.
_BITS_FROM = 0.15

# What 15-bit numbers of windows reach.
_WINDOW_COLS = 2**15 * 16

# Rarer weights lie so far apart that jumps eat up what bytes save.
_DELTA_FROM = 0.01

# Generated code goes through few rows at a time, so its blocks fill an L2, not an L1.
_CODE_BLOCK_COLS = 256


def block_for(facts: Facts, kernel: KernelInfo) -> tuple[int, int]:
    """The blocks (rows, cols) that a kernel wants a layer's weight packed in; (1, 1) for none.

    Args:
        facts: the layer; its density and columns set the column blocks of slices, its blocks the
            rows of those of BSELL.
        kernel: its tile sets the slice height of the other sliced formats.
    """
    return _rule(kernel).block(facts, kernel)


def misfit(facts: Facts, kernel: KernelInfo) -> str:
    """Why a kernel's format does not suit the pattern of a layer's weight; empty if it does."""
    return _rule(kernel).misfit(facts)


def _no_blocks(facts: Facts, kernel: KernelInfo) -> tuple[int, int]:
    return (1, 1)


def _own_blocks(facts: Facts, kernel: KernelInfo) -> tuple[int, int]:
    return facts.block


def _rows_of_blocks(facts: Facts, kernel: KernelInfo) -> tuple[int, int]:
    height = next((h for h in _BLOCK_HEIGHTS if facts.block_rows % h == 0), _BLOCK_HEIGHTS[-1])
    if kernel.op == "spmv":
        return (height, min(_row(facts), _SPMV_BLOCK_COLS))
    few = facts.density < _BLOCK_ROW_SPARSE_BELOW
    return (height, _SPARSE_BLOCK_ROW_COLS if few else _BLOCK_ROW_COLS)


def _slices(facts: Facts, kernel: KernelInfo) -> tuple[int, int]:
    if kernel.op == "spmv":
        return _spmv_slices(facts, kernel, _SPMV_BLOCK_COLS)
    cols = _SPARSE_BLOCK_COLS if facts.density < _SPARSE_BELOW else _BLOCK_COLS
    if kernel.op == "code":
        cols = _CODE_BLOCK_COLS
    elif facts.columns is not None and facts.columns <= _ONE_VECTOR:
        cols = _NARROW_BLOCK_COLS
    return (kernel.tile_rows if kernel.tile_rows > 1 else _ANY_HEIGHT, cols)


def _sign_slices(facts: Facts, kernel: KernelInfo) -> tuple[int, int]:
    return _spmv_slices(facts, kernel, _SIGN_BLOCK_COLS)


def _spmv_slices(facts: Facts, kernel: KernelInfo, most: int) -> tuple[int, int]:
    height = kernel.tile_rows if kernel.tile_rows > 1 else _SPMV_HEIGHT
    return (height, min(_row(facts), most))


def _row(facts: Facts) -> int:
    return max(1, math.prod(facts.shape[1:]))


def _suits_all(facts: Facts) -> str:
    return ""


def _suits_blocks(facts: Facts) -> str:
    return "the zeros do not come in blocks" if facts.block == (1, 1) else ""


def _suits_rows_of_blocks(facts: Facts) -> str:
    if facts.block != (1, 1) and facts.block_rows % _BLOCK_HEIGHTS[-1]:
        return f"the rows of the blocks are no multiple of {_BLOCK_HEIGHTS[-1]}"
    return _suits_blocks(facts)


def _suits_large_groups(facts: Facts) -> str:
    few = facts.groups > 1 and facts.group_rows < _LEAST_GROUP_ROWS
    return f"is for groups of at least {_LEAST_GROUP_ROWS} rows" if few else ""


def _suits_many_weights(facts: Facts) -> str:
    few = facts.density < _BITS_FROM
    return f"is for at least {100 * _BITS_FROM:.0f} % kept weights" if few else ""


def _suits_windows(facts: Facts) -> str:
    wide = _row(facts) > _WINDOW_COLS
    return f"is for at most {_WINDOW_COLS} weights a row" if wide else ""


def _suits_near_weights(facts: Facts) -> str:
    if facts.density < _DELTA_FROM:
        return f"is for at least {100 * _DELTA_FROM:.0f} % kept weights"
    # With more columns instructions bind, not bytes.
    return "is for one column" if (facts.columns or 1) > 1 else ""


def _suits_signs(facts: Facts) -> str:
    return "" if facts.one_magnitude else "the weights of a row differ in magnitude"


@dataclass(frozen=True)
class Rule:
    """What a plan goes by for one format.

    Attributes:
        misfit: of a layer's facts: why its pattern does not suit the format; empty if it does.
        block: of facts and a kernel: the blocks (rows, cols) to pack in; (1, 1) for none.
        pays_below: the density below which the format's CPU kernels are expected to beat dense,
            where nobody measured; `cuda_rules` says it for CUDA.
    """

    misfit: Callable[[Facts], str] = _suits_all
    block: Callable[[Facts, KernelInfo], tuple[int, int]] = _no_blocks
    pays_below: float = 0.0


# Densities: the AVX2 kernels break even with oneDNN on AVX-512 at 0.2 to 0.5, one thread, unit
# strides, ResNet-50's shapes. Cautious on purpose: a wrong guess costs speed, and example inputs
# replace it by a measurement. Formats without a line suit all layers and have no blocks.
RULES: dict[str, Rule] = {
    "csr": Rule(pays_below=0.20),
    "bsr": Rule(_suits_blocks, _own_blocks, pays_below=0.40),
    "sell": Rule(_suits_large_groups, _slices, pays_below=0.30),
    "delta": Rule(_suits_near_weights, _slices, pays_below=0.30),
    "bsell": Rule(_suits_rows_of_blocks, _rows_of_blocks, pays_below=0.45),
    "sign": Rule(_suits_signs, _sign_slices, pays_below=0.45),
    "bits": Rule(_suits_many_weights, pays_below=0.45),
    "window": Rule(_suits_windows, pays_below=0.25),
    "bsr_nhwc": Rule(_suits_blocks, _own_blocks),
}
_PLAIN = Rule()


def _rule(kernel: KernelInfo) -> Rule:
    return RULES.get(kernel.format, _PLAIN)
