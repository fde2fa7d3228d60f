# SPDX-License-Identifier: Apache-2.0
"""Every registered kernel, by name, against the float64 reference over the case table.

The operators are called directly, with the kernel's name, so that nothing above them can choose
another one. Outputs start as NaN between guard bands, inputs lie in slices of NaN-filled buffers.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cases import (
    BLOCKS,
    ConvCase,
    SpmmCase,
    assert_within_bound,
    conv_cases,
    guarded,
    guarded_output,
    guarded_weight,
    kernel_params,
    spmm_cases,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparselt import ops, reference
from sparselt.formats import SparseWeight
from sparselt.plan import KernelInfo

SPMM = pytest.mark.parametrize("kernel", kernel_params("spmm"))
CONV2D = pytest.mark.parametrize("kernel", kernel_params("conv2d"))
ISA_IN_SUBPROCESS = "scalar"

# Enough columns (or pixels) and work that a product is split over threads, both ways.
LARGE_SPMM = (
    SpmmCase(200, 300, 70, density=0.3),
    SpmmCase(60, 300, 900, density=0.1),
    SpmmCase(301, 2000, 1, density=0.5),
    SpmmCase(97, 501, 259, "empty rows", density=0.5),
)
LARGE_CONV = (
    ConvCase(1, 16, 32, (28, 28), (3, 3), padding=(1, 1), density=0.2),
    ConvCase(1, 64, 128, (7, 7), (3, 3), padding=(1, 1), density=0.3),
    ConvCase(9, 16, 24, (13, 13), (3, 3), stride=(2, 2), padding=(1, 1), groups=2, density=0.5),
    ConvCase(2, 32, 48, (1, 199), (1, 5), padding=(0, 2), density=0.3),
)


@pytest.fixture(autouse=True)
def _record_kernel(request: pytest.FixtureRequest, record_property: Callable[..., None]) -> None:
    kernel = getattr(request.node, "callspec", None) and request.node.callspec.params.get("kernel")
    if kernel:
        record_property("kernel", kernel.name)


def blocks_of(kernel: KernelInfo) -> tuple[tuple[int, int] | None, ...]:
    return BLOCKS if kernel.format == "bsr" else (None,)


def a_block_of(kernel: KernelInfo, case: object) -> tuple[int, int] | None:
    """One block shape for a case, so that the table as a whole meets all of them."""
    blocks = blocks_of(kernel)
    return blocks[len(str(case)) % len(blocks)]


def spmm(
    kernel: KernelInfo,
    weight: SparseWeight,
    x: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    lower: float | None = None,
    upper: float | None = None,
) -> Tensor:
    return torch.ops.sparselt.spmm(
        x, weight.parts(), weight.meta(), bias, residual, lower, upper, kernel.name
    )


def conv2d(
    kernel: KernelInfo,
    weight: SparseWeight,
    x: Tensor,
    case: ConvCase,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    lower: float | None = None,
    upper: float | None = None,
) -> Tensor:
    geometry = (case.stride, case.padding, case.dilation, case.groups)
    return torch.ops.sparselt.conv2d(
        x, weight.parts(), weight.meta(), bias, residual, *geometry, lower, upper, kernel.name
    )


# ---- the case table ----


@SPMM
@pytest.mark.parametrize("case", spmm_cases(), ids=str)
def test_spmm_matches_reference_and_writes_nothing_else(kernel: KernelInfo, case: SpmmCase) -> None:
    block, offset = a_block_of(kernel, case), len(str(case)) % 17
    weight = guarded_weight(case.weight(kernel.format, block), offset)
    x = guarded(case.x(), offset)
    out, check_guards = guarded_output((case.rows, case.columns), offset)
    torch.ops.sparselt.spmm_out(
        x, out, weight.parts(), weight.meta(), None, None, None, None, kernel.name
    )
    name = (kernel.name, str(case), block, f"offset={offset}")
    assert_within_bound(name, out, reference.spmm, weight, x)
    check_guards()
    assert torch.equal(out, spmm(kernel, weight, case.x())), "spmm and spmm_out differ"


@CONV2D
@pytest.mark.parametrize("case", conv_cases(), ids=str)
def test_conv2d_matches_reference_and_writes_nothing_else(
    kernel: KernelInfo, case: ConvCase
) -> None:
    block, offset = a_block_of(kernel, case), len(str(case)) % 17
    weight = guarded_weight(case.weight(kernel.format, block), offset)
    x = guarded(case.x(), offset)
    out, check_guards = guarded_output((case.batch, case.filters, *case.out_size()), offset)
    geometry = (case.stride, case.padding, case.dilation, case.groups)
    torch.ops.sparselt.conv2d_out(
        x, out, weight.parts(), weight.meta(), None, None, *geometry, None, None, kernel.name
    )
    name = (kernel.name, str(case), block, f"offset={offset}")
    assert_within_bound(name, out, reference.conv2d, x, weight, **case.options())
    check_guards()
    assert torch.equal(out, conv2d(kernel, weight, x, case)), "conv2d and conv2d_out differ"


@SPMM
@pytest.mark.parametrize("columns", [1, 8, 67])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (16, 16), (17, 33), (65, 40)])
def test_spmm_matches_reference_in_every_block_shape(
    kernel: KernelInfo, rows: int, cols: int, columns: int
) -> None:
    case = SpmmCase(rows, cols, columns, density=0.2)
    for block in blocks_of(kernel):
        weight = case.weight(kernel.format, block)
        y = spmm(kernel, weight, case.x())
        assert_within_bound((kernel.name, str(case), block), y, reference.spmm, weight, case.x())


# ---- bias, residual and clamp ----

EPILOGUE_CONV = (
    ConvCase(2, 4, 6, (9, 11), (3, 3), padding=(1, 1), groups=2),
    ConvCase(1, 4, 6, (9, 11), (3, 3), stride=(2, 2), padding=(1, 0)),
    ConvCase(2, 3, 4, (7, 10), (1, 1)),
)
LIMITS = [(None, None), (0.0, None), (None, 0.5), (0.0, 6.0), (-0.25, 0.25), (1.0, 1.0)]


@SPMM
@pytest.mark.parametrize("columns", [1, 5, 64, 71])
def test_spmm_epilogues_match_reference(kernel: KernelInfo, columns: int) -> None:
    case = SpmmCase(19, 23, columns)
    weight = case.weight(kernel.format, a_block_of(kernel, case))
    for bias in (None, case.bias()):
        for residual in (None, case.residual()):
            for limits in LIMITS:
                y = spmm(kernel, weight, case.x(), bias, residual, *limits)
                name = (kernel.name, str(case), bias is not None, residual is not None, limits)
                assert_within_bound(
                    name, y, reference.spmm, weight, case.x(), bias, residual, *limits
                )


@CONV2D
@pytest.mark.parametrize("case", EPILOGUE_CONV, ids=str)
def test_conv2d_epilogues_match_reference(kernel: KernelInfo, case: ConvCase) -> None:
    weight = case.weight(kernel.format, a_block_of(kernel, case))
    for bias in (None, case.bias()):
        for residual in (None, case.residual()):
            for lower, upper in LIMITS:
                y = conv2d(kernel, weight, case.x(), case, bias, residual, lower, upper)
                epilogue = {"residual": residual, "lower": lower, "upper": upper}
                assert_within_bound(
                    (kernel.name, str(case), bias is not None, epilogue),
                    y,
                    reference.conv2d,
                    case.x(),
                    weight,
                    bias,
                    **case.options(),
                    **epilogue,
                )


# ---- NaN and infinity ----


@SPMM
@pytest.mark.parametrize("columns", [1, 3, 70])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_spmm_passes_nan_and_infinity_on_and_only_where_they_belong(
    kernel: KernelInfo, columns: int, value: float
) -> None:
    case = SpmmCase(9, 12, columns, density=0.4)
    weight = case.weight(kernel.format, a_block_of(kernel, case))
    x = case.x()
    x[5, columns // 2] = value
    for limits in ((None, None), (0.0, 6.0)):
        y = spmm(kernel, weight, x, None, None, *limits)
        name = (kernel.name, str(case), value, limits)
        assert_within_bound(name, y, reference.spmm, weight, x, None, None, *limits)


@CONV2D
def test_conv2d_passes_nan_on_and_only_where_it_belongs(kernel: KernelInfo) -> None:
    case = ConvCase(2, 4, 6, (9, 11), (3, 3), padding=(1, 1), groups=2)
    weight = case.weight(kernel.format, a_block_of(kernel, case))
    for at in ((0, 0, 0, 0), (0, 3, 4, 10), (1, 1, 8, 10)):
        x = case.x()
        x[at] = torch.nan
        y = conv2d(kernel, weight, x, case, None, None, 0.0, 6.0)
        limits = {"lower": 0.0, "upper": 6.0}
        assert_within_bound(
            (kernel.name, at), y, reference.conv2d, x, weight, **case.options(), **limits
        )


# ---- memory ----

OFFSETS = (0, 1, 2, 3, 5, 7, 8, 15, 16)


@SPMM
@pytest.mark.parametrize("offset", OFFSETS)
def test_spmm_stays_inside_its_buffers(kernel: KernelInfo, offset: int) -> None:
    for columns in (1, 2, 7, 8, 9, 63, 64, 65, 130):
        case = SpmmCase(19, 21, columns)
        weight = guarded_weight(case.weight(kernel.format, a_block_of(kernel, case)), offset)
        x, bias, residual = (
            guarded(tensor, offset) for tensor in (case.x(), case.bias(), case.residual())
        )
        out, check_guards = guarded_output((case.rows, columns), offset)
        torch.ops.sparselt.spmm_out(
            x, out, weight.parts(), weight.meta(), bias, residual, None, None, kernel.name
        )
        name = (kernel.name, str(case), f"offset={offset}")
        assert_within_bound(name, out, reference.spmm, weight, x, bias, residual)
        check_guards()


@CONV2D
@pytest.mark.parametrize("offset", OFFSETS)
def test_conv2d_stays_inside_its_buffers(kernel: KernelInfo, offset: int) -> None:
    for case in EPILOGUE_CONV:
        block = a_block_of(kernel, case)
        weight = guarded_weight(case.weight(kernel.format, block), offset)
        x, bias, residual = (
            guarded(tensor, offset) for tensor in (case.x(), case.bias(), case.residual())
        )
        out, check_guards = guarded_output(residual.shape, offset)
        geometry = (case.stride, case.padding, case.dilation, case.groups)
        torch.ops.sparselt.conv2d_out(
            x,
            out,
            weight.parts(),
            weight.meta(),
            bias,
            residual,
            *geometry,
            None,
            None,
            kernel.name,
        )
        name = (kernel.name, str(case), f"offset={offset}")
        epilogue = {"bias": bias, "residual": residual}
        assert_within_bound(name, out, reference.conv2d, x, weight, **epilogue, **case.options())
        check_guards()


@SPMM
def test_spmm_leaves_its_inputs_alone(kernel: KernelInfo) -> None:
    case = SpmmCase(19, 21, 35)
    weight = case.weight(kernel.format, a_block_of(kernel, case))
    inputs = (*weight.parts(), case.x(), case.bias(), case.residual())
    before = [tensor.clone() for tensor in inputs]
    spmm(kernel, weight, *inputs[3:], 0.0, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@CONV2D
def test_conv2d_leaves_its_inputs_alone(kernel: KernelInfo) -> None:
    case = ConvCase(2, 4, 6, (9, 11), (3, 3), padding=(1, 1), groups=2)
    weight = case.weight(kernel.format, a_block_of(kernel, case))
    inputs = (*weight.parts(), case.x(), case.bias(), case.residual())
    before = [tensor.clone() for tensor in inputs]
    conv2d(kernel, weight, inputs[3], case, *inputs[4:], 0.0, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


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


# ---- the choice by name ----


@SPMM
def test_an_spmm_kernel_refuses_another_operation_or_format(kernel: KernelInfo) -> None:
    case, other = SpmmCase(4, 4, 4), "bsr" if kernel.format == "csr" else "csr"
    with pytest.raises(RuntimeError, match=kernel.name):
        spmm(kernel, case.weight(other), case.x())
    conv = ConvCase(1, 2, 2, (5, 5), (3, 3))
    with pytest.raises(RuntimeError, match=kernel.name):
        conv2d(kernel, conv.weight(kernel.format), conv.x(), conv)


@pytest.mark.parametrize("format", ["csr", "bsr"])
def test_no_name_means_the_first_usable_kernel(format: str) -> None:
    case = SpmmCase(33, 65, 1, density=0.6)
    weight = case.weight(format)
    kernels = [k for k in ops.kernels() if (k.op, k.format) == ("spmm", format)]
    first = next(k for k in kernels if k.usable and k.device == "cpu")
    by_default = torch.ops.sparselt.spmm(
        case.x(), weight.parts(), weight.meta(), None, None, None, None, ""
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
    for op, format in {(kernel.op, kernel.format) for kernel in kernels}:
        fallbacks = [k for k in kernels if (k.op, k.format) == (op, format) and not k.features]
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
        cwd=Path(__file__).parent.parent,
        check=False,
    )


@pytest.mark.skipif(
    os.environ.get("SPARSELT_ISA") == ISA_IN_SUBPROCESS,
    reason="the scalar instruction set is already forced for the whole run",
)
def test_kernels_are_right_with_the_scalar_instruction_set_forced() -> None:
    chosen = "nothing_else and one_value or epilogues or registry or no_name"
    done = run_here(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", chosen, isa="scalar"
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
    assert "not tested: csr_spmm_avx2" in done.stdout or "avx2" not in done.stdout


def test_the_forced_instruction_set_disables_the_others() -> None:
    program = (
        "from sparselt import ops\n"
        "assert ops.isa() == 'scalar', ops.isa()\n"
        "for k in ops.kernels():\n"
        "    if k.device == 'cpu':\n"
        "        assert k.usable == (not k.features), k\n"
        "        assert k.usable or 'SPARSELT_ISA' in k.reason, k.reason\n"
    )
    done = run_here("-c", program, isa="scalar")
    assert done.returncode == 0, done.stderr


def test_an_unknown_instruction_set_is_refused_with_the_known_ones() -> None:
    done = run_here("-c", "from sparselt import ops", isa="mmx")
    assert done.returncode == 1
    assert "mmx" in done.stderr
    assert "scalar" in done.stderr


# ---- properties ----

PROPERTY = settings(max_examples=50, deadline=None, derandomize=True)
SIZES = st.integers(1, 40)
DENSITY = st.sampled_from([0.0, 0.05, 0.3, 0.9, 1.0])
PATTERN = st.sampled_from(["random", "empty rows", "empty columns", "one full row"])
SEED = st.integers(0, 2**31)


@SPMM
def test_spmm_matches_reference_on_any_shape(kernel: KernelInfo) -> None:
    @PROPERTY
    @given(SIZES, SIZES, st.integers(0, 150), PATTERN, DENSITY, SEED, st.data())
    def check(
        rows: int,
        cols: int,
        columns: int,
        pattern: str,
        density: float,
        seed: int,
        data: st.DataObject,
    ) -> None:
        case = SpmmCase(rows, cols, columns, pattern, density, seed)
        weight = case.weight(kernel.format, data.draw(st.sampled_from(blocks_of(kernel))))
        y = spmm(kernel, weight, case.x(), case.bias())
        name = (kernel.name, str(case), weight.block)
        assert_within_bound(name, y, reference.spmm, weight, case.x(), case.bias())

    check()


@SPMM
def test_linear_matches_reference_on_any_shape(kernel: KernelInfo) -> None:
    @PROPERTY
    @given(SIZES, SIZES, st.lists(st.integers(0, 9), max_size=3), PATTERN, DENSITY, SEED, st.data())
    def check(
        rows: int,
        cols: int,
        lead: list[int],
        pattern: str,
        density: float,
        seed: int,
        data: st.DataObject,
    ) -> None:
        columns = int(torch.Size(lead).numel())
        case = SpmmCase(rows, cols, columns, pattern, density, seed)
        weight = case.weight(kernel.format, data.draw(st.sampled_from(blocks_of(kernel))))
        x, residual = case.x().T.reshape(*lead, cols), case.residual().T.reshape(*lead, rows)
        y = torch.ops.sparselt.linear(
            x, weight.parts(), weight.meta(), case.bias(), residual, 0.0, None, kernel.name
        )
        assert_within_bound(
            (kernel.name, str(case), lead, weight.block),
            y,
            reference.linear,
            x,
            weight,
            case.bias(),
            residual,
            0.0,
        )

    check()


PAIR = st.tuples(st.integers(1, 3), st.integers(1, 3))


@CONV2D
def test_conv2d_matches_reference_on_any_geometry(kernel: KernelInfo) -> None:
    @PROPERTY
    @given(
        st.integers(0, 3),
        st.integers(1, 3),
        st.tuples(st.integers(1, 3), st.integers(1, 3)),
        st.tuples(st.integers(1, 12), st.integers(1, 40)),
        st.tuples(st.integers(1, 4), st.integers(1, 6)),
        st.tuples(st.integers(1, 5), st.integers(1, 5)),
        st.tuples(st.integers(0, 4), st.integers(0, 4)),
        PAIR,
        DENSITY,
        SEED,
    )
    def check(
        batch: int,
        groups: int,
        per_group: tuple[int, int],
        size: tuple[int, int],
        taps: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        density: float,
        seed: int,
    ) -> None:
        channels, filters = groups * per_group[0], groups * per_group[1]
        case = ConvCase(
            batch, channels, filters, size, taps, stride, padding, dilation, groups, "random",
            density, seed,
        )  # fmt: skip
        if not case.fits():
            return
        weight = case.weight(kernel.format, a_block_of(kernel, case))
        y = conv2d(kernel, weight, case.x(), case, case.bias())
        name = (kernel.name, str(case))
        assert_within_bound(
            name, y, reference.conv2d, case.x(), weight, case.bias(), **case.options()
        )

    check()


@CONV2D
def test_conv1d_matches_reference_on_any_geometry(kernel: KernelInfo) -> None:
    @PROPERTY
    @given(
        st.integers(1, 3),
        st.integers(1, 3),
        st.integers(1, 90),
        st.integers(1, 7),
        st.integers(1, 4),
        st.integers(0, 5),
        st.integers(1, 3),
        DENSITY,
        SEED,
    )
    def check(
        batch: int,
        groups: int,
        length: int,
        taps: int,
        stride: int,
        padding: int,
        dilation: int,
        density: float,
        seed: int,
    ) -> None:
        case = ConvCase(
            batch, 2 * groups, 3 * groups, (1, length), (1, taps), (1, stride), (0, padding),
            (1, dilation), groups, "random", density, seed,
        )  # fmt: skip
        if not case.fits():
            return
        flat = case.weight(kernel.format)
        weight = type(flat).from_parts(
            flat.parts(), (flat.shape[0], flat.shape[1], taps), flat.block
        )
        x = case.x()[:, :, 0, :]
        geometry = (stride, padding, dilation, groups)
        y = ops.conv1d(x, weight, case.bias(), *geometry, kernel=kernel.name)
        name = (kernel.name, str(case))
        assert_within_bound(name, y, reference.conv1d, x, weight, case.bias(), *geometry)

    check()
