# SPDX-License-Identifier: Apache-2.0
"""Pictures show what the record says: the lines handed to the plotter, and once drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from sparselt.lottery import figures
from sparselt.lottery.chart import Panel
from sparselt.lottery.record import Row

pytest.importorskip("matplotlib", reason="pictures need matplotlib")

ROWS = [
    Row(seed, level, arm, 0.5**level, base + 0.01 * seed, 0.9, 1.0, 100 * (level + 1), base, 1.0)
    for seed in (0, 1)
    for level in range(4)
    for arm, base in (("ticket", 0.9), ("reinit", 0.8), ("reinit#2", 0.7))
    if level or arm == "ticket"
]


@pytest.fixture
def panels(monkeypatch: pytest.MonkeyPatch) -> list[Panel]:
    seen: list[Panel] = []

    def record(drawn: Sequence[Panel], caption: str, path: object) -> None:
        seen.extend(drawn)

    monkeypatch.setattr(figures, "draw_chart", record)
    return seen


def test_levels_show_every_seed_of_tickets_and_of_all_their_controls(panels: list[Panel]) -> None:
    figures.draw_levels(ROWS, "", "unused.png")

    accuracy, early = panels
    assert [line.label for line in accuracy.lines] == ["ticket", "reinit"]
    assert dict(accuracy.lines[0].points) == {
        x: pytest.approx([90, 91]) for x in (100.0, 50.0, 25.0, 12.5)
    }
    assert accuracy.lines[1].points[50.0] == pytest.approx([80, 70, 81, 71])
    assert accuracy.marks == {"dense": pytest.approx(90.5)}
    assert early.lines[0].points[12.5] == [400.0, 400.0]
    assert accuracy.shrinking


def test_a_picture_is_a_png_and_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "levels.png"
    path.write_text("old")

    figures.draw_levels(ROWS, "two seeds", path)

    assert path.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [path]
