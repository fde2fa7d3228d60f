# SPDX-License-Identifier: Apache-2.0
"""Each kind of step of a native program computes what torch does."""

from __future__ import annotations

import pytest
import torch
from native_calls import assert_as_exact_as_torch, compiled, segments_of
from networks import input_for, make
from torch import Tensor, nn
from torch.nn import functional as F

from sparselt.plan import DENSE


@pytest.fixture(autouse=True)
def always_sparse(fixed_threads, monkeypatch):
    monkeypatch.setattr(
        "sparselt.tune.measure",
        lambda calls, **_: {c: 100.0 if c == DENSE else float(i) for i, c in enumerate(calls)},
    )


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
    "gate": lambda x: x * torch.sigmoid(x.mean([2, 3], keepdim=True)),
    "scale": lambda x: 0.37 * x,
    "shift": lambda x: x + 1.5,
    "softmax": lambda x: F.softmax(x, -1),
    "softmax of channels": lambda x: x.transpose(1, 3).softmax(-1).transpose(3, 1),
    "layer norm": lambda x: F.layer_norm(x, x.shape[-2:]),
    "layer norm of channels": lambda x: (
        F.layer_norm(x.flatten(2).transpose(1, 2), [8], *WEIGHTS.to(x.dtype), 1e-3)
        .transpose(1, 2)
        .unflatten(2, x.shape[2:])
    ),
    "permutation": lambda x: x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
    "squeeze": lambda x: x.unsqueeze(2).squeeze(2),
}
WEIGHTS = torch.tensor([[0.5, -1.0, 2.0, 0.1, 1.0, 0.0, -0.3, 3.0], [1.0, 0.0] * 4])


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


def test_an_encoder_runs_in_one_stretch_between_attentions():
    program, in_torch = compiled(make("encoder"), input_for("encoder", 2))
    (planned, *_) = program._families[0].planned.values()
    _, by_torch = planned.others()
    assert len(segments_of(program)) <= 3
    assert by_torch["scaled_dot_product_attention"] == 2
    assert "layer_norm" not in by_torch
    program(input_for("encoder", 5))
    assert not in_torch
