# SPDX-License-Identifier: Apache-2.0
"""The search: reset and rewinding to the bit, honest controls, resumption."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from lottery_cases import RECIPE, KilledError, blobs, network, one_thread  # noqa: F401
from torch import Tensor

from sparselt import errors
from sparselt.lottery import (
    CONTROLS,
    Level,
    Progress,
    Recipe,
    best_level,
    find_ticket,
    run_levels,
)
from sparselt.lottery.controls import Arm, Basis, _units, make_control
from sparselt.lottery.networks import build
from sparselt.lottery.recipes import RECIPES, recipe_of
from sparselt.lottery.seeds import derived_seed
from sparselt.lottery.structures import Blocks, NOfM
from sparselt.tickets import load_ticket


def original(recipe: Recipe) -> dict[str, Tensor]:
    return build(network, derived_seed(recipe.seed, "weights")).state_dict()


def run(recipe: Recipe = RECIPE, **options: object) -> list[Level]:
    return list(run_levels(network, blobs(), recipe, **options))  # type: ignore[arg-type]


class TestLevels:
    def test_every_level_starts_from_the_original_weights_to_the_bit(self) -> None:
        first = original(RECIPE)

        for level in run():
            for name, mask in level.ticket.masks.items():
                assert torch.equal(level.ticket.initial[name][mask], first[name][mask])
                assert not level.ticket.weights[name][~mask].any()

    def test_densities_follow_the_ladder_and_masks_are_nested(self) -> None:
        levels = run()

        want = [(round(96 * 0.6**n) + round(48 * 0.8**n)) / 144 for n in range(4)]
        assert [level.density for level in levels] == pytest.approx(want)
        for before, after in pairwise(levels):
            for name, mask in after.ticket.masks.items():
                assert not (mask & ~before.ticket.masks[name]).any()

    def test_each_mask_keeps_the_largest_trained_weights_of_the_level_before(self) -> None:
        levels = run()

        for before, after in pairwise(levels):
            for name, mask in after.ticket.masks.items():
                size = before.ticket.weights[name].abs()
                dropped = before.ticket.masks[name] & ~mask
                assert size[mask].min() >= size[dropped].max()

    def test_the_same_seed_gives_the_same_tickets_and_another_seed_others(self) -> None:
        first, again, other = run(), run(), run(replace(RECIPE, seed=1))

        for a, b in zip(first, again, strict=True):
            assert a.outcome == b.outcome
            assert all(torch.equal(m, b.ticket.masks[n]) for n, m in a.ticket.masks.items())
        name = "0.weight"
        assert not torch.equal(first[3].ticket.masks[name], other[3].ticket.masks[name])

    def test_a_module_starts_from_its_own_weights_and_is_left_as_it_was(self) -> None:
        module = network()
        before = {k: v.clone() for k, v in module.state_dict().items()}

        levels = list(run_levels(module, blobs(), replace(RECIPE, levels=1)))

        assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
        mask = levels[1].ticket.masks["0.weight"]
        assert torch.equal(levels[1].ticket.initial["0.weight"][mask], before["0.weight"][mask])

    def test_global_scope_keeps_the_same_total(self) -> None:
        recipe = replace(RECIPE, scope="global", output_rate=0.4)

        assert run(recipe)[3].density == pytest.approx(round(144 * 0.6**3) / 144)

    def test_one_shot_prunes_in_one_round_to_where_iterating_ends(self) -> None:
        levels = run(replace(RECIPE, schedule="one_shot"))

        assert len(levels) == 2
        assert levels[1].density == run()[3].density

    @pytest.mark.parametrize("control", ["shuffle", "random", "inverted"])
    def test_controls_of_n_of_m_tickets_are_n_of_m_too(self, control: str) -> None:
        for mask in make_control(control, basis(NOfM(2, 4))).masks.values():
            for row in mask:
                groups = torch.nn.functional.pad(row, (0, -len(row) % 4)).reshape(-1, 4)
                assert (groups.sum(1) == 2).all()

    @pytest.mark.parametrize("structure", ["4x1", "2x3", "filter"])
    def test_block_tickets_consist_of_whole_blocks(self, structure: str) -> None:
        from sparselt.lottery.structures import parse_structure

        blocks = parse_structure(structure)
        ticket = run(replace(RECIPE, structure=structure))[2].ticket

        for mask in ticket.masks.values():
            kept = blocks.collapse(mask)
            assert torch.equal(blocks.spread(kept, tuple(mask.shape)), mask)
        assert ticket.density < 1

    def test_criteria_before_training_score_the_starting_weights(self) -> None:
        recipe = replace(RECIPE, criterion="magnitude_at_start", levels=1)
        first = original(recipe)

        mask = run(recipe)[1].ticket.masks["0.weight"]

        size = first["0.weight"].abs()
        assert size[mask].min() >= size[~mask].max()


class TestRestarts:
    def test_rewinding_goes_back_to_the_weights_of_iteration_k_to_the_bit(self) -> None:
        recipe = replace(RECIPE, rewind=7)
        early = replace(RECIPE, iterations=7, levels=0)
        at_seven = next(iter(run_levels(network, blobs(), early))).ticket.weights

        for level in run(recipe)[1:]:
            for name, mask in level.ticket.masks.items():
                assert torch.equal(level.ticket.initial[name][mask], at_seven[name][mask])

    def test_rewinding_shortens_training_by_k_and_keeps_the_schedule(self) -> None:
        levels = run(replace(RECIPE, rewind=10, levels=1))

        assert [row[0] for row in levels[0].outcome.history] == [10, 20, 30]
        assert [row[0] for row in levels[1].outcome.history] == [20, 30]

    @pytest.mark.parametrize(
        ("restart", "looks"),
        [("lr_rewind", [20, 30]), ("fine_tune", [40, 50]), ("continue", [10, 20, 30])],
    )
    def test_restarts_from_trained_weights_keep_them(self, restart: str, looks: list[int]) -> None:
        levels = run(replace(RECIPE, restart=restart, rewind=10, levels=2))

        for before, after in pairwise(levels):
            for name, mask in after.ticket.masks.items():
                assert torch.equal(
                    after.ticket.initial[name][mask], before.ticket.weights[name][mask]
                )
            assert [row[0] for row in after.outcome.history] == looks

    def test_controls_that_start_over_train_as_long_as_the_dense_network(self) -> None:
        recipe = replace(RECIPE, restart="fine_tune", rewind=10, levels=1)
        level = run(recipe, controls=("reinit", "shuffle"))[1]

        assert [row[0] for row in level.controls["reinit"].history] == [10, 20, 30]
        assert [row[0] for row in level.controls["shuffle"].history] == [40, 50]

    def test_unknown_restarts_are_refused(self) -> None:
        with pytest.raises(errors.OptionError, match="fine_tune"):
            run(replace(RECIPE, restart="again"))


def basis(structure: Blocks = Blocks(1, 1), kept: float = 0.3) -> Basis:  # noqa: B008
    generator = torch.Generator().manual_seed(0)
    state = original(RECIPE)
    names = ("0.weight", "4.weight")
    masks = {}
    for name in names:
        shape = tuple(state[name].shape)
        height, width = structure.grid(shape)
        keep = structure.count([shape], min(kept, 0.999) if kept <= 1 else 1.0, 2)
        scores = torch.rand(height * width, generator=generator)
        masks[name] = structure.spread(structure.choose([scores], [shape], keep)[0], shape)
    return Basis(
        ticket=Arm(state, masks, 5),
        previous={name: torch.ones_like(mask) for name, mask in masks.items()},
        scores={name: state[name].abs() for name in names},
        original={name: value + 1 for name, value in state.items()},
        factory=network,
        structure=structure,
        seed=3,
    )


class TestControls:
    @pytest.mark.parametrize("structure", [Blocks(1, 1), Blocks(4, 1), Blocks(1, 0), NOfM(2, 4)])
    @pytest.mark.parametrize("name", CONTROLS)
    def test_every_control_keeps_the_counts_and_differs(self, name: str, structure: Blocks) -> None:
        case = basis(structure)

        arm = make_control(name, case)

        assert _units(arm.masks, structure) == _units(case.ticket.masks, structure)
        same_mask = all(torch.equal(m, case.ticket.masks[n]) for n, m in arm.masks.items())
        same_state = all(torch.equal(v, case.ticket.state[n]) for n, v in arm.state.items())
        assert not (same_mask and same_state)
        assert same_mask == (name in ("reinit", "noise", "reset"))
        assert same_state == (name in ("shuffle", "random", "inverted"))

    @pytest.mark.parametrize("name", ["shuffle", "inverted"])
    def test_layerwise_controls_keep_the_counts_of_every_layer(self, name: str) -> None:
        case = basis()
        for layer, mask in make_control(name, case).masks.items():
            assert int(mask.sum()) == int(case.ticket.masks[layer].sum())

    def test_a_shuffled_mask_is_really_shuffled(self) -> None:
        case = basis()
        first = make_control("shuffle", case).masks
        second = make_control("shuffle", replace(case, seed=4)).masks

        for name, mask in case.ticket.masks.items():
            assert not torch.equal(first[name], mask)
            assert not torch.equal(first[name], second[name])

    def test_inversion_keeps_the_smallest_of_the_level_before(self) -> None:
        case = basis()
        previous = {name: torch.ones_like(mask) for name, mask in case.previous.items()}
        previous["0.weight"][0] = False
        masks = make_control("inverted", replace(case, previous=previous)).masks

        scores, mask = case.scores["0.weight"], masks["0.weight"]
        assert not mask[0].any()
        assert scores[mask].max() <= scores[previous["0.weight"] & ~mask].min()

    def test_reinitialised_weights_come_from_the_same_distribution(self) -> None:
        case = basis()
        arm = make_control("reinit", case)

        old, new = case.ticket.state["0.weight"], arm.state["0.weight"]
        assert not (old == new).any()
        assert float(new.abs().max()) <= 1 / 6**0.5
        assert arm.start == 0

    def test_a_control_that_equals_its_ticket_is_refused(self) -> None:
        for name in ("shuffle", "random", "inverted"):
            with pytest.raises(errors.DataError, match="ticket itself"):
                make_control(name, basis(kept=2.0))
        constant = replace(basis(), factory=lambda: build(network, derived_seed(0, "weights")))
        with pytest.raises(errors.DataError, match="ticket itself"):
            make_control("reinit", constant)

    def test_controls_are_trained_at_every_level_but_the_dense_one(self) -> None:
        levels = run(controls=("reinit", "reinit#2", "shuffle"))

        assert not levels[0].controls
        for level in levels[1:]:
            assert list(level.controls) == ["reinit", "reinit#2", "shuffle"]
            assert level.controls["reinit"] != level.controls["reinit#2"]

    def test_unknown_controls_are_refused(self) -> None:
        with pytest.raises(errors.OptionError, match="shuffle"):
            run(controls=("nothing",))


def killer(at: int) -> Callable[[Progress], None]:
    """Raises at the ``at``-th report."""
    count = 0

    def report(progress: Progress) -> None:
        nonlocal count
        count += 1
        if count == at:
            raise KilledError

    return report


class TestResuming:
    @pytest.mark.parametrize("change", [{}, {"rewind": 15}, {"restart": "continue"}])
    def test_a_run_killed_again_and_again_ends_bitwise_as_an_uninterrupted_one(
        self, tmp_path: Path, change: dict[str, object]
    ) -> None:
        recipe = replace(RECIPE, optimiser="adam", **change)  # type: ignore[arg-type]
        want = run(recipe, controls=("reinit",))

        options = {"controls": ("reinit",), "folder": tmp_path, "checkpoint_seconds": 0.0}
        got, kills = None, 0
        while got is None and kills < 50:
            try:
                got = run(recipe, progress=killer(2), **options)
            except KilledError:
                kills += 1

        assert got is not None
        assert kills >= 7
        for a, b in zip(got, want, strict=True):
            assert a.outcome == b.outcome
            assert a.controls == b.controls
            for part in ("masks", "weights", "initial"):
                left, right = getattr(a.ticket, part), getattr(b.ticket, part)
                assert all(torch.equal(left[n], right[n]) for n in right)

    def test_a_finished_run_is_read_and_not_trained_again(self, tmp_path: Path) -> None:
        want = run(folder=tmp_path, controls=("reinit",))

        def refuse(progress: Progress) -> None:
            raise AssertionError("trained again")

        got = run(folder=tmp_path, controls=("reinit",), progress=refuse)

        assert [level.outcome for level in got] == [level.outcome for level in want]

    def test_controls_can_be_added_to_a_finished_run(self, tmp_path: Path) -> None:
        run(folder=tmp_path)
        arms = []

        levels = run(folder=tmp_path, controls=("random",), progress=lambda p: arms.append(p.arm))

        assert set(arms) == {"random"}
        assert all("random" in level.controls for level in levels[1:])

    def test_the_run_folder_is_named_by_the_hash_and_holds_the_recipe(self, tmp_path: Path) -> None:
        run(folder=tmp_path, controls=("reinit",))

        folder = tmp_path / RECIPE.folder_name()
        assert Recipe.from_json((folder / "recipe.json").read_text()) == RECIPE
        assert sorted(p.name for p in (folder / "level_02").iterdir()) == [
            "reinit.json", "ticket.json", "ticket.safetensors",
        ]  # fmt: skip
        assert load_ticket(folder / "level_02" / "ticket.safetensors").meta["level"] == 2

    def test_a_damaged_record_is_named(self, tmp_path: Path) -> None:
        run(folder=tmp_path)
        path = tmp_path / RECIPE.folder_name() / "level_01" / "ticket.json"
        path.write_text("{}")

        with pytest.raises(errors.TicketFileError, match=r"ticket\.json"):
            run(folder=tmp_path)


class TestFindTicket:
    def test_it_returns_the_last_level_with_a_row_for_each(self, tmp_path: Path) -> None:
        ticket = find_ticket(network, blobs(), RECIPE, controls=("reinit",))

        assert ticket.density == run()[3].density
        assert [row["level"] for row in ticket.meta["levels"]] == [0, 1, 2, 3]
        assert "reinit" in ticket.meta["levels"][3]["controls"]
        assert Recipe.from_values(ticket.meta["recipe"]) == RECIPE
        json.dumps(ticket.meta)
        ticket.save(tmp_path / "t.safetensors")
        model = network()
        load_ticket(tmp_path / "t.safetensors").apply(model)
        assert torch.equal(model[0].weight, ticket.weights["0.weight"])

    def test_progress_tells_level_arm_and_step(self) -> None:
        seen: list[Progress] = []

        find_ticket(network, blobs(), RECIPE, progress=seen.append, controls=("reinit",))

        assert {(p.level, p.arm) for p in seen} == {
            (level, arm)
            for level in range(4)
            for arm in ("ticket", "reinit")
            if level or arm == "ticket"
        }
        assert all(p.levels == 4 and 0 < p.step.iteration <= p.step.iterations for p in seen)

    def test_the_best_level_is_chosen_on_the_validation_split(self) -> None:
        levels = run()
        cases = [
            ([0.9, 0.9, 0.8999, 0.8], 2),
            ([0.9, 0.5, 0.5, 0.5], 0),
            ([0.9, 0.1, 0.1, 0.95], 3),
        ]
        for accuracies, want in cases:
            changed = [
                replace(
                    level,
                    outcome=replace(level.outcome, validation_accuracy=a, test_accuracy=1 - a),
                )
                for level, a in zip(levels, accuracies, strict=True)
            ]
            assert best_level(changed).index == want

    def test_unknown_criteria_and_structures_are_refused(self) -> None:
        for change in ({"criterion": "luck"}, {"structure": "round"}):
            with pytest.raises(errors.OptionError, match=next(iter(change))):
                run(replace(RECIPE, **change))


def test_named_recipes_name_known_networks_and_data() -> None:
    from sparselt.lottery import DATASETS, NETWORKS

    for name, recipe in RECIPES.items():
        assert recipe.network in NETWORKS
        assert recipe.data in DATASETS
        assert recipe_of(name) is recipe
    with pytest.raises(errors.OptionError, match="digits_lenet"):
        recipe_of("best")
