# SPDX-License-Identifier: Apache-2.0
"""Every registered CUDA kernel, by name, on the CPU stand-in against the float64 reference.

Outputs start as NaN, nothing around an array may be touched, and each case runs with its threads in
another order. The same kernels meet a GPU in test_cuda_device.py.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from cases import BLOCKS, PATTERNS, ConvCase, SpmmCase
from cuda_host import Host, KernelFaultError, dtype_of, host, registered
from torch import Tensor

from sparselt import reference
from sparselt.formats import FORMATS, SparseWeight, pack

# Half a unit in the last place, relative, of what a result is rounded to.
ROUNDOFF = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SMALLEST = {torch.float32: 0.0, torch.float16: 2.0**-25, torch.bfloat16: 2.0**-133}

# Around the tiles: 96 rows, windows of 64 columns of W, and 4, 32 and 128 columns of x.
ROWS = (1, 2, 7, 8, 9, 95, 96, 97)
COLS = (0, 1, 2, 31, 63, 64, 65, 130, 257)
COLUMNS = (0, 1, 2, 4, 5, 31, 32, 33, 64, 127, 128, 129)
SPMM_CASES = (
    *(SpmmCase(m, 70, n) for m in ROWS for n in (1, 9, 40)),
    *(SpmmCase(9, k, n) for k in COLS for n in (1, 5, 36)),
    *(SpmmCase(13, 70, n) for n in COLUMNS),
    *(SpmmCase(17, 66, n, pattern) for pattern in PATTERNS for n in (3, 8, 35)),
    *(SpmmCase(17, 66, n, density=density) for density in (0.0, 0.02, 1.0) for n in (2, 32, 130)),
    SpmmCase(100, 300, 132, density=0.1),
    *(SpmmCase(33, k, n, density=0.5) for k in (255, 256, 257) for n in (1, 2, 11)),
    SpmmCase(5, 2600, 1, density=0.1),
    # Pieces of K (16-bit tile8, patch8, bitmask), and groups with many chunks.
    SpmmCase(40, 2100, 3, density=0.4),
    SpmmCase(40, 2100, 17, density=0.1),
    SpmmCase(130, 520, 65, density=0.2),
    SpmmCase(3, 300, 2, density=1.0),
    SpmmCase(0, 5, 7),
)
CONV_CASES = (
    ConvCase(1, 3, 5, (7, 7), (3, 3), padding=(1, 1)),
    ConvCase(2, 4, 10, (13, 13), (3, 3), stride=(2, 2), padding=(1, 1), groups=2),
    ConvCase(3, 4, 8, (5, 5), (1, 1), groups=4),
    ConvCase(1, 5, 97, (6, 40), (3, 3), padding=(1, 1), density=0.1),
    ConvCase(5, 6, 3, (4, 3), (3, 3), padding=(2, 2), dilation=(2, 2)),
    ConvCase(1, 40, 4, (16, 33), (3, 3), padding=(1, 1)),
    ConvCase(2, 3, 4, (1, 150), (1, 5), padding=(0, 2)),
    ConvCase(9, 2, 2, (1, 3), (1, 3), padding=(0, 1)),
    ConvCase(1, 3, 6, (20, 20), (7, 7), stride=(2, 2), padding=(3, 3)),
    ConvCase(1, 3, 2, (5, 5), (2, 4), stride=(5, 4), padding=(3, 1), dilation=(3, 1)),
    ConvCase(1, 2, 2, (6, 6), (2, 2), stride=(7, 9)),
    ConvCase(2, 70, 10, (12, 11), (1, 1)),
    ConvCase(1, 70, 10, (5, 5), (1, 1)),
    ConvCase(2, 6, 4, (9, 16), (1, 1), stride=(2, 1)),
    ConvCase(1, 1, 1, (1, 1), (1, 1), density=1.0),
    ConvCase(1, 3, 2, (1, 1), (3, 3), padding=(1, 1), density=1.0),
    ConvCase(0, 3, 5, (7, 7), (3, 3)),
    *(ConvCase(2, 3, 5, (9, 6), (3, 3), padding=(1, 1), pattern=pattern) for pattern in PATTERNS),
)
LIMITS = ((None, None), (0.0, None), (-0.5, 0.5), (1.0, 1.0))


@pytest.fixture(scope="module")
def machine() -> Host:
    return host()


def kernels(op: str) -> list[str]:
    return [name for name, (kernel_op, _, _) in registered().items() if kernel_op == op]


def turn(case: object, choices: int) -> int:
    """A number below `choices`, another one for each case, the same in every run."""
    return zlib.crc32(str(case).encode()) % choices


def shared_out(op: str, cases: Sequence[SpmmCase | ConvCase]) -> list[object]:
    """Every case for float32 kernels; a third of them for each 16-bit twin of the same source."""
    return [
        pytest.param(kernel, case, id=f"{kernel}-{case}")
        for kernel in kernels(op)
        for position, case in enumerate(cases)
        if dtype_of(kernel) == torch.float32 or position % 3 == (dtype_of(kernel) == torch.bfloat16)
    ]


def packed(kernel: str, case: SpmmCase | ConvCase) -> SparseWeight:
    """The weight of a case in a kernel's format, of values that its type holds exactly."""
    _, sparse_format, _ = registered()[kernel]
    weight, mask = case.dense()
    block = block_for(case) if sparse_format.startswith("bsr") else None
    return FORMATS[sparse_format].from_dense(rounded(weight, kernel), mask, block)


