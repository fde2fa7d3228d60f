# SPDX-License-Identifier: Apache-2.0
"""Times the CUDA kernels against cuBLAS, cuDNN and torch's sparse products.

`python -m bench.cuda.bench --out bench/results` writes <gpu>-cuda.json, anew after every case, and
goes on where a file of the same commit and GPU ends. Every output is checked against a float64
product first; a wrong one gets no figure. Weights take turns over more than twice the L2, so that
each call meets cold ones, dense and sparse alike. Figures are medians of CUDA events around whole
turns: `graph_us` replays a CUDA graph of a turn, `eager_us` runs it call by call. Baselines run in
the case's own type; for float32 with TF32 off and, as a row of its own, on.

`share_of_roofline` is the time that bytes or operations allow over the time taken: weights with
their indices, x and y once each at the rate of a copy, and the multiplications of the weights that
the way multiplies at the rate of a large dense product in its type, both measured at the start.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.cuda.cases import SUITES, Case, in_turns
from bench.cuda.contenders import Contender, Truth, contenders, input_of, weight_of
from sparselt import extension
from sparselt.measure.machine import header
from sparselt.measure.report import read_json, write_json

DENSE_ENGINES = ("dense", "dense_nhwc")  # the faster one is what `times_dense` compares with
TURNS = (5, 30)
# Of one contender's timed turns, eager and as a graph each.
SECONDS = 0.2
# After an error that the device does not get over a new process goes on with the next contender.
AGAIN = 75
# Bytes copied and the side of matrices multiplied to find what the card does.
COPIED, SQUARE = 1 << 31, 8192

Row = dict[str, Any]


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
    for _ in range(2):
        run()
    times: list[float] = []
    while len(times) < TURNS[0] or (len(times) < TURNS[1] and sum(times) * calls < 1e6 * SECONDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / calls)
    quartiles = statistics.quantiles(times, n=4)
    return statistics.median(times), quartiles[2] - quartiles[0]


def time_contender(contender: Contender) -> Row:
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
    except RuntimeError as error:  # a baseline that allocates or waits inside
        torch.cuda.synchronize()
        return times | {"no_graph": _line(error)}
    replayed, spread = turn_us(graph.replay, len(contender.calls))
    return times | {"us": replayed, "graph_us": replayed, "graph_iqr_us": spread}


def ceilings() -> dict[str, float]:
    """What this card does: bytes a second of a copy, and operations a second of dense products."""
    source = torch.empty(COPIED, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy_us = turn_us(partial(target.copy_, source), 1)[0]
    found = {"copy_bytes_per_s": 2e6 * COPIED / copy_us}
    for name, dtype, allowed in (
        ("bfloat16", torch.bfloat16, False),
        ("float16", torch.float16, False),
        ("float32", torch.float32, False),
        ("tf32", torch.float32, True),
    ):
        a, b = (torch.randn(SQUARE, SQUARE, device="cuda").to(dtype) for _ in range(2))
        with tf32(allowed):
            product_us = turn_us(partial(torch.mm, a, b), 1)[0]
        found[f"{name}_flop_per_s"] = 2e6 * SQUARE**3 / product_us
    return found


def run_case(case: Case, limits: dict[str, float]) -> Iterator[Row]:
    """A row for each contender: checked, timed, and against the dense layer and the roofline."""
    weight, x = weight_of(case), input_of(case)
    truth = Truth(case, weight, x)
    dense_us: list[float] = []
    for name, make in contenders(case, weight, x):
        row: Row = {"case": str(case), "engine": name}
        try:
            contender = make()
            row |= {"tf32": contender.tf32, "note": contender.note, "copies": len(contender.calls)}
            with tf32(contender.tf32), torch.no_grad():
                y = contender.calls[0]()
                row["wrong"] = truth.objection(y, contender.tf32)
                row |= {} if row["wrong"] else time_contender(contender)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            # A baseline that torch does not have for this type or block, or memory that is short.
            row["absent"] = _line(error)
        if "us" in row:
            row |= rates(contender, row["us"], [x, y], case, limits)
            row["useful_gflop_per_s"] = truth.density * row["dense_equivalent_gflop_per_s"]
            dense_us += [row["us"]] if name in DENSE_ENGINES else []
            row["times_dense"] = min(dense_us) / row["us"] if dense_us else None
        yield row


def rates(
    contender: Contender, us: float, maps: Sequence[Tensor], case: Case, limits: dict[str, float]
) -> Row:
    """What a time means: of the roofline, and in operations of the dense layer."""
    columns = maps[-1].numel() // case.rows
    moved = contender.weight_bytes + sum(t.numel() * t.element_size() for t in maps)
    bytes_us = 1e6 * moved / limits["copy_bytes_per_s"]
    work_us = 2e6 * contender.multiplied * columns / limits[f"{contender.rate}_flop_per_s"]
    return {
        "weight_bytes": contender.weight_bytes,
        "moved_bytes": moved,
        "bound_by": "bytes" if bytes_us > work_us else "operations",
        "share_of_roofline": max(bytes_us, work_us) / us,
        "dense_equivalent_gflop_per_s": 2e-3 * case.weights * columns / us,
    }


def printed(row: Row) -> str:
    """A row as a line."""
    took = f"{row['us']:10.2f} us" if "us" in row else f"{'--':>13s}"
    ratio = f"{row['times_dense']:6.2f}x" if row.get("times_dense") else ""
    share = f"{row['share_of_roofline']:5.0%}" if "us" in row else ""
    said = row.get("wrong") or row.get("absent") or row.get("crashed") or ""
    return f"{row['case']:90s} {row['engine']:15s} {took} {ratio:7s} {share:5s} {said}"


def gpu_name() -> str:
    """Of the first GPU, as the driver has it."""
    return str(torch.cuda.get_device_properties(0).name)


def gpu_header() -> dict[str, Any]:
    """What the card is, and how torch's products were set."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": gpu_name(),
        "build": extension.build_id(),
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "cuda_of_torch": torch.version.cuda,
        "cuda_runtime": extension._cuda.runtime_version(),
        "reduced_precision_reduction": False,
        "tf32": "off but in rows that say so",
    }


