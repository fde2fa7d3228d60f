# SPDX-License-Identifier: Apache-2.0
"""Tables, result files, comparisons, and what doctor finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sparselt.errors import DataError
from sparselt.measure import doctor, layers, report
from sparselt.measure.timer import Timing


def test_microseconds_keep_three_digits() -> None:
    shown = [report.microseconds(x) for x in (0.5, 9.999, 99.96, 999.4, 999.6, 2.5e6, None)]
    assert shown == ["0.500 us", "10.0 us", "100 us", "999 us", "1.00 ms", "2.50 s", "-"]


def test_markers_are_filled_and_refilled_without_touching_the_rest() -> None:
    text = "before <!-- table: t -->\nold\n<!-- end: t --> after"
    once = report.fill_markers(text, "t", "| new |")
    assert once == "before <!-- table: t -->\n| new |\n<!-- end: t --> after"
    assert report.fill_markers(once, "t", "| new |") == once
    for wrong in ("no markers", "<!-- end: t --><!-- table: t -->", text + text):
        with pytest.raises(DataError, match="markers"):
            report.fill_markers(wrong, "t", "x")


def test_markdown_keeps_a_failed_row_and_its_reason() -> None:
    rows = [
        {"engine": "a", "dense": True, "status": "ok", "reason": "", "error": 1e-7}
        | Timing(((2.0,),)).as_json()
        | {"speedup": 1.0},
        {"engine": "b", "dense": False, "status": "FAIL", "reason": "wrong | output"},
    ]
    text = report.markdown(report.MODEL_COLUMNS, rows)
    assert text.splitlines()[2].startswith("| a | 2.00 us |")
    assert "FAIL: wrong \\| output" in text.splitlines()[3]


def test_verdict_calls_noise_neither_gain_nor_loss() -> None:
    def row(ratio: float, noise: float = 0.0) -> list[dict[str, Any]]:
        return [{"engine": "sparselt", "dense": False, "speedup": ratio, "noise": noise}]

    assert "2.00 times as fast" in report.sparse_verdict(row(2.0), "x")
    assert "slower (2.00 times the time)" in report.sparse_verdict(row(0.5), "x")
    assert "no more than the noise" in report.sparse_verdict(row(1.04), "x")
    assert "no more than the noise" in report.sparse_verdict(row(1.5, noise=0.6), "x")
    assert report.sparse_verdict([], "x") == "No sparse engine was timed."


def result_with(times: dict[str, float], cpu: str = "C") -> dict[str, Any]:
    rows = [
        {"case": "c", "engine": name, "median_us": us, "noise": 0.0} for name, us in times.items()
    ]
    header = {"cpu": cpu, "isa": "avx2", "threads": 2, "versions": {}}
    return {"schema": 1, "machine": header, "rows": rows}


def test_compare_joins_rows_and_warns_of_another_machine() -> None:
    before, after = result_with({"a": 10, "b": 10, "c": 1}), result_with({"a": 5, "b": 10.2})
    rows, warning = report.compare(before, after)
    assert [(row["engine"], row["ratio"], row["verdict"]) for row in rows] == [
        ("a", 2.0, "faster"),
        ("b", pytest.approx(10 / 10.2), "same"),
    ]
    assert warning == ""
    assert "not the same cpu" in report.compare(before, result_with({"a": 1}, "D"))[1]
    with pytest.raises(DataError, match="no case"):
        report.compare(before, result_with({"z": 1}))


def test_compare_takes_the_change_of_dense_engines_for_the_machines_drift() -> None:
    before, after = (
        result_with({"a": 10, "torch_dense": 10}),
        result_with({"a": 8, "torch_dense": 8}),
    )
    for result in (before, after):
        result["rows"][1]["dense"] = True
    rows, _ = report.compare(before, after)
    assert [row["verdict"] for row in rows] == ["same", "same"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 9, "machine": {}, "rows": []}'])
def test_read_json_refuses_other_files(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DataError, match=r"x\.json"):
        report.read_json(tmp_path / "x.json")


def test_summary_counts_only_our_kernels_as_ours() -> None:
    def row(engine: str, dense: bool, us: float) -> dict[str, Any]:
        key = {"case": "c", "density": 0.1, "batch": 1}
        return {**key, "engine": engine, "dense": dense, "median_us": us}

    rows = [
        row("torch_dense", True, 6.0),
        row("numpy_dense", True, 4.0),
        row("torch_csr", False, 1.0),
        row("csr_spmm_avx2", False, 2.0),
    ]
    (found,) = report.layer_summary(rows)
    assert (found["dense"], found["sparse"], found["speedup"]) == (
        "numpy_dense",
        "csr_spmm_avx2",
        2,
    )


def test_doctor_tests_every_usable_kernel() -> None:
    from sparselt import ops

    result = doctor.doctor()
    assert result["healthy"]
    assert [row["kernel"] for row in result["kernels"]] == [info.name for info in ops.kernels()]
    assert {"CUDA", "threads", "instruction set in use"} <= {row["what"] for row in result["rows"]}
    assert "Masks alone give no speed" in doctor.ADVICE


def test_doctor_finds_a_kernel_that_computes_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers.ops, "conv2d", lambda x, weight, **more: torch.zeros(1, 13, 19, 19))
    result = doctor.doctor()
    assert not result["healthy"]
    failed = {row["kernel"] for row in result["kernels"] if row["test"].startswith("FAILED")}
    assert {"csr_conv2d_scalar"} <= failed


def test_doctor_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSELT_ISA", "scalar")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    found = {row["what"]: row["finding"] for row in doctor.doctor()["rows"]}
    assert "forced by SPARSELT_ISA=scalar" in found["instruction set in use"]
    assert found["torch.compile"].startswith("no: there is no C++ compiler")
