# SPDX-License-Identifier: Apache-2.0
"""Max pooling as maxima of shifted views: torch's result, where it applies and nowhere else."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import sparselt
from sparselt.errors import ShapeError
from sparselt.pooling import max_pool_step, shifted_max_pool

aten = torch.ops.aten


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_it_is_torchs_bit_for_bit(memory_format):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 13, 10)
    x[0, 0, 4, 4] = torch.nan
    x[0, 1, 3] = -torch.inf
    x = x.contiguous(memory_format=memory_format)
    checked = 0
    for kernel, stride in itertools.product([(2, 2), (3, 3), (2, 3), (5, 4)], [(1, 1), (2, 3)]):
        for padding in [(0, 0), (1, 1), (1, 0)]:
            want = F.max_pool2d(x, kernel, stride, padding)
            got = shifted_max_pool(x, kernel, stride, padding)
            assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))
            assert torch.equal(got.isnan(), want.isnan())
            checked += 1
    assert checked == 24


def test_an_input_that_no_window_fits_is_refused():
    with pytest.raises(ShapeError, match="at least 3 rows or columns"):
        shifted_max_pool(torch.ones(1, 1, 2, 8), (3, 3), (1, 1), (0, 0))


@pytest.mark.parametrize(
    ("arguments", "applies"),
    [
        (([2, 2], [2, 2]), True),
        (([3, 3], [2, 2], [1, 1]), True),
        (([2, 2], []), True),
        (([2, 2], [2, 2], [0, 0], [2, 2]), False),
        (([2, 2], [2, 2], [0, 0], [1, 1], True), False),
        (([1, 2], [2, 2]), False),
        (([9, 9], [2, 2]), False),
        (([2, 2], [2, 2], [2, 2]), False),
    ],
)
def test_it_applies_to_plain_windows_only(arguments, applies):
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.ones(1, 2, 8, 8)
    node = graph.call_function(aten.max_pool2d.default, (x, *arguments))
    step = max_pool_step(node)
    assert (step is not None) is applies
    if step is not None:
        assert torch.equal(step(x.meta["val"]), aten.max_pool2d.default(x.meta["val"], *arguments))


def test_integers_and_other_operations_are_left_alone():
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.ones(1, 2, 8, 8, dtype=torch.int64)
    assert max_pool_step(graph.call_function(aten.max_pool2d.default, (x, [2, 2]))) is None
    assert max_pool_step(graph.call_function(torch.relu, (x,))) is None


def test_a_program_pools_by_maxima_where_they_are_faster(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(
        "sparselt.tune.measure", lambda calls, **_: {c: float(c != "shifted") for c in calls}
    )
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(3, 2, 1), nn.ReLU()).eval()
    program = sparselt.compile(model, torch.randn(2, 3, 16, 16))
    for batch in (1, 2, 7):
        x = torch.randn(batch, 3, 16, 16)
        torch.testing.assert_close(program(x), model(x).detach())
    (planned, *_) = program._families[0].planned.values()
    steps = [n.target for n in planned.lowered.module.graph.nodes if n.op == "call_function"]
    assert torch.max_pool2d not in steps
    assert "max_pool2d (1)" in str(sparselt.explain(program))
