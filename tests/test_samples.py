# SPDX-License-Identifier: Apache-2.0
"""A batch runs at once or one sample after the other, with the same results."""

from __future__ import annotations

import pytest
import torch
from native_calls import assert_as_exact_as_torch, segments_of
from networks import input_for, make, prune_randomly
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import sparselt
from sparselt.plan import DENSE


@pytest.fixture(autouse=True)
def threads_as_before(fixed_threads):
    pass


def choose_samples(monkeypatch, best: str) -> None:
    """Puts every batch to the choice, lets no first look settle it, and decides it.

    Parts are single samples, which come first among them.
    """
    monkeypatch.setattr("sparselt.family.cache_bytes", lambda: 0)
    monkeypatch.setattr("sparselt.tune.glance", lambda *_: None)

    def measure(calls, **_):
        if best in calls:
            return {name: 1.0 if name == best else 2.0 for name in calls}
        return {c: 100.0 if c == DENSE else float(i) for i, c in enumerate(calls)}

    monkeypatch.setattr("sparselt.tune.measure", measure)


@pytest.mark.parametrize("best", ["as a batch", "in parts"])
def test_any_number_of_threads_gives_the_same_bits(best, monkeypatch):
    choose_samples(monkeypatch, best)
    model = make("residual")
    x = input_for("residual", 7)
    program = sparselt.compile(model, x)
    (planned,) = program._families[0].planned.values()
    assert planned.together == (best == "in parts")
    results = []
    # What one number of threads chose binds the others, whatever they would measure.
    other = "as a batch" if planned.together else "in parts"
    choose_samples(monkeypatch, other)
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        results.append(program(x))
        for segment in segments_of(program):
            made = segment.program_for([x[:1] if planned.together else x])
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
    choose_samples(monkeypatch, "in parts")
    made, shape, each = BATCHES[name]
    model, x = made(), torch.randn(shape)
    program = sparselt.compile(model, x)
    (planned,) = program._families[0].planned.values()
    assert planned.together == each
    assert ("in parts 1 us" in str(sparselt.explain(program))) == each
    for batch in (shape[0], shape[0] - 1):
        assert_as_exact_as_torch(program(x[:batch]), model, x[:batch])
    assert len(program.profile(x, runs=1)) > 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = pytree.tree_leaves(program(x))
    for a, b in zip(got, pytree.tree_leaves(model(x)), strict=True):
        torch.testing.assert_close(a.float(), b.detach(), rtol=0.1, atol=0.1)


def test_the_choice_between_samples_and_batch_is_saved(tmp_path, monkeypatch):
    choose_samples(monkeypatch, "in parts")
    x = input_for("residual", 6)
    program = sparselt.compile(make("residual"), x)
    program.save(tmp_path / "p.safetensors")
    choose_samples(monkeypatch, "as a batch")
    loaded = sparselt.load_program(tmp_path / "p.safetensors")
    assert [planned.together for planned in loaded._families[0].planned.values()] == [1]
    assert torch.equal(loaded(x), program(x))


@pytest.mark.parametrize("best", ["as a batch", "in parts"])
def test_the_next_process_makes_the_same_choice_without_timing_it(best, monkeypatch):
    model, x = make("residual"), input_for("residual", 6)
    choose_samples(monkeypatch, best)
    first = sparselt.compile(model, x)
    choose_samples(monkeypatch, "in parts" if best == "as a batch" else "as a batch")
    again = sparselt.compile(model, x)
    for program in (first, again):
        (planned,) = program._families[0].planned.values()
        assert planned.together == (best == "in parts")
    assert torch.equal(first(x), again(x))


def test_nothing_drawn_to_choose_by_moves_the_users_generator(monkeypatch):
    choose_samples(monkeypatch, "in parts")
    model, x = make("residual"), input_for("residual", 6)
    state = torch.get_rng_state()
    program = sparselt.compile(model, x)
    program(x[:3])
    sparselt.convert(model)
    assert torch.equal(torch.get_rng_state(), state)
