# SPDX-License-Identifier: Apache-2.0
"""What the command for finding tickets does with its flags."""

from __future__ import annotations

import argparse
import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lottery_cases import one_thread  # noqa: F401

from sparselt import errors, frontier
from sparselt.lottery import Recipe, load_data, recipe_of
from sparselt.lottery.command import add_flags, check_flags, find, recipe_from
from sparselt.lottery.methods import METHODS
from sparselt.lottery.networks import build, factory_of
from sparselt.lottery.record import read_record
from sparselt.lottery.stability_record import read_stability
from sparselt.tickets import load_ticket

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

SHORT = [
    "--recipe",
    "digits_lenet",
    "--iterations",
    "20",
    "--levels",
    "2",
    "--evaluate-every",
    "20",
]


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return parser.parse_args(words)


def test_a_recipe_comes_from_a_name_or_a_file_and_flags_change_it(tmp_path: Path) -> None:
    named = recipe_of("digits_conv")
    (tmp_path / "mine.json").write_text(named.to_json())

    assert recipe_from(parsed()) == Recipe()
    assert recipe_from(parsed("--recipe", "digits_conv")) == named
    assert recipe_from(parsed("--recipe", str(tmp_path / "mine.json"))) == named
    changed = recipe_from(parsed("--recipe", "digits_conv", "--levels", "3"))
    assert changed == replace(named, levels=3)


def test_the_commands_of_the_manual_parse() -> None:
    manual = Path(__file__).parent.parent / "docs" / "lottery.md"
    lines = [line for line in manual.read_text().splitlines() if line.startswith("sparselt find ")]
    assert len(lines) >= 5
    for line in lines:
        arguments = parsed(*shlex.split(line)[2:])
        check_flags(arguments)
        assert recipe_from(arguments) != Recipe()


def test_recipes_that_are_not_there_are_refused(tmp_path: Path) -> None:
    for start in ("nothing", str(tmp_path / "absent.json")):
        with pytest.raises(errors.OptionError, match="recipe"):
            recipe_from(parsed("--recipe", start))


def test_one_seed_gives_ticket_record_verdicts_and_advice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ticket, record = tmp_path / "t.safetensors", tmp_path / "r.json"

    found = find(parsed(*SHORT, "--out", str(ticket), "--record", str(record), "--diagnose"))

    assert load_ticket(ticket).meta["level"] == 2
    assert [row["arm"] for row in found["rows"]] == ["ticket"] + ["ticket", "reinit"] * 2
    assert len(read_record(record)[0]) == 5
    assert [verdict["wins"] for verdict in found["verdicts"]] == [False, False]
    shown = capsys.readouterr().out
    assert "1 of at least 3 seeds" in " ".join(shown.split())
    assert found["advice"]
    json.dumps(found)


def test_several_seeds_run_apart_and_the_first_ticket_is_kept(tmp_path: Path) -> None:
    ticket = tmp_path / "t.safetensors"

    found = find(
        parsed(*SHORT, "--out", str(ticket), "--seeds", "4", "5", "--controls", "--levels", "1")
    )

    assert {row["seed"] for row in found["rows"]} == {4, 5}
    assert load_ticket(ticket).meta["seed"] == 4
    assert found["advice"] == []


@pytest.mark.parametrize("method", METHODS)
def test_every_method_leaves_a_ticket_that_its_network_takes(method: str, tmp_path: Path) -> None:
    ticket, record = tmp_path / "t.safetensors", tmp_path / "r.json"
    words = [*SHORT, "--levels", "1", "--rate", "0.5", "--criterion", "snip"]
    words = words if method == "at_initialisation" else words[:-2]

    found = find(parsed(*words, "--method", method, "--out", str(ticket), "--record", str(record)))

    loaded = load_ticket(ticket)
    data = load_data("digits")
    model = loaded.apply(build(factory_of("lenet_300_100", data.shape, 10), 1)).eval()
    with torch.no_grad():
        right = (model(data.test[0]).argmax(1) == data.test[1]).float().mean()
    last = [row for row in found["rows"] if row["arm"] == "ticket"][-1]
    assert float(right) == pytest.approx(last["test_accuracy"])
    assert loaded.density == 1.0 if method == "channels" else loaded.density < 0.6
    arms = {row["arm"] for row in found["rows"]}
    assert arms == {"ticket", *METHODS[method].controls}
    assert bool(found["verdicts"]) == METHODS[method].judged
    assert len(read_record(record)[0]) == len(found["rows"])
    json.dumps(found)


