# SPDX-License-Identifier: Apache-2.0
"""Every registered kernel, by name, against the float64 reference over the case table.

Outputs start as NaN between guard bands, inputs lie in slices of NaN-filled buffers.
"""

from __future__ import annotations

import pytest
import torch
from cases import (
    ConvCase,
    SpmmCase,
    assert_within_bound,
    conv_cases,
    guarded,
    guarded_output,
    guarded_weight,
    spmm_cases,
)
from kernel_calls import CONV2D, SPMM, a_block_of, blocks_of, conv2d, spmm, ungrouped

from sparselt import reference
from sparselt.plan import KernelInfo

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
    case = ungrouped(kernel, case)
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
    case = ungrouped(kernel, case)
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
    case = ungrouped(kernel, ConvCase(2, 4, 6, (9, 11), (3, 3), padding=(1, 1), groups=2))
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
    for case in (ungrouped(kernel, case) for case in EPILOGUE_CONV):
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
    operands = (case.x(), case.bias(), case.residual())
    inputs = (*weight.parts(), *operands)
    before = [tensor.clone() for tensor in inputs]
    spmm(kernel, weight, *operands, 0.0, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@CONV2D
def test_conv2d_leaves_its_inputs_alone(kernel: KernelInfo) -> None:
    case = ungrouped(kernel, ConvCase(2, 4, 6, (9, 11), (3, 3), padding=(1, 1), groups=2))
    weight = case.weight(kernel.format, a_block_of(kernel, case))
    operands = (case.x(), case.bias(), case.residual())
    inputs = (*weight.parts(), *operands)
    before = [tensor.clone() for tensor in inputs]
    conv2d(kernel, weight, operands[0], case, *operands[1:], 0.0, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))
