# SPDX-License-Identifier: Apache-2.0
"""Batch-norm statistics are those of the data, and looking at a network does not change it."""

from __future__ import annotations

import copy

import pytest
import torch
from lottery_cases import network, one_thread  # noqa: F401
from torch import nn

from sparselt.lottery.batch_norm import batch_norms, recompute_statistics, use_batch_statistics


def test_statistics_are_those_of_the_inputs_whatever_they_were() -> None:
    inputs = 3 + 2 * torch.randn(1700, 6, generator=torch.Generator().manual_seed(0))
    norm = nn.BatchNorm1d(6)
    with torch.no_grad():
        norm.running_mean.fill_(50.0)

    recompute_statistics(norm, inputs)

    assert torch.allclose(norm.running_mean, inputs.mean(0), atol=1e-4)
    assert torch.allclose(norm.running_var, inputs.var(0), rtol=1e-2)


@pytest.mark.parametrize("count", [2, 500, 501, 1001])
def test_no_batch_is_too_short_to_have_a_variance(count: int) -> None:
    norm = nn.BatchNorm1d(6)

    recompute_statistics(norm, torch.randn(count, 6, generator=torch.Generator().manual_seed(0)))

    assert bool(torch.isfinite(norm.running_var).all())


@pytest.mark.parametrize("training", [True, False])
def test_weights_modes_and_momentum_stay_and_dropout_is_off(training: bool) -> None:
    torch.manual_seed(0)
    model = network(dropout=0.9).train(training)
    model.append(nn.BatchNorm1d(3))
    model.train(training)
    weights = [copy.deepcopy(parameter) for parameter in model.parameters()]
    inputs = torch.randn(300, 6)

    recompute_statistics(model, inputs)
    first = [norm.running_mean.clone() for norm in batch_norms(model)]
    recompute_statistics(model, inputs)

    assert all(map(torch.equal, weights, model.parameters()))
    assert all(module.training == training for module in model.modules())
    assert [norm.momentum for norm in batch_norms(model)] == [0.1, 0.1]
    assert all(map(torch.equal, first, [norm.running_mean for norm in batch_norms(model)]))


def test_batch_statistics_are_used_by_batch_norm_alone() -> None:
    model = network(dropout=0.5).train()

    use_batch_statistics(model)

    modes = {type(module).__name__: module.training for module in model.children()}
    assert modes == {"Linear": False, "BatchNorm1d": True, "ReLU": False, "Dropout": False}
