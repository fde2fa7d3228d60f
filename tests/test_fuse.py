# SPDX-License-Identifier: Apache-2.0
"""What may be fused with a layer, and what must not be."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from sparselt.fuse import BatchNorm, fold_batch_norm, follow, is_mutating
from sparselt.lowering import lower
from sparselt.nn import SparseLayer
from sparselt.tune import Tuner

WEIGHT = torch.randn(8, 8, 1, 1, generator=torch.Generator().manual_seed(0)) * (
    torch.rand(8, 8, 1, 1, generator=torch.Generator().manual_seed(1)) < 0.3
)
NORM = [torch.rand(8, generator=torch.Generator().manual_seed(i)) + 0.5 for i in range(4)]


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_a_folded_batch_norm_computes_the_same_and_keeps_zeros(affine, with_bias):
    conv, norm = nn.Conv2d(8, 8, 1, bias=with_bias), nn.BatchNorm2d(8, affine=affine).eval()
    conv.weight.data.copy_(WEIGHT)
    norm.running_mean.copy_(NORM[0])
    norm.running_var.copy_(NORM[1])
    folded = fold_batch_norm(
        conv.weight.detach(),
        conv.bias.detach() if with_bias else None,
        BatchNorm(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps),
    )
    x = torch.randn(2, 8, 5, 5, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(F.conv2d(x, *folded), norm(conv(x)), rtol=1e-5, atol=1e-6)
    assert torch.equal(folded[0] == 0, WEIGHT == 0)


def test_a_batch_norm_without_variance_is_not_folded():
    zeros = torch.zeros(8)
    assert fold_batch_norm(WEIGHT, None, BatchNorm(zeros, zeros, None, None, 0.0)) is None


def fused(function, *shapes: tuple[int, ...], density: float = 0.3) -> tuple[str, list[str]]:
    """Lowers `function(weight, x, ...)` forced to sparse; what was fused, and what is left.

    The result is compared with the function's own.
    """
    graph = fx.symbolic_trace(function)
    inputs = [
        torch.randn(shape, generator=torch.Generator().manual_seed(3 + i))
        for i, shape in enumerate(shapes)
    ]
    norms = [value.clone() for value in NORM] if "mean" in function.__code__.co_varnames else []
    values = dict(enumerate([WEIGHT.clone(), *norms]))
    lowered = lower(graph, values, [*values.values(), *inputs], Tuner("csr"))
    got = lowered.module(*values.values(), *[x.clone() for x in inputs])
    want = function(*values.values(), *[x.clone() for x in inputs])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert lowered.rows[0].format == "csr"
    reason = lowered.rows[0].reason.partition("; with ")[2]
    return reason, sorted(lowered.others)


X = (2, 8, 4, 4)


def conv(w, x):
    return F.conv2d(x, w)


CASES = {
    "relu": (lambda w, x: F.relu(conv(w, x)), [X], "clamp", []),
    "relu in place": (lambda w, x: conv(w, x).relu_(), [X], "clamp", []),
    "relu6": (lambda w, x: F.relu6(conv(w, x)), [X], "clamp", []),
    "hardtanh": (lambda w, x: F.hardtanh(conv(w, x), -0.1, 0.2), [X], "clamp", []),
    "clamp": (lambda w, x: conv(w, x).clamp(max=0.1), [X], "clamp", []),
    "crossed clamp": (lambda w, x: conv(w, x).clamp(0.3, -0.3), [X], "", ["clamp"]),
    "add": (lambda w, x, y: conv(w, x) + y, [X, X], "residual", []),
    "add from the left": (lambda w, x, y: y + conv(w, x), [X, X], "residual", []),
    "add in place": (lambda w, x, y: conv(w, x).add_(y), [X, X], "residual", []),
    "add and relu": (lambda w, x, y: F.relu(y + conv(w, x)), [X, X], "residual, clamp", []),
    "relu before add": (lambda w, x, y: y + F.relu(conv(w, x)), [X, X], "clamp", ["add"]),
    "two relus": (lambda w, x: F.relu(F.relu6(conv(w, x))), [X], "clamp", ["relu"]),
    "add broadcast": (lambda w, x, y: conv(w, x) + y, [X, (8, 1, 1)], "", ["add"]),
    "add number": (lambda w, x: conv(w, x) + 1.0, [X], "", ["add"]),
    "add scaled": (lambda w, x, y: torch.add(conv(w, x), y, alpha=2), [X, X], "", ["add"]),
    "add twice": (lambda w, x, y: conv(w, x) + y + x, [X, X], "residual", ["add"]),
    "another reads it": (
        lambda w, x: F.relu(c := conv(w, x)) * c,
        [X],
        "",
        ["mul", "relu"],
    ),
    "batch norm": (
        lambda w, mean, var, a, b, x: F.relu(F.batch_norm(conv(w, x), mean, var, a, b)),
        [X],
        "batch norm, clamp",
        [],
    ),
    "batch norm after relu": (
        lambda w, mean, var, a, b, x: F.batch_norm(F.relu(conv(w, x)), mean, var, a, b),
        [X],
        "clamp",
        ["batch_norm"],
    ),
    "batch norm and add": (
        lambda w, mean, var, a, b, x, y: F.batch_norm(conv(w, x), mean, var, a, b) + y,
        [X, X],
        "batch norm, residual",
        [],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_follows_a_layer_is_fused_only_where_the_result_is_the_same(name):
    function, shapes, reason, others = CASES[name]
    assert fused(function, *shapes) == (reason, others)


def test_an_addition_into_a_tensor_that_others_read_is_not_fused():
    def function(w, x, y):
        z = y * 2
        return z.add_(conv(w, x))

    assert fused(function, X, X)[0] == ""


def test_a_layer_does_not_move_across_a_change_of_its_input():
    def function(w, x, y):
        z = conv(w, x)
        x.mul_(3)
        return F.relu(z + x * y)

    assert fused(function, X, X)[0] == ""


def test_a_training_batch_norm_is_not_folded():
    def function(w, mean, var, a, b, x):
        return F.batch_norm(conv(w, x), mean.clone(), var.clone(), a, b, True)

    assert fused(function, X)[0] == ""


def test_the_batch_norm_of_a_linear_layer_needs_its_channels_last():
    for shape, folds in (((4, 6), True), ((4, 8, 6), False)):
        graph = fx.Graph()
        x, w = graph.placeholder("x"), graph.placeholder("w")
        linear = graph.call_function(F.linear, (x, w))
        linear.meta["val"] = torch.empty(*shape[:-1], 8)
        mean, var = graph.placeholder("mean"), graph.placeholder("var")
        norm = graph.call_function(F.batch_norm, (linear, mean, var))
        graph.output(norm)
        known = {mean: NORM[0], var: NORM[1]}
        fusion = follow(linear, known.get, channels_last=True)
        assert (fusion.batch_norm is not None) == folds


def test_mutation_is_recognised_and_doubt_counts_as_mutation():
    graph = fx.Graph()
    x = graph.placeholder("x")
    calls = {
        torch.relu: False,
        torch.relu_: True,
        operator.add: False,
        operator.iadd: True,
        operator.setitem: True,
        torch.ops.aten.add.Tensor: False,
        torch.ops.aten.add_.Tensor: True,
    }
    for target, mutates in calls.items():
        assert is_mutating(graph.call_function(target, (x, x))) == mutates, target
    assert is_mutating(graph.call_function(F.relu, (x,), {"inplace": True}))
    assert is_mutating(graph.call_function(torch.add, (x, x), {"out": x}))
    assert is_mutating(graph.call_method("mul_", (x, 2)))
    assert not is_mutating(graph.call_method("mul", (x, 2)))
    assert is_mutating(graph.call_module("unknown", (x,)))


def test_a_weight_that_the_graph_writes_to_is_not_packed():
    def function(w, x):
        w.mul_(2)
        return F.conv2d(x, w)

    graph = fx.symbolic_trace(function)
    x = torch.randn(X, generator=torch.Generator().manual_seed(0))
    lowered = lower(graph, {0: WEIGHT.clone()}, [WEIGHT.clone(), x], Tuner("csr"))
    assert not lowered.rows
    want = F.conv2d(x, 2 * WEIGHT)
    torch.testing.assert_close(lowered.module(WEIGHT.clone(), x), want)


def test_lowerings_of_one_graph_share_their_packed_weights():
    graph = fx.symbolic_trace(lambda w, x: F.relu(conv(w, x)))
    packed: dict[tuple[object, ...], SparseLayer] = {}
    for batch in (1, 9):
        x: Tensor = torch.ones(batch, 8, 4, 4)
        lower(graph, {0: WEIGHT}, [WEIGHT, x], Tuner("csr"), packed=packed)
    assert len(packed) == 1
