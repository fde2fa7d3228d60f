# SPDX-License-Identifier: Apache-2.0
"""The case table that every kernel, format and operator test walks, and guarded memory.

A case is a frozen record of sizes, pattern and seed; its tensors are made from the seed on demand,
so that a printed case id is a reproducer. Sizes around a kernel's tile come from the registry.
"""

from __future__ import annotations

import functools
import itertools
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from expected import assert_within_bound
from torch import Tensor

from sparselt.formats import SparseWeight, pack
from sparselt.plan import KernelInfo

__all__ = [
    "BLOCKS",
    "DENSITIES",
    "PATTERNS",
    "ConvCase",
    "SpmmCase",
    "assert_within_bound",
    "conv_cases",
    "cpu_formats",
    "guarded",
    "guarded_output",
    "guarded_weight",
    "kernel_params",
    "spmm_cases",
]

# Of a weight, in fractions; 0 and 1 are an empty and a full one, "one value" is a pattern.
DENSITIES = (0.0, 0.02, 0.1, 0.5, 1.0)

PATTERNS = (
    "random",
    "one value",
    "empty rows",
    "empty columns",
    "one full row",
    "one column",
    "stored zeros",
    "last corner",
)

# Along the outputs, square, no power of two, larger than many matrices, and the degenerate one.
BLOCKS = ((1, 1), (4, 1), (8, 1), (16, 1), (2, 2), (16, 16), (3, 5), (1, 4), (64, 32))

# Floats of NaN on each side of what a kernel may touch: more than any vector or tile row.
GUARD = 64


@dataclass(frozen=True)
class SpmmCase:
    """W (rows, cols) with a pattern, times x (cols, columns)."""

    rows: int
    cols: int
    columns: int
    pattern: str = "random"
    density: float = 0.3
    seed: int = 0

    def __str__(self) -> str:
        return (
            f"M={self.rows},K={self.cols},N={self.columns},{self.pattern.replace(' ', '_')},"
            f"density={self.density:g},seed={self.seed}"
        )

    def dense(self) -> tuple[Tensor, Tensor]:
        """The dense weight (M, K) and its mask."""
        generator = _generator(str(self))
        mask = make_mask(self.pattern, self.rows, self.cols, self.density, generator)
        weight = torch.randn(self.rows, self.cols, generator=generator)
        if self.pattern == "stored zeros":
            weight[torch.rand(weight.shape, generator=generator) < 0.5] = 0.0
        return weight, mask

    def weight(self, format: str = "csr", block: tuple[int, int] | None = None) -> SparseWeight:
        """The packed weight."""
        weight, mask = self.dense()
        if format == "sign":  # the same signs, a magnitude a row
            weight = torch.copysign(0.25 + torch.arange(self.rows).view(-1, 1), weight)
        return pack(weight, mask, format, None if format == "csr" else block)

    def x(self) -> Tensor:
        """(K, N) float32."""
        return torch.randn(self.cols, self.columns, generator=_generator(f"x {self}"))

    def bias(self) -> Tensor:
        """(M,) float32."""
        return torch.randn(self.rows, generator=_generator(f"bias {self}"))

    def residual(self) -> Tensor:
        """(M, N) float32."""
        return torch.randn(self.rows, self.columns, generator=_generator(f"residual {self}"))


