# SPDX-License-Identifier: Apache-2.0
"""Structured tickets: smaller networks from their own original weights, and their controls."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sparselt.errors import FormatError, OptionError, ShapeError
from sparselt.lottery import Data, Recipe
from sparselt.lottery.networks import build
from sparselt.lottery.structured_search import StructuredLevel, run_structured_levels
from sparselt.tickets import load_ticket
from sparselt.tickets.architecture import Delta, shrink

RECIPE = Recipe(
    network="small", data="noise", iterations=12, batch=16, evaluate_every=6, levels=2, rate=0.5
)


def make() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * 16, 6), nn.ReLU(), nn.Linear(6, 3),
    )  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small only wait for a second thread; bitwise claims need a fixed number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def still_one_thread(fixed_threads: None, one_thread: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def data() -> Data:
    source = torch.Generator().manual_seed(0)

    def split(count: int) -> tuple[Tensor, Tensor]:
        y = torch.arange(count) % 3
        x = torch.randn(count, 1, 4, 4, generator=source) + y[:, None, None, None]
        return x, y

    return Data(split(96), split(30), split(30), classes=3)


@pytest.fixture(scope="module")
def levels(data: Data) -> list[StructuredLevel]:
    return list(run_structured_levels(make, data, RECIPE, controls=("scratch_e",)))


def test_each_level_is_a_smaller_network(levels: list[StructuredLevel]) -> None:
    shapes = [[tuple(t.shape) for t in level.ticket.masks.values()] for level in levels]
    assert shapes[0] == [(8, 1, 3, 3), (6, 128), (3, 6)]
    assert shapes[1] == [(4, 1, 3, 3), (3, 64), (3, 3)]
    assert shapes[2] == [(2, 1, 3, 3), (1, 32), (3, 1)]
    dense = 72 + 768 + 18
    assert [level.density for level in levels] == [1.0, (36 + 192 + 9) / dense, 53 / dense]


def test_removed_channels_do_not_come_back(levels: list[StructuredLevel]) -> None:
    for earlier, later in zip(levels[1].delta.kept, levels[2].delta.kept, strict=True):
        assert set(later) < set(earlier)


def test_channels_left_are_the_largest_of_the_trained_network(
    levels: list[StructuredLevel],
) -> None:
    norms = levels[0].ticket.weights["0.weight"].abs().sum((1, 2, 3))
    assert set(levels[1].delta.kept[0]) == set(norms.argsort(descending=True)[:4].tolist())


def test_training_starts_from_the_original_weights_that_are_left(
    levels: list[StructuredLevel],
) -> None:
    whole = levels[0].ticket.initial
    for level in levels:
        for name, tensor in level.delta.slice(whole).items():
            assert torch.equal(level.ticket.initial[name], tensor)
        assert not torch.equal(level.ticket.initial["0.weight"], level.ticket.weights["0.weight"])


def test_ticket_runs_in_the_network_that_its_delta_rebuilds(
    levels: list[StructuredLevel], data: Data
) -> None:
    level = levels[2]
    model = level.ticket.apply(shrink(build(make, 5), level.delta)).eval()
    with torch.no_grad():
        right = (model(data.test[0]).argmax(1) == data.test[1]).float().mean().item()
    assert right == pytest.approx(level.outcome.test_accuracy)


def test_controls_train_at_every_level_but_the_first(levels: list[StructuredLevel]) -> None:
    assert [set(level.controls) for level in levels] == [set(), {"scratch_e"}, {"scratch_e"}]
    assert levels[1].controls["scratch_e"] != levels[1].outcome


def test_same_seed_gives_the_same_search_and_another_one_another(
    levels: list[StructuredLevel], data: Data
) -> None:
    again = list(run_structured_levels(make, data, RECIPE))
    other = list(run_structured_levels(make, data, replace(RECIPE, seed=1)))
    assert [level.outcome for level in again] == [level.outcome for level in levels]
    assert other[0].outcome != levels[0].outcome


def test_rewinding_takes_the_weights_of_that_iteration(data: Data) -> None:
    recipe = replace(RECIPE, rewind=4)
    early = list(run_structured_levels(make, data, replace(RECIPE, iterations=4, levels=0)))
    rewound = list(run_structured_levels(make, data, recipe))
    for name, tensor in rewound[1].delta.slice(early[0].ticket.weights).items():
        if name in rewound[1].ticket.initial:
            assert torch.equal(rewound[1].ticket.initial[name], tensor)


@pytest.mark.parametrize("rewind", [0, 4])
def test_a_stopped_search_goes_on_to_the_same_end(data: Data, tmp_path: Path, rewind: int) -> None:
    recipe = replace(RECIPE, rewind=rewind)
    whole = list(run_structured_levels(make, data, recipe))
    begun = run_structured_levels(make, data, recipe, folder=tmp_path)
    next(begun), next(begun)
    resumed = list(run_structured_levels(make, data, recipe, folder=tmp_path))
    assert [level.outcome for level in resumed] == [level.outcome for level in whole]
    for one, other in zip(resumed, whole, strict=True):
        assert one.delta == other.delta
        for name, tensor in other.ticket.weights.items():
            assert torch.equal(one.ticket.weights[name], tensor), name
    saved = next(tmp_path.glob("*/level_02/ticket.safetensors"))
    assert Delta.from_json(load_ticket(saved).meta["architecture"]) == whole[2].delta


def test_global_scope_keeps_the_total(data: Data) -> None:
    found = list(run_structured_levels(make, data, replace(RECIPE, scope="global", levels=1)))
    delta = found[1].delta
    kept = {g.layers[0]: len(k) for g, k in zip(delta.groups, delta.kept, strict=True)}
    assert kept.get("0", 8) + kept.get("4", 6) == 7


@pytest.mark.parametrize(
    "options",
    [
        {"controls": ("reinit",)},
        {"criterion": "magnitude"},
        {"recipe": replace(RECIPE, restart="fine_tune")},
    ],
)
def test_what_it_cannot_do_is_refused(data: Data, options: dict[str, object]) -> None:
    arguments = {"recipe": RECIPE, **options}
    with pytest.raises(OptionError):
        list(run_structured_levels(make, data, **arguments))  # type: ignore[arg-type]


def test_a_ticket_shrinks_the_original_network_it_is_applied_to(
    levels: list[StructuredLevel], data: Data, tmp_path: Path
) -> None:
    last = levels[-1]
    last.ticket.save(tmp_path / "t.safetensors")
    small = last.ticket.apply(shrink(build(make, 5), last.delta)).eval()

    model = load_ticket(tmp_path / "t.safetensors").apply(build(make, 7)).eval()

    assert model[0].out_channels < 8
    assert torch.equal(model(data.test[0]), small(data.test[0]))
    assert torch.equal(last.ticket.apply(model)(data.test[0]), small(data.test[0]))


def test_a_network_that_a_ticket_does_not_fit_is_left_as_it_was(
    levels: list[StructuredLevel],
) -> None:
    for wider in (5, 12):
        model = make()
        model[6] = nn.Linear(6, wider)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(ShapeError, match=r"6\.weight"):
            levels[-1].ticket.apply(model)
        assert all(torch.equal(tensor, before[n]) for n, tensor in model.state_dict().items())


def test_a_damaged_architecture_is_refused(levels: list[StructuredLevel]) -> None:
    ticket = levels[-1].ticket
    damaged = replace(ticket, meta={**ticket.meta, "architecture": {"version": 1}})
    with pytest.raises(FormatError, match="list of groups"):
        damaged.apply(make())
