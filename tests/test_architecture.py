# SPDX-License-Identifier: Apache-2.0
"""An architecture delta is checked before it touches a network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from shrinkable import Plain, X, every_second, lively
from torch import nn

from sparselt.errors import FormatError, ShapeError
from sparselt.lottery.structured_graph import trace_channels
from sparselt.tickets.architecture import Delta, shrink


def delta_values(**changes: Any) -> dict[str, Any]:
    group: dict[str, Any] = {
        "channels": 3,
        "kept": [0, 2],
        "slots": [["0.weight", 0, 3, 0, 1, 1]],
        **changes,
    }
    return {"version": 1, "groups": [group]}


@pytest.mark.parametrize(
    "values",
    [
        None,
        [],
        {"version": 2, "groups": []},
        {"version": 1, "groups": {}},
        {"version": 1, "groups": [3]},
        delta_values(kept=[]),
        delta_values(kept=[2, 0]),
        delta_values(kept=[0, 0]),
        delta_values(kept=[0, 3]),
        delta_values(kept=[-1]),
        delta_values(kept=[0.0]),
        delta_values(kept=[True]),
        delta_values(channels="3"),
        delta_values(channels=2**40),
        delta_values(channels=4),
        delta_values(slots=[]),
        delta_values(slots=[["0.weight", 0, 3, 0, 1]]),
        delta_values(slots=[[0, 0, 3, 0, 1, 1]]),
        delta_values(slots=[["0.weight", 0, 3, 1, 1, 1]]),
        delta_values(slots=[["0.weight", 0, 3, 0, 0, 1]]),
        delta_values(slots=[["0.weight", 0, 3, 0, 1, 2]]),
        delta_values(slots=[["0.weight", -1, 3, 0, 1, 1]]),
    ],
)
def test_hostile_deltas_are_refused(values: Any) -> None:
    with pytest.raises(FormatError, match="delta"):
        Delta.from_json(values)


@pytest.mark.parametrize(
    ("slot", "error"),
    [
        (["7.weight", 0, 3, 0, 1, 1], FormatError),
        (["0.weight", 0, 2000000000, 0, 1, 1], ShapeError),
        (["0.weight", 5, 3, 0, 1, 1], ShapeError),
        (["2.weight", 0, 3, 0, 1, 1], ShapeError),
        (["1.weight", 0, 6, 0, 2, 1], ShapeError),
        (["1.weight", 1, 3, 0, 1, 1], ShapeError),
    ],
)
def test_deltas_of_another_network_are_refused(slot: list[Any], error: type[Exception]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(6, 6, 1, groups=2), nn.Linear(3, 2))
    before = str(model)
    with pytest.raises(error):
        shrink(model, Delta.from_json(delta_values(slots=[slot])))
    assert str(model) == before


def test_shrinking_twice_is_refused() -> None:
    delta = every_second(trace_channels(lively(Plain), X))
    model = shrink(lively(Plain), delta)
    with pytest.raises(ShapeError, match="only once"):
        shrink(model, delta)


def test_expanding_is_the_inverse_of_slicing_with_zeros_elsewhere() -> None:
    model = lively(Plain)
    state, delta = model.state_dict(), every_second(trace_channels(model, X))
    shapes = {name: tensor.shape for name, tensor in state.items()}
    small = delta.slice(state)
    full = delta.expand(small, shapes)
    assert full["conv2.weight"][0::2].abs().sum() == 0
    assert full["conv2.weight"][:, 0::2].abs().sum() == 0
    assert torch.equal(full["conv2.weight"][1::2, 1::2], state["conv2.weight"][1::2, 1::2])
    again = delta.slice(full)
    assert all(torch.equal(again[name], tensor) for name, tensor in small.items())
    with pytest.raises(ShapeError, match=r"conv2\.weight"):
        delta.expand({"conv2.weight": state["conv2.weight"]}, shapes)
