# SPDX-License-Identifier: Apache-2.0
"""Records, verdicts, advice, replicates and progress: what is said about a search."""

from __future__ import annotations

import csv
from dataclasses import fields, replace
from pathlib import Path

import pytest
from lottery_cases import RECIPE, blobs, network, one_thread  # noqa: F401

from sparselt import errors
from sparselt.lottery import Progress, Recipe, Step, run_levels
from sparselt.lottery.advice import Advice, advise
from sparselt.lottery.experiment import Experiment, run_experiment
from sparselt.lottery.progress import Tally, progress_bars
from sparselt.lottery.record import Row, read_record, rows_of, write_record
from sparselt.lottery.replicates import run_replicates
from sparselt.lottery.stability import Stability
from sparselt.lottery.verdict import judge


def searched(seed: int = 0) -> list[Row]:
    levels = run_levels(
        network, blobs(), replace(RECIPE, seed=seed), controls=("reinit", "reinit#2")
    )
    return rows_of(levels, seed)


def made(
    accuracies: dict[str, list[list[float]]],
    densities: tuple[float, ...] = (1.0, 0.3, 0.05),
    early_stop: int = 500,
) -> list[Row]:
    """Rows from test accuracies by arm, level and seed."""
    return [
        Row(seed, level, arm, densities[level], accuracy, 0.9, 1.0, early_stop, accuracy, 1.0)
        for arm, by_level in accuracies.items()
        for level, by_seed in enumerate(by_level)
        for seed, accuracy in enumerate(by_seed)
    ]


DENSE = [0.980, 0.981, 0.979]
GOOD = {
    "ticket": [DENSE, DENSE, DENSE],
    "reinit": [[], [0.97] * 3, [0.96] * 3],
    "shuffle": [[], [0.97] * 3, [0.95] * 3],
}


class TestRecord:
    def test_rows_name_level_arm_and_seed(self) -> None:
        rows = searched(seed=3)

        arms = [(row.level, row.arm) for row in rows]
        assert arms == [(0, "ticket")] + [
            (level, arm) for level in (1, 2, 3) for arm in ("ticket", "reinit", "reinit#2")
        ]
        assert {row.seed for row in rows} == {3}
        assert [row.kind for row in rows[1:4]] == ["ticket", "reinit", "reinit"]
        assert rows[1].density == rows[2].density < rows[0].density == 1.0

    def test_json_round_trip_is_exact_and_the_csv_says_the_same(self, tmp_path: Path) -> None:
        rows = searched()

        write_record(rows, RECIPE, tmp_path / "record.json")

        assert read_record(tmp_path / "record.json") == (rows, RECIPE)
        with (tmp_path / "record.csv").open() as file:
            table = list(csv.DictReader(file))
        assert list(table[0]) == [item.name for item in fields(Row)]
        assert [float(line["test_accuracy"]) for line in table] == [r.test_accuracy for r in rows]

    @pytest.mark.parametrize("text", ["", "[]", '{"rows": [{"seed": 1}]}', '{"rows": []}'])
    def test_a_file_that_is_no_record_is_refused(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "r.json").write_text(text)
        with pytest.raises(errors.DataError, match=r"r\.json"):
            read_record(tmp_path / "r.json")


