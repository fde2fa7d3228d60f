# SPDX-License-Identifier: Apache-2.0
"""Masks before training: scores that are what their papers say, exact counts, no collapse."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from lottery_cases import one_thread  # noqa: F401
from torch import Tensor, nn
from torch.nn import functional as F

from sparselt import errors
from sparselt.lottery import CRITERIA, Data, Recipe, Training, find_ticket, train
from sparselt.lottery.criteria import Scores, Subject
from sparselt.lottery.initialisation import prune_at_initialisation
from sparselt.lottery.masks import Group, full_masks, prune
from sparselt.lottery.saliency import grasp, snip, synflow
from sparselt.lottery.structures import Blocks

BEFORE_TRAINING = [name for name, criterion in CRITERIA.items() if criterion.before_training]
BUDGETS = ["global", "uniform", "erk"]


def blobs(features: int = 6, classes: int = 3) -> Data:
    source = torch.Generator().manual_seed(0)
    y = torch.arange(120) % classes
    x = torch.randn(120, features, generator=source)
    x[:, :classes] += 2.0 * torch.eye(classes)[y]
    return Data((x[:60], y[:60]), (x[60:90], y[60:90]), (x[90:], y[90:]), classes)


def images() -> Data:
    source = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 1, 6, 6, generator=source), torch.arange(60) % 3
    return Data((x, y), (x, y), (x, y), classes=3)


def chain(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def conv_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Dropout(0.5),
        nn.Linear(54, 3),
    )  # fmt: skip


def built(factory: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return factory()


def subject(model: nn.Module, data: Data, seed: int = 0) -> Subject:
    masks = full_masks(model, Recipe())
    start = {name: model.get_parameter(name).detach().clone() for name in masks}
    return Subject(model, start, masks, data, torch.Generator().manual_seed(seed))


def balanced(data: Data, per_class: int) -> Data:
    """The first examples of each class only, so that a sample of that size is all there is."""
    x, y = data.train
    places = torch.cat([(y == number).nonzero()[:per_class, 0] for number in range(data.classes)])
    return replace(data, train=(x[places], y[places]))


def scaled_one_weight(model: nn.Module, name: str, place: int, factor: float) -> nn.Module:
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.get_parameter(name).view(-1)[place] *= factor
    return changed


class TestSnip:
    def test_is_the_change_of_the_loss_as_a_weight_is_scaled(self) -> None:
        data = balanced(blobs(), 10)
        data = replace(data, train=(data.train[0].double(), data.train[1]))
        model = built(lambda: chain(6, 8, 3)).double()

        scores = snip(subject(model, data))

        for name, place in (("0.weight", 5), ("0.weight", 40), ("2.weight", 11)):
            step = 1e-6
            with torch.no_grad():
                up, down = (
                    float(F.cross_entropy(changed(data.train[0]), data.train[1]))
                    for changed in (
                        scaled_one_weight(model, name, place, 1 + step),
                        scaled_one_weight(model, name, place, 1 - step),
                    )
                )
            slope = abs(up - down) / (2 * step)
            assert float(scores[name].view(-1)[place]) == pytest.approx(slope, rel=1e-4, abs=1e-9)

    def test_looks_at_ten_examples_of_each_class_and_no_other_split(self) -> None:
        seen: list[Tensor] = []
        data, model = blobs(), built(lambda: chain(6, 8, 3))
        model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))

        snip(subject(model, data))

        places = [int((data.train[0] == row).all(1).nonzero()) for row in torch.cat(seen)]
        assert len(set(places)) == 30
        assert torch.bincount(data.train[1][places]).tolist() == [10, 10, 10]

    def test_a_class_with_fewer_examples_gives_all_it_has(self) -> None:
        seen: list[int] = []
        model = built(lambda: chain(6, 8, 3))
        model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))

        snip(subject(model, balanced(blobs(), 4)))

        assert seen == [12]


class TestGrasp:
    def test_is_half_the_change_of_the_gradient_norm_as_a_weight_is_scaled(self) -> None:
        data = balanced(blobs(), 10)
        data = replace(data, train=(data.train[0].double(), data.train[1]))
        model = built(lambda: chain(6, 8, 3)).double()

        scores = grasp(subject(model, data))

        def squared_norm(changed: nn.Module) -> float:
            weights = [changed.get_parameter(name) for name in scores]
            loss = F.cross_entropy(changed(data.train[0]) / 200, data.train[1])
            return sum(float((g**2).sum()) for g in torch.autograd.grad(loss, weights))

        for name, place in (("0.weight", 5), ("0.weight", 40), ("2.weight", 11)):
            step = 1e-5
            up = squared_norm(scaled_one_weight(model, name, place, 1 + step))
            down = squared_norm(scaled_one_weight(model, name, place, 1 - step))
            slope = (up - down) / (2 * step) / 2
            assert float(scores[name].view(-1)[place]) == pytest.approx(slope, rel=1e-3, abs=1e-14)

    def test_keeps_the_weights_whose_removal_would_lower_the_gradient_norm_most(self) -> None:
        model = built(lambda: chain(6, 8, 3))

        scores = grasp(subject(model, blobs()))

        flat = torch.cat([score.flatten() for score in scores.values()])
        assert bool((flat > 0).any())
        assert bool((flat < 0).any())
        masks = prune(scores, full_masks(model, Recipe()), [Group(tuple(scores), 20)], Blocks(1, 1))
        kept = torch.cat([scores[name][mask] for name, mask in masks.items()])
        assert float(kept.min()) >= float(flat.sort(descending=True).values[19])


class TestSynflow:
    @pytest.mark.parametrize(
        ("factory", "data"),
        [(lambda: chain(6, 16, 12, 3), blobs()), (conv_net, images())],
        ids=["linear", "conv"],
    )
    def test_every_layer_holds_the_same_sum(
        self, factory: Callable[[], nn.Module], data: Data
    ) -> None:
        scores = synflow(subject(built(factory), data))

        sums = [float(score.double().sum()) for score in scores.values()]
        assert sums == pytest.approx([sums[0]] * len(sums), rel=1e-5)
        assert sums[0] > 0

    def test_every_unit_takes_in_as_much_as_it_gives_out(self) -> None:
        scores = synflow(subject(built(lambda: chain(6, 16, 12, 3)), blobs()))

        assert torch.allclose(scores["0.weight"].sum(1), scores["2.weight"].sum(0), rtol=1e-5)
        assert torch.allclose(scores["2.weight"].sum(1), scores["4.weight"].sum(0), rtol=1e-5)

    def test_does_not_depend_on_data_signs_or_biases(self) -> None:
        model, other = built(lambda: chain(6, 8, 3)), built(lambda: chain(6, 8, 3))
        with torch.no_grad():
            for name, parameter in other.named_parameters():
                parameter.neg_() if name.endswith("weight") else parameter.add_(3.0)
        noise = blobs()
        noise = replace(noise, train=(torch.full_like(noise.train[0], torch.nan), noise.train[1]))

        first, second = synflow(subject(model, blobs())), synflow(subject(other, noise))

        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_stays_finite_where_products_leave_the_range_of_float32(self) -> None:
        model = built(lambda: chain(6, *[32] * 30, 3))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(60.0)

        scores = synflow(subject(model, blobs()))

        assert all(bool(torch.isfinite(score).all()) for score in scores.values())
        assert max(float(score.max()) for score in scores.values()) == 1.0

    def test_no_layer_collapses_at_a_thousandth_where_other_scores_do(self) -> None:
        def factory() -> nn.Module:
            return chain(32, 60, 60, 60, 60, 10)

        data = blobs(32, 10)
        emptied = {
            name: [
                layer.name
                for layer in prune_at_initialisation(factory, data, name, 0.001).layers()
                if not layer.kept
            ]
            for name in ("synflow", "magnitude_at_start", "snip", "grasp")
        }
        ticket = prune_at_initialisation(factory, data, "synflow", 0.001)
        model = ticket.apply(factory())
        with torch.no_grad():
            flows = copy.deepcopy(model).double()
            for parameter in flows.parameters():
                parameter.abs_()
            for name, parameter in flows.named_parameters():
                if name.endswith("bias"):
                    parameter.zero_()
            through = float(flows(torch.ones(1, 32).double()).sum())

        assert emptied["synflow"] == []
        assert through > 0
        assert emptied["magnitude_at_start"]
        assert ticket.density == pytest.approx(0.001, abs=5e-5)

    def test_takes_a_hundred_steps_each_a_little_smaller(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        kept: list[int] = []

        def watched(shown: Subject) -> Scores:
            kept.append(sum(int(mask.sum()) for mask in shown.masks.values()))
            return synflow(shown)

        monkeypatch.setitem(CRITERIA, "synflow", replace(CRITERIA["synflow"], score=watched))
        ticket = prune_at_initialisation(lambda: chain(6, 30, 3), blobs(), "synflow", 0.1)

        assert len(kept) == 100
        wanted = [270 * 0.1 ** (step / 100) for step in range(100)]
        assert kept == pytest.approx(wanted, abs=0.51)
        assert ticket.density == 0.1


class TestScores:
    @pytest.mark.parametrize("score", [snip, grasp, synflow])
    def test_leave_the_network_and_the_global_generator_as_they_were(
        self, score: Callable[[Subject], Scores]
    ) -> None:
        model = built(conv_net).train()
        before = copy.deepcopy(model.state_dict())
        random_state = torch.get_rng_state()

        first, second = score(subject(model, images())), score(subject(model, images()))

        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert all(module.training for module in model.modules())
        assert all(parameter.grad is None for parameter in model.parameters())
        assert torch.equal(random_state, torch.get_rng_state())
        assert all(torch.equal(first[name], second[name]) for name in first)

    @pytest.mark.parametrize("score", [snip, grasp, synflow])
    def test_of_pruned_weights_are_zero(self, score: Callable[[Subject], Scores]) -> None:
        model = built(lambda: chain(6, 8, 3))
        with torch.no_grad():
            model.get_parameter("0.weight")[2:4] = 0.0

        assert not score(subject(model, blobs()))["0.weight"][2:4].any()


class TestPruneAtInitialisation:
    @pytest.mark.parametrize("criterion", BEFORE_TRAINING)
    @pytest.mark.parametrize("budget", BUDGETS)
    def test_keeps_exactly_the_asked_share(self, criterion: str, budget: str) -> None:
        ticket = prune_at_initialisation(conv_net, images(), criterion, 0.3, budget=budget)

        assert sum(layer.kept for layer in ticket.layers()) == round(0.3 * (36 + 216 + 162))

    @pytest.mark.parametrize("criterion", BEFORE_TRAINING)
    def test_is_the_same_every_time_and_another_with_another_seed(self, criterion: str) -> None:
        def masks(seed: int) -> dict[str, Tensor]:
            return prune_at_initialisation(
                lambda: chain(6, 20, 3), blobs(), criterion, 0.3, seed=seed
            ).masks

        first, again, other = masks(1), masks(1), masks(2)
        assert all(torch.equal(mask, again[name]) for name, mask in first.items())
        assert any(not torch.equal(mask, other[name]) for name, mask in first.items())

    def test_equal_scores_are_kept_in_order(self) -> None:
        model = chain(6, 8, 3)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.5)

        ticket = prune_at_initialisation(model, blobs(), "magnitude_at_start", 0.5)

        flat = torch.cat([mask.flatten() for mask in ticket.masks.values()])
        assert flat.tolist() == [True] * 36 + [False] * 36

    def test_weights_are_the_initial_ones_of_a_search_with_the_same_seed(self) -> None:
        recipe = Recipe(network="n", data="d", seed=3, iterations=1, levels=0)
        searched = find_ticket(lambda: chain(6, 8, 3), blobs(), recipe)

        ticket = prune_at_initialisation(lambda: chain(6, 8, 3), blobs(), "snip", 0.5, seed=3)

        for name, mask in ticket.masks.items():
            assert torch.equal(ticket.weights[name][mask], searched.initial[name][mask])
            assert torch.equal(ticket.weights[name], ticket.initial[name])

    def test_ignored_layers_and_blocks_are_respected(self) -> None:
        ticket = prune_at_initialisation(
            lambda: chain(8, 16, 4), blobs(8, 4), "snip", 0.25, structure="4x1", ignore=("2",)
        )

        assert list(ticket.masks) == ["0.weight"]
        blocks = ticket.masks["0.weight"].reshape(4, 4, 8)
        assert bool((blocks.all(1) | ~blocks.any(1)).all())
        assert ticket.density == 0.25

    @pytest.mark.parametrize("criterion", BEFORE_TRAINING)
    def test_n_of_m_keeps_n_of_every_m_inputs_of_every_layer(self, criterion: str) -> None:
        ticket = prune_at_initialisation(
            lambda: chain(8, 16, 4), blobs(8, 4), criterion, 0.25, structure="1:4"
        )

        for mask in ticket.masks.values():
            groups = mask.reshape(len(mask), -1, 4)
            assert bool((groups.sum(-1) == 1).all())
        assert ticket.density == 0.25

    def test_n_of_m_at_a_ragged_edge_keeps_up_to_n(self) -> None:
        ticket = prune_at_initialisation(
            lambda: chain(6, 8, 3), blobs(), "snip", 0.25, structure="1:4"
        )

        assert ticket.masks["0.weight"].sum(1).tolist() == [2] * 8

    def test_a_module_is_copied_not_pruned(self) -> None:
        model = chain(6, 8, 3)
        before = copy.deepcopy(model.state_dict())

        prune_at_initialisation(model, blobs(), "synflow", 0.2)

        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())

    def test_the_ticket_trains_within_its_mask_and_survives_its_file(self, tmp_path) -> None:  # type: ignore[no-untyped-def]
        from sparselt.tickets import load_ticket

        ticket = prune_at_initialisation(lambda: chain(6, 16, 3), blobs(), "snip", 0.3)
        ticket.save(tmp_path / "ticket.safetensors")
        loaded = load_ticket(tmp_path / "ticket.safetensors")
        model = loaded.apply(chain(6, 16, 3))
        recipe = Recipe(network="n", data="d", lr=0.02, batch=20, iterations=60)

        outcome = train(model, blobs(), Training(recipe), loaded.masks)

        assert outcome.test_accuracy > 0.8
        for name, mask in ticket.masks.items():
            assert not model.get_parameter(name)[~mask].any()
        assert loaded.meta["initialisation"]["criterion"] == "snip"

    def test_the_same_criteria_serve_the_search(self) -> None:
        recipe = Recipe(
            network="n", data="d", iterations=5, batch=20, levels=1, rate=0.9, output_rate=0.9,
            schedule="one_shot", scope="global", criterion="synflow",
        )  # fmt: skip

        ticket = find_ticket(lambda: chain(6, 30, 3), blobs(), recipe)

        alone = prune_at_initialisation(lambda: chain(6, 30, 3), blobs(), "synflow", 0.1)
        assert all(torch.equal(mask, alone.masks[name]) for name, mask in ticket.masks.items())

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"structure": "2:4", "density": 0.1}, "density of 2:4: expected 2 / 4, got 0.1"),
            ({"structure": "2:4", "budget": "erk"}, "budget of 2:4: expected global"),
            ({"criterion": "magnitude"}, "before training"),
            ({"criterion": "nothing"}, "expected one of"),
            ({"budget": "fair"}, "expected one of global, uniform, erk"),
            ({"density": 1.5}, "from 0 to 1"),
        ],
    )
    def test_says_what_is_wrong(self, options: dict[str, object], message: str) -> None:
        wanted = {"criterion": "snip", "density": 0.5, **options}
        with pytest.raises(errors.OptionError, match=message):
            prune_at_initialisation(chain(6, 8, 3), blobs(), **wanted)  # type: ignore[arg-type]
