# SPDX-License-Identifier: Apache-2.0
"""Measured times on disk: recalled where all is the same, and harmless wherever anything is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from networks import prune_randomly
from torch import nn

import sparselt
from sparselt import tune, tune_cache
from sparselt.plan import Plan
from sparselt.tune import Tuner
from sparselt.tune_cache import TimesCache, cache_folder

ROOT = Path(__file__).parent.parent


def folder() -> Path:
    found = cache_folder()
    assert found is not None
    return found


def entries() -> list[Path]:
    return sorted(folder().glob("*.json"))


def layer(density: float = 0.2) -> nn.Linear:
    torch.manual_seed(1)
    return prune_randomly(nn.Linear(96, 64), density)


def without_bias() -> nn.Linear:
    module = layer()
    module.bias = None
    return module


def plan(module: nn.Module | None = None, batch: int = 4, format: str = "auto") -> Plan:
    """What a process that starts now plans."""
    return Tuner(format).plan(module or layer(), inputs=[torch.ones(batch, 96)])


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Notes every measurement; its times are settled, however busy the machine."""
    log: list[int] = []

    def measure(calls, **_):
        log.append(len(calls))
        return {name: 10.0 + i for i, name in enumerate(calls)}

    monkeypatch.setattr(tune, "measure", measure)
    return log


def test_the_next_process_measures_nothing_and_says_so(measured):
    first, second = plan(), plan()
    assert len(measured) == 1
    assert second.reason == first.reason + ", from the cache"
    assert [c.us for c in second.candidates] == [c.us for c in first.candidates]
    model = nn.Sequential(layer(), nn.ReLU())
    row = sparselt.explain(sparselt.convert(model, torch.ones(4, 96)))[0]
    assert row.reason.endswith("from the cache")
    assert len(measured) == 1


def test_layers_within_a_few_percent_of_each_other_share_an_entry(measured):
    plan(layer(0.2)), plan(layer(0.201))
    assert len(measured) == 1


@pytest.mark.parametrize(
    "other",
    [
        lambda: plan(layer(0.3)),
        lambda: plan(batch=5),
        lambda: plan(format="csr"),
        lambda: plan(without_bias()),
        lambda: Tuner(weight_bytes=1 << 40).plan(layer(), inputs=[torch.ones(4, 96)]),
        lambda: Tuner().plan(layer(), inputs=[torch.ones(96, 4).t()]),
    ],
    ids=["density", "batch", "format", "bias", "cold", "strides"],
)
def test_another_problem_is_another_entry(measured, other):
    plan(), other()
    assert len(measured) == len(entries()) == 2


def test_of_a_large_batch_a_part_is_timed_and_the_time_is_that_of_the_whole(measured, monkeypatch):
    monkeypatch.setattr(tune, "_LARGE_INPUT", 1000)
    times = {batch: plan(batch=batch).dense_us for batch in (20, 40, 42, 80, 84)}
    assert times == {20: 10.0, 40: 20.0, 42: 20.0, 80: 40.0, 84: 40.0}


def test_uneven_rows_are_another_kind_than_even_ones(measured):
    even, uneven = torch.zeros(64, 96), torch.zeros(64, 96)
    even[:, ::4], uneven[:16] = 1, 1
    for mask in (even, uneven):
        Tuner().plan(nn.Linear(96, 64), mask, [torch.ones(4, 96)])
    assert len(measured) == 2


def test_other_threads_builds_and_machines_are_other_entries(measured, monkeypatch):
    plan()
    torch.set_num_threads(1)
    plan()
    monkeypatch.setattr(tune, "build_id", lambda: "of other kernels")
    plan()
    monkeypatch.setattr(tune, "cpu_name", lambda: "another CPU")
    plan()
    assert len(measured) == len(entries()) == 4


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "\x00" * 100,
        lambda text: "[" * 50_000,
        lambda text: " " * (1 << 16) + text,
        lambda text: "[]",
        lambda text: text.replace('"us"', '"seconds"'),
        lambda text: text.replace('"dense"', '"gone"'),
        lambda text: text.replace("Linear", "Conv").replace("linear", "spmm"),
        lambda text: json.dumps({**json.loads(text), "us": [1.0]}),
        lambda text: json.dumps({**json.loads(text), "us": {"dense": "fast"}}),
        lambda text: text.replace("10.0", "NaN"),
        lambda text: text.replace("10.0", "-10.0"),
        lambda text: text.replace("10.0", "1e999"),
    ],
)
def test_a_damaged_or_foreign_entry_is_measured_anew(measured, spoil):
    first = plan()
    (path,) = entries()
    whole = path.read_text()
    path.write_text(spoil(whole))
    assert path.read_text() != whole
    assert plan() == first
    assert len(measured) == 2
    assert path.read_text() == whole, "the good entry did not replace the bad one"


