# SPDX-License-Identifier: Apache-2.0
"""A line of the kernel registry (csrc/kernels.inc) as Python sees it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["KernelInfo"]


@dataclass(frozen=True)
class KernelInfo:
    """One line of the kernel registry, as seen on this machine.

    Attributes:
        name: the kernel's one name, for example "csr_spmm_avx2".
        op: "spmm", "conv2d", "panel" for a kernel that serves both, "spmv" for one that serves
            spmm where there are few columns, or "depthwise".
        format: the weight format it reads, a key of `sparselt.formats.FORMATS`, or "dense".
        device: "cpu" or "cuda".
        features: CPU features it needs.
        tile_rows: output rows computed together; of a kernel for SELL, the slice height it reads
            (1 for any).
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
        return {"panel": ("spmm", "conv2d"), "spmv": ("spmm",)}.get(self.op, (self.op,))

    def serves(self, op: str, format: str, block_rows: int) -> bool:
        """Whether it runs `op` on weights of `format` with blocks (slices) of `block_rows` rows."""
        fits = self.format != "sell" or self.tile_rows in (1, block_rows)
        return op in self.operations and self.format == format and fits
