# SPDX-License-Identifier: Apache-2.0
"""The table of whole networks: what it holds, and how it goes on where it was stopped."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from bench import memory, no_loss
from sparselt import cli
from sparselt.errors import DataError, OptionError
from sparselt.measure import model, networks, report, table
from sparselt.measure.timer import Timing

MACHINE = {"cpu": "C", "threads": 2, "isa": "avx2", "versions": {"torch": "2.13.0"}}
ENGINES = ["torch_eager", "onnxruntime", "sparselt"]


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces the engines: notes which models would be timed, and gives each a figure."""
    names: list[str] = []

    def bench_variants(models, example, engines, **_):
        names.extend(f"{name} {len(example)}" for name in models)
        reports = []
        for name in models:
            facts = {"density": float(name.split("@")[1]), "batch": len(example)}
            facts |= {"torch_error": 1e-7, "busy_cores": 0.0}
            found = model.ModelReport(name, facts, [], "torch_eager", dict(MACHINE))
            for engine, us in zip(engines, (30.0, 60.0, 10.0), strict=True):
                row = model.EngineRow(engine, engine != "sparselt", error=2e-7)
                row.timing = Timing(((us,),))
                found.rows.append(row)
            reports.append(found)
        return reports

    monkeypatch.setattr(table, "bench_variants", bench_variants)
    monkeypatch.setattr(table, "header", lambda: dict(MACHINE))
    return names


def test_dense_engines_are_loaded_once_and_stand_beside_every_density() -> None:
    models = {f"n@{d}": networks.pruned_network("lenet", density=d).model for d in (0.5, 0.1)}
    steps: list[str] = []
    reports = model.bench_variants(
        models,
        torch.randn(3, 784),
        ["torch_eager", "sparselt"],
        rounds=1,
        samples=1,
        seconds=0.001,
        progress=steps.append,
    )
    assert sum(step == "loading and checking torch_eager" for step in steps) == 1
    assert sum(step == "loading and checking sparselt" for step in steps) == 2
    first, second = reports
    assert first.rows[0] is second.rows[0]
    assert first.rows[1] is not second.rows[1]
    assert [round(found.facts["density"], 2) for found in reports] == [0.5, 0.1]
    assert all(row.status == "ok" and row.error < 1e-6 for found in reports for row in found.rows)
    assert all(0 < found.facts["torch_error"] < 1e-6 for found in reports)


def test_the_table_holds_every_network_and_the_targets() -> None:
    cases = {(case.network, case.batch): case.densities for case in table.CASES}
    timed = {name for case in table.CASES for name in (case.network, case.also) if name}
    assert timed == set(networks.NETWORKS)
    for network, batch in (("resnet50", 32), ("vgg19", 64), ("mlp", 32), ("lenet", 64)):
        assert cases[network, 1] == cases[network, batch] == (0.2, 0.1, 0.05)
    assert cases["mobilenet", 1] == (1.0, 0.7, 0.5)


def test_cases_are_chosen_by_network_or_by_case() -> None:
    assert [case.name for case in table.chosen_cases(["vgg19@64", "lenet"])] == [
        "vgg19@64",
        "lenet@1",
        "lenet@64",
    ]
    assert {case.densities for case in table.chosen_cases([], quick=True)} == {(0.1,), (0.7,)}
    with pytest.raises(OptionError, match="vgg19@7"):
        table.chosen_cases(["vgg19@7"])


def test_a_stopped_table_goes_on_and_is_as_a_whole_one(timed: list[str], tmp_path: Path) -> None:
    cases = [table.Case("lenet", batch, (0.2, 0.1)) for batch in (1, 64)]

    def stop(done: int, text: str) -> None:
        if done == 1:
            raise KeyboardInterrupt

    path = tmp_path / "t.json"
    with pytest.raises(KeyboardInterrupt):
        table.bench_table(cases, path=path, engines=ENGINES, progress=stop)
    assert timed == ["lenet@0.2 1", "lenet@0.1 1"]
    result = table.bench_table(cases, path=path, resume=True, engines=ENGINES)
    assert timed[2:] == ["lenet@0.2 64", "lenet@0.1 64"]
    assert table.summary(report.read_json(path)) == table.summary(result)
    rows = table.summary(result)
    assert [(row["batch"], round(row["zeros"], 2)) for row in rows] == [
        (1, 0.8),
        (1, 0.9),
        (64, 0.8),
        (64, 0.9),
    ]
    assert {(row["best_dense"], row["speedup"], row["torch_speedup"]) for row in rows} == {
        ("torch_eager", 3.0, 3.0)
    }
    again = table.bench_table(cases, path=path, resume=True, engines=ENGINES)
    assert len(timed) == 4
    assert again["rows"] == report.read_json(path)["rows"]


