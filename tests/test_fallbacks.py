# SPDX-License-Identifier: Apache-2.0
"""Where torch runs instead: what has no native form gives the result that torch gives."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from native_calls import assert_as_exact_as_torch, compiled, segments_of
from networks import input_for, make, prune_randomly
from test_compile import assert_same
from test_native_steps import Steps
from torch import Tensor, nn
from torch.nn import functional as F

import sparselt
from sparselt import dynamo
from sparselt.plan import DENSE

pytestmark = pytest.mark.filterwarnings("ignore:The tensor attribute self.last:UserWarning")


@pytest.fixture(autouse=True)
def always_sparse(fixed_threads, monkeypatch):
    torch.set_num_threads(1)
    torch._dynamo.reset()
    monkeypatch.setattr(
        "sparselt.tune.measure",
        lambda calls, **_: {c: 100.0 if c == DENSE else float(i) for i, c in enumerate(calls)},
    )


# Steps, or variants of them, that only torch has: what it is called in the explanation.
IN_TORCH = {
    "another gelu": (lambda x: F.gelu(x, approximate="tanh"), "gelu"),
    "a sum with a factor": (lambda x: torch.add(x, x, alpha=2), "add"),
    "a broadcast product": (lambda x: x * x[:, :1], "mul"),
    "a bound that is a tensor": (lambda x: torch.clamp(x, min=torch.zeros(1)), "clamp"),
    "bounds that cross": (lambda x: x.clamp(1, -1), "clamp"),
    "a dilated max pool": (lambda x: F.max_pool2d(x, 2, 1, 0, 2), "max_pool2d"),
    "a max pool rounded up": (lambda x: F.max_pool2d(x, 3, 2, 1, 1, True), "max_pool2d"),
    "a max pool with places": (
        lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
        "max_pool2d_with_indices",
    ),
    "a mean pool rounded up": (lambda x: F.avg_pool2d(x, 3, 2, 1, True), "avg_pool2d"),
    "a mean pool over another": (lambda x: F.avg_pool2d(x, 2, divisor_override=3), "avg_pool2d"),
    "uneven windows": (lambda x: F.adaptive_avg_pool2d(x, (3, 5)), "adaptive_avg_pool2d"),
    "a mean over channels": (lambda x: x.mean(1, keepdim=True) + x, "mean"),
    "a mean over everything": (lambda x: x.mean() * x, "mean"),
    "a mean over no dimensions": (lambda x: x.mean([]) * x, "mean"),
    "a mean in double precision": (lambda x: x.mean([2, 3], dtype=torch.float64).float(), "mean"),
    "a number made a vector": (lambda x: torch.flatten(x.mean([0, 1, 2, 3])), "flatten"),
    "a number's mean": (lambda x: x.mean([0, 1, 2, 3]).mean(0), "mean"),
    "a view as another type": (lambda x: x.view(x.dtype), "view"),
    "another type": (lambda x: x.double().relu().to(x.dtype), "relu"),
    "a sum with nothing": (lambda x: torch.cat([x, x[:, :0]], 1), "slice"),
    "a part changed in place": (lambda x: (y := x.clone(), y[:, :1].zero_())[0], "zero_"),
    "a view changed in place": (lambda x: (x.view(-1).mul_(2), x)[1], "mul_"),
    "a value read after its change": (lambda x: (y := x * x, y.add_(x), x + y)[2], ""),
}


@pytest.mark.parametrize("name", IN_TORCH)
def test_a_step_that_only_torch_has_runs_there_and_is_right(name):
    step, left = IN_TORCH[name]
    torch.manual_seed(0)
    model = Steps(step).eval()
    model.first.weight.data.mul_(torch.rand(8, 3, 1, 1) < 0.7)
    model.second.weight.data.mul_(torch.rand(8, 8, 1, 1) < 0.5)
    program, _ = compiled(model, torch.randn(2, 3, 8, 9))
    (note,) = sparselt.explain(program).notes
    assert f" {left} (" in note.partition("the rest runs in torch:")[2] or not left
    for shape in ((1, 3, 8, 9), (5, 3, 6, 12)):
        x = torch.randn(shape)
        assert_as_exact_as_torch(program(x), model, x)


class Tagged(Tensor):
    """A tensor of a user's own class."""


