# SPDX-License-Identifier: Apache-2.0
"""Programs on CUDA replay graphs: when, with what, and into whose memory.

Graphs are simulated: a replay calls again what was captured. Torch's own are met by
test_cuda_device.py.
"""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from simulated_cuda import SimulatedGraphs, simulated_cuda
from torch import Tensor, fx, nn

import sparselt
from sparselt import cuda_graph, dynamo
from sparselt.cuda_graph import GraphedRun, TorchGraphs
from sparselt.errors import DeviceError

CPU = torch.device("cpu")


def doubled(calls: list[int] | None = None) -> GraphedRun:
    """Doubles its first input; `calls` counts the calls of what is captured."""

    def run(leaves: list[Tensor]) -> tuple[Tensor, str]:
        if calls is not None:
            calls.append(1)
        return 2 * leaves[0], "kept"

    return GraphedRun(run, SimulatedGraphs(CPU), CPU)


def test_second_call_of_a_shape_captures_and_later_ones_replay() -> None:
    run = doubled()
    for n in range(4):
        y, other = run([torch.full((3,), float(n))])
        assert torch.equal(y, torch.full((3,), 2.0 * n))
        assert other == "kept"
    run([torch.ones(4)])
    turn = ["wait", "replay", "done"]
    assert run.graphs.log == ["wait", "capture", *turn, *turn, *turn]


def test_results_are_the_callers_own() -> None:
    run = doubled()
    run([torch.zeros(3)])
    first, x = run([torch.ones(3)])[0], torch.full((3,), 2.0)
    second = run([x])[0]
    assert torch.equal(first, torch.full((3,), 2.0))
    with torch.inference_mode():
        second.zero_()
    assert torch.equal(run([x])[0], torch.full((3,), 4.0))
    assert torch.equal(x, torch.full((3,), 2.0))


def test_shape_strides_type_and_numbers_tell_graphs_apart() -> None:
    run = doubled()
    x = torch.arange(6.0).view(2, 3)
    inputs = [[x], [x.T.contiguous().T], [x.half()], [x[:1]], [x, 1], [x, 2]]
    for leaves in (*inputs, *inputs):
        assert torch.equal(run(leaves)[0], 2 * leaves[0])
    assert run.graphs.log.count("capture") == len(inputs)


def test_graph_unused_longest_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graph, "_MOST_GRAPHS", 2)
    run = doubled()
    for size in (1, 1, 2, 2, 1, 3, 3, 1):
        run([torch.ones(size)])
    assert run.graphs.log.count("capture") == 3
    assert run.graphs.log.count("settle") == 1
    run([torch.ones(2)])
    run([torch.ones(2)])
    assert run.graphs.log.count("capture") == 4


def test_what_cannot_be_captured_runs_as_it_is() -> None:
    calls: list[int] = []
    run = doubled(calls)

    def refuse(call: object) -> None:
        raise RuntimeError("not permitted when stream is capturing\nmore")

    run.graphs.capture = refuse
    for n in range(3):
        assert torch.equal(run([torch.full((2,), float(n))])[0], torch.full((2,), 2.0 * n))
    assert len(calls) == 3
    assert run.note.endswith("not as one CUDA graph: not permitted when stream is capturing")


def test_caller_that_captures_gets_the_launches_themselves() -> None:
    run = doubled()
    run.graphs.busy = True
    for _ in range(3):
        assert torch.equal(run([torch.ones(2)])[0], torch.full((2,), 2.0))
    assert run.graphs.log == []


def test_input_of_another_device_is_refused() -> None:
    with pytest.raises(DeviceError, match="input: expected a tensor on cpu, got meta"):
        doubled()([torch.ones(2, device="meta")])


def test_threads_get_their_own_results() -> None:
    run = doubled()

    def work(number: int) -> bool:
        x = torch.full((500,), float(number))
        return all(torch.equal(run([x])[0], 2 * x) for _ in range(50))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))
    assert run.graphs.log.count("capture") == 1