def block_for(case: SpmmCase | ConvCase) -> tuple[int, int]:
    """One of `BLOCKS`, whole block rows a group."""
    group_rows = case.rows if isinstance(case, SpmmCase) else case.filters // case.groups
    whole = isinstance(case, SpmmCase) or case.groups == 1
    fitting = [block for block in BLOCKS if whole or group_rows % block[0] == 0]
    return fitting[turn(case, len(fitting))]


def rounded(tensor: Tensor, kernel: str) -> Tensor:
    return tensor.to(dtype_of(kernel)).float()


def assert_close(
    case: object,
    got: Tensor,
    operation: Callable[..., np.ndarray],
    *args: object,
    slack: float = 1.0,
    **options: object,
) -> None:
    """Within the dot-product bound of float32 sums, and one rounding to the result's type."""
    with np.errstate(invalid="ignore", over="ignore"):
        expected = operation(*args, **options)
        bound = slack * reference.error_bound(operation, *args, **options)
    assert tuple(got.shape) == expected.shape, case
    bound = bound * (1 + ROUNDOFF[got.dtype]) + np.abs(expected) * ROUNDOFF[got.dtype]
    bound = bound + SMALLEST[got.dtype]
    found = got.double().numpy()
    same = (found == expected) | (np.isnan(found) & np.isnan(expected))
    with np.errstate(invalid="ignore"):
        wrong = ~same & ~(np.abs(found - expected) <= bound)
    places = np.argwhere(wrong)
    assert not len(places), (
        f"{case}: {len(places)} of {wrong.size} wrong, first at {places[0].tolist()}: "
        f"got {found[tuple(places[0])]}, expected {expected[tuple(places[0])]}"
    )


@pytest.mark.parametrize(("kernel", "case"), shared_out("spmm", SPMM_CASES))
def test_spmm_matches_reference(machine: Host, kernel: str, case: SpmmCase) -> None:
    weight = packed(kernel, case)
    x, bias, residual = (rounded(t, kernel) for t in (case.x(), case.bias(), case.residual()))
    epilogue = (
        bias if turn(case, 3) else None,
        residual if turn(case, 2) else None,
        *LIMITS[turn(case, len(LIMITS))],
    )
    y = machine.spmm(
        kernel,
        weight,
        x,
        *epilogue,
        batch_major=bool(turn(f"{case} {kernel}", 2)),
        schedule=turn(case, 5),
        offset=turn(case, 4),
    )
    assert_close((kernel, str(case)), y, reference.spmm, weight, x, *epilogue)


@pytest.mark.parametrize("kernel", kernels("spmm"))
@pytest.mark.parametrize("columns", [1, 24, 100, 128])
@pytest.mark.parametrize("batch_major", [False, True])
def test_spmm_is_bitwise_the_same_in_every_order(
    machine: Host, kernel: str, columns: int, batch_major: bool
) -> None:
    case = SpmmCase(20, 150, columns, density=0.25)
    weight, x = packed(kernel, case), rounded(case.x(), kernel)
    results = [
        machine.spmm(kernel, weight, x, batch_major=batch_major, schedule=s, offset=s)
        for s in (0, 1, 8)
    ]
    assert not results[0].isnan().any()
    assert all(torch.equal(results[0], result) for result in results[1:])


@pytest.mark.parametrize("kernel", [k for k in kernels("spmm") if registered()[k][1] == "bsr"])
@pytest.mark.parametrize(
    "block", [*BLOCKS, (2, 1), (12, 1), (32, 32), (40, 24), (128, 16)], ids=str
)
@pytest.mark.parametrize("columns", [3, 40, 136])
def test_spmm_matches_reference_in_every_block_shape(
    machine: Host, kernel: str, block: tuple[int, int], columns: int
) -> None:
    case = SpmmCase(136, 72, columns, density=0.1)
    weight, mask = case.dense()
    weight = pack(rounded(weight, kernel), mask, "bsr", block)
    x = rounded(case.x(), kernel)
    batch_major = bool(turn((block, columns, kernel), 2))
    y = machine.spmm(kernel, weight, x, batch_major=batch_major, schedule=columns % 3)
    assert_close((kernel, block, str(case)), y, reference.spmm, weight, x)


