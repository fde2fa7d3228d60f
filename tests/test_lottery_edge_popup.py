# SPDX-License-Identifier: Apache-2.0
"""Edge-popup: exact counts, weights that never change, straight-through gradient, small files."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lottery_cases import KilledError, blobs, one_thread  # noqa: F401
from torch import Tensor, nn
from torch.nn import functional as F

import sparselt
from sparselt import errors
from sparselt.lottery import Data, Recipe, Step, Training, load_data, train
from sparselt.lottery.edge_popup import (
    FROZEN_WEIGHTS,
    Supermask,
    add_supermasks,
    find_supermask,
    read_supermasks,
)
from sparselt.lottery.masks import Group, prune
from sparselt.lottery.structures import Blocks
from sparselt.tickets import load_ticket

RECIPE = Recipe(
    network="tiny", data="blobs", optimiser="sgd", lr=0.1, momentum=0.9, weight_decay=1e-3,
    batch=20, iterations=30, evaluate_every=10,
)  # fmt: skip


def images() -> Data:
    source = torch.Generator().manual_seed(0)
    y = torch.arange(60) % 3
    x = torch.randn(60, 1, 6, 6, generator=source) + y[:, None, None, None]
    return Data((x, y), (x, y), (x, y), classes=3)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3))


def conv_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False), nn.ReLU(), nn.Flatten(),
        nn.Linear(288, 3),
    )  # fmt: skip


CASES = [(network, blobs), (conv_net, images)]
by_case = pytest.mark.parametrize(("factory", "data"), CASES, ids=["linear", "conv"])


def frozen(model: nn.Module) -> dict[str, Tensor]:
    """Everything but scores and running statistics."""
    return {
        name: value.clone()
        for name, value in model.state_dict().items()
        if not name.endswith(("scores", "running_mean", "running_var", "num_batches_tracked"))
    }


class TestCounts:
    @settings(max_examples=200, deadline=None)
    @given(
        st.lists(st.integers(-3, 3), min_size=1, max_size=40).flatmap(
            lambda values: st.tuples(st.just(values), st.integers(1, len(values)))
        )
    )
    def test_mask_is_the_stable_choice_of_the_largest_magnitudes(
        self, case: tuple[list[int], int]
    ) -> None:
        values, keep = case
        supermask = Supermask((1, len(values)), keep, torch.Generator().manual_seed(0))
        with torch.no_grad():
            supermask.scores.copy_(torch.tensor([values], dtype=torch.float32))

        mask = supermask.mask()

        everything = {"w": torch.ones(1, len(values), dtype=torch.bool)}
        scores = {"w": supermask.scores.detach().abs()}
        want = prune(scores, everything, [Group(("w",), keep)], Blocks(1, 1))["w"]
        assert torch.equal(mask, want)
        assert int(mask.sum()) == keep

    @by_case
    @pytest.mark.parametrize("fraction", [0.07, 0.5, 1.0])
    def test_every_layer_keeps_its_share_before_and_after_training(
        self, factory: Callable[[], nn.Module], data: Callable[[], Data], fraction: float
    ) -> None:
        model = add_supermasks(factory(), fraction)
        before = read_supermasks(model)
        train(model, data(), Training(RECIPE))
        after = read_supermasks(model)

        for first, second in zip(before.layers(), after.layers(), strict=True):
            assert first.kept == second.kept == round(fraction * math.prod(first.shape))
        changed = any(not torch.equal(after.masks[n], mask) for n, mask in before.masks.items())
        assert changed == (fraction < 1)

    def test_fractions_by_name_are_fractions_kept(self) -> None:
        model = add_supermasks(network(), {"0": 0.25, "*": 0.75})

        assert [layer.density for layer in read_supermasks(model).layers()] == [0.25, 0.75]


class TestFreezing:
    @by_case
    @pytest.mark.parametrize("optimiser", ["sgd", "adam", "adamw"])
    def test_no_weight_bias_or_normalisation_ever_changes(
        self, factory: Callable[[], nn.Module], data: Callable[[], Data], optimiser: str
    ) -> None:
        model = add_supermasks(factory(), 0.4)
        first = frozen(model)
        seen: list[bool] = []

        def observe(iteration: int, shown: nn.Module) -> None:
            seen.append(all(torch.equal(first[n], v) for n, v in frozen(shown).items()))

        recipe = Recipe.from_json(RECIPE.to_json())
        how = Training(
            Recipe(**{**vars(recipe), "optimiser": optimiser, "lr": 0.05}), observe=observe
        )
        train(model, data(), how)

        assert seen == [True] * (RECIPE.iterations + 1)

    def test_scores_are_all_that_is_trained(self) -> None:
        model = add_supermasks(conv_net(), 0.4)

        trained = [name for name, p in model.named_parameters() if p.requires_grad]

        assert trained == [f"{n}.parametrizations.weight.0.scores" for n in ("0", "3", "6")]

    def test_biases_are_zero_and_batch_norm_only_normalises(self) -> None:
        model = network()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(3.0)

        state = read_supermasks(add_supermasks(model, 0.4)).weights

        assert not state["0.bias"].any()
        assert not state["1.bias"].any()
        assert bool((state["1.weight"] == 1).all())

    def test_a_layer_with_other_parameters_is_refused(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))

        with pytest.raises(errors.OptionError, match=r"parameters 1\.weight, 1\.bias"):
            add_supermasks(model)


class TestGradient:
    def test_goes_straight_through_the_choice_to_the_scores(self) -> None:
        layer = add_supermasks(nn.Linear(5, 4, bias=False), 0.3)
        x = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
        used: Any = layer.weight
        used.retain_grad()
        loss = (F.linear(x, used) ** 3).sum()
        loss.backward()

        parametrization: Any = layer.parametrizations.weight
        scores, weight = parametrization[0].scores, parametrization.original
        want = used.grad * weight * scores.sign()
        assert torch.equal(scores.grad, want)
        assert bool(scores.grad[~parametrization[0].mask()].any()), "unused edges learn too"
        assert weight.grad is None

    def test_an_edge_whose_use_would_lower_the_loss_pops_up(self) -> None:
        layer = add_supermasks(nn.Linear(2, 1, bias=False), 0.5, seed=0)
        parametrization: Any = layer.parametrizations.weight
        with torch.no_grad():
            parametrization.original.copy_(torch.tensor([[1.0, 1.0]]))
            parametrization[0].scores.copy_(torch.tensor([[0.2, 0.1]]))
        optimiser = torch.optim.SGD([parametrization[0].scores], lr=0.5)

        # The target is the second input alone, and the first edge is in use.
        x = torch.tensor([[1.0, 1.0], [-1.0, 1.0]])
        for _ in range(3):
            optimiser.zero_grad()
            F.mse_loss(layer(x)[:, 0], x[:, 1]).backward()
            optimiser.step()

        assert parametrization[0].mask().tolist() == [[False, True]]


class TestWeights:
    @pytest.mark.parametrize("scaled", [False, True])
    def test_signed_constants_have_kaimings_deviation(self, scaled: bool) -> None:
        layer: Any = add_supermasks(nn.Conv2d(16, 64, 3), 0.25, scaled=scaled)
        drawn = layer.parametrizations.weight.original

        deviation = math.sqrt(2 / (144 * (0.25 if scaled else 1.0)))
        assert torch.equal(drawn.abs(), torch.full_like(drawn, deviation))
        assert float(drawn.sign().mean()) == pytest.approx(0, abs=0.05)

    def test_kaiming_normal_weights_have_it_too(self) -> None:
        layer: Any = add_supermasks(nn.Conv2d(16, 64, 3), 0.25, weights="kaiming_normal")

        drawn = layer.parametrizations.weight.original
        assert float(drawn.std()) == pytest.approx(math.sqrt(2 / 144), rel=0.03)

    def test_a_seed_draws_the_same_again_and_another_differs(self) -> None:
        first, again, other = (
            add_supermasks(network(), 0.5, seed=seed).state_dict() for seed in (1, 1, 2)
        )

        assert all(torch.equal(first[name], value) for name, value in again.items())
        names = [name for name in first if name.endswith(("original", "scores"))]
        assert not any(torch.equal(first[name], other[name]) for name in names)


class TestTicket:
    @by_case
    @pytest.mark.parametrize("weights", FROZEN_WEIGHTS)
    def test_computes_what_the_masked_network_computes(
        self, factory: Callable[[], nn.Module], data: Callable[[], Data], weights: str,
        tmp_path: Path,
    ) -> None:  # fmt: skip
        model = add_supermasks(factory(), 0.4, weights=weights)
        train(model, data(), Training(RECIPE))
        ticket = read_supermasks(model)
        ticket.save(tmp_path / "ticket.safetensors")

        plain = load_ticket(tmp_path / "ticket.safetensors").apply(factory()).eval()

        inputs = data().test[0]
        assert torch.equal(plain(inputs), model.eval()(inputs))

    def test_signed_constants_take_a_bit_a_kept_weight_and_a_scale(self, tmp_path: Path) -> None:
        layer = add_supermasks(nn.Linear(512, 256, bias=False), 0.5)
        ticket = read_supermasks(layer)

        ticket.save(tmp_path / "ticket.safetensors")

        size = (tmp_path / "ticket.safetensors").stat().st_size
        assert size < 512 * 256 / 8 * 1.5 + 1000

    def test_reading_leaves_the_masked_network_alone(self) -> None:
        model = add_supermasks(network(), 0.4)
        before = copy.deepcopy(model.state_dict())

        read_supermasks(model)

        assert list(model.state_dict()) == list(before)
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())

    @by_case
    def test_conversion_bakes_supermasks_and_leaves_the_network_alone(
        self, factory: Callable[[], nn.Module], data: Callable[[], Data]
    ) -> None:
        model = add_supermasks(factory(), 0.1).eval()
        inputs = data().test[0]
        before = model(inputs)

        converted = sparselt.convert(model, format="csr")

        assert torch.equal(model(inputs), before)
        assert torch.allclose(converted(inputs), before, rtol=1e-4, atol=1e-5)
        assert all(
            parameter.requires_grad for n, parameter in model.named_parameters() if "scores" in n
        )

    def test_a_plain_network_has_none_to_read(self) -> None:
        with pytest.raises(errors.OptionError, match="add_supermasks first"):
            read_supermasks(network())


class TestFindSupermask:
    def test_learns_without_training_a_weight(self) -> None:
        recipe = Recipe(network="t", data="b", lr=0.02, batch=20, iterations=150, evaluate_every=50)
        ticket = find_supermask(network, blobs(), recipe, 0.4)
        untrained = read_supermasks(add_supermasks(network(), 0.4, seed=recipe.seed))

        assert ticket.meta["metrics"]["test_accuracy"] > 0.8
        assert ticket.meta["edge_popup"]["keep_fraction"] == 0.4
        both = {n: ticket.masks[n] & mask for n, mask in untrained.masks.items()}
        for name, mask in both.items():
            assert torch.equal(ticket.weights[name][mask], untrained.weights[name][mask])
            assert not torch.equal(ticket.masks[name], untrained.masks[name])

    def test_a_killed_search_goes_on_to_the_same_ticket(self, tmp_path: Path) -> None:
        def kill(step: Step) -> None:
            if step.iteration == 20:
                raise KilledError

        masked = add_supermasks(network(), 0.4)
        begun = copy.deepcopy(masked)
        train(masked, blobs(), Training(RECIPE))
        file = tmp_path / "checkpoint.pt"
        with pytest.raises(KilledError):
            train(
                begun,
                blobs(),
                Training(RECIPE, progress=kill, checkpoint=file, checkpoint_seconds=0),
            )
        resumed = add_supermasks(network(), 0.4)
        train(resumed, blobs(), Training(RECIPE, checkpoint=file))

        want, got = read_supermasks(masked), read_supermasks(resumed)
        assert all(torch.equal(mask, got.masks[name]) for name, mask in want.masks.items())
        assert all(torch.equal(value, got.weights[name]) for name, value in want.weights.items())

    def test_accuracy_against_the_fraction_kept_is_a_hill(self) -> None:
        pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
        digits = load_data("digits")
        recipe = Recipe(data="digits", lr=3e-3, iterations=150, evaluate_every=150)

        low, middle, high = (
            find_supermask("lenet_300_100", digits, recipe, share).meta["metrics"]
            for share in (0.01, 0.5, 0.99)
        )

        assert middle["test_accuracy"] > 0.85
        assert low["test_accuracy"] < middle["test_accuracy"] - 0.1
        assert high["test_accuracy"] < middle["test_accuracy"] - 0.1

    def test_repeats_to_the_bit(self) -> None:
        first, again = (find_supermask(network(), blobs(), RECIPE, {"*": 0.3}) for _ in range(2))

        assert first.meta == again.meta
        assert all(torch.equal(value, again.weights[name]) for name, value in first.weights.items())

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"keep_fraction": 0.0}, "kept, not removed"),
            ({"keep_fraction": 1.2}, "above 0 and up to 1"),
            ({"keep_fraction": 0.001}, "kept weights of a layer"),
            ({"keep_fraction": {"0": 0.5}}, "matches '3'"),
            ({"weights": "uniform"}, "signed_constant, kaiming_normal"),
        ],
    )
    def test_says_what_is_wrong(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(errors.OptionError, match=message):
            find_supermask(network, blobs(), RECIPE, **options)

    def test_scores_that_diverged_are_an_error(self) -> None:
        model = add_supermasks(nn.Linear(4, 2), 0.5)
        parametrization: Any = model.parametrizations
        with torch.no_grad():
            parametrization.weight[0].scores.fill_(torch.nan)

        with pytest.raises(errors.DataError, match="NaN"):
            read_supermasks(model)
