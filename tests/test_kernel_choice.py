# SPDX-License-Identifier: Apache-2.0
"""What a kernel's result may not depend on, how one is chosen by name, and which may run at all."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import ConvCase, SpmmCase, assert_within_bound
from kernel_calls import CONV2D, SPMM, a_block_of, blocks_of, conv2d, spmm, ungrouped

from sparselt import ops, reference
from sparselt.plan import KernelInfo

ROOT = Path(__file__).parent.parent


# Enough columns (or pixels) and work that a product is split over threads, both ways.
LARGE_SPMM = (
    SpmmCase(200, 300, 70, density=0.3),
    SpmmCase(60, 300, 900, density=0.1),
    SpmmCase(301, 2000, 1, density=0.5),
    SpmmCase(301, 600, 7, density=0.3),
    SpmmCase(301, 600, 13, density=0.3),
    SpmmCase(97, 501, 259, "empty rows", density=0.5),
)
LARGE_CONV = (
    ConvCase(1, 16, 32, (28, 28), (3, 3), padding=(1, 1), density=0.2),
    ConvCase(1, 64, 128, (7, 7), (3, 3), padding=(1, 1), density=0.3),
    ConvCase(9, 16, 24, (13, 13), (3, 3), stride=(2, 2), padding=(1, 1), groups=2, density=0.5),
    ConvCase(2, 32, 48, (1, 199), (1, 5), padding=(0, 2), density=0.3),
)


# ---- threads and repeats ----


@SPMM
@pytest.mark.parametrize("case", LARGE_SPMM, ids=str)
def test_spmm_is_bitwise_the_same_for_any_thread_count(kernel: KernelInfo, case: SpmmCase) -> None:
    for block in blocks_of(kernel)[:6]:
        weight = case.weight(kernel.format, block)
        arguments = (kernel, weight, case.x(), case.bias(), case.residual(), -9.0, 9.0)
        torch.set_num_threads(1)
        alone = spmm(*arguments)
        assert torch.equal(alone, spmm(*arguments)), "a repeat differs"
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            assert torch.equal(alone, spmm(*arguments)), f"{threads} threads differ, {block}"
    name = (kernel.name, str(case))
    assert_within_bound(
        name, alone, reference.spmm, weight, case.x(), case.bias(), case.residual(), -9.0, 9.0
    )


@CONV2D
@pytest.mark.parametrize("case", LARGE_CONV, ids=str)
def test_conv2d_is_bitwise_the_same_for_any_thread_count(
    kernel: KernelInfo, case: ConvCase
) -> None:
    case = ungrouped(kernel, case)
    weight = case.weight(kernel.format, a_block_of(kernel, case))
    arguments = (kernel, weight, case.x(), case, case.bias(), case.residual(), -9.0, 9.0)
    torch.set_num_threads(1)
    alone = conv2d(*arguments)
    assert torch.equal(alone, conv2d(*arguments)), "a repeat differs"
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        assert torch.equal(alone, conv2d(*arguments)), f"{threads} threads differ"
    epilogue = {"residual": case.residual(), "lower": -9.0, "upper": 9.0}
    assert_within_bound(
        (kernel.name, str(case)),
        alone,
        reference.conv2d,
        case.x(),
        weight,
        case.bias(),
        **case.options(),
        **epilogue,
    )


@SPMM
def test_spmm_is_as_exact_as_torchs_dense_product(kernel: KernelInfo) -> None:
    case = SpmmCase(64, 700, 100, density=0.5)
    weight = case.weight(kernel.format, a_block_of(kernel, case))
    dense = weight.to_dense()
    exact = dense.double() @ case.x().double()
    ours = (spmm(kernel, weight, case.x()).double() - exact).square().mean().sqrt()
    theirs = (dense @ case.x() - exact).square().mean().sqrt()
    # A dense product may sum in blocks or in more accumulators, which halves the typical error.
    assert ours <= 4 * theirs


@pytest.mark.parametrize("kernel", [k for k in ops.kernels() if k.op == "spmv" and k.usable])
def test_a_column_has_the_same_bits_in_any_company(kernel: KernelInfo) -> None:
    case = SpmmCase(37, 90, 35, density=0.4)
    for block in blocks_of(kernel):
        weight, x, residual = case.weight(kernel.format, block), case.x(), case.residual()
        together = spmm(kernel, weight, x, case.bias(), residual, -3.0, 3.0)
        for first, last in ((0, 1), (3, 5), (4, 8), (6, 15), (0, 16), (5, 22)):
            few = x[:, first:last].contiguous(), case.bias(), residual[:, first:last].contiguous()
            alone = spmm(kernel, weight, *few, -3.0, 3.0)
            assert torch.equal(together[:, first:last], alone), (block, first, last)


# ---- the choice by name ----


@SPMM
def test_an_spmm_kernel_refuses_another_operation_or_format(kernel: KernelInfo) -> None:
    case, other = SpmmCase(4, 4, 4), "bsr" if kernel.format == "csr" else "csr"
    own = other if kernel.format == "sign" else kernel.format  # filters differ in magnitude
    with pytest.raises(RuntimeError, match=kernel.name):
        spmm(kernel, case.weight(other), case.x())
    if "conv2d" in kernel.operations:
        return
    conv = ConvCase(1, 2, 2, (5, 5), (3, 3))
    with pytest.raises(RuntimeError, match=kernel.name):
        conv2d(kernel, conv.weight(own), conv.x(), conv)


@pytest.mark.parametrize(
    "kernel", [k for k in ops.kernels() if k.op in ("panel", "code") and k.usable]
)
def test_groups_of_a_weight_that_was_packed_for_others_are_refused(kernel: KernelInfo) -> None:
    case = ConvCase(1, 4, 48, (5, 5), (3, 3), groups=2)
    for groups in (1, 3):
        other = replace(case, channels=2 * groups, groups=groups)
        weight = other.weight(kernel.format, a_block_of(kernel, case))
        with pytest.raises(RuntimeError, match="pack it for 2 groups"):
            conv2d(kernel, weight, case.x(), case)


@pytest.mark.parametrize("format", ["csr", "bsr"])
def test_a_format_stands_for_its_first_usable_kernel(format: str) -> None:
    case = SpmmCase(33, 65, 1, density=0.6)
    weight = case.weight(format)
    kernels = [k for k in ops.kernels() if (k.op, k.format) == ("spmm", format)]
    first = next(k for k in kernels if k.usable and k.device == "cpu")
    by_default = torch.ops.sparselt.spmm(
        case.x(), weight.parts(), weight.meta(), None, None, None, None, format
    )
    assert torch.equal(by_default, spmm(first, weight, case.x()))


def test_the_registry_is_consistent() -> None:
    kernels = ops.kernels()
    names = [kernel.name for kernel in kernels]
    assert len(set(names)) == len(names)
    for kernel in kernels:
        assert kernel.name.startswith(f"{kernel.format}_{kernel.op}_")
        assert kernel.usable == (kernel.reason == ""), kernel
        assert min(kernel.tile_rows, kernel.tile_columns) >= 1
    on_cpu = [kernel for kernel in kernels if kernel.device == "cpu"]
    for op, format in {(op, kernel.format) for kernel in on_cpu for op in kernel.operations}:
        served = [k for k in on_cpu if op in k.operations and k.format == format]
        fallbacks = [kernel for kernel in served if not kernel.features]
        assert any(k.usable for k in fallbacks), f"no portable kernel for {op} on {format}"


# ---- instruction sets ----


def run_here(*arguments: str, isa: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "SPARSELT_ISA": isa}
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        check=False,
    )


@pytest.mark.skipif(
    os.environ.get("SPARSELT_ISA") == "scalar",
    reason="the scalar instruction set is already forced for the whole run",
)
def test_kernels_are_right_with_the_scalar_instruction_set_forced() -> None:
    chosen = "nothing_else and one_value or epilogues"
    done = run_here(
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/test_kernels.py",
        "-k",
        chosen,
        isa="scalar",
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
    assert "not tested: csr_spmm_avx2" in done.stdout or "avx2" not in done.stdout


def test_the_forced_instruction_set_disables_the_others() -> None:
    program = (
        "from sparselt import _C, ops\n"
        "assert ops.isa() == 'scalar', ops.isa()\n"
        "for k in ops.kernels():\n"
        "    if k.device == 'cpu':\n"
        "        assert k.usable == (not k.features), k\n"
        "        excluded = set(k.features) <= set(_C.cpu_features())\n"
        "        why_not = 'SPARSELT_ISA' if excluded else 'this CPU has no'\n"
        "        assert k.usable or why_not in k.reason, k.reason\n"
    )
    done = run_here("-c", program, isa="scalar")
    assert done.returncode == 0, done.stderr


def test_an_unknown_instruction_set_is_refused_with_the_known_ones() -> None:
    done = run_here("-c", "from sparselt import ops", isa="mmx")
    assert done.returncode == 1
    assert "mmx" in done.stderr
    assert "scalar" in done.stderr
