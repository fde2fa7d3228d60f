# SPDX-License-Identifier: Apache-2.0
"""The quickstart, at a size of seconds: it finds, saves, loads, runs, compares and draws."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import sparselt
from sparselt import lottery, quickstart
from sparselt.measure import report
from sparselt.measure.baselines import Baseline

pytest.importorskip("sklearn", reason="the digits come with scikit-learn, which is not installed")
pytest.importorskip("matplotlib", reason="the picture needs matplotlib, which is not installed")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    return out, quickstart.run(out, fast=True, seed=3)


def test_it_leaves_tickets_a_picture_and_all_figures(made: tuple[Path, dict[str, Any]]) -> None:
    out, result = made
    names = {path.name for path in out.iterdir()}
    assert names == {
        "quickstart.json",
        "quickstart.png",
        "lenet_300_100.safetensors",
        "lenet_300_100-dense.safetensors",
        "conv_small.safetensors",
        "conv_small-dense.safetensors",
    }
    assert (out / "quickstart.png").read_bytes().startswith(b"\x89PNG")
    assert report.read_json(out / "quickstart.json")["kind"] == "quickstart"
    assert [row["status"] for row in result["rows"]] == ["ok", "ok"]


def test_tickets_are_below_a_tenth_and_smaller_on_disk(made: tuple[Path, dict[str, Any]]) -> None:
    out, result = made
    for row in result["rows"]:
        ticket = sparselt.load_ticket(out / f"{row['network']}.safetensors")
        assert ticket.density < 0.10
        assert ticket.density == pytest.approx(row["density"])
        assert sum(layer.kept for layer in ticket.layers()) == row["kept"]
        assert ticket.initial.keys() == ticket.masks.keys()
        assert row["ticket_bytes"] < row["dense_bytes"]


def test_saved_ticket_has_the_accuracy_of_the_table_and_runs_sparse(
    made: tuple[Path, dict[str, Any]],
) -> None:
    out, result = made
    data = lottery.load_data("digits")
    for row in result["rows"]:
        model = lottery.NETWORKS[row["network"]](data.shape, data.classes)
        sparselt.load_ticket(out / f"{row['network']}.safetensors").apply(model)
        _, accuracy = lottery.evaluate(model, data.test)
        assert accuracy == pytest.approx(row["ticket_accuracies"][0])
        sparse = sparselt.convert(model.eval(), format="csr")
        with torch.no_grad():
            agree = sparse(data.test[0]).argmax(1) == model(data.test[0]).argmax(1)
        assert agree.float().mean() > 0.99


def test_every_level_has_a_control_but_the_dense_one(made: tuple[Path, dict[str, Any]]) -> None:
    for row in made[1]["rows"]:
        first, *others = row["levels"]
        assert first["density"] == 1.0
        assert first["control_accuracies"] == []
        assert all(len(level["control_accuracies"]) == 1 for level in others)


def test_table_has_a_cell_for_each_network_and_keeps_losses(
    made: tuple[Path, dict[str, Any]],
) -> None:
    rows = copy.deepcopy(made[1]["rows"])
    rows[0]["batches"][0] |= {"speedup": 0.5, "noise": 0.0}
    lines = quickstart.table_rows(rows)
    assert all(len(line["cells"]) == 2 for line in lines)
    assert "0.50x" in [line["cells"][0] for line in lines]
    sentences = quickstart.verdicts({"machine": {}, "rows": rows})
    assert any("batch 1: sparselt is slower (2.00 times the time)" in text for text in sentences)


def accuracy_row(ticket: list[float], control: list[float], dense: float) -> dict[str, Any]:
    mean = {"ticket": sum(ticket) / len(ticket), "control": sum(control) / len(control)}
    level = {"density": 0.08, "ticket_accuracy": mean["ticket"]}
    return {
        "density": 0.08,
        "dense_accuracy": dense,
        "ticket_accuracy": mean["ticket"],
        "ticket_accuracies": ticket,
        "control_accuracy": mean["control"],
        "control_accuracies": control,
        "levels": [{"density": 1.0, "ticket_accuracy": dense}, level],
    }


@pytest.mark.parametrize(
    ("ticket", "control", "dense", "claim"),
    [
        ([0.98, 0.981, 0.979], [0.95, 0.951, 0.949], 0.98, "a winning ticket"),
        ([0.97, 0.971, 0.969], [0.95, 0.951, 0.949], 0.98, "not a winning ticket"),
        ([0.98, 0.99, 0.97], [0.975, 0.974, 0.976], 0.98, "not a winning ticket"),
        ([0.98], [0.5], 0.98, "too few"),
    ],
)
def test_a_ticket_wins_only_if_it_matches_dense_and_beats_its_control_beyond_the_seeds(
    ticket: list[float], control: list[float], dense: float, claim: str
) -> None:
    assert claim in quickstart._accuracy_verdict(accuracy_row(ticket, control, dense))
    if claim == "a winning ticket":
        assert "not a" not in quickstart._accuracy_verdict(accuracy_row(ticket, control, dense))


def test_a_dense_engine_that_breaks_is_left_out_and_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(model: torch.nn.Module, example: tuple[torch.Tensor, ...]) -> Any:
        raise RuntimeError("the compiler is broken\nand says more")

    name = "torch_compile"
    engine = Baseline(name, True, lambda: "", broken)
    monkeypatch.setitem(quickstart.BASELINES, name, engine)
    settings = replace(quickstart.FAST, dense_engines=("torch_eager", name), seconds=0.0)
    found = quickstart._time(torch.nn.Linear(4, 2).eval(), torch.randn(3, 4), settings)
    assert found["best_dense"] == "torch_eager"
    assert "torch_compile is left out: the compiler is broken\n" in capsys.readouterr().out


def test_wrong_output_is_a_failed_row_not_a_figure_to_be_proud_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(model: torch.nn.Module, example: tuple[torch.Tensor, ...]) -> Any:
        return lambda x: [model(x).detach() + 1]

    engine = Baseline("sparselt", False, lambda: "", wrong)
    monkeypatch.setitem(quickstart.BASELINES, "sparselt", engine)
    tiny = quickstart.Settings(
        cases=(quickstart.FAST.cases[0],),
        seeds=1,
        levels=1,
        rate=0.95,
        batches=(1,),
        seconds=0.0,
        dense_engines=("torch_eager",),
    )
    result = quickstart.run(tmp_path, settings=tiny)
    assert result["rows"][0]["status"] == "FAIL"
    assert any("wrong output at batch 1" in text for text in quickstart.verdicts(result))
