# SPDX-License-Identifier: Apache-2.0
"""Random small problems through every usable kernel and pooling step, against float64.

    python tests/fuzz.py --problems 100000 --seed 0

Each problem is made from the seed and its number alone. The first failure prints what was wrong and
the command that makes the same problem again, and the exit status is then 1.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import torch
from cases import DENSITIES, PATTERNS, ConvCase, SpmmCase, assert_within_bound
from kernel_calls import blocks_of, ungrouped
from torch import Tensor
from torch.nn import functional as F

from sparselt import ops, reference
from sparselt.extension import ArenaPool, NativeProgram
from sparselt.formats import SparseWeight, pack
from sparselt.neighbours import depthwise_conv2d
from sparselt.plan import KernelInfo

__all__ = ["main"]

LIMITS = ((None, None), (0.0, None), (None, 0.5), (0.0, 6.0), (-0.25, 0.25))
PROGRESS_SECONDS = 5.0


def a_size(chance: random.Random, largest: int) -> int:
    """Mostly small, sometimes at the edge of a vector or a tile."""
    if chance.random() < 0.3:
        edge = chance.choice([size for size in (1, 4, 8, 16, 24, 32, 64, 128) if size <= largest])
        return max(1, edge + chance.choice((-1, 0, 1)))
    return chance.randint(1, largest)


def a_pair(chance: random.Random, low: int, high: int) -> tuple[int, int]:
    return chance.randint(low, high), chance.randint(low, high)


def a_matrix(chance: random.Random, seed: int) -> SpmmCase:
    # A few are large enough to be split over threads.
    scale = 5 if chance.random() < 0.02 else 1
    rows, cols, columns = (a_size(chance, scale * largest) for largest in (40, 60, 140))
    density = chance.choice((*DENSITIES, chance.random()))
    return SpmmCase(rows, cols, columns, chance.choice(PATTERNS), density, seed)


def a_convolution(chance: random.Random, seed: int, one_row: bool) -> ConvCase:
    """A geometry that has at least one output."""
    while True:
        groups = chance.choice((1, 1, 2, 3))
        size, kernel, padding = a_pair(chance, 1, 20), a_pair(chance, 1, 5), a_pair(chance, 0, 4)
        if one_row:
            size, kernel, padding = (1, a_size(chance, 140)), (1, kernel[1]), (0, padding[1])
        case = ConvCase(
            chance.randint(1, 3),
            groups * chance.randint(1, 4),
            groups * chance.randint(1, 4),
            size,
            kernel,
            a_pair(chance, 1, 4),
            padding,
            a_pair(chance, 1, 3),
            groups,
            chance.choice(PATTERNS),
            chance.choice((*DENSITIES, chance.random())),
            seed,
        )
        if case.fits():
            return case


def kernels_for(op: str) -> Iterator[KernelInfo]:
    for kernel in ops.kernels():
        if op in kernel.operations and kernel.usable and kernel.device == "cpu":
            yield kernel


def solve(operation: str, case: SpmmCase | ConvCase, chance: random.Random) -> Iterator[str]:
    """Run one problem through each kernel that can; yields the kernels' names."""
    bias = case.bias() if chance.random() < 0.5 else None
    residual = case.residual() if chance.random() < 0.3 else None
    limits = dict(zip(("lower", "upper"), chance.choice(LIMITS), strict=True))
    for kernel in kernels_for("spmm" if isinstance(case, SpmmCase) else "conv2d"):
        if isinstance(case, ConvCase) and ungrouped(kernel, case) != case:
            continue
        block = chance.choice(blocks_of(kernel))
        weight = case.weight(kernel.format, block)
        arguments, options = given(operation, case, weight, residual)
        options |= limits
        name = (kernel.name, operation, str(case), block, bias is not None, options)
        # Only here: torch's own small operators wait for threads longer than they work.
        torch.set_num_threads(chance.choice((1, 2, 3)))
        y = getattr(ops, operation)(*arguments, bias, **options, kernel=kernel.name)
        torch.set_num_threads(1)
        assert_within_bound(name, y, getattr(reference, operation), *arguments, bias, **options)
        yield kernel.name


def given(
    operation: str, case: SpmmCase | ConvCase, weight: SparseWeight, residual: Tensor | None
) -> tuple[tuple[object, ...], dict[str, object]]:
    """The operation's leading arguments and its options."""
    if operation == "spmm":
        return (weight, case.x()), {"residual": residual}
    if operation == "linear":
        turned = None if residual is None else residual.T.contiguous()
        return (case.x().T.contiguous(), weight), {"residual": turned}
    assert isinstance(case, ConvCase)
    if operation == "conv2d":
        return (case.x(), weight), {**case.options(), "residual": residual}
    block = None if weight.block == (1, 1) else weight.block
    flat = pack(
        weight.to_dense().squeeze(2), weight.mask().squeeze(2), weight.name, block, case.groups
    )
    options = {
        "stride": case.stride[1],
        "padding": case.padding[1],
        "dilation": case.dilation[1],
        "groups": case.groups,
        "residual": None if residual is None else residual.squeeze(2),
    }
    return (case.x().squeeze(2), flat), options