@pytest.mark.parametrize("method", ["channels", "at_initialisation"])
def test_a_kept_run_of_any_method_is_read_and_not_trained_again(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*SHORT, "--levels", "1", "--method", method, "--runs", str(tmp_path)]
    words += ["--criterion", "grasp"] if method == "at_initialisation" else []
    words += ["--out", str(tmp_path / "t.safetensors"), "--seeds", "3", "5"]
    first = find(parsed(*words))
    monkeypatch.setattr("sparselt.lottery.training._Loop.run", None)

    assert find(parsed(*words)) == first
    assert {row["seed"] for row in first["rows"]} == {3, 5}


def test_masks_of_other_densities_do_not_share_a_run(tmp_path: Path) -> None:
    words = [*SHORT, "--method", "at_initialisation", "--criterion", "snip", "--controls"]
    words += ["--runs", str(tmp_path), "--out", str(tmp_path / "t.safetensors"), "--density"]

    densities = [find(parsed(*words, share))["rows"][-1]["density"] for share in ("0.2", "0.5")]

    assert densities == pytest.approx([0.2, 0.5], abs=1e-4)


def test_dead_units_are_reported_and_removed_without_a_change_of_outputs(tmp_path: Path) -> None:
    whole, small = tmp_path / "whole.safetensors", tmp_path / "small.safetensors"
    words = [*SHORT, "--controls", "--levels", "1", "--rate", "0.95"]

    found = find(parsed(*words, "--out", str(whole), "--dead-units", "report"))
    find(parsed(*words, "--out", str(small), "--dead-units", "remove"))

    assert [row["name"] for row in found["activity"]] == ["2", "4"]
    assert any(row["dead"] for row in found["activity"])
    data = load_data("digits")
    factory = factory_of("lenet_300_100", data.shape, 10)
    models = [load_ticket(path).apply(build(factory, 1)).eval() for path in (whole, small)]
    wide, narrow = (len(model.get_parameter("1.weight")) for model in models)
    assert narrow < wide
    x = data.train[0]
    torch.testing.assert_close(models[1](x), models[0](x))


def test_stability_gives_a_pair_of_rows_a_point_and_no_ticket(tmp_path: Path) -> None:
    ticket, record = tmp_path / "t.safetensors", tmp_path / "s.json"

    found = find(
        parsed(*SHORT, "--stability", "0", "10", "--out", str(ticket), "--record", str(record))
    )

    rows = [(row["arm"], row["start"]) for row in found["rows"]]
    assert rows == [("dense", 0), ("ticket", 0), ("dense", 10), ("ticket", 10)]
    assert len(read_stability(record)[0]) == 4
    assert not ticket.exists()


def test_the_frontier_has_a_row_a_level_and_structure(tmp_path: Path) -> None:
    record = tmp_path / "f.json"
    words = [*SHORT, "--levels", "1", "--frontier", "4x1", "channels", "--batches", "1"]

    found = frontier.find_frontier(parsed(*words, "--record", str(record)))

    assert [row["structure"] for row in found["rows"]] == ["dense", "4x1", "channels"]
    assert all(row["latency_us"] for row in found["rows"])
    assert json.loads(record.read_text())["kind"] == "frontier"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--density", "0.2"], "--density: expected --method edge_popup or .* got --method imp"),
        (["--scaled"], "--scaled: expected --method edge_popup with it"),
        (["--stability", "0", "--dead-units", "report"], "--dead-units: .* got --stability"),
        (["--method", "channels", "--diagnose"], "--diagnose: expected --method imp"),
        (["--method", "channels", "--controls", "reinit"], "control: expected one of scratch_e"),
        (["--method", "at_initialisation"], "criterion before training"),
        (["--method", "edge_popup", "--frozen-weights", "ones"], "weights: expected one of"),
        (["--seeds", "1", "1"], "seeds: expected different numbers"),
    ],
)
def test_flags_that_make_no_sense_together_are_refused(words: list[str], sentence: str) -> None:
    with pytest.raises(errors.OptionError, match=sentence):
        find(parsed(*SHORT, *words))