class Results:
    """The file, which is whole after every row, and what of it is done."""

    def __init__(self, path: Path) -> None:
        self.path, self.machine, self.gpu = path, header(), gpu_header()
        self.rows: list[Row] = []
        self.limits: dict[str, float] = {}
        if path.exists():
            old = read_json(path)
            if all(old["gpu"][key] == self.gpu[key] for key in ("name", "build")):
                rates = {k: v for k, v in old["gpu"].items() if k.endswith("_per_s")}
                self.rows, self.limits = old["rows"], rates

    def finished(self, case: Case) -> bool:
        """Whether a case is in the file, whole or as far as the device survived it."""
        return any(row["case"] == str(case) for row in self.rows)

    def write(self, unrun: Sequence[Case]) -> None:
        """The rows so far, and what was not run."""
        gpu = self.gpu | self.limits
        result = {"kind": "cuda", "machine": self.machine, "gpu": gpu, "rows": self.rows}
        write_json(self.path, result | {"unrun": [str(case) for case in unrun]})


def device_is_lost() -> bool:
    """Whether nothing more can be computed in this process."""
    try:
        torch.ones(2, device="cuda").sum().item()
    except RuntimeError:
        return True
    return False


def run(cases: Sequence[Case], results: Results, seconds: float) -> int:
    """Runs what the file does not have, as long as there is time; the exit status."""
    end = time.monotonic() + seconds
    results.limits = results.limits or ceilings()
    left = [case for case in cases if not results.finished(case)]
    while left and time.monotonic() < end:
        case, *left = left
        for row in run_case(case, results.limits):
            lost = "absent" in row and device_is_lost()
            if lost:
                row["crashed"] = row.pop("absent")
            results.rows.append(row)
            results.write(left)
            print(printed(row), flush=True)
            if lost:
                return AGAIN
        torch.cuda.empty_cache()
    print(f"{len(left)} of {len(cases)} cases left for another run", flush=True)
    return 0


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the suites named, prints a line a row, writes the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--suite", nargs="*", choices=SUITES, default=list(SUITES))
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--seconds", type=float, default=1e9, help="start no case after this time")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    options = parser.parse_args(arguments)
    cases = in_turns(options.suite)
    if options.list:
        print(*cases, sep="\n")
        return 0
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    # Ours add up in float32; so must what they are compared with.
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    name = gpu_name().replace("NVIDIA", "").split()[0].lower()
    options.out.mkdir(parents=True, exist_ok=True)
    return run(cases, Results(options.out / f"{name}-cuda.json"), options.seconds)


if __name__ == "__main__":
    sys.exit(main())
