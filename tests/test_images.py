# SPDX-License-Identifier: Apache-2.0
"""Batches that run with the images innermost: right results, whatever meets them on the way."""

from __future__ import annotations

import math

import pytest
import torch
from native_calls import assert_as_exact_as_torch, segments_of
from networks import prune_randomly
from torch import Tensor, nn

import sparselt
from sparselt.image_rules import plan_in_images
from sparselt.images import IMAGES
from sparselt.ops import kernels
from sparselt.plan import DENSE, Facts, Plan
from sparselt.rules import block_for

ABLE = [k for k in kernels() if k.usable and k.op in ("panel", "code")]


@pytest.fixture(autouse=True)
def threads_as_before(fixed_threads):
    pass


def choose_images(monkeypatch, kernel=None) -> None:
    """Puts every batch to the choice, which is for images, with one kernel or by rule."""
    monkeypatch.setattr("sparselt.family.cache_bytes", lambda: 0)
    monkeypatch.setattr("sparselt.tune.glance", lambda *_: None)
    best = ("in parts", "images innermost")
    monkeypatch.setattr(
        "sparselt.tune.measure",
        lambda calls, **_: {c: float(c not in best) + 99 * (c == DENSE) for c in calls},
    )
    if kernel is None:
        return

    def plan(facts: Facts, known) -> Plan:
        return Plan(kernel.name, kernel.format, "forced", block=block_for(facts, kernel))

    monkeypatch.setattr("sparselt.rules._BLOCK_COLS", 24)
    monkeypatch.setattr("sparselt.rules._CODE_BLOCK_COLS", 24)
    monkeypatch.setattr("sparselt.tune.plan_in_images", plan)


def native_of(program, samples: Tensor):
    """The native program for these samples."""
    (segment,) = segments_of(program)
    return segment.program_for([samples]).native


class Mixed(nn.Module):
    """Filters, strides and borders of all kinds, two residual sums, pools and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 5, stride=2, padding=2)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.same = nn.Conv2d(8, 8, 3, padding=1)
        self.far = nn.Conv2d(8, 8, (3, 5), padding=(2, 2), dilation=(2, 1))
        self.down = nn.Conv2d(8, 20, 3, stride=(2, 3), padding=1)
        self.short = nn.Conv2d(8, 20, 1, stride=(2, 3))
        self.mean = nn.AvgPool2d(2, 1, 1, count_include_pad=False)
        self.head = nn.Linear(20, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.first(x)))
        x = torch.relu(self.far(torch.relu(self.same(x))) + x)
        x = nn.functional.silu(self.down(x) + self.short(x))
        return self.head(self.mean(x).mean((2, 3)))


@pytest.mark.parametrize("kernel", ABLE, ids=lambda kernel: kernel.name)
def test_every_kernel_computes_images(kernel, monkeypatch):
    choose_images(monkeypatch, kernel)
    model = prune_randomly(Mixed(), 0.4)
    x = torch.randn(32, 3, 31, 26, generator=torch.Generator().manual_seed(1))
    program = sparselt.compile(model, x)
    assert [p.together for p in program._families[0].planned.values()] == [IMAGES]
    native = native_of(program, x[:IMAGES])
    # All but the input and the output stay as they are.
    assert (native.num_in_images, native.num_turns) == (native.num_steps, 2)
    for count in (32, 31, 26, 18, 17, 10):
        assert_as_exact_as_torch(program(x[:count]), model, x[:count])


def test_any_number_of_threads_gives_the_same_bits(monkeypatch):
    choose_images(monkeypatch)
    model = prune_randomly(Mixed(), 0.4)
    x = torch.randn(48, 3, 20, 21, generator=torch.Generator().manual_seed(1))
    program = sparselt.compile(model, x)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        (segment,) = segments_of(program)
        made = segment.program_for([x[:IMAGES]])
        made.native.set_parallel(True)
        for made.apart in (False, True):
            results.append(program(x))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("size", [(64, 64), (56, 55), (1, 50)], ids=str)
def test_the_mean_of_a_large_map_is_no_one_long_sum(size, monkeypatch):
    choose_images(monkeypatch)
    layer = nn.Conv2d(2, 18, 1, bias=False)
    with torch.no_grad():
        layer.weight.zero_()[:, 0] = 1.0
    model = nn.Sequential(layer, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    # Equal values are rounded the same way at each step of one sum: up to 680 times 2^-24 here.
    x = torch.full((IMAGES, 2, *size), 0.7)
    program = sparselt.compile(model, x)
    native = native_of(program, x)
    assert native.num_in_images == native.num_steps
    wanted = float(x[0, 0, 0, 0])
    roundings = 2 * math.ceil(math.sqrt(math.prod(size))) + 2
    torch.testing.assert_close(
        program(x).double(),
        torch.full((IMAGES, 18), wanted, dtype=torch.float64),
        rtol=roundings * 2.0**-24,
        atol=0.0,
    )


class Meeting(nn.Module):
    """Values that both kinds of steps meet, one of them a result."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 6, 3, padding=1)
        self.grouped = nn.Conv2d(6, 6, 3, padding=1, groups=3)
        self.second = nn.Conv2d(12, 5, 3)
        self.head = nn.Linear(5 * 4 * 3, 9)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.relu(self.first(x))
        z = self.second(torch.cat([y, self.grouped(y)], 1))
        return self.head(z.flatten(1)), y


