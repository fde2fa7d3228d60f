# SPDX-License-Identifier: Apache-2.0
"""The suite of DLMC's layers: it times what the library chooses, checked first."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from sparselt import cli, extension, ops
from sparselt.measure import chosen, dlmc
from sparselt.measure.report import write_text
from sparselt.measure.suites import DLMC, Layer, real_mask
from sparselt.measure.sweep import Sweep, run_sweep

SMALL = (
    Layer("small.layer1.conv1", 32, 48, columns=60),
    Layer("small.layer1.conv2", 16, 72, columns=49),
    Layer("small.layer1.conv2", 16, 8, kernel=3, size=7),
)


@pytest.fixture(autouse=True)
def one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_REPEATS", "_BATCH_REPEATS"):
        monkeypatch.setattr(chosen, name, 5)
    monkeypatch.setattr(chosen, "_SECONDS", 0.0)


def bench(layers: tuple[Layer, ...] = SMALL, **options: Any) -> dict[str, Any]:
    grid = {"densities": (0.2,), "batches": (1,), "counts": (1,)} | options
    path = grid.pop("path", None)
    made = Sweep("dlmc", lambda quick: dlmc.dlmc_items(quick, layers, **grid), dlmc.dlmc_table)
    return run_sweep(made, path=path)


def fix_choice(monkeypatch: pytest.MonkeyPatch, wanted: str) -> None:
    """Has every layer run a kernel whose name begins so."""
    faked = lambda calls, **_: {c: 2.0 - c.startswith(wanted) for c in calls}  # noqa: E731
    monkeypatch.setattr(chosen, "measure", faked)
    monkeypatch.setattr("sparselt.tune.measure", faked)


def test_a_row_holds_the_choice_and_what_it_is_held_against(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fix_choice(monkeypatch, "sell_panel")
    torch.set_num_threads(2)
    result = bench(path=tmp_path / "kept.json", counts=(1,), batches=(1, 2))
    assert torch.get_num_threads() == 2
    rows = result["rows"]
    # A matrix of im2col is made for one image only.
    assert [(row["part"], row["batch"]) for row in rows] == [
        ("1x1 spmm", 1),
        ("3x3 spmm of im2col", 1),
        ("3x3 conv2d", 1),
        ("3x3 in a program", 1),
        ("1x1 spmm", 2),
        ("3x3 conv2d", 2),
        ("3x3 in a program", 2),
    ]
    for row in rows:
        assert row["status"] == "ok"
        assert row["pattern"] == "random"
        assert row["kernel"].startswith("sell_panel")
        assert row["threads"] == 1
        assert row["speedup"] == row["dense_us"][row["best_dense"]] / row["median_us"]
        assert row["best_dense"] == min(row["dense_us"], key=row["dense_us"].__getitem__)
        assert (row["csr_us"] is None) == (row["op"] == "conv2d")
        assert math.isclose(row["share"], row["gflops"] / chosen.peak(row["threads"]))
    first = rows[0]
    flops = 2 * round(0.2 * 32 * 48) * 60
    assert math.isclose(first["gflops"], flops / first["median_us"] / 1e3)
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert kept["rows"] == rows


@pytest.mark.parametrize("wanted", ["sell_panel", "csr", "dense"])
def test_a_layer_in_a_program_has_its_values_in_panels_where_its_kernel_runs_them(
    monkeypatch: pytest.MonkeyPatch, wanted: str
) -> None:
    fix_choice(monkeypatch, wanted)
    layers = (
        Layer("small.conv1", 20, 40, kernel=1, size=6),
        Layer("transformer.small", 20, 40, columns=18),
    )
    rows = [row for row in bench(layers, batches=(2,))["rows"] if row["way"] == "program"]
    assert [row["part"] for row in rows] == ["1x1 in a program", "transformer in a program"]
    for row in rows:
        assert row["status"] == "ok"
        assert row["kernel"].startswith(wanted)
        assert row["in_panels"] == (2 if wanted == "sell_panel" else 0)


def test_a_layer_that_does_not_gain_is_timed_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    fix_choice(monkeypatch, "dense")
    rows = bench(densities=(0.2, 0.1))["rows"]
    assert {(row["kernel"], row["status"]) for row in rows} == {("dense", "ok")}


def test_a_wrong_output_fails_and_gets_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.spmm
    fix_choice(monkeypatch, "sell_panel")
    monkeypatch.setattr(chosen.ops, "spmm", lambda *a, **k: right(*a, **k) + 1e-3)
    row = bench(SMALL[:1])["rows"][0]
    assert row["status"] == "FAIL"
    assert row["reason"] == "wrong output: call@0.2"
    assert "median_us" not in row


def test_the_means_are_geometric_and_slow_layers_are_named() -> None:
    common = {"batch": 1, "threads": 2, "density": 0.1, "status": "ok", "pattern": "random"}
    common |= {"busy_cores": 0.0, "layer": "small.conv1", "median_us": 10.0}
    rows = [
        {"case": "a", "part": "1x1 spmm", "op": "spmm", "way": "call"}
        | {"gflops": 10.0, "share": 0.1, "speedup": 8.0, "csr_us": 30.0},
        {"case": "b", "part": "3x3 spmm of im2col", "op": "spmm", "way": "call"}
        | {"gflops": 40.0, "share": 0.4, "speedup": 0.5, "csr_us": 50.0, "layer": "small.conv2"},
        {"case": "c", "part": "1x1 in a program", "op": "conv2d", "way": "program"}
        | {"gflops": 40.0, "share": 0.4, "speedup": 2.0, "csr_us": None, "median_us": 5.0},
    ]
    rows = [common | row for row in rows]
    machine = {"cpu": "C", "threads": 2, "isa": "avx2", "versions": {}}
    result = {"rows": rows, "machine": machine, "peaks": {"2": 100.0}}
    summary = {line["part"]: line for line in dlmc.dlmc_summary(result)}
    assert set(summary) == {
        *("1x1 in a program", "1x1 spmm", "3x3 spmm of im2col"),
        *("resnet50", "resnet50 in a program"),
    }
    line = summary["resnet50"]
    assert math.isclose(line["gflops"], 20.0)
    assert math.isclose(line["share"], 0.2)
    assert math.isclose(line["speedup"], 2.0)
    assert math.isclose(line["csr"], math.sqrt(15.0))
    assert (line["least"], line["least_csr"], line["layers"]) == (0.5, 3.0, 2)
    # Held against the product of the same layer.
    assert summary["1x1 in a program"]["csr"] == 6.0
    caption = str(dlmc.dlmc_table(result).caption)
    assert "b at 90%, batch 1: 0.50" in caption
    assert "a at 90%" not in caption
    assert "3 cases have random zeros" in caption


@pytest.mark.skipif(
    not (Path(os.environ.get("SPARSELT_DATA", "")) / "dlmc").is_dir(),
    reason="SPARSELT_DATA names no folder with dlmc",
)
def test_every_layer_of_the_suite_has_its_real_mask() -> None:
    for layer in DLMC:
        mask = real_mask(layer, 0.1)
        assert mask is not None, layer.name
        assert 0.05 < float(mask.double().mean()) < 0.2


def test_masks_of_the_transformer_are_read_from_their_files(tmp_path: Path) -> None:
    layer = next(x for x in DLMC if x.name == "transformer.ffn1")
    folder = tmp_path / "dlmc" / "transformer" / "magnitude_pruning" / "0.9"
    starts = " ".join(["0", *["1"] * layer.rows])
    name = "body_encoder_layer_2_ffn_conv1_fully_connected.smtx"
    write_text(folder / name, f"{layer.rows}, {layer.cols}, 1\n{starts}\n7\n")
    mask = real_mask(layer, 0.1, tmp_path)
    assert mask is not None
    assert mask.nonzero().tolist() == [[0, 7]]
    assert real_mask(layer, 0.2, tmp_path) is None


def test_the_command_prints_and_keeps_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = Sweep("dlmc", lambda quick: dlmc.dlmc_items(quick, SMALL), dlmc.dlmc_table, dlmc._peaks)
    monkeypatch.setattr(dlmc, "SWEEP", made)
    words = ["bench", "dlmc", "--quick", "--only", "conv2", "--json", str(tmp_path / "r.json")]
    assert cli.main(words) == 0
    assert "3x3 in a program (1)" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "r.json").read_text())["rows"]) == 3


def test_the_machines_rates_are_those_of_the_threads_and_the_instruction_set() -> None:
    torch.set_num_threads(1)
    peak = max(extension.multiply_add_rate() for _ in range(3))
    # From 2 multiply-adds a cycle of 1 GHz to 64 lanes at 8 GHz.
    assert 2 < peak < 1024
    widths = {"scalar": 1, "neon": 4, "avx2": 8, "avx512": 16}
    assert peak > widths[ops.isa()]
    assert 0.1 < extension.read_rate(1 << 20) < 10_000
