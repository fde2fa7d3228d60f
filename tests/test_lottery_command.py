# SPDX-License-Identifier: Apache-2.0
"""What the command for finding tickets does with its flags."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
from lottery_cases import one_thread  # noqa: F401

from sparselt import errors
from sparselt.lottery import Recipe, recipe_of
from sparselt.lottery.command import add_flags, find, recipe_from
from sparselt.lottery.record import read_record
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