def test_figures_of_another_machine_are_not_continued(timed: list[str], tmp_path: Path) -> None:
    cases = [table.Case("lenet", 1, (0.1,)), table.Case("lenet", 2, (0.1,))]
    path = tmp_path / "t.json"
    kept = table.bench_table(cases[:1], path=path, engines=ENGINES)
    kept["machine"]["cpu"] = "another"
    report.write_json(path, kept)
    with pytest.raises(DataError, match="the same cpu"):
        table.bench_table(cases, path=path, resume=True, engines=ENGINES)
    assert len(timed) == 1, "minutes were spent before the file was refused"


def test_notes_name_failures_and_other_work() -> None:
    case = {"case": "n", "batch": 1, "density": 0.1, "asked": 0.1, "best_dense": ""}
    case |= {"torch_error": 1e-7, "busy_cores": 1.5}
    row = {"case": "n", "batch": 1, "density": 0.1, "engine": "sparselt", "dense": False}
    failed = {**row, "status": "FAIL", "reason": "wrong output", "error": 0.5}
    missing = {**row, "engine": "openvino", "status": "absent", "reason": "not installed: openvino"}
    result = {"cases": [case], "rows": [failed, missing]}
    (line,) = table.summary(result)
    assert line["note"] == "sparselt FAIL: wrong output; BUSY: 1.5 cores"
    assert line["speedup"] is None
    assert table.absent(result) == ["openvino is not installed: openvino"]
    assert report.markdown(table.TABLE_COLUMNS, [line]).count("| - |") >= 1


def test_command_prints_the_table_and_keeps_it(
    timed: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", "model", "all", "--only", "lenet@64", "--engines", ",".join(ENGINES)]
    path = tmp_path / "t.json"
    assert cli.main([*words, "--quick", "--json", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "lenet" in shown
    assert "3.00x" in shown
    assert len(report.read_json(path)["cases"]) == 1


def test_the_search_for_losses_meets_every_kind_of_network() -> None:
    drawn = list(itertools.islice(no_loss.samples(0), 3 * len(no_loss.KINDS)))
    assert [sample.kind for sample in drawn] == 3 * list(no_loss.KINDS)
    assert drawn == list(itertools.islice(no_loss.samples(0), len(drawn)))
    for sample in drawn[: len(no_loss.KINDS)]:
        x = no_loss.Sample(sample.kind, 16, sample.size and 9, 2, 0.5)
        assert x.build()(x.inputs()).shape[:2] == (2, 16)


@pytest.mark.parametrize(("us", "measured", "lost"), [(12.0, 2, True), (10.4, 1, False)])
def test_a_network_that_loses_is_timed_again(
    monkeypatch: pytest.MonkeyPatch, us: float, measured: int, lost: bool
) -> None:
    spent: list[float] = []

    def interleave(calls, *, seconds, **_):
        spent.append(seconds)
        return {name: Timing(((us if name == "sparselt" else 10.0,),)) for name in calls}

    monkeypatch.setattr(no_loss, "interleave", interleave)
    row = no_loss.time_one(no_loss.Sample("linear", 16, 0, 3, 0.5), with_compile=False)
    assert (len(spent), row["lost"], row["wrong"]) == (measured, lost, False)
    assert spent == sorted(spent)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_memory_is_that_of_processes_that_load_and_call() -> None:
    rows = memory.measure_memory("lenet", 3, 0.1)
    assert [row["side"] for row in rows] == ["torch imported", "sparselt", "torch"]
    for row in rows[1:]:
        assert rows[0]["loaded_mib"] < row["peak_mib"]
        assert 0 < row["loaded_mib"] <= row["loading_peak_mib"] <= row["peak_mib"]