def test_torch_warms_up_on_a_stream_of_its_own_and_captures_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log: list[str] = []

    class Stream:
        def __init__(self, name: str = "side") -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            log.append(f"{self.name} waits for {other.name}")

    @contextlib.contextmanager
    def within(stream: Stream):
        log.append(f"on {stream.name}")
        yield
        log.append(f"off {stream.name}")

    @contextlib.contextmanager
    def graph(made: object, **options: object):
        assert options == {
            "pool": "pool",
            "stream": side[0],
            "capture_error_mode": "thread_local",
        }
        log.append("begin")
        yield
        log.append("end")

    side: list[Stream] = []
    fake = SimpleNamespace(
        Stream=lambda: side.append(Stream()) or side[-1],
        current_stream=lambda device=None: Stream("current"),
        stream=within,
        graph=graph,
        graph_pool_handle=lambda: "pool",
        CUDAGraph=lambda: SimpleNamespace(replay="replay"),
        device=lambda device: contextlib.nullcontext(),
    )
    monkeypatch.setattr(torch, "cuda", fake)
    replay, result = TorchGraphs(torch.device("cuda", 0)).capture(lambda: log.append("call") or 7)
    assert (replay, result) == ("replay", 7)
    assert log == [
        "side waits for current",
        "on side",
        "call",
        "call",
        "off side",
        "current waits for side",
        "begin",
        "call",
        "end",
    ]


def test_compiled_program_replays_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 32))
    for layer in (model[0], model[3]):
        layer.weight.data.mul_(torch.rand(layer.weight.shape) < 0.1)
    inputs = [torch.randn(2, 3, 8, 8) for _ in range(3)]
    wanted = [model(x).detach() for x in inputs]
    monkeypatch.setenv("SPARSELT_KERNEL", "csr_spmm_cuda")
    with simulated_cuda(monkeypatch) as gpu:
        program = sparselt.compile(model.cuda(), inputs[0].cuda())
        explained = sparselt.explain(program)
        got = [program(x.cuda()).cpu() for x in inputs]
        assert program(torch.randn(5, 3, 8, 8).cuda()).shape == (5, 32)
        with pytest.raises(DeviceError, match="input: expected a tensor on cuda:0, got cpu"):
            program(inputs[0])
    assert [row.kernel for row in explained] == ["dense", "csr_spmm_cuda"]
    assert "launched as one CUDA graph" in "".join(explained.notes)
    assert set(gpu.launches) == {"csr_spmm_cuda"}
    for y, want in zip(got, wanted, strict=True):
        torch.testing.assert_close(y, want)


def backend_on_cuda(
    monkeypatch: pytest.MonkeyPatch, model: nn.Module, inputs: list[Tensor]
) -> tuple[list[Tensor], list[SimulatedGraphs]]:
    """What the backend gives for a model's graph on a simulated device, called by hand.

    Dynamo itself does not trace simulated tensors; it hands over a graph as here.
    """
    made: list[SimulatedGraphs] = []

    def graphs(device: torch.device) -> SimulatedGraphs:
        made.append(SimulatedGraphs(device))
        return made[-1]

    captured: list[tuple[fx.GraphModule, list[object]]] = []

    def keep(module: fx.GraphModule, example: list[object]) -> object:
        captured.append((module, example))
        return module.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=keep)(inputs[0])
    (module, example) = captured[0]
    own = [i for i, value in enumerate(example) if value is not inputs[0]]
    with simulated_cuda(monkeypatch), torch.no_grad():
        monkeypatch.setattr(cuda_graph, "TorchGraphs", graphs)
        there = [value.cuda() for value in example]
        run = dynamo.backend(module, there, mode="reduce-overhead")

        def call(x: Tensor) -> Tensor:
            args = [there[i] if i in own else x.cuda() for i in range(len(there))]
            return run(*args)[0].cpu()

        return [call(x) for x in inputs], made


def test_reduced_overhead_replays_with_the_models_own_tensors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16), nn.ReLU()).eval().requires_grad_(False)
    inputs = [torch.randn(4, 32) for _ in range(4)]
    got, (graphs,) = backend_on_cuda(monkeypatch, model, inputs)
    for y, x in zip(got, inputs, strict=True):
        torch.testing.assert_close(y, model(x))
    assert graphs.log.count("capture") == 1
    assert graphs.log.count("replay") == 3


def test_model_that_writes_to_its_buffers_is_not_recorded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.calls.add_(1)

    inputs = [torch.zeros(2)] * 4
    got, (graphs,) = backend_on_cuda(monkeypatch, Counting(), inputs)
    # Dynamo's own look at the model was the first call.
    assert [float(y[0]) for y in got] == [2.0, 3.0, 4.0, 5.0]
    assert "capture" not in graphs.log
