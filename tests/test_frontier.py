# SPDX-License-Identifier: Apache-2.0
"""The frontier holds what is measured, and only what nothing else beats."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sparselt.errors import OptionError
from sparselt.frontier import Point, draw_frontier, measure_frontier, undominated, write_frontier
from sparselt.lottery import Data, Recipe

RECIPE = Recipe(
    network="small", data="noise", iterations=4, batch=16, evaluate_every=4, levels=1, rate=0.5
)


def make() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3))


@pytest.fixture(scope="module")
def points() -> list[Point]:
    source = torch.Generator().manual_seed(0)

    def split(count: int) -> tuple[Tensor, Tensor]:
        return torch.randn(count, 12, generator=source), torch.arange(count) % 3

    data = Data(split(64), split(30), split(30), classes=3)
    structures = ("1x1", "4x1", "2:4", "channels")
    return measure_frontier(
        RECIPE, structures, network=make, data=data, batches=(1, 4), seconds=0.0
    )


def test_every_structure_is_timed_at_every_batch(points: list[Point]) -> None:
    found = [(point.structure, point.level, point.batch) for point in points]
    expected = [("dense", 0), ("1x1", 1), ("4x1", 1), ("2:4", 1), ("2:4", 2), ("channels", 1)]
    assert found == [(name, level, batch) for name, level in expected for batch in (1, 4)]


def test_times_come_with_checked_outputs(points: list[Point]) -> None:
    for point in points:
        assert point.error <= 1e-4
        assert point.latency_us is not None
        assert point.dense_us is not None
        assert point.speedup is not None
        assert point.speedup[0] == pytest.approx(point.dense_us / point.latency_us)
        assert point.speedup[1] <= point.speedup[2]


def test_density_is_over_the_original_weights(points: list[Point]) -> None:
    found = {(p.structure, p.level): p.density for p in points}
    assert found["dense", 0] == 1.0
    assert found["channels", 1] == (8 * 12 + 3 * 8) / (16 * 12 + 3 * 16)
    assert found["1x1", 1] == (16 * 12 * 0.5 + 48 * 0.75) / (16 * 12 + 3 * 16)
    assert found["2:4", 2] == 0.5


def point(
    structure: str, level: int, accuracy: float, us: float | None, seed: int = 0, dense: float = 100
) -> Point:
    return Point(structure, seed, level, 0.1, accuracy, 1, us, us, us and dense, None, 0.0)


def test_frontier_by_hand() -> None:
    dense, fast = point("dense", 0, 0.98, 100.0), point("1x1", 2, 0.95, 20.0)
    slow_and_worse, wrong = point("4x1", 1, 0.97, 120.0), point("2:4", 1, 0.999, None)
    good, tied = point("1x1", 1, 0.985, 60.0), point("channels", 1, 0.95, 25.0)
    everything = [dense, fast, slow_and_worse, wrong, good, tied]
    assert undominated(everything, 1) == [fast, good]
    assert undominated(everything, 64) == []


def test_a_ticket_that_was_timed_while_the_machine_was_busy_is_not_slower_for_it() -> None:
    idle, busy = point("1x1", 1, 0.95, 20.0), point("4x1", 1, 0.96, 30.0, dense=300.0)
    assert undominated([idle, busy], 1) == [busy]


def test_seeds_count_by_their_mean() -> None:
    lucky, unlucky = point("1x1", 1, 0.99, 10.0), point("1x1", 1, 0.91, 30.0, seed=1)
    steady = point("4x1", 1, 0.96, 15.0)
    assert undominated([lucky, unlucky, steady], 1) == [steady]


def test_record_and_picture_are_written_whole(points: list[Point], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    write_frontier(points, RECIPE, tmp_path / "frontier.json", "example")
    draw_frontier(points, "small", tmp_path / "frontier.png")
    record = json.loads((tmp_path / "frontier.json").read_text())
    assert record["kind"] == "frontier"
    assert record["machine"]["command"] == "example"
    assert record["recipe"]["rate"] == 0.5
    with (tmp_path / "frontier.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(record["rows"]) == len(points)
    assert float(rows[1]["latency_us"]) == record["rows"][1]["latency_us"]
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {
        "frontier.json", "frontier.csv", "frontier.png",
    }  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {"structures": ()},
        {"structures": ("1x1",) * 7},
        {"structures": ("round",)},
        {"batches": ()},
        {"batches": (0,)},
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, object]) -> None:
    x, y = torch.zeros(6, 12), torch.arange(6) % 3
    data = Data((x, y), (x, y), (x, y), classes=3)
    with pytest.raises(OptionError):
        measure_frontier(RECIPE, network=make, data=data, **options)  # type: ignore[arg-type]
