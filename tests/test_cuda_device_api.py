# SPDX-License-Identifier: Apache-2.0
"""The public API on a GPU: moves, plans that are timed, programs as graphs, torch's 2:4 product.

What test_cuda_api.py, test_cuda_graph.py and test_cuda_semi_structured.py claim of a simulated
device. bench/cuda/run.sh runs this.
"""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_cuda_api import LAYERS, TYPES, assert_close, pruned
from test_cuda_device import READY
from torch import Tensor, nn

import sparselt
from sparselt import ops
from sparselt.cuda_graph import GraphedRun
from sparselt.errors import DeviceError, KernelError
from sparselt.formats import FORMATS
from sparselt.nn import SparseConv2d, SparseLinear
from sparselt.plan import SEMI_STRUCTURED

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not READY, reason="no CUDA device, or sparselt._C_cuda is not built"),
]
CUDA_FORMATS = ("csr", "bsr", "tile8", "bsr_nhwc")


def network() -> nn.Sequential:
    """Convolutions, a residual-free head and everything that is fused between."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 256),
        nn.ReLU(),
        nn.Linear(256, 10),
    ).eval()
    for layer in model:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            pruned(layer, 0.1)
    return model.requires_grad_(False)


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense float32 without TF32, and no times from another run."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setenv("SPARSELT_CACHE", "off")


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_layer_moves_runs_and_comes_back(name: str, dtype: torch.dtype) -> None:
    kind, dense, shape = LAYERS[name]
    layer, x = kind.from_dense(pruned(dense)), torch.randn(shape)
    want, kernel = dense(x), layer.kernel
    layer.to("cuda", dtype)
    assert_close(layer(x.to("cuda", dtype)), want, dtype)
    assert_close(copy.deepcopy(layer)(x.to("cuda", dtype)), want, dtype)
    if dtype != torch.bfloat16:  # which has rounded the weights
        with torch.autocast("cuda", torch.float16):
            assert_close(layer.float()(x.cuda()), want, torch.float16)
    assert layer.cpu().kernel == kernel


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_blocks_of_channels_run_over_channels_last(dtype: torch.dtype) -> None:
    dense = nn.Conv2d(64, 32, 3, padding=1).requires_grad_(False)
    kept = (torch.rand(2, 4, 3, 3) < 0.2).repeat_interleave(16, 0).repeat_interleave(16, 1)
    dense.weight.mul_(kept)
    layer, x = SparseConv2d.from_dense(dense).to("cuda", dtype), torch.randn(2, 64, 7, 7)
    assert layer.weight.format == "bsr_nhwc"
    y = layer(x.to("cuda", dtype))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close(y, dense(x), dtype)


@pytest.mark.parametrize("format", CUDA_FORMATS)
def test_packing_on_the_device_gives_what_the_cpu_gives(format: str) -> None:
    dense = pruned(nn.Linear(515, 130), 0.1).weight
    here, there = FORMATS[format].from_dense(dense), FORMATS[format].from_dense(dense.cuda())
    assert here.block == there.block
    for a, b in zip(here.parts(), there.parts(), strict=True):
        assert b.is_cuda
        assert torch.equal(a, b.cpu())
    there.validate(full=True)


@pytest.mark.parametrize("op", ["spmm", "linear", "conv2d"])
def test_operators_pass_every_check_of_torch(op: str) -> None:
    matrix = sparselt.pack(pruned(nn.Linear(40, 24)).weight.cuda())
    filters = sparselt.pack(pruned(nn.Conv2d(8, 12, 3)).weight.cuda())
    end = (None, None, 0.0, None, "csr")
    arguments = {
        "spmm": (torch.randn(40, 9).cuda(), list(matrix.parts()), matrix.meta(), *end),
        "linear": (torch.randn(9, 40).cuda(), list(matrix.parts()), matrix.meta(), *end),
        "conv2d": (
            torch.randn(2, 8, 9, 9).cuda(),
            list(filters.parts()),
            filters.meta(),
            None,
            None,
            (1, 1),
            (1, 1),
            (1, 1),
            1,
            *end[2:],
        ),
    }[op]
    found = torch.library.opcheck(getattr(torch.ops.sparselt, op).default, arguments)
    assert set(found.values()) == {"SUCCESS"}


def test_operator_neither_waits_nor_allocates_more_than_its_result() -> None:
    weight, x = (
        sparselt.pack(pruned(nn.Linear(512, 512)).weight.cuda()),
        torch.randn(64, 512).cuda(),
    )
    ops.linear(x, weight)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = ops.linear(x, weight)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # The result, and at most one workspace.
    assert torch.cuda.memory_stats()["allocation.all.allocated"] - before <= 2
    assert y.shape == (64, 512)


def test_errors_name_the_device_and_the_kernel() -> None:
    weight = sparselt.pack(torch.eye(4))
    with pytest.raises(DeviceError, match="weight: expected a tensor on cuda:0, as x is, got cpu"):
        ops.spmm(weight, torch.ones(4, 2).cuda())
    with pytest.raises(KernelError, match="got 'csr_spmm_scalar'"):
        ops.spmm(weight.to("cuda"), torch.ones(4, 2).cuda(), kernel="csr_spmm_scalar")
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        weight.to(f"cuda:{torch.cuda.device_count()}")


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_conversion_times_every_candidate_and_dense(dtype: torch.dtype) -> None:
    model, x = network(), torch.randn(4, 3, 16, 16)
    want = model(x)
    converted = sparselt.convert(model.to("cuda", dtype), x.to("cuda", dtype))
    for row in sparselt.explain(converted):
        tried = [c for c in row.plan.candidates if c.applies]
        assert all(c.us is not None and c.us > 0 for c in tried), row.plan.explain()
    assert_close(converted(x.to("cuda", dtype)), want, dtype)


def test_sanitizer_selection_of_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSELT_KERNEL", "csr_conv2d_cuda")
    model, x = network(), torch.randn(2, 3, 16, 16)
    want = model(x)
    program = sparselt.compile(model.cuda(), x.cuda())
    for _ in range(3):
        assert_close(program(x.cuda()), want)


@pytest.mark.parametrize("kernel", ["csr_conv2d_cuda", "csr_spmm_cuda", "dense", ""])
def test_program_replays_graphs_of_several_shapes(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSELT_KERNEL", kernel)
    model = network()
    program = sparselt.compile(copy.deepcopy(model).cuda(), torch.randn(2, 3, 16, 16).cuda())
    kept: list[tuple[Tensor, Tensor]] = []
    for batch in (2, 5, 2, 1, 5, 2, 1, 1):
        x = torch.randn(batch, 3, 16, 16)
        kept.append((program(x.cuda()), model(x)))
    for got, want in kept:
        assert_close(got, want)
    assert "launched as one CUDA graph" in str(sparselt.explain(program))
    runs = [run for run in program._routes.values() if isinstance(run, GraphedRun)]
    assert any(captured is not None for run in runs for captured in run._captured.values())
    with pytest.raises(DeviceError, match="input: expected a tensor on cuda:0, got cpu"):
        program(torch.randn(2, 3, 16, 16))


def test_replay_waits_for_nothing_on_the_host() -> None:
    x = torch.randn(2, 3, 16, 16).cuda()
    program = sparselt.compile(network().cuda(), x)
    for _ in range(3):
        program(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        program(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_threads_on_streams_of_their_own_get_their_own_results() -> None:
    model = network()
    program = sparselt.compile(copy.deepcopy(model).cuda(), torch.randn(2, 3, 16, 16).cuda())
    inputs = [torch.randn(2, 3, 16, 16) for _ in range(8)]
    wanted = [model(x) for x in inputs]

    def work(number: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            x = inputs[number].cuda()
            results = [program(x) for _ in range(50)]
            torch.cuda.current_stream().synchronize()
        for y in results:
            assert_close(y, wanted[number])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


def test_program_can_be_part_of_the_callers_graph() -> None:
    x = torch.randn(2, 3, 16, 16).cuda()
    program = sparselt.compile(network().cuda(), x)
    program(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = program(x)
    x.copy_(2 * x)
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(y, program(x))


def test_converted_module_can_be_captured_as_any_module() -> None:
    x = torch.randn(2, 3, 16, 16).cuda()
    model = sparselt.convert(network().cuda(), format="csr")
    want = model(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = model(x)
    graph.replay()
    torch.testing.assert_close(y, want)
    graphed = torch.cuda.make_graphed_callables(model, (x,))
    torch.testing.assert_close(graphed(x), want)


@pytest.mark.parametrize("backend", ["sparselt", "inductor"])
def test_reduced_overhead_of_torch_compile_gives_the_same(backend: str) -> None:
    model, inputs = network(), [torch.randn(2, 3, 16, 16) for _ in range(5)]
    there = copy.deepcopy(model).cuda()
    there = there if backend == "sparselt" else sparselt.convert(there, format="csr")
    fast = torch.compile(there, backend=backend, mode="reduce-overhead")
    with torch.inference_mode():
        results = [fast(x.cuda()).clone() for x in inputs]
    for y, x in zip(results, inputs, strict=True):
        assert_close(y, model(x))


@pytest.mark.parametrize("dtype", TYPES[1:], ids=str)
def test_two_of_four_runs_by_torchs_product(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    dense = nn.Linear(256, 128).requires_grad_(False)
    dense.weight.mul_((torch.rand(128, 64, 4).argsort(-1) < 2).view(128, 256))
    model, x = nn.Sequential(dense, nn.ReLU()), torch.randn(32, 256)
    want = model(x)
    model.to("cuda", dtype)
    converted = sparselt.convert(model, x.to("cuda", dtype), format=SEMI_STRUCTURED)
    row = sparselt.explain(converted)[0]
    assert row.kernel == SEMI_STRUCTURED, row.plan.explain()
    assert_close(converted(x.to("cuda", dtype)), want, dtype)
    assert torch.equal(converted.state_dict()["0.weight"], model[0].weight)
    assert_close(converted.cpu()(x.to(dtype)), want, dtype)


def test_every_device_runs_its_own_program() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    model, x = network(), torch.randn(2, 3, 16, 16)
    program = sparselt.compile(copy.deepcopy(model).to("cuda:1"), x.to("cuda:1"))
    layer = SparseLinear.from_dense(pruned(nn.Linear(48, 40))).to("cuda:1")
    for _ in range(3):
        y = program(x.to("cuda:1"))
        assert y.device.index == 1
        assert_close(y, model(x))
    assert layer(torch.randn(3, 48, device="cuda:1")).device.index == 1