def solve_depthwise(chance: random.Random, seed: int) -> Iterator[str]:
    """As `solve`, for a dense filter a channel; the reference takes it as a packed weight."""
    case = a_convolution(chance, seed, one_row=chance.random() < 0.3)
    case = replace(case, groups=case.channels, filters=case.channels * chance.randint(1, 2))
    weight, x, bias = case.weight("csr", None), case.x(), case.bias()
    residual = case.residual() if chance.random() < 0.3 else None
    limits = dict(zip(("lower", "upper"), chance.choice(LIMITS), strict=True))
    geometry = (case.stride, case.padding, case.dilation)
    for kernel in kernels_for("depthwise"):
        torch.set_num_threads(chance.choice((1, 2, 3)))
        y = depthwise_conv2d(
            x, weight.to_dense(), bias, *geometry, residual=residual, **limits, kernel=kernel.name
        )
        torch.set_num_threads(1)
        options = {**case.options(), "residual": residual, **limits}
        name = (kernel.name, str(case), residual is not None, limits)
        assert_within_bound(name, y, reference.conv2d, x, weight, bias, **options)
        yield kernel.name


def solve_pooling(chance: random.Random, seed: int) -> Iterator[str]:
    """One step of a native program: maxima are torch's to the bit, means as close as sums are."""
    size = a_size(chance, 30), a_size(chance, 40)
    kernel = chance.randint(1, min(6, size[0])), chance.randint(1, min(9, size[1]))
    stride = a_pair(chance, 1, 4)
    padding = chance.randint(0, kernel[0] // 2), chance.randint(0, kernel[1] // 2)
    window = kernel, stride, padding
    x = torch.randn(a_size(chance, 40), *size, generator=torch.Generator().manual_seed(seed))
    counted = chance.random() < 0.5
    wanted = {
        "max_pool": F.max_pool2d(x, *window),
        "mean_pool": F.avg_pool2d(x.double(), *window, count_include_pad=counted),
    }
    torch.set_num_threads(chance.choice((1, 2, 3)))
    for name, want in wanted.items():
        program = NativeProgram(torch.get_num_threads(), ArenaPool())
        numbers = program.add_input(x.numel()), program.add_value(want.numel()), x.shape[0]
        sizes = [*size, *kernel, *stride, *padding]
        more = [counted] if name == "mean_pool" else []
        getattr(program, f"add_{name}")(*numbers, sizes, *more)
        program.add_output(numbers[1])
        program.finish()
        y = torch.full((want.numel() + 1,), torch.nan)
        program.run([x.data_ptr()], [y.data_ptr()])
        got = y[:-1].view(want.shape).to(want.dtype)
        exact = name == "max_pool"
        assert torch.equal(got, want) if exact else torch.allclose(got, want, 0.0, 1e-5), window
        assert y[-1].isnan(), window
        yield name
    torch.set_num_threads(1)


def run_problem(seed: int, number: int) -> list[str]:
    """Make and check problem `number`; returns the names of the kernels that ran it."""
    chance = random.Random(f"{seed}/{number}")
    operation = chance.choice(
        ("spmm", "linear", "conv1d", "conv2d", "conv2d", "depthwise", "pooling")
    )
    if operation == "depthwise":
        return list(solve_depthwise(chance, number))
    if operation == "pooling":
        return list(solve_pooling(chance, number))
    if operation in ("spmm", "linear"):
        case: SpmmCase | ConvCase = a_matrix(chance, number)
    else:
        case = a_convolution(chance, number, one_row=operation == "conv1d")
    return list(solve(operation, case, chance))


def main(arguments: list[str] | None = None) -> int:
    """Run the problems; 0 if all are right, 1 at the first that is not."""
    parser = argparse.ArgumentParser(description="Fuzz every kernel against the reference.")
    parser.add_argument("--problems", type=int, default=100_000, help="how many (100000)")
    parser.add_argument("--seed", type=int, default=0, help="of all problems (0)")
    parser.add_argument("--first", type=int, default=0, help="number of the first problem (0)")
    options = parser.parse_args(arguments)
    counts: Counter[str] = Counter()
    torch.set_num_threads(1)
    start = told = time.perf_counter()
    for done in range(options.problems):
        number = options.first + done
        try:
            counts.update(run_problem(options.seed, number))
        except Exception as error:
            print(f"problem {number} failed: {type(error).__name__}: {error}", file=sys.stderr)
            print(
                f"again: python tests/fuzz.py --seed {options.seed} --first {number} --problems 1",
                file=sys.stderr,
            )
            return 1
        now = time.perf_counter()
        if now - told >= PROGRESS_SECONDS:
            told = now
            rate = (done + 1) / (now - start)
            left = (options.problems - done - 1) / rate
            told_so_far = f"{done + 1} of {options.problems}, {rate:.0f}/s, {left:.0f} s left"
            print(told_so_far, file=sys.stderr, flush=True)
    ran = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    print(f"{options.problems} problems right in {time.perf_counter() - start:.0f} s: {ran}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
