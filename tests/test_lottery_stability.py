# SPDX-License-Identifier: Apache-2.0
"""Instability and linear mode connectivity, on cases whose answer is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lottery_cases import RECIPE, blobs, network, one_thread  # noqa: F401
from torch import nn

from sparselt import errors
from sparselt.lottery import Data, run_levels
from sparselt.lottery.controls import Arm
from sparselt.lottery.masks import full_masks
from sparselt.lottery.stability import (
    Stability,
    dense_arms,
    linear_path,
    measure_stability,
    sweep,
)


def test_instability_is_the_highest_error_less_the_mean_of_both_ends() -> None:
    case = Stability(0, 1.0, (0.10, 0.30, 0.20), (0.0, 0.01, 0.0), "none")

    assert case.instability == pytest.approx(0.15)
    assert case.train_instability == pytest.approx(0.01)
    assert not case.is_stable
    assert replace(case, errors=(0.1, 0.11, 0.1)).is_stable


def test_a_line_between_mirrored_weights_has_its_barrier_in_the_middle() -> None:
    # Swapping both hidden units changes nothing, but half way between the two nets they cancel.
    net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Tanh(), nn.Linear(2, 2, bias=False))
    first = {"0.weight": [[3.0], [-3.0]], "2.weight": [[5.0, -5.0], [-5.0, 5.0]]}
    second = {"0.weight": [[-3.0], [3.0]], "2.weight": [[-5.0, 5.0], [5.0, -5.0]]}
    x = torch.tensor([[1.0], [2.0], [-1.0], [-2.0]])
    data = Data(*[(x, torch.tensor([0, 0, 1, 1]))] * 3, classes=2)  # type: ignore[misc]
    ends = [{k: torch.tensor(v) for k, v in end.items()} for end in (first, second)]

    test_errors, train_errors = linear_path(net, ends[0], ends[1], data, points=5)

    assert test_errors == (0.0, 0.0, 0.5, 0.0, 0.0)
    assert train_errors == test_errors


def test_batch_norm_statistics_are_gathered_anew_at_every_point() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm1d(6, affine=False), nn.Linear(6, 3))
    state = {k: v.clone() for k, v in net.state_dict().items()}
    wrong = {**state, "0.running_mean": torch.full((6,), 50.0)}
    data = blobs()

    right_errors, _ = linear_path(net, state, state, data, points=3)
    wrong_errors, _ = linear_path(net, wrong, wrong, data, points=3)

    assert right_errors == wrong_errors


def test_copies_that_do_not_train_apart_are_perfectly_stable() -> None:
    torch.manual_seed(0)
    model, recipe = network(), replace(RECIPE, batch=60, optimiser="sgd")
    arm = Arm(model.state_dict(), full_masks(model, recipe), 0)

    # The whole training split in every batch: the data order cannot matter but for rounding.
    case = measure_stability(model, blobs(), recipe, arm, points=4)

    assert len(case.errors) == len(case.train_errors) == 4
    assert case.instability <= 0.001
    assert case.batch_norm == "recomputed"
    assert case.density == 1.0


def test_the_two_copies_really_see_different_orders() -> None:
    torch.manual_seed(0)
    model = network()
    arm = Arm(model.state_dict(), full_masks(model, RECIPE), 0)
    first = measure_stability(model, blobs(), RECIPE, arm, points=3)
    other = measure_stability(model, blobs(), RECIPE, arm, points=3, pair=1)
    again = measure_stability(model, blobs(), RECIPE, arm, points=3)

    assert first == again
    assert first != other


def test_dense_arms_are_the_networks_of_the_search_itself() -> None:
    arms = dense_arms(network, blobs(), RECIPE, (0, 7))
    level = list(run_levels(network, blobs(), replace(RECIPE, rewind=7, levels=1)))[1]

    assert [arm.start for arm in arms.values()] == [0, 7]
    for name, value in level.arm.state.items():
        assert torch.equal(arms[7].state[name], value), name


def test_a_sweep_gives_dense_and_ticket_at_every_point() -> None:
    recipe = replace(RECIPE, levels=1)

    cases = list(sweep(network, blobs(), recipe, (0, 10), points=3, pairs=2))

    assert [dense.start for dense, _, _ in cases] == [0, 10]
    assert [ticket.start for _, ticket, _ in cases] == [0, 10]
    assert all(dense.density == 1.0 and ticket.density < 1 for dense, ticket, _ in cases)
    assert all(0 <= accuracy <= 1 for *_, accuracy in cases)


def test_a_line_needs_three_points() -> None:
    model = network()
    with pytest.raises(errors.OptionError, match="points"):
        linear_path(model, model.state_dict(), model.state_dict(), blobs(), points=2)
