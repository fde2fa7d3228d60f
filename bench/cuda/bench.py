# SPDX-License-Identifier: Apache-2.0
"""Times the CUDA kernels against cuBLAS, cuDNN and torch's sparse products.

`python -m bench.cuda.bench --out bench/results` writes <gpu>-cuda.json. Every output is checked
against a float64 product first; a wrong one gets no figure. Weights take turns over more than twice
the L2, so that each call meets cold ones, dense and sparse alike. Figures are medians of CUDA
events around whole turns: `graph_us` replays a CUDA graph of a turn, `eager_us` runs it call by
call. Baselines run in the case's own type; for float32 with TF32 off and, as a row of its own, on.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cuda.cases import SUITES, Case
from sparselt.formats import FORMATS, SparseWeight
from sparselt.measure.machine import header
from sparselt.measure.report import write_json

SUFFIX = {torch.float32: "", torch.float16: "_f16", torch.bfloat16: "_bf16"}
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# Tensor cores and TF32 round more often than once an addition; this covers both and no wrong index.
SLACK = {torch.float32: 1.0, torch.float16: 4.0, torch.bfloat16: 4.0}
TF32_UNIT = 2.0**-10
DENSE_ENGINES = ("dense", "dense_nhwc")  # the faster one is what `times_dense` compares with
REPEATS = 30
MOST_COPIES = 64

Call = Callable[[], Tensor]


@dataclass
class Contender:
    """One way to run a case: calls that differ only in which copy of the weight they read."""

    name: str
    calls: list[Call]
    weight_bytes: int
    tf32: bool = False


def weight_of(case: Case) -> Tensor:
    """The dense weight, on the GPU, in the case's type; zero where it is pruned."""
    shape = (case.rows, case.cols, *(case.kernel or ()))
    generator = torch.Generator("cuda").manual_seed(len(str(case)))
    weight = torch.randn(shape, device="cuda", generator=generator)
    # Blocks of a convolution lie under one tap of the filter.
    flat = (weight.permute(0, 2, 3, 1) if case.channels_last else weight).reshape(case.rows, -1)
    grid = (-(-flat.shape[0] // case.block[0]), -(-flat.shape[1] // case.block[1]))
    kept = torch.rand(grid, device="cuda", generator=generator)
    if case.block == (1, 1):
        kept = kept < case.density
    else:  # exactly: a small layer has few blocks
        count = max(round(case.density * kept.numel()), 1)
        kept = kept <= kept.view(-1).kthvalue(count).values
    kept = kept.repeat_interleave(case.block[0], 0).repeat_interleave(case.block[1], 1)
    flat = flat * kept[: flat.shape[0], : flat.shape[1]]
    if case.channels_last:
        by_taps = flat.view(case.rows, *(case.kernel or ()), case.cols)
        return by_taps.permute(0, 3, 1, 2).contiguous().to(getattr(torch, case.dtype))
    return flat.view(shape).to(getattr(torch, case.dtype))


def input_of(case: Case) -> Tensor:
    """The layer's x: (N, K), or (B, C_in, H, W)."""
    shape = (case.columns, case.cols, *(case.size if case.kernel else ()))
    x = torch.randn(shape, device="cuda").to(getattr(torch, case.dtype))
    return x.to(memory_format=torch.channels_last) if case.channels_last else x


def dense_call(case: Case, x: Tensor, weight: Tensor) -> Call:
    """The layer on a dense weight."""
    if case.kernel is None:
        return lambda: F.linear(x, weight)
    padding = (case.kernel[0] // 2, case.kernel[1] // 2)
    return lambda: F.conv2d(x, weight, None, case.stride, padding)


def sparse_call(case: Case, x: Tensor, packed: SparseWeight, parts: list[Tensor]) -> Call:
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


def copies_of(weight_bytes: int) -> int:
    """How many copies of a weight are more than twice the L2."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return min(MOST_COPIES, 2 * l2 // max(weight_bytes, 1) + 2)


def contenders(case: Case, weight: Tensor, x: Tensor) -> Iterator[Contender]:
    """The dense layer, torch's sparse product, and ours.

    Dense float32 comes twice, TF32 off and on; a convolution over channels-last maps in both
    layouts, since which one cuDNN is faster in depends on the layer.
    """
    size = weight.numel() * weight.element_size()
    layouts = {"dense": torch.contiguous_format}
    if case.channels_last:
        layouts["dense_nhwc"] = torch.channels_last
    for name, layout in layouts.items():
        ours = x.contiguous(memory_format=layout)
        copies = [weight.clone(memory_format=layout) for _ in range(copies_of(size))]
        dense = [dense_call(case, ours, copy) for copy in copies]
        yield Contender(name, dense, size)
        if weight.dtype == torch.float32:
            yield Contender(f"{name}_tf32", dense, size, tf32=True)
    if case.kernel is None:
        yield from torch_sparse(case, weight, x)
    for format_name in case.formats:
        block = case.block if format_name.startswith("bsr") else None
        packed = FORMATS[format_name].from_dense(weight.float(), None, block)
        parts = [p.to(weight.dtype) if p.is_floating_point() else p for p in packed.parts()]
        size = sum(part.numel() * part.element_size() for part in parts)
        turns = [[part.clone() for part in parts] for _ in range(copies_of(size))]
        calls = [sparse_call(case, x, packed, turn) for turn in turns]
        yield Contender(format_name, calls, size)


def torch_sparse(case: Case, weight: Tensor, x: Tensor) -> Iterator[Contender]:
    """What torch has for the same structure: cuSPARSE for CSR, Triton or cuSPARSE for blocks."""
    if case.block == (1, 1):
        packed = weight.to_sparse_csr()
        indices = 4 * (packed.crow_indices().numel() + packed.col_indices().numel())
        name = "torch_csr"
    elif case.block[0] == case.block[1]:
        packed = weight.to_sparse_bsr(case.block)
        indices = 8 * (packed.crow_indices().numel() + packed.col_indices().numel())
        name = "torch_bsr"
    else:
        return
    size = packed.values().numel() * packed.values().element_size() + indices
    turns = [packed.clone() for _ in range(copies_of(size))]
    if name == "torch_bsr":
        yield Contender(name, [lambda w=w: F.linear(x, w) for w in turns], size)
    else:
        columns = x.T.contiguous()
        yield Contender(name, [lambda w=w: (w @ columns).T for w in turns], size)


def wrong(case: Case, contender: Contender, weight: Tensor, x: Tensor, y: Tensor) -> str:
    """Why an output is not to be timed; empty where it is within the dot-product bound."""
    exact = dense_call(case, x.double(), weight.double())()
    magnitude = dense_call(case, x.double().abs(), weight.double().abs())()
    terms = int((weight.flatten(1) != 0).sum(1).max()) + 2
    unit = TF32_UNIT if contender.tf32 else SLACK[x.dtype] * UNIT[torch.float32]
    bound = terms * unit * magnitude + UNIT[x.dtype] * exact.abs() * (1 + 1e-6)
    if contender.tf32:
        bound = 4 * unit * magnitude + terms * UNIT[torch.float32] * magnitude
    if tuple(y.shape) != tuple(exact.shape):
        return f"shape {tuple(y.shape)}, expected {tuple(exact.shape)}"
    excess = (y.double() - exact).abs() - bound
    bad = int((~(excess <= 0)).sum())
    return f"{bad} of {y.numel()} outputs beyond the bound" if bad else ""


@contextmanager
def tf32(enabled: bool) -> Iterator[None]:
    """TF32 for matrix products and convolutions, off again afterwards."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = enabled
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def turn_us(run: Callable[[], object], calls: int) -> tuple[float, float]:
    """Median and spread (interquartile) of the time of one call, in microseconds."""
    for _ in range(3):
        run()
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / calls)
    quartiles = statistics.quantiles(times, n=4)
    return statistics.median(times), quartiles[2] - quartiles[0]


def time_contender(contender: Contender) -> dict[str, float]:
    """Graph and eager times of a call that meets a cold weight; `us` is the graph, if it can."""

    def turn() -> None:
        for call in contender.calls:
            call()

    eager, eager_spread = turn_us(turn, len(contender.calls))
    times = {"us": eager, "eager_us": eager, "eager_iqr_us": eager_spread}
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            turn()
    except RuntimeError:  # a baseline that allocates or waits inside
        torch.cuda.synchronize()
        return times
    replayed, spread = turn_us(graph.replay, len(contender.calls))
    return times | {"us": replayed, "graph_us": replayed, "graph_iqr_us": spread}


def ceilings() -> dict[str, float]:
    """What this card does: bytes a second of a copy, and operations a second of dense products."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy_us = turn_us(lambda: target.copy_(source), 1)[0]
    found = {"copy_bytes_per_s": 2 * source.numel() / (1e-6 * copy_us)}
    for name, dtype, allowed in (
        ("bfloat16", torch.bfloat16, False),
        ("float16", torch.float16, False),
        ("float32", torch.float32, False),
        ("tf32", torch.float32, True),
    ):
        a, b = (torch.randn(8192, 8192, device="cuda").to(dtype) for _ in range(2))
        with tf32(allowed):
            product_us = turn_us(lambda a=a, b=b: a @ b, 1)[0]
        found[f"{name}_flop_per_s"] = 2 * 8192**3 / (1e-6 * product_us)
    return found


def run_case(case: Case, limits: dict[str, float]) -> list[dict[str, Any]]:
    """A row for each contender: checked, timed, and against the dense layer and the floor."""
    weight, x = weight_of(case), input_of(case)
    nonzero = int((weight != 0).sum())
    rows: list[dict[str, Any]] = []
    for contender in contenders(case, weight, x):
        row: dict[str, Any] = {"case": str(case), "engine": contender.name}
        rows.append(row)
        row |= {"weight_bytes": contender.weight_bytes, "copies": len(contender.calls)}
        row["tf32"] = contender.tf32
        try:
            with tf32(contender.tf32), torch.no_grad():
                y = contender.calls[0]()
                row["wrong"] = wrong(case, contender, weight, x, y)
                if row["wrong"]:
                    continue
                row |= time_contender(contender)
        except RuntimeError as error:  # a baseline that torch does not have for this type or block
            row["absent"] = str(error).splitlines()[0][:200]
            continue
        per_output = y.numel() / case.rows
        row["useful_gflop_per_s"] = 2e-3 * nonzero * per_output / row["us"]
        row["dense_equivalent_gflop_per_s"] = 2e-3 * weight.numel() * per_output / row["us"]
        moved = contender.weight_bytes + sum(t.numel() * t.element_size() for t in (x, y))
        row["moved_bytes"] = moved
        row["share_of_copy_rate"] = moved / limits["copy_bytes_per_s"] / (1e-6 * row["us"])
        dense = [row["us"] for row in rows if row["engine"] in DENSE_ENGINES and "us" in row]
        row["times_dense"] = min(dense) / row["us"] if dense else None
    return rows


def main() -> None:
    """Run the suites named, print a line a row, write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--suite", nargs="*", choices=SUITES, default=list(SUITES))
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    options = parser.parse_args()
    cases = [case for suite in options.suite for case in SUITES[suite]]
    if options.list:
        print(*cases, sep="\n")
        return
    from sparselt import _C_cuda  # registers the CUDA kernels

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    # Ours add up in float32; so must what they are compared with.
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    limits = ceilings()
    properties = torch.cuda.get_device_properties(0)
    gpu = {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "cuda_of_torch": torch.version.cuda,
        "reduced_precision_reduction": False,
        "cuda_runtime": _C_cuda.runtime_version(),
        **limits,
    }
    rows = []
    for case in cases:
        for row in run_case(case, limits):
            rows.append(row)
            time = f"{row['us']:10.2f} us" if "us" in row else "        --"
            ratio = f"{row['times_dense']:6.2f}x" if row.get("times_dense") else ""
            print(f"{row['case']:90s} {row['engine']:12s} {time} {ratio} {row.get('wrong') or ''}")
        torch.cuda.empty_cache()
    short = properties.name.replace("NVIDIA", "").split()[0].lower()
    result = {"kind": "cuda", "machine": header(), "gpu": gpu, "rows": rows}
    write_json(options.out / f"{short}-cuda.json", result)


if __name__ == "__main__":
    main()
