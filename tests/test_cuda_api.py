# SPDX-License-Identifier: Apache-2.0
"""The public API on CUDA tensors, with a simulated device (simulated_cuda.py) in place of a GPU.

What is claimed here is all that is Python: formats, plans, devices, types and errors. That the
kernels compute what they should is test_cuda_kernels.py's claim, and a GPU's test_cuda_device.py's.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from cuda_host import host
from simulated_cuda import Gpu, SimulatedTensor, simulated_cuda
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import sparselt
from sparselt import extension, ops
from sparselt.errors import DeviceError, DtypeError, KernelError
from sparselt.nn import SparseConv1d, SparseConv2d, SparseLinear

HALVES = (torch.float16, torch.bfloat16)
TYPES = (torch.float32, *HALVES)


def pruned(module: nn.Module, density: float = 0.2, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    with torch.no_grad():
        module.weight.normal_()
        module.weight.mul_(torch.rand(module.weight.shape) < density)
    return module.requires_grad_(False)


LAYERS = {
    "linear": (SparseLinear, nn.Linear(48, 40), (5, 48)),
    "conv1d": (SparseConv1d, nn.Conv1d(8, 12, 5, padding=2), (2, 8, 20)),
    "conv2d": (SparseConv2d, nn.Conv2d(8, 12, 3, stride=2, padding=1), (2, 8, 9, 9)),
}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    with simulated_cuda(monkeypatch) as found:
        yield found


def assert_close(got: Tensor, want: Tensor, dtype: torch.dtype = torch.float32) -> None:
    loose = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
    assert got.dtype is dtype
    torch.testing.assert_close(got.cpu().float(), want, rtol=loose, atol=loose)


# ---- moving ----


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    ("name", "format"),
    [*((name, f) for name in LAYERS for f in ("csr", "sell")), ("linear", "bsr")],
)
def test_layer_moves_to_a_kernel_of_the_device_and_back(
    gpu: Gpu, name: str, format: str, dtype: torch.dtype
) -> None:
    kind, dense, shape = LAYERS[name]
    layer = kind.from_dense(pruned(dense), format=format)
    x = torch.randn(shape)
    want, before = dense(x), (layer.kernel, layer.weight.format, layer.weight.block, layer.plan)
    layer.to("cuda:0", dtype)
    assert all(part.is_cuda for part in layer.weight.parts())
    assert layer.kernel in {k.name for k in ops.kernels() if k.device == "cuda"}
    assert layer.plan.reason.endswith("after planning, chosen by rule")
    assert_close(layer(x.to("cuda:0", dtype)), want, dtype)
    assert gpu.launches == [layer.kernel]
    *indices, values = layer.weight.parts()
    assert values.dtype is dtype
    assert not any(index.is_floating_point() for index in indices)
    layer.to("cpu", torch.float32)
    assert (layer.kernel, layer.weight.format, layer.weight.block, layer.plan) == before
    assert_close(layer(x), want if dtype == torch.float32 else layer.to_dense()(x))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_type_changes_on_the_device_and_the_kernel_with_it(gpu: Gpu, dtype: torch.dtype) -> None:
    layer = SparseLinear.from_dense(pruned(nn.Linear(48, 40))).cuda()
    short = {torch.float16: "f16", torch.bfloat16: "bf16"}[dtype]
    assert layer.to(dtype).kernel == f"csr_spmm_cuda_{short}"
    assert layer.float().kernel == "csr_spmm_cuda"
    assert layer.double().kernel == ""
    x = torch.randn(3, 48, dtype=torch.float64)
    torch.testing.assert_close(layer(x.cuda()).cpu(), layer.to_dense().cpu()(x))


def test_layer_for_few_columns_stays_one(gpu: Gpu) -> None:
    spmv = next(k.name for k in ops.kernels() if k.op == "spmv" and k.format == "sell" and k.usable)
    layer = SparseLinear.from_dense(pruned(nn.Linear(300, 40)), kernel=spmv)
    x = torch.randn(2, 300)
    want = layer(x)
    assert layer.cuda().weight.format == "tile8"
    assert_close(layer(x.cuda()), want)
    saved = layer.state_dict()
    assert {"weight.crow_indices", "weight.col_indices", "weight.values"} <= saved.keys()
    other = SparseLinear.from_dense(nn.Linear(300, 40), format="csr")
    other.load_state_dict({key: value.cpu() for key, value in saved.items()})
    assert_close(other(x), want)
    layer.load_state_dict(saved)
    assert layer.weight.format == "tile8"
    assert_close(copy.deepcopy(layer)(x.cuda()), want)
    assert layer.cpu().kernel == spmv


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_convolution_of_channel_blocks_runs_over_channels_last(
    gpu: Gpu, dtype: torch.dtype
) -> None:
    dense = nn.Conv2d(64, 32, 3, padding=1).requires_grad_(False)
    torch.manual_seed(0)
    kept = (torch.rand(2, 4, 3, 3) < 0.2).repeat_interleave(16, 0).repeat_interleave(16, 1)
    dense.weight.mul_(kept)
    layer, x = SparseConv2d.from_dense(dense).to("cuda:0", dtype), torch.randn(2, 64, 7, 7)
    assert (layer.weight.format, layer.weight.block) == ("bsr_nhwc", (16, 16))
    y = layer(x.to("cuda:0", dtype))
    assert_close(y, dense(x), dtype)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert gpu.launches == [layer.kernel]
    assert SparseConv2d.from_dense(dense.to("cuda:0", dtype)).kernel == layer.kernel


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_call_of_a_layer_asks_nothing_of_the_device(
    gpu: Gpu, name: str, dtype: torch.dtype
) -> None:
    kind, dense, shape = LAYERS[name]
    layer = nn.Sequential(kind.from_dense(pruned(dense)), nn.ReLU()).to("cuda:0", dtype)
    x = torch.randn(shape).to("cuda:0", dtype)
    gpu.asked.clear()
    layer(x)
    views = {"view", "unsqueeze", "squeeze", "_unsafe_view", "as_strided", "detach", "alias"}
    asked = {operator.split(".")[0] for operator in gpu.asked}
    assert asked <= {"linear", "conv2d", "relu"} | views


def test_tied_layers_move_together(gpu: Gpu) -> None:
    dense = pruned(nn.Linear(48, 48))
    model = nn.Sequential(dense, nn.Linear(48, 48))
    model[1].weight = dense.weight
    x = torch.randn(5, 48)
    converted = sparselt.convert(model, format="csr")
    want = converted(x)
    assert_close(converted.cuda()(x.cuda()), want)
    assert converted[0].weight is converted[1].weight
    assert gpu.launches == ["csr_spmm_cuda"] * 2
    assert_close(converted.cpu()(x), want)


def test_move_that_no_kernel_serves_is_refused_before_anything_moves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = SparseLinear.from_dense(pruned(nn.Linear(48, 40)))
    kernel = layer.kernel
    old = "it needs compute capability 8.0, device 0 has 7.5"
    with (
        simulated_cuda(monkeypatch, capabilities=(75, 90)),
        pytest.raises(KernelError, match=old),
    ):
        layer.cuda()
    assert (layer.kernel, layer.weight.device.type) == (kernel, "cpu")


def test_layer_moves_to_the_device_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = SparseLinear.from_dense(pruned(nn.Linear(48, 40))), torch.randn(5, 48)
    want = layer(x)
    with simulated_cuda(monkeypatch, capabilities=(75, 90, 86)) as gpu:
        layer.to("cuda:1")
        planned = layer.plan
        assert_close(layer(x.to("cuda:1")), want)
        assert layer(x.to("cuda:1")).device.index == 1
        with pytest.raises(DeviceError, match=r"on cuda:2, .* got cuda:1"):
            ops.linear(x.to("cuda:2"), layer.weight)
        layer.to("cuda:2")
        assert_close(layer(x.to("cuda:2")), want)
        assert layer.plan is planned, "what was planned on one device holds on another like it"
        with pytest.raises(KernelError, match=r"device 0 has 7\.5"):
            layer.to("cuda:0")
        assert layer.weight.device.index == 2
        dense = pruned(nn.Linear(48, 40)).to("cuda:1")
        assert SparseLinear.from_dense(dense)(x.to("cuda:1")).device.index == 1
        program = sparselt.compile(nn.Sequential(dense, nn.ReLU()), x.to("cuda:1"))
        for _ in range(3):
            assert program(x.to("cuda:1")).device.index == 1
        with pytest.raises(DeviceError, match="input: expected a tensor on cuda:1, got cuda:2"):
            program(x.to("cuda:2"))
    assert gpu.launches


# ---- functional operations ----


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("format", ["csr", "bsr", "tile8"])
def test_packed_on_the_device_a_weight_keeps_its_type_and_runs(
    gpu: Gpu, format: str, dtype: torch.dtype
) -> None:
    dense = pruned(nn.Linear(300, 40)).weight.to(dtype)
    weight = sparselt.pack(dense.cuda(), format=format)
    assert (weight.device.type, weight.dtype) == ("cuda", dtype)
    assert torch.equal(weight.to_dense().cpu(), dense.float())
    weight.validate(full=True)
    x, bias = torch.randn(7, 300).to(dtype), torch.randn(40).to(dtype)
    want = torch.relu(x.float() @ dense.float().T + bias.float())
    y = ops.linear(x.cuda(), weight, bias.cuda(), lower=0.0)
    torch.testing.assert_close(
        y.cpu().float(), want, rtol=2e-2, atol=2e-1 if dtype.itemsize == 2 else 1e-4
    )
    y = ops.spmm(weight, x.mT.cuda(), bias.cuda(), lower=0.0)
    torch.testing.assert_close(
        y.cpu().float().mT, want, rtol=2e-2, atol=2e-1 if dtype.itemsize == 2 else 1e-4
    )


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_convolutions_run_on_the_device(gpu: Gpu, dtype: torch.dtype) -> None:
    for name, call in (("conv1d", ops.conv1d), ("conv2d", ops.conv2d)):
        _, dense, shape = LAYERS[name]
        pruned(dense)
        x, weight = torch.randn(shape), sparselt.pack(dense.weight.to(dtype).cuda())
        bias = dense.bias.to("cuda:0", dtype)
        y = call(x.to("cuda:0", dtype), weight, bias, dense.stride, dense.padding)
        assert_close(y, dense(x), dtype)


def test_operands_of_other_devices_and_types_are_refused(gpu: Gpu) -> None:
    weight = sparselt.pack(torch.eye(4))
    there = weight.to("cuda:0")
    tiles = sparselt.pack(torch.ones(4, 4, 1, 1).cuda(), format="tile8")
    x = torch.ones(4, 2)
    with pytest.raises(DeviceError, match=r"weight: expected a tensor on cuda:0, as x is, got cpu"):
        ops.spmm(weight, x.cuda())
    with pytest.raises(DeviceError, match=r"weight: expected a tensor on cpu"):
        ops.spmm(there, x)
    with pytest.raises(DeviceError, match=r"bias: expected a tensor on cuda:0"):
        ops.spmm(there, x.cuda(), torch.ones(4))
    elsewhere = SimulatedTensor(x, torch.device("cuda", 1))
    with pytest.raises(DeviceError, match=r"weight: expected a tensor on cuda:1, .* got cuda:0"):
        ops.spmm(there, elsewhere)
    with pytest.raises(DtypeError, match=r"weight: expected torch.float16, as x is"):
        ops.spmm(there, x.cuda().half())
    with pytest.raises(DtypeError, match="float32, float16 or bfloat16"):
        ops.spmm(there, x.cuda().double())
    with pytest.raises(DtypeError, match="expected float32"):
        ops.spmm(weight, x.half())
    with pytest.raises(KernelError, match="expected one of csr_spmm_cuda, got 'csr_spmm_avx2'"):
        ops.spmm(there, x.cuda(), kernel="csr_spmm_avx2")
    with pytest.raises(KernelError, match=r"a format conv2d has in float32 on cuda \(.*csr"):
        ops.conv2d(x.view(1, 4, 2, 1).cuda(), tiles)
    with pytest.raises(DeviceError, match="CUDA kernels read other formats"):
        sparselt.pack(torch.eye(4).cuda(), format="sell")
    with pytest.raises(DeviceError, match="CUDA kernels read other formats"):
        sparselt.pack(torch.eye(4), format="sell").to("cuda:0")
    with pytest.raises(DtypeError, match="values: expected"):
        weight.to(dtype=torch.float16)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast_computes_in_its_type(gpu: Gpu, dtype: torch.dtype) -> None:
    dense = pruned(nn.Linear(48, 40))
    layer, x = SparseLinear.from_dense(dense).cuda(), torch.randn(5, 48)
    with torch.autocast("cuda", dtype):
        results = [
            layer(x.cuda()),
            layer(x.to("cuda:0", dtype)),
            ops.linear(x.cuda(), layer.weight, layer.bias),
        ]
    for y in results:
        assert_close(y, dense(x), dtype)
    assert len({*gpu.launches}) == 1


def test_public_api_runs_the_kernels_own_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    with simulated_cuda(monkeypatch, host()) as gpu:
        for kind, dense, shape in LAYERS.values():
            layer, x = kind.from_dense(pruned(dense)).cuda(), torch.randn(shape)
            assert_close(layer(x.cuda()), dense(x))
        weight = sparselt.pack(LAYERS["linear"][1].weight.half().cuda(), format="tile8")
        x = torch.randn(3, 48)
        y = ops.linear(x.cuda().half(), weight)
        assert_close(y, x.half().float() @ weight.to_dense().cpu().T, torch.float16)
    assert gpu.launches == [
        "csr_spmm_cuda",
        "csr_conv2d_cuda",
        "csr_conv2d_cuda",
        "tile8_spmm_cuda_f16",
    ]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_fake_tensors_tell_shape_type_device_and_layout(dtype: torch.dtype) -> None:
    matrix, filters = pruned(nn.Linear(48, 40)).weight, torch.ones(32, 16, 3, 3)
    matrices = [sparselt.pack(matrix, format=format) for format in ("csr", "bsr", "tile8")]
    layouts = {"csr": torch.contiguous_format, "bsr_nhwc": torch.channels_last}
    banks = {sparselt.pack(filters, format=format): layouts[format] for format in layouts}
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:

        def there(tensor: Tensor) -> Tensor:
            made = mode.from_tensor(tensor).to("cuda:0")
            return made.to(dtype) if made.is_floating_point() else made

        none = (None, None, None, None)
        for packed in matrices:
            parts, meta = [there(part) for part in packed.parts()], packed.meta()
            x = torch.empty(5, 48, device="cuda", dtype=dtype)
            y = torch.ops.sparselt.linear(x, parts, meta, *none, packed.name)
            assert (y.shape, y.dtype, y.device.type) == ((5, 40), dtype, "cuda")
            y = torch.ops.sparselt.spmm(x.mT, parts, meta, *none, packed.name)
            assert (y.shape, y.dtype, y.stride()) == ((40, 5), dtype, (5, 1))
        for packed, layout in banks.items():
            parts, meta = [there(part) for part in packed.parts()], packed.meta()
            end = (*none[:2], (1, 1), (1, 1), (1, 1), 1, *none[2:], packed.name)
            x = torch.empty(2, 16, 8, 9, device="cuda", dtype=dtype)
            y = torch.ops.sparselt.conv2d(x, parts, meta, *end)
            assert (y.shape, y.dtype, y.device.type) == ((2, 32, 8, 9), dtype, "cuda")
            assert y.is_contiguous(memory_format=layout)


# ---- without a GPU, or without the module ----


def test_registry_says_why_cuda_kernels_are_unusable() -> None:
    found = [kernel for kernel in ops.kernels() if kernel.device == "cuda"]
    assert found
    for kernel in found:
        built = extension._cuda is not None
        assert kernel.usable == (not kernel.reason)
        assert built or kernel.reason.startswith("sparselt was built without its CUDA module")


def test_build_without_cuda_says_so(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    # Undone here, before the fixture undoes its own.
    with monkeypatch.context() as patch:
        patch.setattr(extension, "_cuda", None)
        patch.setattr(extension, "_SERVED", extension.served())
        extension.kernels.cache_clear()
        weight = sparselt.pack(torch.eye(4)).to("cuda:0")
        with pytest.raises(KernelError, match="built without its CUDA module"):
            ops.spmm(weight, torch.ones(4, 2).cuda())
        layer = SparseLinear.from_dense(pruned(nn.Linear(48, 40)))
        with pytest.raises(KernelError, match="built without its CUDA module"):
            layer.cuda()
        assert layer.weight.device.type == "cpu"
