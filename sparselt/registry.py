# SPDX-License-Identifier: Apache-2.0
"""What a plan chooses by: a line of the kernel registry (csrc/kernels.inc), and a layer's facts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

__all__ = ["Facts", "KernelInfo"]


@dataclass(frozen=True)
class KernelInfo:
    """One line of the kernel registry, as seen on this machine.

    Attributes:
        name: the kernel's one name, for example "csr_spmm_avx2".
        op: "spmm", "conv2d", "panel" or "code" for a kernel that serves both, "spmv" for one that
            serves spmm where there are few columns, "band" for one that serves conv2d line by line,
            or "depthwise".
        format: the weight format it reads, a key of `sparselt.formats.FORMATS`, or "dense".
        device: "cpu" or "cuda".
        features: CPU features it needs.
        tile_rows: output rows computed together; of a "panel", "code" or "spmv" kernel the slice
            height that it reads (1 for any).
        tile_columns: columns (pixels, batch items) computed together.
        dtype: the element type of values and activations, for example "float32".
        usable: whether it was built and can run here.
        reason: why it is not usable; empty otherwise.
    """

    name: str
    op: str
    format: str
    device: str
    features: tuple[str, ...]
    tile_rows: int
    tile_columns: int
    dtype: str
    usable: bool
    reason: str = ""

    @property
    def operations(self) -> tuple[str, ...]:
        """The operations it serves: "spmm", "conv2d"."""
        both = ("spmm", "conv2d")
        served = {"panel": both, "code": both, "spmv": ("spmm",), "band": ("conv2d",)}
        return served.get(self.op, (self.op,))

    @property
    def slice_rows(self) -> int | None:
        """The rows that the slices of a weight must have for it; None for any number."""
        walks_slices = self.op in ("panel", "code", "spmv") and self.tile_rows > 1
        return self.tile_rows if walks_slices else None

    def serves(self, op: str, format: str, block_rows: int) -> bool:
        """Whether it runs `op` on weights of `format` with blocks (slices) of `block_rows` rows."""
        fits = self.slice_rows in (None, block_rows)
        return op in self.operations and self.format == format and fits


@dataclass(frozen=True)
class Facts:
    """What is known about a layer before anything runs.

    Attributes:
        op: "linear", "spmm", "conv1d" or "conv2d".
        shape: the weight's logical shape, (M, K) or (C_out, C_in / groups, ...).
        nnz: kept weights.
        columns: N of the product: the batch for a linear layer, B * P * Q for a convolution; None
            when unknown.
        block: (rows, cols) of the blocks that the zeros come in; (1, 1) when they do not.
        groups: of a convolution.
        one_magnitude: whether the kept weights of each row differ in sign alone.
        device: "cpu" or "cuda".
        device_index: which CUDA device; GPUs of several generations may be in one machine. What is
            measured on one of a kind holds for all, so it tells no layers apart.
        dtype: of the weight, without the "torch." prefix.
        two_of_four: whether at most two of each four weights of a row, in order, are kept.
        obstacle: why no sparse kernel may serve this layer at all; empty when one may.
    """

    op: str
    shape: tuple[int, ...]
    nnz: int
    columns: int | None = None
    block: tuple[int, int] = (1, 1)
    groups: int = 1
    one_magnitude: bool = False
    device: str = "cpu"
    dtype: str = "float32"
    two_of_four: bool = False
    obstacle: str = ""
    device_index: int = field(default=0, compare=False, repr=False)

    @property
    def density(self) -> float:
        """Kept weights over all weights; 1.0 for an empty weight."""
        size = math.prod(self.shape)
        return self.nnz / size if size else 1.0

    @property
    def block_rows(self) -> int:
        """Rows of blocks that no group of a convolution ends inside of."""
        return self.block[0] if self.groups == 1 else math.gcd(self.block[0], self.group_rows)

    @property
    def group_rows(self) -> int:
        """Output channels of a group; all of them where there is one."""
        return self.shape[0] // self.groups