def test_an_old_entry_is_measured_anew(measured):
    plan()
    (path,) = entries()
    os.utime(path, (0, time.time() - 40 * 86400))
    plan()
    assert len(measured) == 2
    plan()
    assert len(measured) == 2


@pytest.mark.parametrize("scatter", [False, True])
def test_times_that_were_disturbed_are_not_kept(monkeypatch, scatter):
    def measure(calls, spent, **_):
        spent.update({name: [10.0, 10.0, 10.0 + 90.0 * scatter, 100.0] for name in calls})
        return dict.fromkeys(calls, 10.0)

    monkeypatch.setattr(tune, "measure", measure)
    assert plan().dense_us == 10.0
    assert len(entries()) == 1 - scatter


@pytest.mark.parametrize("word", ["0", "off", "OFF"])
def test_the_cache_can_be_switched_off(measured, monkeypatch, tmp_path, word):
    monkeypatch.setenv("SPARSELT_CACHE", word)
    monkeypatch.chdir(tmp_path)
    plan(), plan()
    assert len(measured) == 2
    assert not list(tmp_path.iterdir())


def test_the_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSELT_CACHE", str(tmp_path))
    assert folder() == tmp_path / "times"
    monkeypatch.delenv("SPARSELT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert folder() == tmp_path / "sparselt" / "times"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert folder() == tmp_path / "home" / ".cache" / "sparselt" / "times"


def test_a_folder_that_cannot_be_written_is_an_empty_cache(measured, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPARSELT_CACHE", str(tmp_path / "file"))
    plan(), plan()
    assert len(measured) == 2


def test_the_cache_is_bounded_and_spares_what_is_not_its_own(monkeypatch):
    monkeypatch.setattr(tune_cache, "_MOST_ENTRIES", 8)
    monkeypatch.setattr(tune_cache, "_KEPT_ENTRIES", 5)
    monkeypatch.setattr(tune_cache, "_PUTS_BETWEEN_CHECKS", 1)
    cache = TimesCache()
    cache.put("0", {"dense": 1.0})
    foreign = folder() / "notes.json"
    foreign.write_text("mine")
    killed = folder() / f".{entries()[0].name}.k2_x9"
    killed.write_text("")
    for path in (foreign, killed):
        os.utime(path, (0, 0))
    for i in range(1, 30):
        cache.put(str(i), {"dense": float(i)})
        assert len(entries()) <= 8 + 1
    assert foreign.read_text() == "mine"
    assert not killed.exists()
    assert cache.get("29", ["dense"]) == {"dense": 29.0}
    assert cache.get("0", ["dense"]) is None


WRITER = """
import sys
from sparselt.tune_cache import TimesCache
cache, own = TimesCache(), sys.argv[1]
for turn in range(150):
    cache.put("shared", {"dense": float(own), "other": float(own)})
    cache.put(f"{own} {turn}", {"dense": 1.0 + turn})
    got = cache.get("shared", ["dense", "other"])
    assert got is not None and got["dense"] == got["other"], got
"""


def test_processes_that_write_at_once_read_whole_entries():
    command = [sys.executable, "-c", WRITER]
    running = [
        subprocess.Popen([*command, str(i)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for i in (1, 2, 3)
    ]
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert len(list(folder().iterdir())) == 1 + 3 * 150
    cache = TimesCache()
    assert all(cache.get(f"{i} 149", ["dense"]) == {"dense": 150.0} for i in (1, 2, 3))
