# SPDX-License-Identifier: Apache-2.0
"""Every registered kernel against the reference on any shape, geometry, density and block."""

from __future__ import annotations

import torch
from cases import ConvCase, SpmmCase, assert_within_bound
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_calls import CONV2D, SPMM, a_block_of, blocks_of, conv2d, spmm, ungrouped

from sparselt import ops, reference
from sparselt.plan import KernelInfo

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
        case = ungrouped(kernel, case)
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
        case = ungrouped(kernel, case)
        groups = case.groups
        flat = case.weight(kernel.format, a_block_of(kernel, case))
        weight = type(flat).from_parts(
            flat.parts(), (flat.shape[0], flat.shape[1], taps), flat.block
        )
        x = case.x()[:, :, 0, :]
        geometry = (stride, padding, dilation, groups)
        y = ops.conv1d(x, weight, case.bias(), *geometry, kernel=kernel.name)
        name = (kernel.name, str(case))
        assert_within_bound(name, y, reference.conv1d, x, weight, case.bias(), *geometry)

    check()
