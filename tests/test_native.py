# SPDX-License-Identifier: Apache-2.0
"""Native programs: what they compute, where their values lie, and when torch runs instead."""

from __future__ import annotations

import copy
import random
import threading

import pytest
import torch
from networks import NETWORKS, input_for, make, prune_randomly
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import sparselt
from sparselt import dynamo
from sparselt.extension import plan_memory
from sparselt.native import SEGMENT, Segment, SegmentProgram
from sparselt.plan import DENSE

LINE = 16  # floats


@pytest.fixture(autouse=True)
def always_sparse(fixed_threads, monkeypatch):
    monkeypatch.setattr(
        "sparselt.tune.measure",
        lambda calls, **_: {c: 100.0 if c == DENSE else float(i) for i, c in enumerate(calls)},
    )


def segments_of(program) -> list[Segment]:
    (planned, *_) = program._families[0].planned.values()
    return [node.meta[SEGMENT] for node in planned.module.graph.nodes if SEGMENT in node.meta]


def compiled(model: nn.Module, x: Tensor):
    """The program, and how often a segment of it has run in torch."""
    program = sparselt.compile(model, x)
    in_torch: list[int] = []
    for segment in segments_of(program):
        run = segment.torch.forward
        segment.torch.forward = lambda *v, run=run: (in_torch.append(1), run(*v))[1]
    return program, in_torch


def assert_as_exact_as_torch(got: object, model: nn.Module, x: Tensor) -> None:
    """At most four times as far from the float64 result as torch's float32 result is, by maximum
    norm, and no closer than a few roundings is asked for."""
    given = x.double() if x.is_floating_point() else x
    with torch.no_grad():
        exact = pytree.tree_leaves(copy.deepcopy(model).double()(given))
        plain = pytree.tree_leaves(model(x.clone()))
    for a, b, c in zip(pytree.tree_leaves(got), plain, exact, strict=True):
        if not b.is_floating_point():
            continue
        assert a.shape == b.shape
        scale = float(c.abs().max())
        bound = max(4 * float((b - c).abs().max()), 1e-6 * scale)
        assert float((a - c).abs().max()) <= bound


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


class Steps(nn.Module):
    """One step between two layers, or after the first where it leaves no image."""

    def __init__(self, step) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.step = step
        self.second = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.step(self.first(x))
        return self.second(y) if y.dim() == 4 and y.shape[1] == 8 else y


