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
from sparselt.errors import OptionError
from sparselt.measure import dlmc
from sparselt.measure.report import write_text
from sparselt.measure.suites import DLMC, Layer, real_mask

SMALL = (
    Layer("small.layer1.conv1", 32, 48, columns=60),
    Layer("small.layer1.conv2", 16, 72, columns=49),
    Layer("small.layer1.conv2", 16, 8, kernel=3, size=7),
)


@pytest.fixture(autouse=True)
def one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dlmc, "_REPEATS", 5)


def bench(layers: tuple[Layer, ...] = SMALL, **options: Any) -> dict[str, Any]:
    grid = {"densities": (0.2,), "batches": (1,), "threads": (2,), "seconds": 0.0} | options
    return dlmc.bench_dlmc(layers, **grid)


def test_a_row_holds_the_choice_and_what_it_is_held_against(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    result = bench(path=tmp_path / "kept.json", threads=(2, 1), batches=(1, 2))
    assert torch.get_num_threads() == 1
    rows = result["rows"]
    # A matrix of im2col is made for one image only.
    assert [(row["part"], row["batch"]) for row in rows[::2]] == [
        ("spmm 1x1", 1),
        ("spmm 3x3 (im2col)", 1),
        ("conv2d 3x3", 1),
        ("spmm 1x1", 2),
        ("conv2d 3x3", 2),
    ]
    known = {kernel.name for kernel in ops.kernels() if kernel.usable} | {"dense"}
    for row in rows:
        assert row["status"] == "ok"
        assert row["pattern"] == "random"
        assert row["kernel"] in known
        assert row["speedup"] == row["dense_us"][row["best_dense"]] / row["median_us"]
        assert row["best_dense"] == min(row["dense_us"], key=row["dense_us"].__getitem__)
        assert (row["csr_us"] is None) == (row["part"] == "conv2d 3x3")
        assert row["share"] == row["gflops"] / result["peaks"][str(row["threads"])]
    first = rows[0]
    flops = 2 * round(0.2 * 32 * 48) * 60
    assert math.isclose(first["gflops"], flops / first["median_us"] / 1e3)
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert kept["rows"] == rows
    assert kept["machine"]["threads"] == 2


def test_a_layer_that_does_not_gain_is_timed_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = lambda calls, **_: {name: 1.0 + (name != "dense") for name in calls}  # noqa: E731
    monkeypatch.setattr(dlmc, "measure", slow)
    monkeypatch.setattr("sparselt.tune.measure", slow)
    assert {row["kernel"] for row in bench()["rows"]} == {"dense"}


def test_a_wrong_output_fails_and_gets_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.spmm
    fast = lambda calls, **_: {name: 1.0 + (name == "dense") for name in calls}  # noqa: E731
    monkeypatch.setattr(dlmc, "measure", fast)
    monkeypatch.setattr(dlmc.ops, "spmm", lambda *a, **k: right(*a, **k) + 1e-3)
    row = bench(SMALL[:1])["rows"][0]
    assert row["status"] == "FAIL"
    assert "sparselt" in row["reason"]
    assert "median_us" not in row


def test_the_means_are_geometric_and_slow_layers_are_named() -> None:
    common = {"batch": 1, "threads": 2, "density": 0.1, "status": "ok", "pattern": "random"}
    rows = [
        {"case": "a", "part": "spmm 1x1", "gflops": 10.0, "share": 0.1, "speedup": 8.0, **common},
        {"case": "b", "part": "spmm 1x1", "gflops": 40.0, "share": 0.4, "speedup": 0.5, **common},
    ]
    for row, csr_us in zip(rows, (30.0, None), strict=True):
        row |= {"csr_us": csr_us, "median_us": 10.0, "busy_cores": 0.0}
    machine = {"cpu": "C", "threads": 2, "isa": "avx2", "versions": {}}
    result = {"rows": rows, "machine": machine, "peaks": {"2": 100.0}}
    summary = dlmc.dlmc_summary(result)
    assert [line["part"] for line in summary] == ["all spmm", "spmm 1x1"]
    for line in summary:
        assert math.isclose(line["gflops"], 20.0)
        assert math.isclose(line["share"], 0.2)
        assert math.isclose(line["speedup"], 2.0)
        assert math.isclose(line["csr"], 3.0)
        assert (line["least"], line["layers"]) == (0.5, 2)
    caption = str(dlmc.dlmc_table(result).caption)
    assert "b at 90%, batch 1: 0.50" in caption
    assert "a at 90%" not in caption
    assert "2 cases have random zeros" in caption


def test_words_choose_layers_and_an_unknown_one_is_refused() -> None:
    assert dlmc.chosen_layers() == DLMC
    assert {layer.name for layer in dlmc.chosen_layers(["ffn"])} == {
        "transformer.ffn1",
        "transformer.ffn2",
    }
    with pytest.raises(OptionError, match=r"--only: expected parts of .*got layer9"):
        dlmc.chosen_layers(["layer9"])
    with pytest.raises(OptionError, match="batches and threads of at least 1"):
        bench(threads=(0,))


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
    monkeypatch.setattr(dlmc, "DLMC", SMALL)
    words = ["bench", "dlmc", "--quick", "--only", "conv2", "--json", str(tmp_path / "r.json")]
    assert cli.main(words) == 0
    assert "conv2d 3x3 (1)" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "r.json").read_text())["rows"]) == 2


def test_the_machines_rates_are_those_of_the_threads_and_the_instruction_set() -> None:
    torch.set_num_threads(1)
    peak = max(extension.multiply_add_rate() for _ in range(3))
    # From 2 multiply-adds a cycle of 1 GHz to 64 lanes at 8 GHz.
    assert 2 < peak < 1024
    widths = {"scalar": 1, "neon": 4, "avx2": 8, "avx512": 16}
    assert peak > widths[ops.isa()]
    assert 0.1 < extension.read_rate(1 << 20) < 10_000
