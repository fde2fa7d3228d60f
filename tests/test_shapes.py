# SPDX-License-Identifier: Apache-2.0
"""The shapes told by rules are those that torch tells, and it is asked where there is no rule."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from networks import NETWORKS, input_for, make
from torch import fx, nn
from torch.utils import _pytree as pytree

import sparselt
from sparselt import shapes
from sparselt.capture import capture

aten = torch.ops.aten
X = torch.zeros(2, 4, 8, 8)
ROWS = torch.zeros(2, 6, 8)

# Calls on tensors, and whether a rule tells their shape.
CALLS: list[tuple[Any, tuple[Any, ...], bool]] = [
    (aten.conv2d.default, (X, torch.zeros(6, 2, 3, 2), torch.zeros(6), [2], [1, 0], [1], 2), True),
    (aten.conv2d.padding, (X, torch.zeros(6, 4, 3, 3), None, [1, 1], "same"), True),
    (aten.conv2d.padding, (X, torch.zeros(6, 4, 3, 3), None, [2, 2], "valid"), True),
    (aten.conv1d.default, (ROWS, torch.zeros(5, 6, 3), None, [2], [1], [2]), True),
    (aten.conv2d.default, (X[0], torch.zeros(6, 4, 3, 3)), False),
    (aten.linear.default, (ROWS, torch.zeros(3, 8), torch.zeros(3)), True),
    (aten.addmm.default, (torch.zeros(3), ROWS[0], torch.zeros(8, 3)), True),
    (aten.matmul.default, (X, torch.zeros(4, 8, 3)), True),
    (aten.matmul.default, (ROWS, torch.zeros(8)), False),
    (aten.add.Tensor, (X, torch.zeros(4, 1, 8)), True),
    (aten.mul.Tensor, (2.0, ROWS), True),
    (aten.add_.Tensor, (X, torch.zeros(1, 8)), True),
    (aten.max_pool2d.default, (X, [3, 3], [2, 2], [1, 1]), True),
    (aten.max_pool2d.default, (X, [3, 3], [2, 2], [1, 1], [1, 1], True), False),
    (aten.avg_pool2d.default, (X, [2, 2]), True),
    (aten.adaptive_avg_pool2d.default, (X, [3, 1]), True),
    (aten.mean.dim, (X, [-1, 2], True), True),
    (aten.mean.dim, (X, [-1, 2]), True),
    (aten.mean.default, (X,), False),
    (aten.layer_norm.default, (ROWS, [6, 8], torch.zeros(6, 8)), True),
    (aten.batch_norm.default, (X, *[torch.zeros(4)] * 4, False, 0.1, 1e-5, True), True),
    (aten.softmax.int, (ROWS, -1), True),
    (aten.softmax.int, (ROWS, -1, torch.float64), False),
    (aten.scaled_dot_product_attention.default, (X, X, torch.zeros(2, 4, 8, 5)), True),
    (aten.flatten.using_ints, (X, 1), True),
    (aten.view.default, (X, [2, -1, 2]), True),
    (aten.permute.default, (X, [3, 0, 2, 1]), True),
    (aten.expand.default, (torch.zeros(1, 4), [3, -1]), True),
    (aten.select.int, (X, 1, -1), True),
    (aten.chunk.default, (ROWS, 4, 1), True),
    (aten.split.Tensor, (ROWS, 4, 1), True),
    (aten.clamp.default, (X, 0, 6), True),
    (aten.cumsum.default, (X, 1), False),
    (aten.relu.default, (torch.zeros(3, dtype=torch.float64),), False),
    (aten.cat.default, ([X, torch.zeros(2, 3, 8, 8)], -3), True),
]


def _called(target: Any, args: tuple[Any, ...]) -> tuple[fx.GraphModule, list[Any]]:
    """A graph of one call, whose tensors are its inputs."""
    graph = fx.Graph()
    tensors = [x for x in pytree.tree_leaves(args) if isinstance(x, torch.Tensor)]
    nodes = {id(x): graph.placeholder(f"x{i}") for i, x in enumerate(tensors)}
    given = pytree.tree_map(lambda x: nodes.get(id(x), x), args)
    graph.output((graph.call_function(target, given),))
    return fx.GraphModule({}, graph), tensors


def _told(module: fx.GraphModule) -> list[Any]:
    values = [node.meta["val"] for node in module.graph.nodes if node.op.startswith("call_")]
    return [
        [(tuple(y.shape), y.dtype, y.device) for y in pytree.tree_leaves(value)] for value in values
    ]


@pytest.mark.parametrize(("target", "args", "known"), CALLS, ids=lambda x: str(x)[:40])
def test_a_rule_tells_what_torch_computes(target, args, known, monkeypatch):
    module, inputs = _called(target, args)
    asked = []
    monkeypatch.setattr(shapes, "_by_torch", lambda *given: asked.append(given))
    shapes.propagate(module, inputs)
    assert bool(asked) is not known
    if known:
        got = pytree.tree_leaves(module(*inputs))
        assert _told(module) == [[(tuple(y.shape), y.dtype, y.device) for y in got]]


@pytest.mark.parametrize(
    ("target", "args"),
    [
        (aten.linear.default, (ROWS, torch.zeros(3, 7))),
        (aten.conv2d.default, (X, torch.zeros(6, 3, 3, 3))),
        (aten.conv2d.default, (X, torch.zeros(6, 4, 9, 9))),
        (aten.add_.Tensor, (torch.zeros(1, 8), X)),
        (aten.batch_norm.default, (X, *[torch.zeros(3)] * 4, False, 0.1, 1e-5, True)),
        (aten.cat.default, ([X, torch.zeros(2, 3, 8, 7)], 1)),
        (aten.layer_norm.default, (ROWS, [6])),
        (aten.view.default, (X, [3, -1])),
    ],
    ids=lambda x: str(x)[:40],
)
def test_what_does_not_fit_is_refused_as_torch_does(target, args):
    module, inputs = _called(target, args)
    with pytest.raises(Exception, match=r"\S"):
        shapes.propagate(module, inputs)


@pytest.mark.parametrize("name", sorted(NETWORKS.keys() - {"branching"}))  # is not captured
def test_rules_and_torch_agree_on_whole_networks(name):
    x = input_for(name, 2)
    captured = capture(make(name).eval(), (x,), {})
    inputs = [*captured.constants, x]
    shapes.propagate(captured.module, inputs)
    by_rules = _told(captured.module)
    with torch.no_grad():
        shapes._by_torch(captured.module, inputs)
    assert by_rules == _told(captured.module)


def test_loading_a_program_imports_nothing_of_torchs_compiler(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
    model = nn.Sequential(model, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    sparselt.compile(model, torch.ones(1, 3, 8, 8)).save(tmp_path / "p.safetensors")
    code = (
        "import sys, torch, sparselt;"
        "sparselt.load_program(sys.argv[1])(torch.ones(1, 3, 8, 8));"
        "print([x for x in ('sympy', 'torch._dynamo', 'torch._inductor') if x in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "p.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