@dataclass(frozen=True)
class ConvCase:
    """Filters (filters, channels / groups, *kernel) over x (batch, channels, *size)."""

    batch: int
    channels: int
    filters: int
    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    pattern: str = "random"
    density: float = 0.3
    seed: int = 0

    def __str__(self) -> str:
        def pair(sizes: tuple[int, int]) -> str:
            return f"{sizes[0]}x{sizes[1]}"

        return (
            f"B={self.batch},C={self.channels},M={self.filters},map={pair(self.size)},"
            f"kernel={pair(self.kernel)},stride={pair(self.stride)},padding={pair(self.padding)},"
            f"dilation={pair(self.dilation)},groups={self.groups},"
            f"{self.pattern.replace(' ', '_')},density={self.density:g},seed={self.seed}"
        )

    def fits(self) -> bool:
        """Whether the dilated filter fits into the padded map."""
        return min(self.out_size()) >= 1

    def out_size(self) -> tuple[int, int]:
        """(P, Q)."""
        rows, columns = (
            (self.size[i] + 2 * self.padding[i] - self.dilation[i] * (self.kernel[i] - 1) - 1)
            // self.stride[i]
            + 1
            for i in (0, 1)
        )
        return rows, columns

    def options(self) -> dict[str, object]:
        """The keyword arguments of conv2d, but for the epilogue."""
        return {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
        }

    def dense(self) -> tuple[Tensor, Tensor]:
        """The dense filters and their mask."""
        shape = (self.filters, self.channels // self.groups, *self.kernel)
        generator = _generator(str(self))
        mask = make_mask(self.pattern, shape[0], math.prod(shape[1:]), self.density, generator)
        return torch.randn(shape, generator=generator), mask.view(shape)

    def weight(self, format: str = "csr", block: tuple[int, int] | None = None) -> SparseWeight:
        """The packed filters."""
        weight, mask = self.dense()
        return pack(weight, mask, format, None if format == "csr" else block, self.groups)

    def x(self) -> Tensor:
        """(B, C_in, H, W) float32."""
        shape = (self.batch, self.channels, *self.size)
        return torch.randn(shape, generator=_generator(f"x {self}"))

    def bias(self) -> Tensor:
        """(C_out,) float32."""
        return torch.randn(self.filters, generator=_generator(f"bias {self}"))

    def residual(self) -> Tensor:
        """(B, C_out, P, Q) float32."""
        shape = (self.batch, self.filters, *self.out_size())
        return torch.randn(shape, generator=_generator(f"residual {self}"))


def _generator(text: str) -> torch.Generator:
    # Python's own hash differs from process to process.
    return torch.Generator().manual_seed(zlib.crc32(text.encode()))


def make_mask(
    pattern: str, rows: int, cols: int, density: float, generator: torch.Generator
) -> Tensor:
    """Bool (rows, cols): which weights a pattern of `PATTERNS` keeps."""
    mask = torch.rand(rows, cols, generator=generator) < density
    if not rows * cols:
        return mask
    if pattern == "one value":
        mask[:] = False
        mask[rows // 2, cols // 2] = True
    elif pattern == "empty rows":
        mask[::2] = False
    elif pattern == "empty columns":
        mask[:, 1::3] = False
        mask[:, -1] = False
    elif pattern == "one full row":
        mask[:] = False
        mask[rows // 2] = True
    elif pattern == "one column":
        mask[:] = False
        mask[:, cols // 2] = True
    elif pattern == "last corner":
        mask[:] = False
        mask[-1, -1] = True
    else:
        assert pattern in ("random", "stored zeros"), pattern
    return mask


def edge_sizes(tiles: Sequence[int]) -> list[int]:
    """0, 1, 2, primes, and one below, at and above each tile and its vectors."""
    sizes = {0, 1, 2, 3, 7, 13}
    for tile in {8, 16, *tiles}:
        sizes |= {tile - 1, tile, tile + 1}
    widest = max(tiles)
    return sorted(sizes | {2 * widest - 1, 2 * widest, 2 * widest + 9})


@functools.cache
def spmm_cases() -> tuple[SpmmCase, ...]:
    """Every size with an ordinary pattern, then every density and pattern with a few sizes."""
    columns = edge_sizes([kernel.tile_columns for kernel in _kernels()])
    rows = edge_sizes([kernel.tile_rows for kernel in _kernels()])
    cases = [
        *(SpmmCase(5, 11, n) for n in columns),
        *(SpmmCase(m, 11, n) for m in rows for n in (1, 3, 65)),
        *(SpmmCase(5, k, n) for k in (0, 1, 2, 31, 32, 33, 64, 127) for n in (1, 3, 65)),
        *(
            SpmmCase(m, k, n, density=density)
            for (m, k), n, density in itertools.product(
                [(1, 1), (17, 23), (32, 32)], (1, 8, 67), DENSITIES
            )
        ),
        *(
            SpmmCase(m, k, n, pattern)
            for (m, k), n, pattern in itertools.product(
                [(1, 9), (9, 1), (17, 23)], (1, 8, 67), PATTERNS
            )
        ),
        SpmmCase(37, 300, 130, density=0.1),
        SpmmCase(3, 2000, 17, density=0.5),
        *(SpmmCase(19, 3000, n, density=0.003) for n in (1, 2, 8)),  # hundreds of columns apart
    ]
    return tuple(dict.fromkeys(cases))


CONV_STRIDES = ((1, 1), (2, 2), (3, 3), (2, 1))
CONV_PADDINGS = ((0, 0), (1, 1), (2, 2), (1, 2))
CONV_DILATIONS = ((1, 1), (2, 2))
CONV_KERNELS = ((1, 1), (3, 3), (1, 5), (5, 3), (7, 7))
CONV_MAPS = ((7, 7), (13, 13), (1, 19), (9, 16), (14, 71))


@functools.cache
def conv_cases() -> tuple[ConvCase, ...]:
    """Every combination of geometry and groups; maps and batches take turns over them."""
    return tuple(dict.fromkeys((*_conv_combinations(), *_conv_patterns())))


def _conv_combinations() -> Iterator[ConvCase]:
    turns = itertools.count()
    for kernel, stride, padding, dilation, groups in itertools.product(
        CONV_KERNELS, CONV_STRIDES, CONV_PADDINGS, CONV_DILATIONS, (1, 2, 4)
    ):
        turn = next(turns)
        # groups = 4 is depthwise, with two filters a channel every other time.
        filters = 8 if groups == 4 and turn % 2 else (4 if groups == 4 else 6)
        for shift in range(len(CONV_MAPS)):
            size = CONV_MAPS[(turn + shift) % len(CONV_MAPS)]
            case = ConvCase(
                1 + turn % 3, 4, filters, size, kernel, stride, padding, dilation, groups
            )
            if case.fits():
                yield case
                break


def _conv_patterns() -> Iterator[ConvCase]:
    for pattern in PATTERNS:
        yield ConvCase(2, 3, 5, (9, 16), (3, 3), padding=(1, 1), pattern=pattern)
        yield ConvCase(1, 6, 4, (7, 7), (3, 3), stride=(2, 2), groups=2, pattern=pattern)
    for density in DENSITIES:
        yield ConvCase(1, 3, 5, (13, 13), (3, 3), padding=(1, 1), density=density)
    # A 1x1 convolution over maps whose pixels lie around the tile.
    for tile in sorted(
        {kernel.tile_columns for kernel in _kernels() if "conv2d" in kernel.operations}
    ):
        for pixels in (tile - 1, tile, tile + 1):
            if pixels:
                yield ConvCase(2, 5, 3, (1, pixels), (1, 1))
                yield ConvCase(1, 2, 3, (3, pixels), (3, 3), padding=(1, 1))
    yield ConvCase(0, 3, 5, (7, 7), (3, 3))
    yield ConvCase(1, 1, 1, (1, 1), (1, 1), density=1.0)
    yield ConvCase(1, 3, 2, (3, 3), (3, 3), density=1.0)
    yield ConvCase(1, 3, 2, (1, 1), (3, 3), padding=(1, 1), density=1.0)
    yield ConvCase(1, 3, 2, (5, 5), (2, 4), stride=(5, 4), padding=(3, 1), dilation=(3, 1))
    yield ConvCase(1, 2, 2, (6, 6), (2, 2), stride=(7, 9))


def cpu_formats() -> list[str]:
    """The formats that kernels of the CPU read."""
    return list(dict.fromkeys(k.format for k in _kernels() if "spmm" in k.operations))


def _kernels() -> tuple[KernelInfo, ...]:
    from sparselt import ops  # not at the top: the format tests need no extension

    return tuple(kernel for kernel in ops.kernels() if kernel.device == "cpu")


def kernel_params(op: str) -> list[object]:
    """Every CPU kernel of an operation as a pytest parameter; one that cannot run says why."""
    params = []
    for kernel in _kernels():
        if op not in kernel.operations:
            continue
        marks = []
        if not kernel.usable:
            marks.append(pytest.mark.skip(reason=f"{kernel.name}: {kernel.reason}"))
        params.append(pytest.param(kernel, id=kernel.name, marks=marks))
    return params


def guarded(tensor: Tensor, offset: int = 0) -> Tensor:
    """The same values in a slice of a larger buffer: NaN (0 for integers) on both sides.

    A read outside the slice turns the result into NaN; the offset, in elements, breaks alignment.
    """
    fill = math.nan if tensor.is_floating_point() else 0
    buffer = torch.full((GUARD + offset + tensor.numel() + GUARD,), fill, dtype=tensor.dtype)
    inside = buffer[GUARD + offset : GUARD + offset + tensor.numel()]
    inside.copy_(tensor.reshape(-1))
    return inside.view(tensor.shape)


def guarded_weight(weight: SparseWeight, offset: int = 0) -> SparseWeight:
    """The same weight with each part in a slice of a guarded buffer."""
    parts = [guarded(part, offset) for part in weight.parts()]
    return type(weight).from_parts(parts, weight.shape, weight.block)


def guarded_output(shape: Sequence[int], offset: int = 0) -> tuple[Tensor, Callable[[], None]]:
    """A contiguous output of NaN in a larger buffer of NaN, and a check of what is around it."""
    size = math.prod(shape)
    buffer = torch.full((GUARD + offset + size + GUARD,), math.nan)
    start, end = GUARD + offset, GUARD + offset + size

    def check() -> None:
        around = torch.cat([buffer[:start], buffer[end:]])
        touched = (~around.isnan()).nonzero().flatten()
        positions = [int(i) - start if i < start else int(i) - start + size for i in touched]
        assert not positions, f"wrote outside the output, at {positions} relative to its start"

    return buffer[start:end].view(tuple(shape)), check
