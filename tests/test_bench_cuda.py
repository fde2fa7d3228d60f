# SPDX-License-Identifier: Apache-2.0
"""The benchmark for a GPU and its script, run on a simulated device: nothing is timed here.

What counts is that a lent machine's minutes end in a file: one wrong kernel, one missing baseline,
one crash or one deadline may cost its own row and no other.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cuda_host.operators import Launch
from simulated_cuda import Gpu, simulated_cuda

from bench.cuda import bench
from bench.cuda.cases import SUITES, Case, in_turns
from sparselt.measure.report import read_json

ROOT = Path(__file__).resolve().parent.parent
SMALL = {
    "few": (Case("few", 48, 64, 3, 0.2, "float16", ("bitmask", "tile8", "patch8", "csr")),),
    "exact": (Case("exact", 40, 30, 70, 0.1),),
    "blocks": (Case("blocks", 64, 64, 40, 0.5, "float32", ("bsr",), (16, 16)),),
    "convolution": (Case("c", 8, 6, 2, 0.2, "float32", ("csr",), (1, 1), (3, 3), (7, 7), 2),),
    "channels": (Case("n", 32, 32, 2, 0.5, "bfloat16", ("bsr_nhwc",), (16, 16), (3, 3), (6, 6)),),
    "halves": (Case("halves", 64, 128, 32, 0.5, "float16", ("semi_structured",)),),
    "planned": (Case("planned", 64, 64, 4, 0.1, "float16", ("planned",)),),
}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    monkeypatch.setattr(bench, "SUITES", SMALL)
    monkeypatch.setattr("bench.cuda.cases.SUITES", SMALL)
    monkeypatch.setattr("bench.cuda.contenders.MOST_COPIES", 2)
    monkeypatch.setattr(bench, "TURNS", (2, 2))
    monkeypatch.setattr(bench, "COPIED", 64)
    monkeypatch.setattr(bench, "SQUARE", 8)
    settings = (torch.backends.cudnn, torch.backends.cuda.matmul)
    allowed = [backend.allow_tf32 for backend in settings]
    matmul = torch.backends.cuda.matmul
    reduced = matmul.allow_fp16_reduced_precision_reduction
    narrow = matmul.allow_bf16_reduced_precision_reduction
    with simulated_cuda(monkeypatch) as found:
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
        monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
        yield found
    for backend, value in zip(settings, allowed, strict=True):
        backend.allow_tf32 = value
    matmul.allow_fp16_reduced_precision_reduction = reduced
    matmul.allow_bf16_reduced_precision_reduction = narrow


def rows_of(path: Path) -> list[dict[str, object]]:
    return read_json(path / "simulated-cuda.json")["rows"]


def test_every_row_is_checked_and_set_against_dense_and_roofline(gpu: Gpu, tmp_path: Path) -> None:
    assert bench.main(["--out", str(tmp_path)]) == 0
    rows = rows_of(tmp_path)
    engines = {row["engine"] for row in rows}
    ours = {"bitmask", "tile8", "patch8", "csr", "bsr", "bsr_nhwc", "semi_structured", "planned"}
    assert ours | {"dense", "dense_tf32", "dense_nhwc"} <= engines
    for row in rows:
        if row["engine"] in ours | {"dense", "dense_nhwc"}:
            assert "us" in row, row
            assert row["times_dense"] > 0
            assert row["share_of_roofline"] > 0
            assert row["bound_by"] in ("bytes", "operations")
        assert row.get("tf32", False) == str(row["engine"]).endswith("tf32")
        assert row.get("wrong", "") == "", row
    result = read_json(tmp_path / "simulated-cuda.json")
    assert result["unrun"] == []
    assert result["gpu"]["tf32"].startswith("off")


def test_wrong_result_gets_no_figure(
    gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Gpu._result

    def wrong(self: Gpu, op: str, args: object, launch: Launch) -> torch.Tensor:
        y = right(self, op, args, launch)
        return y + 1 if launch.kernel.startswith("tile8") else y

    monkeypatch.setattr(Gpu, "_result", wrong)
    assert bench.main(["--suite", "few", "--out", str(tmp_path)]) == 0
    found = {row["engine"]: row for row in rows_of(tmp_path)}
    assert "outputs beyond the bound" in str(found["tile8"]["wrong"])
    assert "us" not in found["tile8"]
    assert "us" in found["patch8"]


def test_crash_costs_one_row_and_the_next_process_goes_on(
    gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Gpu._result

    def crash(self: Gpu, op: str, args: object, launch: Launch) -> torch.Tensor:
        if launch.kernel.startswith("csr"):
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")
        return right(self, op, args, launch)

    monkeypatch.setattr(Gpu, "_result", crash)
    monkeypatch.setattr(bench, "device_is_lost", lambda: "csr_spmm_cuda" in gpu.launches)
    command = ["--suite", "exact", "blocks", "--out", str(tmp_path)]
    assert bench.main(command) == bench.AGAIN
    gpu.launches.clear()  # as a new process finds the device
    assert bench.main(command) == 0
    rows = rows_of(tmp_path)
    (lost,) = [row for row in rows if "crashed" in row]
    assert lost["engine"] == "csr"
    assert lost["crashed"] == "CUDA error: an illegal memory access was encountered"
    assert any(row["engine"] == "bsr" and "us" in row for row in rows)
    assert len({(row["case"], row["engine"]) for row in rows}) == len(rows)


def test_time_that_is_out_is_said_and_taken_up_again(gpu: Gpu, tmp_path: Path) -> None:
    command = ["--suite", "exact", "convolution", "--out", str(tmp_path)]
    assert bench.main([*command, "--seconds", "0"]) == 0
    assert not (tmp_path / "simulated-cuda.json").exists()
    with pytest.MonkeyPatch.context() as patch:
        clock = iter([0.0, 0.5, 2.0, 2.0])
        patch.setattr(bench, "time", SimpleNamespace(monotonic=lambda: next(clock)))
        assert bench.main([*command, "--seconds", "1"]) == 0
    assert read_json(tmp_path / "simulated-cuda.json")["unrun"] == [str(SMALL["convolution"][0])]
    assert bench.main(command) == 0
    assert read_json(tmp_path / "simulated-cuda.json")["unrun"] == []


def test_time_is_shared_out_over_the_rows_of_the_table() -> None:
    cases = in_turns(list(SUITES))
    assert len({str(case) for case in cases}) == len(cases) == sum(map(len, SUITES.values()))
    assert {case for suite in SUITES.values() for case in suite[:0]} <= set(cases)
    first = cases[: len(SUITES)]
    assert all(any(case in SUITES[name] for case in first) for name in SUITES)
    assert sum(case.density == 0.1 for case in first) >= len(SUITES) - 1


# ---- run.sh ----

FAKE_PYTHON = """#!/usr/bin/env bash
echo "$*" >> "$LOG"
case "$*" in
  *get_device_capability*) echo 9.0 ;;
  *setup.py*) echo "arch $TORCH_CUDA_ARCH_LIST" >> "$LOG"; exit "${BUILD:-0}" ;;
  *bench.cuda.bench*) if [ "$(grep -c bench.cuda.bench "$LOG")" = 1 ]; then exit 75; fi ;;
  *pytest*) exit "${TESTS:-0}" ;;
  *is_available*) exit "${NO_GPU:-0}" ;;
