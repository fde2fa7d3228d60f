# SPDX-License-Identifier: Apache-2.0
"""Native programs: what they compute, where their values lie, and when torch runs instead."""

from __future__ import annotations

import contextlib
import random
import threading

import pytest
import torch
from native_calls import assert_as_exact_as_torch, compiled, segments_of
from networks import NETWORKS, input_for, make, prune_randomly
from torch import Tensor, nn
from torch.nn import functional as F

import sparselt
from sparselt import dynamo
from sparselt.extension import plan_memory
from sparselt.native import SegmentProgram
from sparselt.plan import DENSE

LINE = 16  # floats


@pytest.fixture(autouse=True)
def always_sparse(fixed_threads, monkeypatch):
    monkeypatch.setattr(
        "sparselt.tune.measure",
        lambda calls, **_: {c: 100.0 if c == DENSE else float(i) for i, c in enumerate(calls)},
    )


@pytest.mark.parametrize("name", [n for n in NETWORKS if n != "branching"])
@pytest.mark.parametrize("batch", [1, 3, 16])
def test_networks_are_as_exact_as_in_torch(name, batch):
    model = make(name)
    x = input_for(name, batch)
    program = sparselt.compile(model, input_for(name, 2))
    assert_as_exact_as_torch(program(x.clone()), model, x)


@pytest.mark.parametrize("name", ["residual", "perceptron"])
def test_a_network_of_known_steps_is_one_segment(name):
    program, in_torch = compiled(make(name), input_for(name, 2))
    (planned, *_) = program._families[0].planned.values()
    calls = [n for n in planned.module.graph.nodes if n.op.startswith("call_")]
    assert len(calls) == 1
    program(input_for(name, 4))
    assert not in_torch


class Between(nn.Module):
    """A step that only torch has, in the midst of others."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a = torch.relu(self.first(x))
        b = torch.cumsum(a, 2) * 0.1
        c = torch.relu(self.second(b)) + a
        return self.head(c.mean([2, 3])), a


def test_segments_and_torch_take_turns():
    model = prune_randomly(Between())
    program, in_torch = compiled(model, torch.randn(2, 3, 9, 7))
    assert len(segments_of(program)) == 2
    assert "cumsum (1)" in str(sparselt.explain(program))
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 9, 7)
        assert_as_exact_as_torch(program(x), model, x)
    assert not in_torch


class Joined(nn.Module):
    """Concatenations of fresh values, of an input, of one value twice, and one that is a result."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(n, 8, 3, padding=1) for n in (4, 12, 20))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values = [x]
        for conv in self.convs:
            values.append(torch.relu(conv(torch.cat(values, 1))))
        last = values[-1]
        return torch.cat([last, last, F.max_pool2d(values[1], 3, 1, 1)], 1), last


@pytest.mark.parametrize("batch", [1, 3])
def test_values_are_joined_in_place_or_by_copies(batch):
    model = prune_randomly(Joined(), 0.3)
    program, in_torch = compiled(model, torch.randn(2, 4, 6, 5))
    x = torch.randn(batch, 4, 6, 5)
    assert_as_exact_as_torch(program(x), model, x)
    assert not in_torch