OUTSIDE = {
    "a parameter": lambda x: nn.Parameter(x),
    "a tensor with a gradient": lambda x: x.requires_grad_(),
    "a tensor of another class": lambda x: x.as_subclass(Tagged),
    "a part of a larger one": lambda x: torch.cat([x, x], 2)[:, :, :17, :],
    "rows backwards in memory": lambda x: x.flip(2).transpose(2, 3).contiguous().transpose(2, 3),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_input_that_is_no_plain_tensor_is_taken(name):
    model = make("residual")
    program, in_torch = compiled(model, input_for("residual", 2))
    x = OUTSIDE[name](input_for("residual", 2))
    got = program(x)
    assert_as_exact_as_torch(torch.as_tensor(got), model, x.detach().as_subclass(Tensor).clone())
    assert bool(in_torch) == (name == "a tensor of another class")


def test_an_input_of_any_layout_is_taken():
    model = make("residual")
    program, in_torch = compiled(model, input_for("residual", 2))
    x = input_for("residual", 4)
    wanted = program(x)
    assert torch.equal(program(x.contiguous(memory_format=torch.channels_last)), wanted)
    wide = torch.zeros(*x.shape[:3], 2 * x.shape[3])
    wide[..., ::2] = x
    assert torch.equal(program(wide[..., ::2]), wanted)
    assert not in_torch


def test_under_autocast_torch_runs_the_steps():
    program, in_torch = compiled(make("residual"), input_for("residual", 2))
    x = input_for("residual", 2)
    wanted = program(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = program(x)
    assert in_torch
    torch.testing.assert_close(got.float(), wanted, rtol=0.1, atol=0.1)


def test_under_autocast_a_sparse_layer_returns_float32():
    x = torch.ones(2, 64)
    program, _ = compiled(prune_randomly(torch.nn.Linear(64, 64)), x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = program(x)
    assert got.dtype is torch.float32
    assert torch.equal(got, program(x))


def test_programs_for_old_shapes_make_room(monkeypatch):
    monkeypatch.setattr("sparselt.native._MAX_PROGRAMS", 2)
    model = make("perceptron")
    program, in_torch = compiled(model, input_for("perceptron", 2))
    for batch in (2, 3, 4, 5, 2):
        x = input_for("perceptron", batch)
        assert_as_exact_as_torch(program(x), model, x)
        assert len(segments_of(program)[0].programs) <= 2
    assert not in_torch


class Odd(nn.Module):
    """Two layers, and a forward that a test brings."""

    def __init__(self, forward) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        self.register_buffer("count", torch.zeros(1))
        self.own = forward

    def forward(self, x):
        return self.own(self, x)


def counts(m, x):
    y = m.b(m.a(x)) + m.count
    m.count.add_(1)
    return y


def loops(m, x):
    for _ in range(x.shape[0]):
        x = x + 0.1 * m.a(x)
    return m.b(x)


def casts(m, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = m.a(x)
    return m.b(y.float())


def as_tied(m):
    m.b.weight = m.a.weight


def with_hooks(m):
    m.a.register_forward_hook(lambda module, args, y: 2 * y)
    m.b.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def in_series(m, x):
    return m.b(F.relu(m.a(x)))


# What a forward does that a graph or a program may not do, what is changed beforehand, and a word
# of the explanation.
ODD = {
    "a weight for two layers": (in_series, as_tied, ""),
    "a weight and its transpose": (lambda m, x: m.a(x) @ m.a.weight, None, ""),
    "hooks": (in_series, with_hooks, "add (1), mul (1)"),
    "a weight computed anew": (lambda m, x: m.b(F.linear(x, 2 * m.a.weight)), None, "linear (1)"),
    "a bias computed anew": (
        lambda m, x: F.linear(m.b(x), m.a.weight, m.a.bias + 1),
        None,
        "linear (1)",
    ),
    "a bias for each image": (lambda m, x: torch.addmm(x, m.b(x), m.a.weight), None, "addmm (1)"),
    "a product of values": (lambda m, x: m.b(m.a(x) @ (x.T @ x)), None, "matmul (2)"),
    "a weight in the result": (lambda m, x: (m.a(x), m.b.weight, x, None, 3), None, ""),
    "a size in the result": (lambda m, x: (m.b(m.a(x)), x.shape[0]), None, ""),
    "one value twice": (lambda m, x: {"y": (y := m.a(x)), "z": [y, m.b(y)]}, None, ""),
    "its input changed": (lambda m, x: in_series(m, x.mul_(2)), None, "mul_ (1)"),
    "a part of its input changed": (lambda m, x: (x[:, :2].zero_(), m.b(m.a(x)))[1], None, "zero_"),
    "its buffer changed": (counts, None, "the model changes count when it runs"),
    "a size by values": (lambda m, x: m.b((y := m.a(x))[y.sum(1) > 0]), None, "depends on values"),
    "a number by values": (lambda m, x: m.b(y := m.a(x)) * y.max().item(), None, "on values"),
    "a branch by values": (lambda m, x: m.b(x) if x.sum() > 0 else m.a(x), None, "torch.export"),
    "a branch by sizes": (lambda m, x: m.b(m.a(x)) if len(x) > 2 else m.a(x), None, ""),
    "a branch by mode": (lambda m, x: m.b(x) if m.training else m.a(x), None, ""),
    "a loop over sizes": (loops, None, ""),
    "a condition": (
        lambda m, x: torch.cond(x.sum() > 0, lambda x: m.a(x), lambda x: m.b(x), (x,)),
        None,
        "cond (1)",
    ),
    "numpy": (lambda m, x: m.b(torch.from_numpy(m.a(x).numpy())), None, "torch.export"),
    "lower precision": (casts, None, "wrap_with_autocast (1)"),
    "attributes set": (lambda m, x: (setattr(m, "last", m.a(x)), m.b(m.last))[1], None, ""),
    "no batch": (lambda m, x: m.b(F.relu(m.a(x.sum(0)))), None, "sum (1)"),
    "three dimensions": (lambda m, x: m.b(F.relu(m.a(x[:, None]))), None, "unsqueeze (1)"),
    "no layers": (lambda m, x: x.relu() + 1, None, "add (1), relu (1)"),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_model_computes_what_it_does_in_torch_and_says_where(name, capfd):
    forward, change, told = ODD[name]
    torch.manual_seed(0)
    model = prune_randomly(Odd(forward), 0.4)
    if change is not None:
        change(model)
    example = torch.randn(2, 16)
    kept, twin = example.clone(), copy.deepcopy(model)
    program = sparselt.compile(model, example)
    assert torch.equal(example, kept)
    assert capfd.readouterr().err == ""
    assert told in " ".join(sparselt.explain(program).notes)
    with torch.no_grad():
        for batch in (2, 1, 5, 0):
            x = torch.randn(batch, 16) if batch else torch.zeros(0, 16)
            given, want_given = x.clone(), x.clone()
            try:
                want = twin(want_given)
            except RuntimeError:
                with pytest.raises(RuntimeError):
                    program(given)
                continue
            assert_same(program(given), want)
            assert torch.equal(given, want_given)


@pytest.mark.parametrize("name", ["a size by values", "a number by values", "its buffer changed"])
def test_an_odd_model_computes_what_it_does_in_torch_through_dynamo(name):
    torch.manual_seed(0)
    model = prune_randomly(Odd(ODD[name][0]), 0.4)
    twin = copy.deepcopy(model)
    fast = torch.compile(model, backend=dynamo.backend)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "a graph runs in torch as it is")
        for batch in (2, 5):
            x = torch.randn(batch, 16)
            assert_same(fast(x), twin(x))


def autocast_at_the_end(m, x):
    y = m.a(x).relu()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return m.b(y)


@pytest.mark.parametrize("forward", [in_series, autocast_at_the_end], ids=["around", "inside"])
def test_under_autocast_dynamo_gets_what_torch_computes(forward, monkeypatch):
    monkeypatch.setattr(
        "sparselt.tune.measure",
        lambda calls, **_: {c: 100.0 if c == DENSE else 1.0 for c in calls},
    )
    torch.manual_seed(0)
    model = prune_randomly(Odd(forward), 0.1)
    fast = torch.compile(model, backend=dynamo.backend)
    x = torch.randn(4, 16)
    with torch.inference_mode():
        with torch.autocast("cpu", torch.bfloat16), pytest.warns(UserWarning, match="narrower"):
            got, want = fast(x), model(x)
        assert got.dtype is want.dtype is torch.bfloat16
        assert torch.equal(got, want)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "kernels of the sparselt backend")
            got, want = fast(x), model(x)
        assert got.dtype is want.dtype
        torch.testing.assert_close(got, want)
