# SPDX-License-Identifier: Apache-2.0
"""The ways to run a case: the dense layer, torch's sparse products, ours; and what they must give.

Each comes with as many copies of its weight as fill the second-level cache twice, so that a turn
over them meets every weight cold, dense and sparse alike.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparselt
from bench.cuda.cases import Case
from sparselt.formats import FORMATS, SparseWeight

__all__ = ["Contender", "Truth", "contenders", "input_of", "weight_of"]

SUFFIX = {torch.float32: "", torch.float16: "_f16", torch.bfloat16: "_bf16"}
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# Tensor cores and TF32 round more often than once an addition; this covers both and no wrong index.
SLACK = {torch.float32: 1.0, torch.float16: 4.0, torch.bfloat16: 4.0}
TF32_UNIT = 2.0**-10
# Of these formats every position between the stored weights is multiplied too, on tensor cores.
UNPACKED = ("patch8", "bitmask")
# Formats whose kernels multiply stored weights on the FP32 units in every type.
PLAIN = ("csr", "tile8")
MOST_COPIES = 64

Call = Callable[[], Tensor]


@dataclass
class Contender:
    """One way to run a case.

    Attributes:
        name: of the engine or format.
        calls: they differ only in which copy of the weight they read.
        weight_bytes: of one copy, indices included.
        multiplied: weights that are multiplied with every column.
        rate: which measured rate of operations bounds it, a key of `bench.ceilings`.
        tf32: whether float32 products may go through TF32.
        note: what was chosen, where something chooses.
    """

    name: str
    calls: list[Call]
    weight_bytes: int
    multiplied: int
    rate: str
    tf32: bool = False
    note: str = ""


Maker = Callable[[], Contender]


@lru_cache(maxsize=32)  # drawing them takes longer than a case is timed
def noise(count: int, seed: int) -> Tensor:
    """Normal numbers on the GPU, the same on every machine, as the CPU draws them."""
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)).cuda()


def weight_of(case: Case) -> Tensor:
    """The dense weight, on the GPU, in the case's type; zero where it is pruned."""
    rows, taps = case.rows, case.kernel or (1, 1)
    # Blocks of a convolution lie under one tap of the filter.
    flat = noise(rows * case.cols * taps[0] * taps[1], 0).view(rows, -1)
    if "semi_structured" in case.formats:
        by_four = flat.view(rows, -1, 4).abs()
        kept = (by_four >= by_four.topk(2, dim=-1).values[..., 1:]).view_as(flat)
    else:
        grid = (-(-flat.shape[0] // case.block[0]), -(-flat.shape[1] // case.block[1]))
        order = noise(grid[0] * grid[1], 1)
        # Exactly: a small layer has few blocks.
        count = max(round(case.density * order.numel()), 1)
        kept = (order <= order.kthvalue(count).values).view(grid)
        kept = kept.repeat_interleave(case.block[0], 0).repeat_interleave(case.block[1], 1)
    flat = flat * kept[: flat.shape[0], : flat.shape[1]]
    if case.channels_last:
        by_taps = flat.view(rows, *taps, case.cols)
        return by_taps.permute(0, 3, 1, 2).contiguous().to(getattr(torch, case.dtype))
    shape = (rows, case.cols, *(case.kernel or ()))
    return flat.view(shape).to(getattr(torch, case.dtype))


def input_of(case: Case) -> Tensor:
    """The layer's x: (N, K), or (B, C_in, H, W)."""
    shape = (case.columns, case.cols, *(case.size if case.kernel else ()))
    x = noise(torch.Size(shape).numel(), 2).view(shape).to(getattr(torch, case.dtype))
    return x.to(memory_format=torch.channels_last) if case.channels_last else x


class Truth:
    """A case's result in float64, and how far from it a right one may be."""

    def __init__(self, case: Case, weight: Tensor, x: Tensor) -> None:
        self.exact = _dense_call(case, x.double(), weight.double())()
        self.magnitude = _dense_call(case, x.double().abs(), weight.double().abs())()
        self.density = int((weight != 0).sum()) / weight.numel()
        self.terms = int((weight.flatten(1) != 0).sum(1).max()) + 2

    def objection(self, y: Tensor, tf32: bool) -> str:
        """Why an output is not to be timed; empty where it is within the dot-product bound."""
        if tuple(y.shape) != tuple(self.exact.shape):
            return f"shape {tuple(y.shape)}, expected {tuple(self.exact.shape)}"
        unit = SLACK[y.dtype] * UNIT[torch.float32]
        bound = self.terms * unit * self.magnitude + UNIT[y.dtype] * self.exact.abs() * (1 + 1e-6)
        if tf32:
            bound = bound + 4 * TF32_UNIT * self.magnitude
        bad = int((~((y.double() - self.exact).abs() <= bound)).sum())
        return f"{bad} of {y.numel()} outputs beyond the bound" if bad else ""


def contenders(case: Case, weight: Tensor, x: Tensor) -> Iterator[tuple[str, Maker]]:
    """The dense layer, torch's sparse products, and ours, by name and ready to be made.

    Dense float32 comes twice, TF32 off and on; a convolution over channels-last maps in both
    layouts, since which one cuDNN is faster in depends on the layer.
    """
    layouts = {"dense": torch.contiguous_format}
    if case.channels_last:
        layouts["dense_nhwc"] = torch.channels_last
    for name, layout in layouts.items():
        yield name, partial(_dense, case, weight, x, name, layout)
        if weight.dtype == torch.float32:
            yield f"{name}_tf32", partial(_dense, case, weight, x, f"{name}_tf32", layout)
    if case.kernel is None and not {"semi_structured", "planned"} & {*case.formats}:
        if case.block == (1, 1):
            yield "torch_csr", partial(_torch_csr, weight, x)
        elif case.block[0] == case.block[1]:
            yield "torch_bsr", partial(_torch_bsr, case, weight, x)
    for name in case.formats:
        if name == "semi_structured":
            yield name, partial(_semi_structured, case, weight, x)
        elif name == "planned":
            yield name, partial(_planned, case, weight, x)
        else:
            yield name, partial(_packed, case, weight, x, name)


def _dense(
    case: Case, weight: Tensor, x: Tensor, name: str, layout: torch.memory_format
) -> Contender:
    """Torch's layer, by cuBLAS or cuDNN."""
    size = weight.numel() * weight.element_size()
    x = x.contiguous(memory_format=layout)
    copies = [weight.clone(memory_format=layout) for _ in range(_copies_of(size))]
    calls = [_dense_call(case, x, copy) for copy in copies]
    tf32 = name.endswith("_tf32")
    return Contender(name, calls, size, weight.numel(), "tf32" if tf32 else case.dtype, tf32)


def _packed(case: Case, weight: Tensor, x: Tensor, name: str) -> Contender:
    """Our kernel of a format."""
    block = case.block if name.startswith("bsr") else None
    packed = FORMATS[name].from_dense(weight.float(), None, block)
    parts = [p.to(weight.dtype) if p.is_floating_point() else p for p in packed.parts()]
    size = sum(part.numel() * part.element_size() for part in parts)
    turns = [[part.clone() for part in parts] for _ in range(_copies_of(size))]
    multiplied = weight.numel() if name in UNPACKED else parts[-1].numel()
    rate = "float32" if name in PLAIN else case.dtype
    calls = [_sparse_call(case, x, packed, turn) for turn in turns]
    return Contender(name, calls, size, multiplied, rate)


def _semi_structured(case: Case, weight: Tensor, x: Tensor) -> Contender:
    """Torch's 2:4 product, whose library multiplies half of the weights at the dense rate."""
    size = weight.numel() * weight.element_size() * 9 // 16
    copies = [
        torch.sparse.to_sparse_semi_structured(weight.clone()) for _ in range(_copies_of(size))
    ]
    calls = [lambda w=w: F.linear(x, w) for w in copies]
    return Contender("semi_structured", calls, size, weight.numel() // 2, case.dtype)


def _planned(case: Case, weight: Tensor, x: Tensor) -> Contender:
    """What `convert` makes of the layer after timing its candidates here."""
    if case.kernel is None:
        layer: nn.Module = nn.Linear(case.cols, case.rows, bias=False, device="meta")
    else:
        padding = (case.kernel[0] // 2, case.kernel[1] // 2)
        layer = nn.Conv2d(
            case.cols, case.rows, case.kernel, case.stride, padding, bias=False, device="meta"
        )
    layer.weight = nn.Parameter(weight, requires_grad=False)
    converted = sparselt.convert(nn.Sequential(layer).eval(), x)
    (row,) = sparselt.explain(converted)
    state = converted.state_dict().values()
    size = sum(t.numel() * t.element_size() for t in state if isinstance(t, Tensor))
    copies = [converted, *(copy.deepcopy(converted) for _ in range(_copies_of(size) - 1))]
    calls = [lambda m=m: m(x) for m in copies]
    multiplied = int((weight != 0).sum())
    return Contender("planned", calls, size, multiplied, case.dtype, note=row.plan.reason)


def _torch_csr(weight: Tensor, x: Tensor) -> Contender:
    """By cuSPARSE."""
    packed, columns = weight.to_sparse_csr(), x.T.contiguous()
    indices = 4 * (packed.crow_indices().numel() + packed.col_indices().numel())
    size = packed.values().numel() * weight.element_size() + indices
    turns = [packed.clone() for _ in range(_copies_of(size))]
    calls = [lambda w=w: (w @ columns).T for w in turns]
    return Contender("torch_csr", calls, size, packed.values().numel(), "float32")


def _torch_bsr(case: Case, weight: Tensor, x: Tensor) -> Contender:
    """By Triton or cuSPARSE."""
    packed = weight.to_sparse_bsr(case.block)
    indices = 8 * (packed.crow_indices().numel() + packed.col_indices().numel())
    size = packed.values().numel() * weight.element_size() + indices
    turns = [packed.clone() for _ in range(_copies_of(size))]
    calls = [lambda w=w: F.linear(x, w) for w in turns]
    return Contender("torch_bsr", calls, size, packed.values().numel(), case.dtype)


def _dense_call(case: Case, x: Tensor, weight: Tensor) -> Call:
    """The layer on a dense weight."""
    if case.kernel is None:
        return lambda: F.linear(x, weight)
    padding = (case.kernel[0] // 2, case.kernel[1] // 2)
    return lambda: F.conv2d(x, weight, None, case.stride, padding)


def _sparse_call(case: Case, x: Tensor, packed: SparseWeight, parts: list[Tensor]) -> Call:
    """The layer on packed parts, by the kernel of the format."""
    meta, suffix = packed.meta(), SUFFIX[x.dtype]
    if case.kernel is None:
        name = f"{packed.name}_spmm_cuda{suffix}"
        linear = torch.ops.sparselt.linear
        return lambda: linear(x, parts, meta, None, None, None, None, name)
    stride, padding = [case.stride] * 2, [size // 2 for size in case.kernel]
    name = f"{packed.name}_conv2d_cuda{suffix}"
    conv2d = torch.ops.sparselt.conv2d
    return lambda: conv2d(x, parts, meta, None, None, stride, padding, [1, 1], 1, None, None, name)


def _copies_of(weight_bytes: int) -> int:
    """How many copies of a weight are more than twice the L2."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return min(MOST_COPIES, 2 * l2 // max(weight_bytes, 1) + 2)