class TestVerdict:
    def test_a_small_ticket_that_holds_and_beats_both_controls_wins(self) -> None:
        large, small = judge(made(GOOD))

        assert small.wins
        assert not large.wins
        assert large.reasons == ("keeps 30.0 % of the weights, more than 10 %",)
        assert small.controls["reinit"].mean == pytest.approx(0.96)
        assert small.dense.width == pytest.approx(0.002)

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"ticket": [DENSE, DENSE, [0.977, 0.978, 0.976]]}, "points below the dense"),
            ({"reinit": [[], [0.97] * 3, [0.979] * 3]}, "leads the reinit control by 0.10"),
            ({"shuffle": [[], [0.97] * 3, [0.99, 0.9, 0.95]]}, "spread of 9.00"),
            ({"ticket": [DENSE[:2], DENSE[:2], DENSE[:2]]}, "2 of at least 3 seeds"),
            ({"shuffle": []}, "no shuffle control was run"),
        ],
    )
    def test_each_part_of_the_rule_can_fail_alone(
        self, change: dict[str, list[list[float]]], reason: str
    ) -> None:
        small = judge(made({**GOOD, **change}))[1]

        assert not small.wins
        assert any(reason in text for text in small.reasons), small.reasons

    def test_a_loss_within_the_margin_is_no_loss(self) -> None:
        rows = made({**GOOD, "ticket": [[0.98] * 3, [0.98] * 3, [0.9785] * 3]})
        assert judge(rows)[1].wins
        assert not judge(rows, margin=0.001)[1].wins

    def test_without_a_dense_level_nothing_is_judged(self) -> None:
        with pytest.raises(errors.DataError, match="dense"):
            judge([row for row in made(GOOD) if row.level])


LOSING = {
    "ticket": [DENSE, DENSE, [0.95, 0.951, 0.949]],
    "reinit": [[], [0.97] * 3, [0.95, 0.949, 0.951]],
    "shuffle": [[], [0.97] * 3, [0.95, 0.949, 0.951]],
}
PLAIN = Recipe(iterations=1000, levels=2)


def proposals(rows: list[Row], recipe: Recipe = PLAIN, case: Stability | None = None) -> list[str]:
    return [advice.proposal for advice in advise(rows, recipe, case)]


class TestAdvice:
    def test_a_ticket_that_wins_needs_none(self) -> None:
        assert advise(made(GOOD), PLAIN) == []

    def test_a_ticket_no_better_than_its_controls_should_rewind_later_and_warm_up(self) -> None:
        found = advise(made(LOSING), PLAIN)

        assert [advice.proposal for advice in found][:2] == [
            "rewind to iteration 20", "warm up over 100 iterations",
        ]  # fmt: skip
        assert found[0].recipe == replace(PLAIN, rewind=20)
        assert "5.0 %" in found[0].problem
        assert "3.00 points" in found[0].problem

    def test_measured_stability_decides_over_guesses(self) -> None:
        shaky = Stability(0, 1.0, (0.02, 0.2, 0.02), (0.0,) * 3, "none")
        calm = Stability(0, 1.0, (0.02, 0.02, 0.02), (0.0,) * 3, "none")

        assert "rewind to iteration 20" in proposals(made(LOSING), PLAIN, shaky)
        assert "instability 18.0 %" in advise(made(LOSING), PLAIN, shaky)[0].problem
        assert not any("rewind" in text for text in proposals(made(LOSING), PLAIN, calm))

    def test_a_sudden_fall_asks_for_smaller_steps(self) -> None:
        advice = next(a for a in advise(made(LOSING), PLAIN) if "a round" in a.proposal)

        assert advice.proposal == "prune 10 % a round instead of 20 %"
        assert advice.recipe == replace(PLAIN, rate=0.1, conv_rate=0.1, levels=4)

    def test_one_shot_and_blocks_are_questioned(self) -> None:
        recipe = replace(PLAIN, schedule="one_shot", structure="16x16")
        said = " ".join(proposals(made(LOSING), recipe))

        assert "prune in 2 rounds" in said
        assert "smaller units" in said

    def test_a_dense_network_that_still_improves_is_trained_longer_first(self) -> None:
        rows = [replace(row, train_accuracy=0.9) for row in made(LOSING, early_stop=1000)]

        assert proposals(rows)[0] == "train 2000 iterations"

    def test_few_seeds_missing_controls_and_large_tickets_are_named(self) -> None:
        rows = made({"ticket": [[0.98], [0.98], [0.98]]})
        said = proposals(rows)

        assert any("at least 3" in text for text in said)
        assert any("without a control" in text for text in said)
        assert any("more rounds" in text for text in said)

    def test_every_proposed_recipe_differs_and_advice_reads_as_a_sentence(self) -> None:
        for advice in advise(made(LOSING), PLAIN):
            assert advice.recipe is None or advice.recipe != PLAIN
            assert str(advice) == f"{advice.problem}: {advice.proposal}"
        assert str(Advice("a", "b")) == "a: b"


