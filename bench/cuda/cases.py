# SPDX-License-Identifier: Apache-2.0
"""The table that is timed on a GPU: lists of cases, nothing else."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["SUITES", "Case", "in_turns"]

_TARGET = 0.1


@dataclass(frozen=True)
class Case:
    """One product or convolution, and the formats to run it with.

    Attributes:
        name: what the shape is from.
        rows: M, or C_out.
        cols: K, or C_in of a convolution.
        columns: N of a linear layer's batch, or the batch of a convolution.
        density: of the weight.
        dtype: of weight, x and y.
        formats: of `formats.FORMATS`; "semi_structured" for torch's 2:4 product, and "planned" for
            what `sparselt.convert` chooses on the device.
        block: in which weights are kept; (1, 1) for no structure.
        kernel: (R, S) of a convolution; None for a linear layer.
        size: (H, W) of a convolution's input.
        stride: of a convolution.
    """

    name: str
    rows: int
    cols: int
    columns: int
    density: float
    dtype: str = "float32"
    formats: tuple[str, ...] = ("csr",)
    block: tuple[int, int] = (1, 1)
    kernel: tuple[int, int] | None = None
    size: tuple[int, int] = (1, 1)
    stride: int = 1

    def __str__(self) -> str:
        block = "" if self.block == (1, 1) else f",block={self.block[0]}x{self.block[1]}"
        shape = f"M={self.rows},K={self.cols},N={self.columns}"
        if self.kernel:
            shape += f",map={self.size[0]}x{self.size[1]},kernel={self.kernel[0]}x{self.kernel[1]}"
            shape += f",stride={self.stride}"
        return f"{self.name}:{shape}{block},density={self.density:g},{self.dtype}"

    @property
    def weights(self) -> int:
        """How many the dense layer has."""
        return self.rows * self.cols * math.prod(self.kernel or ())

    @property
    def channels_last(self) -> bool:
        """Whether maps are kept with channels last, as filters in blocks read them."""
        return "bsr_nhwc" in self.formats


DECODE = (
    *(
        Case(name, rows, cols, n, density, dtype, ("bitmask", "tile8", "patch8", "csr"))
        for name, rows, cols in (("mlp_up", 14336, 4096), ("mlp_down", 4096, 14336))
        for n in (1, 2, 4, 8, 16)
        for density in (0.5, 0.3, 0.1, 0.05)
        for dtype in ("float16",)
    ),
    # Too few rows to fill a GPU: K is cut.
    *(
        Case("key", 1024, 4096, n, density, "bfloat16", ("bitmask", "tile8", "patch8"))
        for n in (1, 16)
        for density in (0.5, 0.1)
    ),
    *(
        Case("mlp_up", 14336, 4096, 1, density, "float32", ("bitmask", "tile8", "csr"))
        for density in (0.5, 0.1)
    ),
    *(
        Case("lenet_fc1", 300, 784, n, density, "float32", ("tile8", "csr"))
        for n in (1, 64)
        for density in (0.1, 0.02)
    ),
)

SMALL_BATCH = tuple(
    Case(name, rows, cols, n, density, dtype, ("patch8", "tile8"))
    for name, rows, cols, dtype in (
        ("mlp_up_batch", 14336, 4096, "float16"),
        ("mlp_down_batch", 4096, 14336, "bfloat16"),
    )
    for n in (8, 16, 32, 64)
    for density in (0.4, 0.3, 0.2, 0.1, 0.05)
)

EXACT = tuple(
    Case(name, rows, cols, n, density)
    for name, rows, cols, n in (
        ("resnet50_1x1", 512, 512, 784),
        ("resnet50_1x1", 2048, 512, 1568),
        ("transformer_ffn", 2048, 512, 2048),
        ("square", 4096, 4096, 2048),
    )
    for density in (0.3, 0.2, 0.1, 0.05, 0.02)
)

BLOCKS = tuple(
    Case("square", 4096, 4096, n, density, dtype, ("bsr",), block)
    for block in ((4, 1), (8, 1), (16, 16), (32, 32), (64, 64), (128, 128))
    for n in (1, 16, 512, 2048)
    for density in (0.2, 0.1, 0.05)
    for dtype in (("float32",) if block[1] == 1 else ("bfloat16", "float32"))
    if dtype == "bfloat16" or n == 2048
)

BLOCK_DECODE = tuple(
    Case(name, rows, cols, n, density, "bfloat16", ("bsr",), block)
    for name, rows, cols in (("mlp_up", 14336, 4096), ("mlp_down", 4096, 14336))
    for block in ((16, 16), (32, 32), (64, 64), (128, 128))
    for n in (1, 8, 16)
    for density in (0.2, 0.1, 0.05)
)

RESNET50 = (
    ("resnet50_layer1", 64, 64, (3, 3), (56, 56), 1),
    ("resnet50_layer2", 128, 128, (3, 3), (28, 28), 1),
    ("resnet50_layer2_first", 128, 128, (3, 3), (56, 56), 2),
    ("resnet50_layer3", 256, 256, (3, 3), (14, 14), 1),
    ("resnet50_layer4", 512, 512, (3, 3), (7, 7), 1),
    ("resnet50_layer3_1x1", 1024, 256, (1, 1), (14, 14), 1),
    ("resnet50_layer1_1x1", 256, 64, (1, 1), (56, 56), 1),
)

CONVOLUTION = tuple(
    Case(name, filters, channels, batch, density, dtype, ("csr",), (1, 1), kernel, size, stride)
    for name, filters, channels, kernel, size, stride in RESNET50
    for batch in (1, 32)
    for density in (0.2, 0.1, 0.05)
    for dtype in ("float32",)
)

BLOCK_CONVOLUTION = tuple(
    Case(name, filters, channels, batch, density, dtype, ("bsr_nhwc",), block, kernel, size, stride)
    for name, filters, channels, kernel, size, stride in RESNET50
    for block in ((32, 32), (64, 64), (128, 128))
    if min(filters, channels) >= block[1]
    for batch in (1, 32)
    for density in (0.2, 0.1, 0.05)
    for dtype in ("bfloat16", "float32")
    if dtype == "bfloat16" or block == (32, 32)
)

TWO_OF_FOUR = tuple(
    Case(f"square_{size}", size, size, n, 0.5, dtype, ("semi_structured",))
    for size in (2048, 4096, 8192)
    for n in (64, 1024, 4096)
    for dtype in ("float16", "bfloat16")
    if n < 4096 or size > 2048
)

# What no kernel is for should stay dense, and the rest should be no slower.
PLANNED = (
    *(
        Case("planned_square", 4096, 4096, n, density, "float16", ("planned",))
        for n in (1, 64, 2048)
        for density in (0.5, 0.1)
    ),
    Case("planned_square", 4096, 4096, 2048, 0.1, "bfloat16", ("planned",), (64, 64)),
    *(
        Case(
            f"planned_{name}",
            filters,
            channels,
            32,
            0.1,
            "float32",
            ("planned",),
            (1, 1),
            *geometry,
        )
        for name, filters, channels, *geometry in (RESNET50[0], RESNET50[3], RESNET50[5])
    ),
)

SUITES = {
    "decode": DECODE,
    "small_batch": SMALL_BATCH,
    "exact": EXACT,
    "blocks": BLOCKS,
    "block_decode": BLOCK_DECODE,
    "convolution": CONVOLUTION,
    "block_convolution": BLOCK_CONVOLUTION,
    "two_of_four": TWO_OF_FOUR,
    "planned": PLANNED,
}


def in_turns(suites: Sequence[str]) -> list[Case]:
    """The cases of several suites, one of each in turn: time that runs out leaves none without.

    Of a suite, the density that the targets name most comes first.
    """
    sorted_suites = [sorted(SUITES[name], key=lambda c: c.density != _TARGET) for name in suites]
    turns = itertools.zip_longest(*sorted_suites)
    return [case for turn in turns for case in turn if case is not None]
