# SPDX-License-Identifier: Apache-2.0
"""Kernels for dense blocks on the CPU stand-in: each tile size, each way to read x, parts of sums.

The tables of test_cuda_kernels.py meet the same kernels with sizes that fit nothing; here sizes
come in 16-byte pieces, so that background copies and the kernels for few columns are run.
"""

from __future__ import annotations

import pytest
import torch
from cases import ConvCase, SpmmCase
from cuda_host import Host, KernelFaultError, dtype_of, host, registered
from test_cuda_kernels import assert_close, kernels, rounded, turn
from torch import Tensor

from sparselt import reference
from sparselt.formats import BSR
from sparselt.formats.bsr_nhwc import ChannelsLastBSR

Block = tuple[int, int]

SPMM_KERNELS = [name for name in kernels("spmm") if registered()[name][1] == "bsr"]
CONV_KERNELS = [name for name in kernels("conv2d") if registered()[name][1] == "bsr_nhwc"]
# Limits that leave most values as they are: a case must not pass by being clamped.
LIMITS = ((None, None), (-30.0, 1.0), (0.0, None))

# Rows and columns beside whole tiles; less depth than a step, several steps; many columns.
TILES: tuple[tuple[SpmmCase, Block], ...] = (
    (SpmmCase(64, 96, 136), (16, 16)),
    (SpmmCase(40, 72, 24), (16, 8)),
    (SpmmCase(100, 256, 40), (32, 32)),
    (SpmmCase(130, 320, 136), (64, 64)),
    (SpmmCase(200, 200, 24), (128, 40)),
    (SpmmCase(300, 64, 40), (256, 16)),
    (SpmmCase(64, 64, 1032), (64, 32)),
    (SpmmCase(128, 80, 1032), (128, 16)),
)
STRIPS: tuple[tuple[SpmmCase, Block], ...] = tuple(
    (SpmmCase(m, k, n), block)
    for n in (1, 2, 3, 5, 8, 9, 16)
    for m, k, block in ((40, 2200, (16, 8)), (96, 1600, (64, 64)), (48, 600, (24, 16)))
)
# One tile, or two: parts are made up to four.
PARTS: tuple[tuple[SpmmCase, Block], ...] = (
    (SpmmCase(16, 2048, 24, density=0.9), (16, 16)),
    (SpmmCase(50, 1100, 33, density=0.9), (64, 32)),
    (SpmmCase(10, 1300, 20, density=0.9), (10, 13)),
)
CONVS: tuple[tuple[ConvCase, Block], ...] = (
    (ConvCase(1, 32, 48, (9, 11), (3, 3), padding=(1, 1)), (16, 16)),
    (ConvCase(2, 16, 64, (13, 10), (3, 3), stride=(2, 2), padding=(1, 1)), (64, 16)),
    (ConvCase(1, 64, 32, (8, 8), (3, 3), padding=(2, 2), dilation=(2, 2)), (32, 32)),
    (ConvCase(3, 32, 128, (7, 7), (1, 1)), (128, 32)),
    (ConvCase(2, 64, 64, (7, 7), (3, 3), padding=(1, 1), groups=2), (32, 16)),
    (ConvCase(1, 24, 40, (5, 40), (1, 5), stride=(1, 3), padding=(0, 2)), (16, 8)),
    (ConvCase(1, 40, 20, (6, 5), (5, 3), padding=(4, 2), density=0.9), (32, 16)),
    (ConvCase(1, 3, 64, (14, 15), (7, 7), stride=(2, 2), padding=(3, 3)), (64, 16)),
    (ConvCase(1, 8, 64, (33, 32), (3, 3), padding=(1, 1)), (64, 8)),
    (ConvCase(150, 16, 16, (2, 1), (2, 1), padding=(1, 0)), (16, 16)),
)


@pytest.fixture(scope="module")
def machine() -> Host:
    return host()


