# SPDX-License-Identifier: Apache-2.0
"""Every registered CUDA kernel on a GPU, through torch.ops.sparselt, against the reference.

The case table is that of the CPU stand-in (test_cuda_kernels.py). bench/cuda/run.sh runs this.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from cases import ConvCase, SpmmCase
from cuda_host import dtype_of, registered
from test_cuda_blocks import (
    CONV_KERNELS,
    CONVS,
    PARTS,
    SPMM_KERNELS,
    STRIPS,
    TILES,
    Block,
    filters,
    matrix,
)
from test_cuda_kernels import (
    CONV_CASES,
    LIMITS,
    SPMM_CASES,
    assert_close,
    kernels,
    packed,
    rounded,
    turn,
)
from torch import Tensor

from sparselt import ops, reference
from sparselt.formats import FORMATS, SparseWeight

READY = torch.cuda.is_available() and find_spec("sparselt._C_cuda") is not None
if READY:
    from sparselt import _C_cuda  # noqa: F401  (registers the CUDA kernels)
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not READY, reason="no CUDA device, or sparselt._C_cuda is not built"),
]
SANITIZER_CASES = (
    SpmmCase(97, 130, 1, density=0.2),
    SpmmCase(97, 130, 33, density=0.2),
    SpmmCase(100, 300, 132, density=0.1),
    SpmmCase(33, 257, 11, density=0.5),
    SpmmCase(40, 2100, 17, density=0.1),
)
SANITIZER_CONV_CASES = (
    ConvCase(2, 4, 10, (13, 13), (3, 3), stride=(2, 2), padding=(1, 1), groups=2),
    ConvCase(1, 40, 4, (16, 33), (3, 3), padding=(1, 1)),
    ConvCase(2, 70, 10, (12, 11), (1, 1)),
)

Epilogue = tuple[Tensor | None, Tensor | None, float | None, float | None]


def on_gpu(weight: SparseWeight, dtype: torch.dtype) -> list[Tensor]:
    parts = [part.cuda() for part in weight.parts()]
    return [part.to(dtype) if part.is_floating_point() else part for part in parts]


def gpu(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to("cuda", dtype)


def epilogue_of(case: SpmmCase | ConvCase, kernel: str) -> Epilogue:
    return (
        rounded(case.bias(), kernel) if turn(case, 3) else None,
        rounded(case.residual(), kernel) if turn(case, 2) else None,
        *LIMITS[turn(case, len(LIMITS))],
    )


def check_spmm(kernel: str, case: SpmmCase, weight: SparseWeight | None = None) -> None:
    weight = packed(kernel, case) if weight is None else weight
    x = rounded(case.x(), kernel)
    bias, residual, lower, upper = epilogue = epilogue_of(case, kernel)
    dtype = dtype_of(kernel)
    parts, meta = on_gpu(weight, dtype), weight.meta()
    args = (gpu(bias, dtype), gpu(residual, dtype), lower, upper, kernel)
    y = torch.ops.sparselt.spmm(gpu(x, dtype), parts, meta, *args)
    out = torch.full_like(y, torch.nan)
    torch.ops.sparselt.spmm_out(gpu(x, dtype), out, parts, meta, *args)
    assert torch.equal(out, y)
    # Tensor cores may round more often than once an addition.
    slack = 1.0 if dtype == torch.float32 else 4.0
    assert_close((kernel, str(case)), y.cpu(), reference.spmm, weight, x, *epilogue, slack=slack)
    turned = None if residual is None else residual.mT.contiguous()
    args = (gpu(bias, dtype), gpu(turned, dtype), lower, upper, kernel)
    y = torch.ops.sparselt.linear(gpu(x.mT.contiguous(), dtype), parts, meta, *args)
    assert_close(
        (kernel, "linear", str(case)),
        y.cpu().mT,
        reference.spmm,
        weight,
        x,
        *epilogue,
        slack=slack,
    )


def check_conv2d(kernel: str, case: ConvCase, weight: SparseWeight | None = None) -> None:
    weight = packed(kernel, case) if weight is None else weight
    x = rounded(case.x(), kernel)
    bias, residual, lower, upper = epilogue_of(case, kernel)
    dtype = dtype_of(kernel)
    geometry = (case.stride, case.padding, case.dilation, case.groups)
    parts = on_gpu(weight, dtype)
    end = (gpu(bias, dtype), gpu(residual, dtype), *geometry, lower, upper, kernel)
    y = torch.ops.sparselt.conv2d(gpu(x, dtype), parts, weight.meta(), *end)
    out = torch.full_like(y, torch.nan)
    torch.ops.sparselt.conv2d_out(gpu(x, dtype), out, parts, weight.meta(), *end)
    assert torch.equal(out, y)
    options = case.options() | {"bias": bias, "residual": residual, "lower": lower, "upper": upper}
    assert_close((kernel, str(case)), y.cpu(), reference.conv2d, x, weight, **options)


@pytest.mark.parametrize("kernel", kernels("spmm"))
@pytest.mark.parametrize("case", SPMM_CASES, ids=str)
def test_spmm_and_linear_match_reference(kernel: str, case: SpmmCase) -> None:
    check_spmm(kernel, case)


@pytest.mark.parametrize("kernel", kernels("conv2d"))
@pytest.mark.parametrize("case", CONV_CASES, ids=str)
def test_conv2d_matches_reference(kernel: str, case: ConvCase) -> None:
    check_conv2d(kernel, case)


@pytest.mark.parametrize("kernel", SPMM_KERNELS)
@pytest.mark.parametrize(("case", "block"), [*TILES, *STRIPS, *PARTS], ids=str)
def test_blocks_match_reference(kernel: str, case: SpmmCase, block: Block) -> None:
    check_spmm(kernel, case, matrix(kernel, case, block))


@pytest.mark.parametrize("kernel", CONV_KERNELS)
@pytest.mark.parametrize(("case", "block"), CONVS, ids=str)
def test_blocks_of_filters_match_reference(kernel: str, case: ConvCase, block: Block) -> None:
    check_conv2d(kernel, case, filters(kernel, case, block))


@pytest.mark.parametrize("kernel", CONV_KERNELS)
def test_channels_last_maps_stay_so_and_others_are_taken(kernel: str) -> None:
    case, block = CONVS[0]
    dtype, weight = dtype_of(kernel), filters(kernel, case, block)
    x = gpu(case.x(), dtype)
    assert x is not None
    parts, none = on_gpu(weight, dtype), (None, None)

    def call(maps: Tensor) -> Tensor:
        geometry = (case.stride, case.padding, case.dilation, case.groups)
        return torch.ops.sparselt.conv2d(
            maps, parts, weight.meta(), *none, *geometry, *none, kernel
        )

    y = call(x.to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, call(x.contiguous()))


@pytest.mark.parametrize("kernel", kernels("spmm"))
@pytest.mark.parametrize("case", SANITIZER_CASES, ids=str)
def test_sanitizer_selection_of_spmm(kernel: str, case: SpmmCase) -> None:
    check_spmm(kernel, case)


@pytest.mark.parametrize("kernel", kernels("conv2d"))
@pytest.mark.parametrize("case", SANITIZER_CONV_CASES, ids=str)
def test_sanitizer_selection_of_conv2d(kernel: str, case: ConvCase) -> None:
    check_conv2d(kernel, case)


@pytest.mark.parametrize("kernel", SPMM_KERNELS)
@pytest.mark.parametrize(("case", "block"), [TILES[3], STRIPS[5], PARTS[1]], ids=str)
def test_sanitizer_selection_of_blocks(kernel: str, case: SpmmCase, block: Block) -> None:
    check_spmm(kernel, case, matrix(kernel, case, block))


@pytest.mark.parametrize("kernel", CONV_KERNELS)
@pytest.mark.parametrize(("case", "block"), [CONVS[1], CONVS[6]], ids=str)
def test_sanitizer_selection_of_blocks_of_filters(
    kernel: str, case: ConvCase, block: Block
) -> None:
    check_conv2d(kernel, case, filters(kernel, case, block))


@pytest.mark.parametrize("kernel", kernels("spmm"))
@pytest.mark.parametrize("columns", [1, 24, 300])
def test_large_product_is_right_and_repeats_bitwise(kernel: str, columns: int) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    dtype = dtype_of(kernel)
    dense = torch.randn(1030, 2050, device="cuda", generator=generator).to(dtype)
    dense *= torch.rand(dense.shape, device="cuda", generator=generator) < 0.1
    weight = FORMATS[registered()[kernel][1]].from_dense(dense.float())
    x = torch.randn(columns, 2050, device="cuda", generator=generator).to(dtype)
    parts = on_gpu(weight, dtype)
    run = torch.ops.sparselt.linear
    results = [run(x, parts, weight.meta(), None, None, None, None, kernel) for _ in range(4)]
    expected = x.double() @ dense.double().mT
    bound = 4 * 400 * 2.0**-24 * (x.double().abs() @ dense.double().abs().mT)
    bound += {2: 2.0**-7, 4: 0.0}[dtype.itemsize] * expected.abs()
    assert ((results[0].double() - expected).abs() <= bound).all()
    assert all(torch.equal(results[0], result) for result in results[1:])


@pytest.mark.parametrize("kernel", kernels("spmm"))
@pytest.mark.parametrize("columns", [1, 40])
def test_call_runs_in_a_graph_on_another_stream(kernel: str, columns: int) -> None:
    case = SpmmCase(70, 90, columns, density=0.3)
    dtype = dtype_of(kernel)
    weight = packed(kernel, case)
    parts, x = on_gpu(weight, dtype), gpu(case.x(), dtype)
    assert x is not None

    def call() -> Tensor:
        none = (None, None, None, None)
        return torch.ops.sparselt.spmm(x, parts, weight.meta(), *none, kernel)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()
    x.copy_(2 * x)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, call())


@pytest.mark.parametrize("op", ["spmm", "conv2d"])
def test_functional_operators_take_cuda_tensors(op: str) -> None:
    if op == "spmm":
        case = SpmmCase(20, 30, 9)
        y = ops.spmm(case.weight().to("cuda"), case.x().cuda(), case.bias().cuda(), lower=0.0)
        assert_close(case, y.cpu(), reference.spmm, case.weight(), case.x(), case.bias(), lower=0.0)
    else:
        conv = ConvCase(2, 4, 6, (9, 9), (3, 3), padding=(1, 1))
        y = ops.conv2d(conv.x().cuda(), conv.weight().to("cuda"), **conv.options())
        assert_close(conv, y.cpu(), reference.conv2d, conv.x(), conv.weight(), **conv.options())


def test_mixed_devices_and_types_are_refused() -> None:
    case = SpmmCase(5, 6, 7)
    weight = case.weight()
    parts = on_gpu(weight, torch.float32)
    none = (None, None, None, None, "csr")
    with pytest.raises(RuntimeError, match="expected a tensor on device"):
        torch.ops.sparselt.spmm(case.x().cuda(), list(weight.parts()), weight.meta(), *none)
    with pytest.raises(RuntimeError, match="dtype"):
        torch.ops.sparselt.spmm(case.x().cuda().half(), parts, weight.meta(), *none)
    with pytest.raises(RuntimeError, match="expected a CUDA kernel"):
        torch.ops.sparselt.spmm(case.x().cuda(), parts, weight.meta(), *none[:-1], "no_such")


def test_every_device_runs_its_own_tensors() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    case = SpmmCase(20, 30, 9)
    x, weight = case.x().to("cuda:1"), case.weight().to("cuda:1")
    none = (None, None, None, None, "csr")
    y = torch.ops.sparselt.spmm(x, list(weight.parts()), weight.meta(), *none)
    assert y.device == x.device
    assert_close(case, y.cpu(), reference.spmm, case.weight(), case.x())