def test_other_steps_find_values_as_in_torch(monkeypatch):
    choose_images(monkeypatch)
    model = prune_randomly(Meeting(), 0.4)
    x = torch.randn(20, 4, 6, 5, generator=torch.Generator().manual_seed(1))
    program = sparselt.compile(model, x)
    assert native_of(program, x[:IMAGES]).num_in_images >= 2
    assert_as_exact_as_torch(program(x), model, x)


def test_an_infinite_value_reaches_the_rows_that_use_it_alone(monkeypatch):
    choose_images(monkeypatch)
    model = prune_randomly(nn.Sequential(nn.Conv2d(3, 9, 3, padding=1), nn.Conv2d(9, 8, 3)), 0.3)
    x = torch.randn(16, 3, 9, 8, generator=torch.Generator().manual_seed(1))
    program = sparselt.compile(model, x)
    x[3, 1, 4, 4] = torch.inf
    (planned,) = program._families[0].planned.values()
    assert planned.together == IMAGES
    got = program(x)
    expected = torch.cat([program(image[None]) for image in x])
    assert expected[3].isfinite().any()
    assert not expected[3].isfinite().all()
    torch.testing.assert_close(got, expected, equal_nan=True)


def test_the_choice_is_saved(tmp_path, monkeypatch):
    choose_images(monkeypatch)
    x = torch.randn(16, 3, 12, 13)
    program = sparselt.compile(prune_randomly(Mixed(), 0.4), x)
    program.save(tmp_path / "p.safetensors")
    monkeypatch.setattr("sparselt.tune.measure", lambda *_, **__: pytest.fail("timed anew"))
    loaded = sparselt.load_program(tmp_path / "p.safetensors")
    assert [p.together for p in loaded._families[0].planned.values()] == [IMAGES]
    assert torch.equal(loaded(x), program(x))
    assert len(loaded.profile(x, runs=1)) > 3


def test_layers_are_planned_by_rule():
    facts = Facts("conv2d", (32, 16, 3, 3), nnz=500)
    assert plan_in_images(facts, kernels()).format in ("sell", DENSE)
    blocks = Facts("conv2d", (32, 16, 3, 3), nnz=480, block=(4, 1))
    assert plan_in_images(blocks, kernels()).format in ("bsell", DENSE)
    grouped = Facts("conv2d", (32, 16, 3, 3), nnz=500, groups=2)
    assert plan_in_images(grouped, kernels()).is_dense
    assert plan_in_images(Facts("linear", (8, 8), nnz=64), kernels()).is_dense
