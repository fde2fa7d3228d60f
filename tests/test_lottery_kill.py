# SPDX-License-Identifier: Apache-2.0
"""A search whose process is killed outright, at whatever it is doing, and what is left of it."""

from __future__ import annotations

import multiprocessing
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lottery_cases import RECIPE, blobs, network, one_thread  # noqa: F401

from sparselt.lottery import Level, run_levels

LONG = replace(RECIPE, iterations=400, levels=3, rewind=20)


def search(folder: Path) -> list[Level]:
    torch.set_num_threads(1)
    options = {"controls": ("reinit",), "folder": folder, "checkpoint_seconds": 0.0}
    return list(run_levels(network, blobs(), LONG, **options))


def assert_same(got: list[Level], want: list[Level]) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.outcome == b.outcome
        assert a.controls == b.controls
        for part in ("masks", "weights", "initial"):
            left, right = getattr(a.ticket, part), getattr(b.ticket, part)
            assert all(torch.equal(left[name], value) for name, value in right.items())


def test_killed_processes_leave_what_leads_to_bitwise_the_same_end(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    level = tmp_path / LONG.folder_name() / "level_01"
    for awaited in ("ticket.pt", "reinit.pt"):
        process = context.Process(target=search, args=(tmp_path,))
        process.start()
        end = time.monotonic() + 120
        while not (level / awaited).exists() and process.is_alive() and time.monotonic() < end:
            time.sleep(0.002)
        process.kill()
        process.join()
    assert not (level.parent / "level_03" / "ticket.json").exists(), "killed too late to show much"

    assert_same(search(tmp_path), search(tmp_path / "whole"))
    left = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert not [name for name in left if name.endswith(".pt")]


@pytest.mark.parametrize("lost", ["ticket.safetensors", "ticket.json", "reinit.json"])
def test_a_level_that_was_written_in_part_is_trained_again(tmp_path: Path, lost: str) -> None:
    want = search(tmp_path)
    (tmp_path / LONG.folder_name() / "level_02" / lost).unlink()

    assert_same(search(tmp_path), want)