class Separable(nn.Module):
    """A depthwise convolution between two others, with what can be fused to it."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, stride, 1, groups=8)
        self.second = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.depthwise(x)
        return self.second(F.relu6(y + x if y.shape == x.shape else y))


@pytest.mark.parametrize("stride", [1, 2])
def test_a_depthwise_convolution_is_native_with_its_sum_and_clamp(stride):
    torch.manual_seed(0)
    model = Separable(stride).eval()
    model.first.weight.data.mul_(torch.rand(8, 3, 1, 1) < 0.7).mul_(6)
    model.second.weight.data.mul_(torch.rand(8, 8, 1, 1) < 0.5)
    program, in_torch = compiled(model, torch.randn(2, 3, 9, 20))
    (segment,) = segments_of(program)
    (made,) = segment.programs.values()
    assert made.native.num_steps == 3
    for shape in ((2, 3, 9, 20), (1, 3, 33, 8)):
        x = torch.randn(shape)
        assert_as_exact_as_torch(program(x), model, x)
    assert not in_torch


class Normalised(nn.Module):
    """Batch norms that fold into no layer: first, of a value that is read again, and last."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1)
        self.norms = nn.ModuleList(map(nn.BatchNorm2d, (4, 8, 8)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(F.relu6(self.norms[0](x)))
        return self.norms[2](x + self.second(F.relu(self.norms[1](x), inplace=True)))


def test_batch_norms_that_fold_into_no_layer_are_native_with_their_clamp():
    torch.manual_seed(0)
    model = prune_randomly(Normalised().eval())
    model.norms[2].weight = model.norms[2].bias = None
    program, in_torch = compiled(model, torch.randn(2, 4, 9, 20))
    (segment,) = segments_of(program)
    (made,) = segment.programs.values()
    assert made.native.num_steps == 5
    assert "natively: batch_norm (3)" in str(sparselt.explain(program))
    for shape in ((2, 4, 9, 20), (1, 4, 5, 5)):
        x = torch.randn(shape)
        assert_as_exact_as_torch(program(x), model, x)
    assert not in_torch
    with torch.autocast("cpu"):
        assert program(x).shape == (1, 8, 5, 5)


def test_the_backend_of_torch_compile_runs_native_programs(monkeypatch):
    ran: list[int] = []
    run = SegmentProgram.__call__
    monkeypatch.setattr(SegmentProgram, "__call__", lambda *v: (ran.append(1), run(*v))[1])
    model = make("residual")
    fast = torch.compile(model, backend=dynamo.backend)
    with torch.inference_mode():
        for batch in (2, 5):
            x = input_for("residual", batch)
            fast(x)
            ran.clear()
            assert_as_exact_as_torch(fast(x), model, x)
            assert len(ran) == 1


@pytest.mark.parametrize(
    "moment",
    [
        contextlib.nullcontext,
        torch.inference_mode,
        lambda: torch.device("meta"),
        lambda: torch.autocast("cpu", torch.bfloat16),
    ],
    ids=["plain", "inference", "default device", "autocast"],
)
def test_a_network_of_one_program_is_right_whatever_the_moment(moment):
    model = make("residual")
    x = input_for("residual", 2)
    program = sparselt.compile(model, x)
    program(x)
    with torch.no_grad():
        wanted = model(x)
        inputs = {
            "plain": x,
            "with gradients": x.clone().requires_grad_(),
            "transposed": x.transpose(-1, -2).contiguous().transpose(-1, -2),
            "channels last": x.contiguous(memory_format=torch.channels_last),
        }
    for given in inputs.values():
        with moment():
            got = program(given)
        assert not got.requires_grad
        assert got.dtype in (torch.float32, torch.bfloat16)
        error = float((got.float() - wanted).abs().max())
        assert error <= (0.1 if got.dtype is torch.bfloat16 else 1e-5) * float(wanted.abs().max())


def test_the_straight_call_refuses_what_its_program_was_not_made_for(monkeypatch):
    program = sparselt.compile(make("residual"), input_for("residual", 2))
    x = input_for("residual", 2)
    program(x)
    made = program._straight[x.shape]
    assert torch.equal(made.straight(x), program(x))
    refused = [x.double(), x.to("meta"), x.to_sparse(), x.transpose(-1, -2)]
    assert [made.straight(other) for other in refused] == [None] * len(refused)
    with torch.autocast("cpu"):
        assert made.straight(x) is None
    monkeypatch.setattr(torch, "get_num_threads", lambda: made.threads + 1)
    assert made.straight(x) is None


def test_calls_share_one_arena_and_calls_at_once_have_one_each():
    model = make("residual")
    program = sparselt.compile(model, input_for("residual", 8))
    (segment,) = segments_of(program)
    program(input_for("residual", 8))
    before = segment.pool.allocations
    for _ in range(20):
        program(input_for("residual", 8))
    assert segment.pool.allocations == before
    inputs = [input_for("residual", 8) for _ in range(6)]
    with torch.no_grad():
        wanted = [model(x) for x in inputs]
    wrong: list[int] = []

    def work(own: int) -> None:
        for _ in range(30):
            if not torch.allclose(program(inputs[own]), wanted[own], rtol=1e-3, atol=1e-4):
                wrong.append(own)

    threads = [threading.Thread(target=work, args=(own,)) for own in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert segment.pool.allocations <= before + 6


def test_values_that_live_together_never_overlap():
    rng = random.Random(0)
    for _ in range(200):
        blocks = []
        for _ in range(rng.randint(1, 25)):
            first = rng.randint(0, 12)
            blocks.append(
                (rng.choice([0, 1, 15, 16, 17, 300, 1000]), first, first + rng.randint(0, 5))
            )
        offsets, total = plan_memory(blocks)
        for i, (floats, first, last) in enumerate(blocks):
            assert offsets[i] % LINE == 0
            assert offsets[i] + floats <= total
            for j in range(i):
                other, begin, end = blocks[j]
                if first <= end and begin <= last and floats and other:
                    apart = offsets[i] + floats <= offsets[j] or offsets[j] + other <= offsets[i]
                    assert apart, (blocks[i], blocks[j])


def test_values_that_do_not_live_together_share_memory():
    assert plan_memory([(160, 0, 1), (160, 2, 3), (96, 1, 2)]) == ([0, 0, 160], 256)


def test_a_tensor_changed_in_place_is_changed_for_all_who_read_it():
    model = make("in place")
    x = input_for("in place", 2)
    program = sparselt.compile(model, x)
    assert_as_exact_as_torch(program(x.clone()), model, x)
