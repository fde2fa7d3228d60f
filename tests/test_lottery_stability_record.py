# SPDX-License-Identifier: Apache-2.0
"""The record of stability reads back as it was written, and its picture shows what it says."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from sparselt import errors
from sparselt.lottery.chart import Line, Panel, draw_chart
from sparselt.lottery.stability import Stability
from sparselt.lottery.stability_record import (
    StabilityRow,
    draw_stability,
    read_stability,
    write_stability,
)

ROWS = [
    StabilityRow(arm, seed, 0, Stability(start, 0.5, (0.1, rise, 0.2), (0.0, 0.1, 0.0), "none"))
    for arm, rise in (("dense", 0.2), ("ticket", 0.4))
    for start in (0, 100)
    for seed in (0, 1)
]


class TestRecord:
    def test_reads_back_what_was_written(self, tmp_path: Path) -> None:
        write_stability(ROWS, tmp_path / "record.json", {"settings": {"data": "blobs"}})

        rows, meta = read_stability(tmp_path / "record.json")

        assert rows == ROWS
        assert meta == {"settings": {"data": "blobs"}}

    def test_states_the_instability_and_the_ends(self, tmp_path: Path) -> None:
        write_stability(ROWS, tmp_path / "record.json")

        values = json.loads((tmp_path / "record.json").read_text())["rows"][-1]
        with (tmp_path / "record.csv").open() as file:
            table = list(csv.DictReader(file))

        assert values["instability"] == pytest.approx(0.25)
        assert values["train_instability"] == pytest.approx(0.1)
        assert values["mean_end_error"] == pytest.approx(0.15)
        assert len(table) == len(ROWS)
        assert table[-1]["arm"] == "ticket"
        assert float(table[-1]["instability"]) == pytest.approx(0.25)
        assert "errors" not in table[-1]

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": [{}]}', '{"rows": 3}'])
    def test_a_file_that_is_none_is_an_error(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "record.json").write_text(text)

        with pytest.raises(errors.DataError, match="expected a record of stability"):
            read_stability(tmp_path / "record.json")

    def test_nothing_is_not_a_record(self, tmp_path: Path) -> None:
        with pytest.raises(errors.DataError, match="at least one row"):
            write_stability([], tmp_path / "record.json")
        assert not list(tmp_path.iterdir())


class TestPicture:
    def test_is_one_png_and_nothing_beside_it(self, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib", reason="pictures need matplotlib")
        draw_stability(ROWS, tmp_path / "picture.png", "blobs")

        assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]
        assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")

    def test_shows_means_bands_and_marks(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        figure = pytest.importorskip("matplotlib.figure", reason="pictures need matplotlib")
        shown: list[list[tuple[list[float], list[float]]]] = []

        def keep(self: object, *args: object, **options: object) -> None:
            shown.append(
                [
                    (list(line.get_xdata()), list(line.get_ydata()))
                    for axes in self.axes  # type: ignore[attr-defined]
                    for line in axes.lines
                ]
            )

        monkeypatch.setattr(figure.Figure, "savefig", keep)
        panel = Panel("t", "x", "y", [Line("a", {10: [1.0, 3.0], 500: [4.0]})], {"m": 2.0}, True)
        draw_chart([panel], "", tmp_path / "picture.png")

        assert shown == [[([0.0, 1.0], [2.0, 4.0]), ([0, 1], [2.0, 2.0])]]