STEPS = {
    "relu": F.relu,
    "relu6": F.relu6,
    "relu in place": lambda x: F.relu(x, inplace=True),
    "clamp": lambda x: torch.clamp(x, -0.3, 0.7),
    "hardtanh": F.hardtanh,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "hardswish": F.hardswish,
    "twice": lambda x: x + x,
    "square": lambda x: x * x,
    "max pool": lambda x: F.max_pool2d(x, 3, 2, 1),
    "max pool, uneven": lambda x: F.max_pool2d(x, (2, 3), (1, 2), (1, 0)),
    "max pool, wide": lambda x: F.max_pool2d(x, (1, 9), 3, (0, 4)),
    "mean pool": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "mean pool without padding": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "mean of all": lambda x: F.adaptive_avg_pool2d(x, 1),
    "windows along one axis": lambda x: F.adaptive_avg_pool2d(x, (None, 3)),
    "mean of quarters": lambda x: F.adaptive_avg_pool2d(x, (4, 3)),
    "mean with dims kept": lambda x: x.mean([2, 3], keepdim=True),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_native_and_right(name):
    torch.manual_seed(0)
    model = Steps(STEPS[name]).eval()
    model.first.weight.data.mul_(torch.rand(8, 3, 1, 1) < 0.7).mul_(6)
    model.second.weight.data.mul_(torch.rand(8, 8, 1, 1) < 0.5)
    program, in_torch = compiled(model, torch.randn(2, 3, 8, 9))
    assert len(segments_of(program)) == 1
    for shape in ((2, 3, 8, 9), (1, 3, 8, 9), (5, 3, 8, 9)):
        x = torch.randn(shape) * 3
        assert_as_exact_as_torch(program(x), model, x)
    assert not in_torch
    x[0, :, 3, 4] = torch.nan
    torch.testing.assert_close(program(x), model(x).detach(), equal_nan=True, rtol=1e-3, atol=1e-3)


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


def choose_samples(monkeypatch, best: str) -> None:
    """Puts every batch to the choice, lets no first look settle it, and decides it."""
    monkeypatch.setattr("sparselt.family.cache_bytes", lambda: 0)
    monkeypatch.setattr("sparselt.family._is_clearly_first", lambda *_: False)

    def measure(calls, **_):
        if best in calls:
            return {name: 1.0 if name == best else 2.0 for name in calls}
        return {c: 100.0 if c == DENSE else float(i) for i, c in enumerate(calls)}

    monkeypatch.setattr("sparselt.tune.measure", measure)


@pytest.mark.parametrize("best", ["as a batch", "one by one"])
def test_any_number_of_threads_gives_the_same_bits(best, monkeypatch):
    choose_samples(monkeypatch, best)
    model = make("residual")
    x = input_for("residual", 7)
    program = sparselt.compile(model, x)
    (planned,) = program._families[0].planned.values()
    assert planned.each == (best == "one by one")
    results = []
    # What one number of threads chose binds the others, whatever they would measure.
    other = "as a batch" if planned.each else "one by one"
    choose_samples(monkeypatch, other)
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        results.append(program(x))
        for segment in segments_of(program):
            made = segment.program_for([x[:1] if planned.each else x])
            made.native.set_parallel(True)
            for made.apart in (False, True):
                results.append(program(x))
    assert all(torch.equal(results[0], other) for other in results[1:])


class Mixing(nn.Module):
    """Samples that meet: the mean goes over pairs of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y + y.mean(0)


class Apart(nn.Module):
    """Two native stretches, a table that belongs to no sample, and two results."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(1, 8, 6, 5))
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.first(x) + self.table
        return self.second(torch.cumsum(y, 1)).mean([2, 3]), y


BATCHES = {
    "residual": (lambda: make("residual"), (6, 3, 17, 15), True),
    "mixing": (lambda: prune_randomly(Mixing(), 0.5), (4, 8), False),
    "apart": (lambda: prune_randomly(Apart(), 0.5), (3, 3, 6, 5), True),
}


@pytest.mark.parametrize("name", BATCHES)
def test_samples_run_one_by_one_only_where_that_comes_to_the_same(name, monkeypatch):
    choose_samples(monkeypatch, "one by one")
    made, shape, each = BATCHES[name]
    model, x = made(), torch.randn(shape)
    program = sparselt.compile(model, x)
    (planned,) = program._families[0].planned.values()
    assert planned.each == each
    assert ("one by one 1 us" in str(sparselt.explain(program))) == each
    for batch in (shape[0], shape[0] - 1):
        assert_as_exact_as_torch(program(x[:batch]), model, x[:batch])
    assert len(program.profile(x, runs=1)) > 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = pytree.tree_leaves(program(x))
    for a, b in zip(got, pytree.tree_leaves(model(x)), strict=True):
        torch.testing.assert_close(a.float(), b.detach(), rtol=0.1, atol=0.1)


def test_the_choice_between_samples_and_batch_is_saved(tmp_path, monkeypatch):
    choose_samples(monkeypatch, "one by one")
    x = input_for("residual", 6)
    program = sparselt.compile(make("residual"), x)
    program.save(tmp_path / "p.safetensors")
    choose_samples(monkeypatch, "as a batch")
    loaded = sparselt.load_program(tmp_path / "p.safetensors")
    assert [planned.each for planned in loaded._families[0].planned.values()] == [True]
    assert torch.equal(loaded(x), program(x))


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
