# SPDX-License-Identifier: Apache-2.0
"""Timing, machine headers, and single layers measured in one process."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from sparselt.errors import KernelError, OptionError
from sparselt.measure import layers, machine, suites
from sparselt.measure.timer import Flush, Timing, burst, interleave, measure, speedup

LAYER = suites.Layer("small", 24, 40, columns=33)


def test_quantiles_and_noise_are_those_of_the_samples() -> None:
    timing = Timing(rounds=((1.0, 3.0), (2.0, 2.0), (5.0, 1.0)))
    assert timing.median_us == 2.0
    assert timing.quantile_us(1.0) == 5.0
    assert timing.noise == pytest.approx(abs(2.0 / 2.0 - 1))
    assert Timing(((4.0,), (2.0,))).noise == pytest.approx(1.0)
    assert timing.as_json()["samples"] == 6


def test_burst_measures_the_time_of_one_call() -> None:
    (sample,) = burst(lambda: time.sleep(0.002), samples=1, calls=3)
    assert 2000 <= sample < 20000


def test_interleave_takes_turns_and_rotates_the_order() -> None:
    order: list[str] = []
    times = interleave(
        {name: lambda name=name: order.append(name) or time.sleep(1e-4) for name in "ab"},
        repeats=10,
        seconds=0.0,
        warmup_seconds=0.0,
    )
    turns = [name for name, _ in itertools.groupby(order)]
    assert turns == ["a", "b", "a", "b", "a"]  # warm-up; round 1: a, b; round 2: b, a
    assert all(timing.samples_us.size >= 10 for timing in times.values())


def test_fast_calls_are_timed_many_at_once_and_slow_ones_alone() -> None:
    times = interleave(
        {"fast": lambda: None, "slow": lambda: time.sleep(1e-3)}, repeats=5, seconds=0.0
    )
    assert times["fast"].calls > 50
    assert times["slow"].calls == 1
    assert times["slow"].median_us > 900 > times["fast"].median_us


def test_flush_runs_before_every_call_and_is_not_timed() -> None:
    events: list[str] = []

    def flush() -> None:
        events.append("flush")
        time.sleep(2e-3)

    timing = measure(lambda: events.append("call"), repeats=5, seconds=0.0, flush=flush)
    timed = "".join(event[0] for event in events)
    assert "fcfcfcfcfc" in timed
    assert timing.cache == "flushed"
    assert timing.median_us < 1000


def test_flush_rewrites_its_whole_buffer() -> None:
    flush = Flush(1000)
    flush()
    flush()
    assert (flush._buffer == 2).all()
    with pytest.raises(OptionError, match="at least 1"):
        Flush(0)


def test_interleave_refuses_nothing_to_time() -> None:
    with pytest.raises(OptionError, match="expected callables"):
        interleave({})


def test_speedup_interval_holds_the_ratio_and_widens_with_noise() -> None:
    steady = Timing(tuple((10.0,) for _ in range(8)))
    shaky = Timing(tuple((float(x),) for x in (3, 5, 7, 5, 3, 7, 5, 5)))
    ratio, low, high = speedup(steady, shaky)
    assert ratio == 2.0
    assert low < 2.0 < high
    assert speedup(steady, steady) == (1.0, 1.0, 1.0)


def test_header_says_what_a_figure_depends_on() -> None:
    found = machine.header("a command")
    assert json.loads(json.dumps(found)) == found
    assert found["cpu"]
    assert found["threads"] == torch.get_num_threads()
    assert found["versions"]["torch"] == torch.__version__
    assert found["isa"] in ("scalar", "avx2", "avx512", "neon")
    assert found["command"] == "a command"
    assert {"flags", "caches_bytes", "affinity", "virtual_machine", "date"} <= found.keys()


def test_a_header_names_no_folder_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/sparselt", "inspect", "/elsewhere/a b.pt"])
    assert machine.command_line() == "sparselt inspect 'a b.pt'"
    monkeypatch.setenv("SPARSELT_CACHE", "/somewhere/times")
    assert machine.header()["environment"]["SPARSELT_CACHE"] == "times"


def test_commit_is_recorded_only_in_the_checkout(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    away = tmp_path / "site-packages" / "sparselt" / "measure" / "machine.py"
    monkeypatch.setattr(machine, "__file__", str(away))
    assert "commit" not in machine.header()


def test_bench_layers_covers_every_kernel_that_fits() -> None:
    from sparselt import ops

    result = layers.bench_layers([LAYER], [0.2], block=(4, 1), seconds=0.0)
    engines = {row["engine"]: row for row in result["rows"]}
    spmm = {
        info.name
        for info in ops.kernels()
        if "spmm" in info.operations and info.device == "cpu" and info.format != "sign"
    }
    assert spmm | {"torch_dense", "numpy_dense", "torch_csr"} == engines.keys()
    for row in engines.values():
        assert row["status"] in ("ok", "absent"), row
        if row["status"] == "ok":
            assert row["gflops"] < row["dense_gflops"]
            assert row["weight_bytes"] > 0
    assert len({row["best_dense"] for row in engines.values() if "best_dense" in row}) == 1


def test_bench_layers_gives_a_wrong_kernel_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    real = layers._kernel_run

    def wrong(case: Any, weight: Any, kernel: str) -> Any:
        run = real(case, weight, kernel)
        return (lambda: run() + 1e-3) if kernel == "csr_spmm_scalar" else run

    monkeypatch.setattr(layers, "_kernel_run", wrong)
    result = layers.bench_layers([LAYER], seconds=0.0)
    (row,) = [row for row in result["rows"] if row["engine"] == "csr_spmm_scalar"]
    assert row["status"] == "FAIL"
    assert "median_us" not in row


def test_bench_layers_keeps_a_kernel_that_raises_as_a_failed_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*words: Any, **more: Any) -> Any:
        raise KernelError("it broke")

    monkeypatch.setattr(layers.ops, "spmm", broken)
    rows = layers.bench_layers([LAYER], seconds=0.0)["rows"]
    assert {row["reason"] for row in rows if row["status"] == "FAIL"} == {"it broke"}


@pytest.mark.parametrize("layer", [LAYER, suites.Layer("fc", 10, 30), suites.SUITES["resnet20"][2]])
def test_problem_bound_accepts_torch_and_refuses_a_lost_term(layer: suites.Layer) -> None:
    case = layers.problem(layer, 0.3, batch=2)
    y = layers.apply_dense(case.op, layer, case.weight, case.x)
    assert case.error(y)[1]
    assert case.weight.count_nonzero() == round(0.3 * case.weight.numel())
    lost = case.weight.clone().flatten()
    lost[lost.abs().argmax()] = 0
    y = layers.apply_dense(case.op, layer, lost.view_as(case.weight), case.x)
    assert not case.error(y)[1]


def test_cold_times_are_marked_as_flushed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "_flush_bytes", lambda: 1 << 20)
    result = layers.bench_layers([LAYER], seconds=0.0, cold=True)
    assert {row["cache"] for row in result["rows"] if "cache" in row} == {"flushed"}


def test_bench_layers_refuses_senseless_arguments() -> None:
    with pytest.raises(OptionError, match="density"):
        layers.bench_layers([LAYER], [1.5])
    with pytest.raises(OptionError, match="batch"):
        layers.bench_layers([LAYER], batch=0)
    with pytest.raises(OptionError, match="0 layers"):
        layers.bench_layers([])
    with pytest.raises(OptionError, match="expected one of"):
        suites.suite("alexnet")


@pytest.mark.parametrize("block", [(1, 1), (4, 1), (16, 16)])
def test_random_mask_keeps_exactly_the_share_in_whole_blocks(block: tuple[int, int]) -> None:
    mask = suites.random_mask((32, 8, 2, 2), 0.25, block)
    assert int(mask.sum()) == 32 * 32 // 4
    tiles = mask.reshape(32 // block[0], block[0], 32 // block[1], block[1])
    kept = tiles.sum((1, 3))
    assert set(kept.unique().tolist()) <= {0, block[0] * block[1]}
