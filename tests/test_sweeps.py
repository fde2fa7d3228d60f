# SPDX-License-Identifier: Apache-2.0
"""The commands of `sparselt bench` that measure case by case: what they share, and each table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from sparselt import cli
from sparselt.errors import DataError, OptionError
from sparselt.measure import batches, blocks, choice, chosen, vector
from sparselt.measure.suites import Layer
from sparselt.measure.sweep import Item, Sweep, chosen_items, run_sweep, sweep
from sparselt.measure.timer import Watched, interleave


@pytest.fixture(autouse=True)
def one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_REPEATS", "_BATCH_REPEATS"):
        monkeypatch.setattr(chosen, name, 5)
    monkeypatch.setattr(chosen, "_SECONDS", 0.0)


def counted(names: Sequence[str], ran: list[str]) -> Sweep:
    def item(name: str) -> Item:
        return Item(name, lambda: ran.append(name) or [{"case": name, "status": "ok"}])

    return Sweep("counted", lambda quick: [item(x) for x in names], lambda _: None)


def printed(table: Any) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def test_words_choose_cases_and_an_unknown_one_is_refused() -> None:
    ran: list[str] = []
    made = counted(("fc 4x4", "fc 8x8", "conv 4x4"), ran)
    run_sweep(made, ["8x8", "conv"])
    assert ran == ["fc 8x8", "conv 4x4"]
    with pytest.raises(OptionError, match=r"--only: .* like .* of fc 4x4; .*got layer9"):
        chosen_items(made, ["layer9"])


def test_a_result_is_kept_after_each_case_and_resumed(tmp_path: Path) -> None:
    path, ran = tmp_path / "r.json", list[str]()
    stopped = counted(("a", "b"), ran)
    broken = Sweep("counted", lambda quick: [*stopped.items(quick), Item("c", stop)], stopped.table)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(broken, path=path)
    assert json.loads(path.read_text())["done"] == ["a", "b"]
    whole = run_sweep(counted(("a", "b", "c"), ran), path=path, resume=True)
    assert ran == ["a", "b", "c"]
    assert [row["case"] for row in whole["rows"]] == ["a", "b", "c"]
    run_sweep(counted(("a",), ran), path=path)
    assert ran[3:] == ["a"]
    other = Sweep("other", stopped.items, stopped.table)
    with pytest.raises(DataError, match=r"--resume: .*another kind"):
        run_sweep(other, path=path, resume=True)


def stop() -> list[dict[str, Any]]:
    raise KeyboardInterrupt


@pytest.mark.parametrize("kind", cli._SWEEPS)
def test_every_command_has_its_sweep_whose_names_differ(kind: str) -> None:
    found = sweep(kind)
    assert found.kind == kind
    for quick in (False, True):
        names = [item.name for item in found.items(quick)]
        assert len(set(names)) == len(names)
    assert len(found.items(True)) < len(found.items(False))


def test_of_a_watched_call_the_part_counts_that_it_returns() -> None:
    times = interleave({"a": Watched(lambda: 1e6)}, repeats=5, seconds=0.0, warmup_seconds=0.0)
    assert times["a"].median_us == 1e6


def test_a_jump_is_told_from_one_batch_to_the_next_larger_one() -> None:
    us = {1: 8.0, 16: 2.0, 17: 4.0, 32: 4.4}
    rows = [
        {"case": case, "density": 0.1, "batch": batch, "image_us": us[batch] / scale}
        | {"status": "ok", "busy_cores": 0.0}
        for case, scale in (("a", 1), ("b", 2))
        for batch in (17, 1, 32, 16)
    ]
    assert [(row["batch"], round(ratio, 2)) for row, ratio in batches.jumps(rows)] == [
        *((17, 2.0), (17, 2.0), (32, 1.1), (32, 1.1)),
        *((16, 0.25), (16, 0.25)),
    ]
    machine = {"cpu": "C", "threads": 2, "isa": "avx2", "versions": {}}
    caption = str(batches.batches_table({"rows": rows, "machine": machine}).caption)
    assert "largest 2.00" in caption
    assert "a at 90%, batch 17: 2.00; b at 90%, batch 17: 2.00\n" in caption


def test_every_batch_of_a_small_network_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "BATCHES", (1, 2))
    monkeypatch.setattr(batches, "_CASES", {"small": batches._linear(40)})
    result = run_sweep(batches.SWEEP, quick=True)
    assert [(row["batch"], row["status"]) for row in result["rows"]] == [(1, "ok"), (2, "ok")]
    for row in result["rows"]:
        assert row["image_us"] == row["median_us"] / row["batch"]
    assert "small" in printed(batches.batches_table(result))


def test_a_wrong_program_gets_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "BATCHES", (2,))
    monkeypatch.setattr(batches, "_CASES", {"small": batches._linear(40)})
    right = batches.sparselt.compile

    def compiled(model: torch.nn.Module, x: torch.Tensor) -> Any:
        program = right(model, x)
        program.__class__ = type("Wrong", (type(program),), {"__call__": lambda self, x: x})
        return program

    monkeypatch.setattr(batches.sparselt, "compile", compiled)
    (row,) = batches.batches_items(quick=True)[0].run()
    assert row["status"] == "FAIL"
    assert "image_us" not in row


def test_of_all_layers_the_least_gain_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "LAYERS", (Layer("small.fc", 20, 30),))
    monkeypatch.setattr(choice, "_DENSITIES", (0.2, 0.1))
    result = run_sweep(choice.SWEEP, quick=True)
    assert [row["density"] for row in result["rows"]] == [0.2, 0.1]
    assert "small.fc" in printed(choice.choice_table(result))


def test_blocks_run_in_a_call_and_in_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_CASES", ((Layer("small", 32, 48), 18),))
    result = run_sweep(blocks.SWEEP, ["8x1"])
    assert [(row["way"], row["block"]) for row in result["rows"]] == [
        ("call", "8x1"),
        ("program", "8x1"),
    ]
    assert "8x1 " in str(blocks.blocks_table(result).caption)


def test_a_vector_is_held_against_the_rate_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vector, "_LAYERS", (Layer("small", 64, 96),))
    monkeypatch.setattr(vector, "_BUFFER_BYTES", 1 << 17)
    result = run_sweep(vector.SWEEP, ["density 0.1, threads 1"])
    (row,) = result["rows"]
    assert row["status"] == "ok"
    assert row["share"] == row["weight_bytes"] / row["median_us"] / 1e3 / row["read_rate"]
    assert f"{row['bytes_a_nonzero']:.2f}" in printed(vector.vector_table(result))