esac
"""


def script(tmp_path: Path, *stages: str, **environment: str) -> tuple[int, str, str]:
    """(exit status, what the interpreter was asked, run.txt) of run.sh with a false Python."""
    python, log = tmp_path / "python", tmp_path / "log"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    names = {"PYTHON": str(python), "LOG": str(log), "OUT": str(tmp_path / "out"), **environment}
    done = subprocess.run(
        ["bash", ROOT / "bench" / "cuda" / "run.sh", *stages],
        env={"PATH": os.environ["PATH"], "PROCESSES": "2", **names},
        capture_output=True,
        text=True,
        check=False,
    )
    said = tmp_path / "out" / "run.txt"
    return done.returncode, log.read_text(), said.read_text() if said.exists() else done.stderr


def test_script_goes_on_after_a_stage_that_fails(tmp_path: Path) -> None:
    status, asked, said = script(tmp_path, "build", "test", "bench", TESTS="3")
    assert status == 1
    assert "arch 9.0a" in asked
    assert asked.count("bench.cuda.bench") == 2, "the process that lost its device is followed"
    ended = [line.rsplit(" after ", 1)[0] for line in said.splitlines()]
    assert ended == ["build: passed", "test: failed with exit status 3", "bench: passed"]


def test_script_stops_where_nothing_was_built(tmp_path: Path) -> None:
    status, asked, said = script(tmp_path, "build", "test", BUILD="1")
    assert (status, "pytest" in asked) == (1, False)
    assert said.startswith("build: failed with exit status 1")


def test_script_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    status, _, said = script(tmp_path, NO_GPU="1")
    assert status == 2
    assert "no torch that sees a GPU" in said


def test_script_keeps_each_stage_to_its_time(tmp_path: Path) -> None:
    (tmp_path / "slow").mkdir()
    slow = tmp_path / "slow" / "timeout"
    slow.write_text("#!/usr/bin/env bash\nexit 124\n")
    slow.chmod(0o755)
    path = f"{slow.parent}:{os.environ['PATH']}"
    status, _, said = script(tmp_path, "test", "sanitize", PATH=path)
    assert status == 1
    assert [line.split(" after")[0] for line in said.splitlines()] == [
        "test: out of time",
        "sanitize: out of time",
    ]