@pytest.mark.parametrize("kernel", kernels("spmm"))
@pytest.mark.parametrize("columns", [1, 20, 70])
def test_spmm_runs_a_batch(machine: Host, kernel: str, columns: int) -> None:
    case = SpmmCase(10, 30, columns)
    weight = packed(kernel, case)
    x = rounded(torch.stack([case.x(), -2 * case.x(), 3 * case.x()]), kernel)
    y = machine.spmm(kernel, weight, x)
    for item, got in zip(x, y, strict=True):
        assert_close((kernel, str(case)), got, reference.spmm, weight, item)


def unpacks_dense_tiles(kernel: str) -> bool:
    """Whether it multiplies the zeros between the stored weights too, as a dense layer does."""
    _, sparse_format, dtype = registered()[kernel]
    return sparse_format == "patch8" or (sparse_format == "bitmask" and dtype != "float32")


@pytest.mark.parametrize("kernel", [k for k in kernels("spmm") if unpacks_dense_tiles(k)])
@pytest.mark.parametrize("columns", [3, 17])
def test_infinite_x_reaches_only_its_own_column_of_dense_tiles(
    machine: Host, kernel: str, columns: int
) -> None:
    case = SpmmCase(33, 90, columns, density=0.3)
    weight, x = packed(kernel, case), rounded(case.x(), kernel)
    x[::7, 1] = torch.inf
    y = machine.spmm(kernel, weight, x)
    assert not y[:, 1].isfinite().any()
    kept = [n for n in range(columns) if n != 1]
    assert_close((kernel, str(case)), y[:, kept], reference.spmm, weight, x[:, kept])


@pytest.mark.parametrize("kernel", [k for k in kernels("spmm") if not unpacks_dense_tiles(k)])
@pytest.mark.parametrize("columns", [1, 3, 16, 64])
def test_infinite_x_reaches_only_what_is_stored(machine: Host, kernel: str, columns: int) -> None:
    case = SpmmCase(33, 90, columns, "empty columns", density=0.3)
    weight = packed(kernel, case)
    x = rounded(case.x(), kernel)
    x[~weight.mask().any(dim=0)] = torch.inf
    x[~weight.mask().any(dim=0), ::2] = torch.nan
    y = machine.spmm(kernel, weight, x)
    assert y.isfinite().all()
    assert_close((kernel, str(case)), y, reference.spmm, weight, x)


@pytest.mark.parametrize("kernel", kernels("spmm"))
def test_nan_survives_the_clamp(machine: Host, kernel: str) -> None:
    weight = FORMATS[registered()[kernel][1]].from_dense(torch.ones(16, 16))
    x = torch.full((16, 5), torch.nan)
    assert machine.spmm(kernel, weight, x, lower=0.0, upper=1.0).isnan().all()


@pytest.mark.parametrize(("kernel", "case"), shared_out("conv2d", CONV_CASES))
def test_conv2d_matches_reference(machine: Host, kernel: str, case: ConvCase) -> None:
    weight = packed(kernel, case)
    x, bias, residual = (rounded(t, kernel) for t in (case.x(), case.bias(), case.residual()))
    epilogue = (
        bias if turn(case, 3) else None,
        residual if turn(case, 2) else None,
        *LIMITS[turn(case, len(LIMITS))],
    )
    y = machine.conv2d(
        kernel,
        weight,
        x,
        *epilogue,
        out_size=case.out_size(),
        schedule=turn(case, 5),
        offset=turn(case, 4),
        **case.options(),
    )
    names = ("bias", "residual", "lower", "upper")
    options = case.options() | dict(zip(names, epilogue, strict=True))
    assert_close((kernel, str(case)), y, reference.conv2d, x, weight, **options)


@pytest.mark.parametrize("kernel", kernels("conv2d"))
def test_conv2d_is_bitwise_the_same_in_every_order(machine: Host, kernel: str) -> None:
    case = ConvCase(1, 60, 20, (10, 18), (3, 3), padding=(1, 1), density=0.2)
    weight, x = packed(kernel, case), rounded(case.x(), kernel)
    results = [
        machine.conv2d(kernel, weight, x, out_size=case.out_size(), schedule=s, **case.options())
        for s in (0, 1, 8)
    ]
    assert not results[0].isnan().any()
    assert all(torch.equal(results[0], result) for result in results[1:])


@pytest.mark.parametrize("kernel", [k for k in kernels("conv2d") if registered()[k][1] == "csr"])
def test_conv2d_refuses_a_patch_beyond_shared_memory(machine: Host, kernel: str) -> None:
    case = ConvCase(1, 1, 1, (1, 60000), (1, 2), dilation=(1, 50000))
    weight = packed(kernel, case)
    with pytest.raises(KernelFaultError, match="CUDA error 801"):
        machine.conv2d(kernel, weight, case.x(), out_size=case.out_size(), **case.options())
