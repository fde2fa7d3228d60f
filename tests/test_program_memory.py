# SPDX-License-Identifier: Apache-2.0
"""A program keeps no dense weights of layers that run sparse, and can still be planned again."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from networks import input_for, make, prune_randomly
from torch import nn

import sparselt
from sparselt.plan import DENSE
from sparselt.shelf import Shelf

# Compiles a network of 128 MiB of weights, 5 % of them kept, and lets go of the model.
MEASURE = """
import gc, json
import torch, sparselt
from torch import nn
torch.set_num_threads(1)
page = 4096
def resident():
    gc.collect()
    return int(open("/proc/self/statm").read().split()[1]) * page
def model():
    torch.manual_seed(0)
    layers = [nn.Linear(4096, 4096) for _ in range(2)]
    for layer in layers:
        layer.weight.data.mul_(torch.rand(4096, 4096) < 0.05)
    return nn.Sequential(*layers).eval()
# What the first compilation of a process imports is not the weights'.
x = torch.randn(8, 4096)
sparselt.compile(nn.Sequential(nn.Linear(4096, 8)), x)(x)
empty = resident()
dense = model()
want = dense(x).detach()
loaded = resident()
program = sparselt.compile(dense, x)
del dense
compiled = resident()
again = program(torch.cat([x, x]))
right = torch.allclose(program(x), want, rtol=1e-3, atol=1e-4)
right = right and torch.allclose(again[8:], want, rtol=1e-3, atol=1e-4)
kernels = [row.kernel for row in sparselt.explain(program)]
print(json.dumps({"dense": loaded - empty, "compiled": compiled - empty,
                  "planned again": resident() - empty, "right": right, "kernels": kernels}))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_a_program_takes_a_fraction_of_the_dense_model_in_memory():
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["right"]
    assert DENSE not in found["kernels"], found
    # Packed values and indices are 10 % of the dense weights, the bits to rebuild them 8 %.
    assert found["dense"] > 100e6
    assert found["compiled"] < 0.4 * found["dense"], found
    assert found["planned again"] < 0.4 * found["dense"], found


def test_weights_come_back_bit_for_bit_when_another_size_is_planned(monkeypatch):
    monkeypatch.setattr(
        "sparselt.tune.measure", lambda calls, **_: {c: i for i, c in enumerate(reversed(calls))}
    )
    torch.set_num_threads(1)
    model = make("residual")
    program = sparselt.compile(model, input_for("residual", 2))
    assert any(p.numel() == 0 for p in program._prepared.parameters())
    for batch in (1, 5, 40):
        x = input_for("residual", batch)
        torch.testing.assert_close(program(x), model(x).detach(), rtol=1e-3, atol=1e-4)
    x = torch.randn(2, 3, 21, 23)
    torch.testing.assert_close(program(x), model(x).detach(), rtol=1e-3, atol=1e-4)
    with program._shelf.out():
        for got, want in zip(program._prepared.parameters(), model.parameters(), strict=True):
            assert torch.equal(got, want)


def test_a_weight_that_the_graph_reads_itself_stays_whole():
    shelf = Shelf()
    weight = prune_randomly(nn.Linear(64, 64)).weight.detach()
    before = copy.deepcopy(weight)
    shelf.put(weight)
    assert weight.numel() == 0
    with shelf.out():
        assert torch.equal(weight, before)
        shelf.keep([weight])
    assert torch.equal(weight, before)


def test_a_loaded_program_lets_its_dense_weights_go_too(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "sparselt.tune.measure", lambda calls, **_: {c: i for i, c in enumerate(reversed(calls), 1)}
    )
    sparselt.compile(make("residual"), input_for("residual", 2)).save(tmp_path / "p.safetensors")
    program = sparselt.load_program(tmp_path / "p.safetensors")
    empty = [t for t in program._families[0].captured.constants if t.numel() == 0]
    assert len(empty) >= 5
    assert all(t._base is None and t.untyped_storage().nbytes() == 0 for t in empty)


def test_what_is_small_or_full_is_not_put_away():
    shelf = Shelf()
    for tensor in (torch.zeros(4, 4), torch.ones(64, 64), torch.zeros(64, 8).t()):
        shape = tensor.shape
        shelf.put(tensor)
        assert tensor.shape == shape
