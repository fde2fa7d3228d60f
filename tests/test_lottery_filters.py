# SPDX-License-Identifier: Apache-2.0
"""Which filters go first, and how many."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from shrinkable import Plain, X, lively

from sparselt.errors import DataError, OptionError
from sparselt.lottery.filters import FILTER_CRITERIA
from sparselt.lottery.structured import choose_channels, prune_filters
from sparselt.lottery.structured_graph import trace_channels
from sparselt.tickets.architecture import ChannelGroup, Slot


def test_kept_counts_are_rounded_down_but_never_to_nothing() -> None:
    small = prune_filters(lively(Plain), X, 0.1).model
    assert (small.conv1.out_channels, small.conv2.out_channels, small.fc1.out_features) == (1, 1, 1)
    small = prune_filters(lively(Plain), X, 0.7).model
    assert (small.conv1.out_channels, small.conv2.out_channels, small.fc1.out_features) == (4, 3, 4)


def test_kept_counts_are_rounded_up_to_a_multiple() -> None:
    small = prune_filters(lively(Plain), X, 0.5, multiple=4).model
    assert (small.conv1.out_channels, small.conv2.out_channels, small.fc1.out_features) == (4, 4, 4)
    small = prune_filters(lively(Plain), X, 0.9, multiple=4).model
    assert small.conv2.out_channels == 4
    assert small.conv1.out_channels == 6


def test_density_by_pattern_leaves_other_layers_whole() -> None:
    small = prune_filters(lively(Plain), X, {"conv*": 0.5}).model
    assert (small.conv1.out_channels, small.conv2.out_channels, small.fc1.out_features) == (3, 2, 7)
    small = prune_filters(lively(Plain), X, {"conv*": 0.5}, scope="global").model
    assert small.conv1.out_channels + small.conv2.out_channels == 5
    assert small.fc1.out_features == 7


def test_global_ranking_does_not_empty_a_layer() -> None:
    model = lively(Plain)
    with torch.no_grad():
        for tensor in (model.conv1.weight, model.fc1.weight):
            tensor[1:] *= 1e-6
    channels = trace_channels(model, X)
    delta = choose_channels(model, channels, 0.3, scope="global", least=2)
    kept = dict(zip((g.layers[0] for g in delta.groups), delta.kept, strict=True))
    assert sum(len(each) for each in kept.values()) == 2 + 2 + 2
    assert all(len(each) >= 2 for each in kept.values())
    assert 0 in kept["conv1"]


def test_equal_scores_keep_the_earlier_channel() -> None:
    model = lively(Plain)
    with torch.no_grad():
        model.conv1.weight.fill_(1.0)
    delta = choose_channels(model, trace_channels(model, X), {"conv1": 0.5})
    assert delta.kept == ((0, 1, 2),)


def test_random_scores_follow_the_seed() -> None:
    model, channels = lively(Plain), trace_channels(lively(Plain), X)
    deltas = [choose_channels(model, channels, 0.5, "random", seed=s) for s in (1, 1, 2)]
    assert deltas[0] == deltas[1] != deltas[2]


GROUP = ChannelGroup(3, (Slot("w", 0, 3), Slot("bn.weight", 0, 3), Slot("next", 1, 3)))
# Filters on a line: at 0, 1 and 3 with a second coordinate of 0.
TENSORS = {
    "w": torch.tensor([[0.0, 0.0], [1.0, 0.0], [3.0, 0.0]]),
    "bn.weight": torch.tensor([-5.0, 0.5, 1.0]),
    "next": torch.ones(2, 3),
}


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        ("l1", [0.0, 1.0, 3.0]),
        ("l2", [0.0, 1.0, 3.0]),
        ("largest_l1", [0.0, -1.0, -3.0]),
        ("batch_norm", [5.0, 0.5, 1.0]),
        ("geometric_median", [4.0, 3.0, 5.0]),
    ],
)
def test_criterion_scores_by_hand(criterion: str, expected: list[float]) -> None:
    scores = FILTER_CRITERIA[criterion](GROUP, TENSORS, torch.Generator())
    assert scores.tolist() == pytest.approx(expected)


def test_l1_and_l2_differ_and_sum_over_what_is_added() -> None:
    group = ChannelGroup(1, (Slot("a", 0, 1), Slot("b", 0, 1)))
    tensors = {"a": torch.tensor([[3.0, 4.0]]), "b": torch.tensor([[-12.0]])}
    assert FILTER_CRITERIA["l1"](group, tensors, torch.Generator()).item() == 19.0
    assert FILTER_CRITERIA["l2"](group, tensors, torch.Generator()).item() == 13.0


def test_batch_norm_criterion_needs_a_batch_norm() -> None:
    with pytest.raises(OptionError, match="batch norm behind conv2"):
        prune_filters(lively(Plain), X, {"conv2": 0.5}, "batch_norm")


def test_scores_that_are_not_finite_are_refused() -> None:
    model = lively(Plain)
    with torch.no_grad():
        model.conv1.weight[0] = torch.nan
    with pytest.raises(DataError, match="conv1"):
        prune_filters(model, X, 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, "density"),
        ({"density": 1.5}, "density"),
        ({"density": {"nothing": 0.5}}, "pattern of conv1"),
        ({"density": {"fc2": 0.5}}, "fc2 must stay: its channels are the network's output"),
        ({"density": 0.5, "criterion": "taste"}, "l1"),
        ({"density": 0.5, "scope": "model"}, "layer or global"),
        ({"density": 0.5, "multiple": 0}, "multiple"),
        ({"density": 0.5, "least": 0}, "least"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        prune_filters(lively(Plain), X, **options)