def kept_blocks(rows: int, cols: int, block: Block, density: float) -> Tensor:
    """A mask (rows, cols) of whole blocks: none in the second of many block rows, a last one."""
    grid = (-(-rows // block[0]), -(-cols // block[1]))
    kept = torch.rand(grid, generator=torch.Generator().manual_seed(rows * cols)) < density
    if grid[0] > 2:
        kept[1] = False
    kept[-1, -1] = True
    kept = kept.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return kept[:rows, :cols]


def matrix(kernel: str, case: SpmmCase, block: Block) -> BSR:
    mask = kept_blocks(case.rows, case.cols, block, case.density)
    return BSR.from_dense(rounded(case.dense()[0], kernel), mask, block)


def filters(kernel: str, case: ConvCase, block: Block) -> ChannelsLastBSR:
    weight = rounded(case.dense()[0], kernel)
    rows, channels, *taps = weight.shape
    overhang = -channels % block[1]
    columns = (channels + overhang) * taps[0] * taps[1]
    mask = kept_blocks(rows, columns, block, case.density).view(rows, *taps, -1)
    return ChannelsLastBSR.from_dense(weight, mask[..., :channels].permute(0, 3, 1, 2), block)


def epilogue(case: SpmmCase | ConvCase, kernel: str) -> tuple:
    return (
        rounded(case.bias(), kernel) if turn(case, 2) else None,
        rounded(case.residual(), kernel) if turn(case, 3) else None,
        *LIMITS[turn(case, len(LIMITS))],
    )


def check_spmm(machine: Host, kernel: str, case: SpmmCase, block: Block, **how: bool) -> None:
    weight, x = matrix(kernel, case, block), rounded(case.x(), kernel)
    end = epilogue(case, kernel)
    y = machine.spmm(kernel, weight, x, *end, schedule=turn(case, 5), **how)
    assert_close((kernel, block, str(case)), y, reference.spmm, weight, x, *end)


def check_conv2d(machine: Host, kernel: str, case: ConvCase, block: Block, **how: bool) -> None:
    weight, x = filters(kernel, case, block), rounded(case.x(), kernel)
    end = epilogue(case, kernel)
    y = machine.conv2d(
        kernel,
        weight,
        x,
        *end,
        out_size=case.out_size(),
        schedule=turn(case, 5),
        **case.options(),
        **how,
    )
    options = case.options() | dict(zip(("bias", "residual", "lower", "upper"), end, strict=True))
    assert_close((kernel, block, str(case)), y, reference.conv2d, x, weight, **options)


def shared_out(names: list[str], cases: tuple) -> list[object]:
    """Every case for float32 and float16, a third of them for bfloat16."""
    return [
        pytest.param(kernel, case, block, id=f"{kernel}-{block[0]}x{block[1]}-{case}")
        for kernel in names
        for position, (case, block) in enumerate(cases)
        if dtype_of(kernel) != torch.bfloat16 or position % 3 == 0
    ]


@pytest.mark.parametrize("batch_major", [False, True])
@pytest.mark.parametrize(("kernel", "case", "block"), shared_out(SPMM_KERNELS, TILES))
def test_tile_matches_reference(
    machine: Host, kernel: str, case: SpmmCase, block: Block, batch_major: bool
) -> None:
    check_spmm(machine, kernel, case, block, batch_major=batch_major)


@pytest.mark.parametrize(("kernel", "case", "block"), shared_out(SPMM_KERNELS, STRIPS))
def test_few_columns_match_reference(
    machine: Host, kernel: str, case: SpmmCase, block: Block
) -> None:
    check_spmm(machine, kernel, case, block, batch_major=True)


@pytest.mark.parametrize("workspace", [False, True])
@pytest.mark.parametrize("batch_major", [False, True])
@pytest.mark.parametrize(("kernel", "case", "block"), shared_out(SPMM_KERNELS, PARTS))
def test_parts_of_block_rows_match_reference(
    machine: Host, kernel: str, case: SpmmCase, block: Block, batch_major: bool, workspace: bool
) -> None:
    check_spmm(machine, kernel, case, block, batch_major=batch_major, workspace=workspace)


@pytest.mark.parametrize(("kernel", "case", "block"), shared_out(CONV_KERNELS, CONVS))
def test_conv2d_matches_reference(machine: Host, kernel: str, case: ConvCase, block: Block) -> None:
    check_conv2d(machine, kernel, case, block)


@pytest.mark.parametrize("kernel", [*SPMM_KERNELS, *CONV_KERNELS])
def test_result_is_bitwise_the_same_in_every_order(machine: Host, kernel: str) -> None:
    if kernel in SPMM_KERNELS:
        case, block = PARTS[0]
        weight, x = matrix(kernel, case, block), rounded(case.x(), kernel)
        results = [machine.spmm(kernel, weight, x, schedule=s) for s in (0, 1, 8)]
    else:
        conv, block = CONVS[0]
        filter_bank, x = filters(kernel, conv, block), rounded(conv.x(), kernel)
        options = {"out_size": conv.out_size(), **conv.options()}
        results = [machine.conv2d(kernel, filter_bank, x, schedule=s, **options) for s in (0, 1, 8)]
    assert not results[0].isnan().any()
    assert all(torch.equal(results[0], result) for result in results[1:])


@pytest.mark.parametrize("kernel", SPMM_KERNELS)
@pytest.mark.parametrize("columns", [8, 40])
def test_infinite_x_reaches_only_stored_blocks(machine: Host, kernel: str, columns: int) -> None:
    case = SpmmCase(48, 200, columns)
    weight, x = matrix(kernel, case, (16, 16)), rounded(case.x(), kernel)
    unread = ~weight.mask()[:16].any(dim=0)
    assert unread.any()
    x[unread] = torch.inf
    y = machine.spmm(kernel, weight, x, batch_major=True)
    assert y[:16].isfinite().all()


@pytest.mark.parametrize("kernel", CONV_KERNELS)
def test_pixels_beyond_the_map_are_zeros_not_neighbours(machine: Host, kernel: str) -> None:
    weight = ChannelsLastBSR.from_dense(torch.ones(16, 16, 3, 3), block=(16, 16))
    x = torch.ones(2, 16, 3, 4)
    y = machine.conv2d(kernel, weight, x, out_size=(3, 4), padding=(1, 1))
    counts = torch.tensor([[4, 6, 6, 4], [6, 9, 9, 6], [4, 6, 6, 4]])
    assert torch.equal(y.float(), (16.0 * counts).expand(2, 16, 3, 4))


@pytest.mark.parametrize("kernel", CONV_KERNELS)
@pytest.mark.parametrize(
    ("case", "block"),
    [
        (ConvCase(1, 8, 24, (20, 4), (3, 3), groups=2), (16, 8)),
        (ConvCase(1, 8, 16, (20, 4), (16, 1)), (16, 8)),
        (ConvCase(1, 1, 1, (1, 5), (1, 2), dilation=(1, 3), padding=(0, 2**30)), (1, 1)),
    ],
    ids=["a block row in two groups", "a filter of 16 rows", "a map beyond 32 bits"],
)
def test_what_a_kernel_does_not_do_is_refused(
    machine: Host, kernel: str, case: ConvCase, block: Block
) -> None:
    weight = ChannelsLastBSR.from_dense(torch.ones(case.dense()[0].shape), block=block)
    with pytest.raises(KernelFaultError, match="CUDA error 801"):
        machine.conv2d(kernel, weight, case.x(), out_size=(1, 1), **case.options())