class TestReplicates:
    def test_processes_give_the_rows_that_this_process_would(self, tmp_path: Path) -> None:
        recipe = replace(RECIPE, levels=1, iterations=10)
        seen: set[int] = set()

        rows = run_replicates(
            network, blobs(), recipe, (0, 1), folder=tmp_path,
            progress=lambda seed, now: seen.add(seed),
        )  # fmt: skip

        want = []
        for seed in (0, 1):
            want += rows_of(run_levels(network, blobs(), replace(recipe, seed=seed)), seed)
        assert [replace(row, seconds=0) for row in rows] == [replace(r, seconds=0) for r in want]
        assert seen == {0, 1}
        assert len(list(tmp_path.iterdir())) == 2

    def test_a_failure_in_a_process_is_raised_here(self) -> None:
        with pytest.raises(errors.OptionError, match="criterion"):
            run_replicates(network, blobs(), replace(RECIPE, criterion="luck", iterations=2), (0,))

    @pytest.mark.parametrize("options", [{"seeds": ()}, {"seeds": (1, 1)}, {"processes": 0}])
    def test_options_that_mean_nothing_are_refused(self, options: dict[str, object]) -> None:
        with pytest.raises(errors.OptionError):
            run_replicates(network, blobs(), RECIPE, **{"seeds": (0,), **options})  # type: ignore


class TestProgress:
    def test_the_share_rises_from_0_to_1_and_never_falls(self) -> None:
        shares, tally = [], Tally(controls=1)

        def report(now: Progress) -> None:
            shares.append(tally.share(now))

        list(run_levels(network, blobs(), RECIPE, controls=("reinit",), progress=report))

        assert shares == sorted(shares)
        assert shares[0] == pytest.approx(1 / 21)
        assert shares[-1] == pytest.approx(1.0)

    def test_a_resumed_run_starts_where_it_stopped(self) -> None:
        now = Progress(level=2, levels=4, arm="ticket", step=Step(5, 10, 0.9))

        assert Tally(controls=1).share(now) == pytest.approx(3.5 / 7)

    def test_bars_show_level_arm_step_and_accuracy(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with progress_bars() as report:
            report(7, Progress(2, 4, "ticket", Step(500, 600, 0.987)))

        shown = " ".join(capsys.readouterr().out.split())
        for part in ("seed 7", "level 2/3", "ticket", "500/600", "98.7 %"):
            assert part in shown


class TestExperiment:
    def test_one_call_leaves_record_picture_verdicts_and_advice(self, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib", reason="pictures need matplotlib")
        recipe = replace(RECIPE, levels=2, iterations=10)

        found = run_experiment(
            recipe, tmp_path, seeds=(0,), controls=("reinit",), network=network, data=blobs()
        )

        stem = recipe.folder_name()
        assert [path.name for path in found.files] == [
            f"{stem}.{e}" for e in ("json", "csv", "png")
        ]
        assert all(path.stat().st_size > 100 for path in found.files)
        assert read_record(found.files[0]) == (found.rows, recipe)
        assert [verdict.level for verdict in found.verdicts] == [1, 2]
        assert found.smallest_win is None
        assert found.advice
        assert (tmp_path / "runs" / stem / "level_02" / "ticket.safetensors").exists()

    def test_the_smallest_win_is_the_one_of_least_density(self) -> None:
        rows = made(GOOD, densities=(1.0, 0.08, 0.05))
        found = Experiment(rows, judge(rows), [], [])

        assert found.smallest_win is not None
        assert found.smallest_win.level == 2
