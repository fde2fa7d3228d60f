# SPDX-License-Identifier: Apache-2.0
"""Counts, ladders, nesting, ties, structures, criteria: everything about masks that needs no
training.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lottery_cases import one_thread, run_ladder  # noqa: F401
from torch import Tensor, nn

from sparselt import errors
from sparselt.lottery import CRITERIA, NETWORKS, Data, Recipe, recipe_of
from sparselt.lottery.criteria import Subject
from sparselt.lottery.masks import (
    Group,
    MaskKeeper,
    density,
    full_masks,
    groups_at,
    layer_rates,
    prune,
)
from sparselt.lottery.structures import Blocks

ONE = Blocks(1, 1)

OUTPUT = {"cifar10_vgg_19": ("54",), "cifar10_resnet_20": ("linear",)}
LENET = [100, 80.0, 64.1, 51.3, 41.1, 32.9, 26.3, 21.1, 16.9, 13.5, 10.8, 8.7, 7.0, 5.6, 4.5, 3.6,
         2.9, 2.3, 1.9, 1.5]  # fmt: skip


def ladder(network: str, shape: tuple[int, ...], recipe: Recipe) -> list[float]:
    """Weights remaining, in percent, of every level."""
    with torch.device("meta"):
        model = NETWORKS[network](shape, 10)
    rates = layer_rates(model, recipe)
    shapes = {name: model.get_parameter(name) for name in rates}
    total = sum(weight.numel() for weight in shapes.values())
    kept = [
        sum(group.keep for group in groups_at(rates, shapes, recipe, level, ONE))
        for level in range(recipe.levels + 1)
    ]
    return [100 * count / total for count in kept]


def test_lenets_ladder_is_the_published_one() -> None:
    assert ladder("lenet_300_100", (1, 28, 28), Recipe()) == pytest.approx(LENET, abs=0.05001)


@pytest.mark.parametrize(
    ("network", "conv_rate", "labels"),
    [("conv_2", 0.1, [8.8, 4.6]), ("conv_4", 0.1, [11.1, 9.2, 5.4]), ("conv_6", 0.15, [])],
)
def test_convolutional_ladders_pass_through_the_published_labels(
    network: str, conv_rate: float, labels: list[float]
) -> None:
    steps = ladder(network, (3, 32, 32), Recipe(conv_rate=conv_rate, levels=25))

    assert steps == sorted(steps, reverse=True)
    for label in labels:
        assert min(abs(step - label) for step in steps) <= 0.0501


def test_deep_recipes_end_at_0_8_to_the_number_of_rounds() -> None:
    for name, label in (("cifar10_vgg_19", 1.44), ("cifar10_resnet_20", 13.4)):
        recipe = recipe_of(name)
        convolutions = ladder(recipe.network, (3, 32, 32), replace(recipe, ignore=OUTPUT[name]))

        assert convolutions[-1] == pytest.approx(label, abs=0.0501)


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 6, 3), nn.Flatten(), nn.Linear(24, 10), nn.Linear(10, 4))


class TestRates:
    def test_convolutions_hidden_and_output_layers_have_their_own(self) -> None:
        recipe = Recipe(rate=0.2, conv_rate=0.15)

        assert layer_rates(two_layers(), recipe) == {
            "0.weight": 0.15,
            "2.weight": 0.2,
            "3.weight": 0.1,
        }

    def test_single_layers_can_be_set_and_ignored(self) -> None:
        recipe = Recipe(rates=("2=0.5", "3.weight=0"), ignore=("0",))

        assert layer_rates(two_layers(), recipe) == {"2.weight": 0.5, "3.weight": 0.0}

    @pytest.mark.parametrize(
        "change",
        [
            {"ignore": ("nothing",)},
            {"ignore": ("*",)},
            {"rates": ("2",)},
            {"rates": ("2=x",)},
            {"rates": ("2=1.0",)},
            {"rates": ("none=0.5",)},
        ],
    )
    def test_patterns_that_mean_nothing_are_refused(self, change: dict[str, object]) -> None:
        with pytest.raises(errors.OptionError):
            layer_rates(two_layers(), Recipe.from_values(change))

    def test_biases_and_normalisation_are_never_pruned(self) -> None:
        model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Linear(2, 2))

        assert list(full_masks(model, Recipe())) == ["0.weight", "2.weight"]


class TestPrune:
    @settings(max_examples=60, deadline=None)
    @given(
        sizes=st.lists(st.integers(1, 60), min_size=1, max_size=4),
        rate=st.floats(0.0, 0.9),
        levels=st.integers(1, 5),
        scope=st.sampled_from(["layer", "global"]),
        values=st.integers(1, 5),
        seed=st.integers(0, 99),
    )
    def test_counts_are_exact_masks_nested_and_kept_scores_the_largest(
        self, sizes: list[int], rate: float, levels: int, scope: str, values: int, seed: int
    ) -> None:
        # Few different values, so that ties are the rule.
        generator = torch.Generator().manual_seed(seed)
        scores = {
            str(i): torch.randint(0, values, (size, 1), generator=generator).float()
            for i, size in enumerate(sizes)
        }
        recipe = Recipe(rate=rate, levels=levels, scope=scope)

        steps = run_ladder(scores, recipe)

        for level, (before, after) in enumerate(pairwise(steps), 1):
            pools = [[name] for name in scores] if scope == "layer" else [list(scores)]
            for names in pools:
                kept = torch.cat([after[name] for name in names])
                all_scores = torch.cat([scores[name] for name in names])
                dropped = torch.cat([before[name] for name in names]) & ~kept
                assert int(kept.sum()) == max(1, round(len(kept) * (1 - rate) ** level))
                if kept.any() and dropped.any():
                    assert all_scores[kept].min() >= all_scores[dropped].max()
            for name in scores:
                assert not (after[name] & ~before[name]).any()

    def test_ties_go_to_the_earlier_position_and_prune_no_extra(self) -> None:
        masks = prune(
            {"w": torch.ones(2, 5)},
            {"w": torch.ones(2, 5, dtype=torch.bool)},
            [Group(("w",), 7)],
            ONE,
        )

        assert masks["w"].int().tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]

    def test_pruned_weights_never_return_even_with_larger_scores(self) -> None:
        before = {"w": torch.tensor([[True, False, True, True]])}

        after = prune({"w": torch.tensor([[1.0, 99.0, 3.0, 2.0]])}, before, [Group(("w",), 2)], ONE)

        assert after["w"].tolist() == [[False, False, True, True]]

    def test_negative_scores_of_kept_weights_stay_above_pruned_ones(self) -> None:
        before = {"w": torch.tensor([[True, False, True]])}

        after = prune({"w": torch.tensor([[-5.0, 0.0, -9.0]])}, before, [Group(("w",), 2)], ONE)

        assert after["w"].tolist() == [[True, False, True]]

    def test_global_scope_competes_over_layers_of_one_rate_only(self) -> None:
        scores = {
            "a": torch.tensor([[9.0, 8.0]]),
            "b": torch.tensor([[1.0, 2.0]]),
            "c": torch.ones(1, 2),
        }
        masks = {name: torch.ones(1, 2, dtype=torch.bool) for name in scores}
        rates = {"a": 0.5, "b": 0.5, "c": 0.0}
        recipe = Recipe(scope="global", rate=0.5)

        after = prune(scores, masks, groups_at(rates, masks, recipe, 1, ONE), ONE)

        assert {name: mask.tolist() for name, mask in after.items()} == {
            "a": [[True, True]],
            "b": [[False, False]],
            "c": [[True, True]],
        }

    def test_ignored_layers_are_untouched_and_uncounted(self) -> None:
        model = two_layers()
        recipe = Recipe(ignore=("0",))
        masks = full_masks(model, recipe)

        assert list(masks) == ["2.weight", "3.weight"]
        assert sum(mask.numel() for mask in masks.values()) == 280

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_scores_that_are_not_finite_are_refused(self, bad: float) -> None:
        masks = {"w": torch.ones(1, 2, dtype=torch.bool)}
        with pytest.raises(errors.DataError, match="diverged"):
            prune({"w": torch.tensor([[1.0, bad]])}, masks, [Group(("w",), 1)], ONE)

    def test_density_is_kept_over_prunable(self) -> None:
        masks = {"a": torch.tensor([True, False]), "b": torch.ones(6, dtype=torch.bool)}
        assert density(masks) == 7 / 8


def subject() -> Subject:
    model = two_layers()
    masks = full_masks(model, Recipe())
    x, y = torch.randn(12, 2, 4, 4), torch.arange(12) % 4
    start = {name: torch.randn(mask.shape) for name, mask in masks.items()}
    data = Data((x, y), (x, y), (x, y), classes=4)
    return Subject(model, start, masks, data, torch.Generator().manual_seed(0))


class TestCriteria:
    @pytest.mark.parametrize("name", CRITERIA)
    def test_every_criterion_scores_every_weight_with_finite_numbers(self, name: str) -> None:
        case = subject()
        before = {k: v.clone() for k, v in case.model.state_dict().items()}

        scores = CRITERIA[name].score(case)

        assert {k: v.shape for k, v in scores.items()} == {
            k: v.shape for k, v in case.masks.items()
        }
        assert all(bool(torch.isfinite(score).all()) for score in scores.values())
        assert all(torch.equal(v, before[k]) for k, v in case.model.state_dict().items())

    @pytest.mark.parametrize("name", CRITERIA)
    def test_every_criterion_is_deterministic(self, name: str) -> None:
        first, second = CRITERIA[name].score(subject()), CRITERIA[name].score(subject())

        assert all(torch.equal(first[k], second[k]) for k in first)

    def test_magnitude_looks_at_the_size_and_not_the_sign(self) -> None:
        case = subject()
        weight = case.model.get_parameter("3.weight").data
        weight.copy_(torch.linspace(-1, 1, weight.numel()).reshape(weight.shape))

        scores = CRITERIA["magnitude"].score(case)["3.weight"]

        assert torch.equal(scores, weight.abs())
        assert torch.equal(CRITERIA["smallest"].score(case)["3.weight"], -weight.abs())

    def test_movement_is_the_distance_from_the_start(self) -> None:
        case = subject()
        start = {k: v.detach().clone() for k, v in case.model.named_parameters() if k in case.masks}
        moved = replace(case, start=start)
        case.model.get_parameter("2.weight").data[0, 0] += 3.0

        assert int(CRITERIA["movement"].score(moved)["2.weight"].argmax()) == 0


OPTIMISERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "sgd with momentum and decay": lambda p: torch.optim.SGD(
        p, 0.1, momentum=0.9, weight_decay=0.1
    ),
    "nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, weight_decay=0.1),
}


class TestMaskKeeper:
    @pytest.mark.parametrize("name", OPTIMISERS)
    def test_pruned_weights_and_their_optimiser_state_stay_exactly_zero(self, name: str) -> None:
        model = two_layers()
        generator = torch.Generator().manual_seed(1)
        masks = {
            n: torch.rand(m.shape, generator=generator) < 0.3
            for n, m in full_masks(model, Recipe()).items()
        }
        optimiser = OPTIMISERS[name](model.parameters())
        keeper = MaskKeeper(model, masks)
        kept_before = model.get_parameter("2.weight").detach()[masks["2.weight"]].clone()

        for _ in range(5):
            x = torch.randn(8, 2, 4, 4, generator=generator)
            optimiser.zero_grad()
            model(x).square().sum().backward()
            keeper.mask_gradients()
            optimiser.step()
            keeper.mask_weights()
            for tensor_name, mask in masks.items():
                parameter = model.get_parameter(tensor_name)
                pruned = parameter.detach()[~mask]
                assert torch.equal(pruned, torch.zeros_like(pruned))
                assert not torch.signbit(pruned).any()
                for value in optimiser.state[parameter].values():
                    if isinstance(value, Tensor) and value.shape == mask.shape:
                        assert not value[~mask].any()

        changed = model.get_parameter("2.weight").detach()[masks["2.weight"]] != kept_before
        assert float(changed.float().mean()) > 0.5

    def test_weights_are_masked_even_if_an_optimiser_revives_them(self) -> None:
        model = nn.Linear(2, 1, bias=False)
        keeper = MaskKeeper(model, {"weight": torch.tensor([[True, False]])})

        model.weight.data.fill_(5.0)
        keeper.mask_weights()

        assert model.weight.tolist() == [[5.0, 0.0]]

    def test_negative_and_tiny_weights_keep_their_gradients(self) -> None:
        model = nn.Linear(3, 1, bias=False)
        model.weight.data = torch.tensor([[-0.5, 1e-9, 0.0]])
        keeper = MaskKeeper(model, {"weight": torch.tensor([[True, True, True]])})
        model(torch.ones(1, 3)).sum().backward()

        keeper.mask_gradients()

        assert model.weight.grad is not None
        assert model.weight.grad.tolist() == [[1.0, 1.0, 1.0]]
