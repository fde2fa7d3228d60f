# SPDX-License-Identifier: Apache-2.0
"""What a plan expects of CUDA kernels where nobody measured, from the registry's facts alone.

The figures follow from counting bytes and operations (docs/cuda.md), not from runs: they are
cautious, and example inputs on the device replace them by measurements.
"""

from __future__ import annotations

import math

from sparselt.registry import Facts, KernelInfo

__all__ = [
    "BLOCK_FORMATS",
    "FEW_COLUMNS_FORMATS",
    "SEMI_STRUCTURED",
    "pays_below",
    "preference",
    "refusal",
    "semi_structured_refusal",
]

# Formats whose kernels read the weight once for every tile of columns, and so are for few of them.
FEW_COLUMNS_FORMATS = ("tile8", "patch8", "bitmask")
_FEW_COLUMNS = 64
# From this density on a bit a position takes less than a byte a weight.
_BITS_FROM = 0.3
# Tensor cores multiply 8 columns at a time: with more, patch8 leaves tile8 behind.
_TENSOR_COLUMNS = 8

BLOCK_FORMATS = ("bsr", "bsr_nhwc")

# Torch's own 2:4 product: a candidate beside the registry's kernels, as dense is.
SEMI_STRUCTURED = "semi_structured"
_HALF_TYPES = ("float16", "bfloat16")
# What both of torch's back ends take: rows and columns of the weight.
_SEMI_STRUCTURED_MULTIPLES = (32, 64)
# Below these it measured slower than dense on an H100 (published figures, not ours).
_SEMI_STRUCTURED_PAYS_FROM = (2048, 1024)

# Density below which a kernel is expected to beat cuBLAS or cuDNN.
_PAYS_BELOW = {
    # 3 and 5 bytes a weight in tile8, 2 and 4 of a dense one; half of where the bytes are equal.
    ("few", "float32"): 0.4,
    ("few", "half"): 0.3,
    # Tensor cores on both sides.
    ("blocks", "float32"): 0.2,
    ("blocks", "half"): 0.2,
    # Plain cores, which dense float32 without TF32 uses too; 16-bit dense has sixteen times as many
    # operations a second.
    ("rows", "float32"): 0.1,
    ("rows", "half"): 0.02,
}
# A bit a position and the value: as many bytes as dense from 0.94 on in 16 bits, 0.97 in float32.
_BITS_PAY_BELOW = 0.45
# Blocks with a side below this leave most of a tensor-core tile empty.
_FULL_BLOCK = 16


def refusal(facts: Facts, kernel: KernelInfo) -> str:
    """Why a CUDA kernel is not for a product with this many columns; empty if it is."""
    if kernel.format not in FEW_COLUMNS_FORMATS:
        return ""
    few = facts.columns is not None and facts.columns <= _FEW_COLUMNS
    return "" if few else f"is for at most {_FEW_COLUMNS} columns"


def preference(facts: Facts, format: str) -> int:
    """Where a format stands among those that apply, the smallest first.

    Formats for blocks and for few columns apply only where the layer has them.
    """
    halves = [SEMI_STRUCTURED] if _halves_pay(facts) else []
    few = ["tile8", "patch8", "bitmask"]
    if facts.density >= _BITS_FROM:
        few.reverse()
    elif (facts.columns or 0) > _TENSOR_COLUMNS:
        few = ["patch8", "tile8", "bitmask"]
    order = [*BLOCK_FORMATS, *few, *halves, "csr"]
    return order.index(format) if format in order else len(order)


def pays_below(facts: Facts, format: str) -> float:
    """The density below which a format is expected to beat dense."""
    if format == SEMI_STRUCTURED:
        return 1.0 if _halves_pay(facts) else 0.0
    kind = "few" if format in FEW_COLUMNS_FORMATS else "rows"
    if format == "bitmask":
        return _BITS_PAY_BELOW
    if format in BLOCK_FORMATS and (facts.dtype == "float32" or min(facts.block) >= _FULL_BLOCK):
        kind = "blocks"
    return _PAYS_BELOW[kind, "half" if facts.dtype in _HALF_TYPES else "float32"]


def semi_structured_refusal(facts: Facts) -> str:
    """Why torch's 2:4 product cannot run a layer; empty if it can."""
    if facts.op not in ("linear", "spmm"):
        return "is for linear layers"
    if facts.dtype not in _HALF_TYPES:
        return f"computes float16 and bfloat16, the weight is {facts.dtype}"
    rows, cols = _SEMI_STRUCTURED_MULTIPLES
    if facts.shape[0] % rows or facts.shape[1] % cols or not math.prod(facts.shape):
        return f"needs rows a multiple of {rows} and columns of {cols}"
    return "" if facts.two_of_four else "more than two weights of some four are kept"


def _halves_pay(facts: Facts) -> bool:
    sides, least = _SEMI_STRUCTURED_PAYS_FROM
    return min(facts.shape) >= sides and (facts.columns or 0) >= least
