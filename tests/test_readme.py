# SPDX-License-Identifier: Apache-2.0
"""The README is true: its Python runs, its commands parse, its tables come from results."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from sparselt import cli
from sparselt.measure import report

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_python_block_runs_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 5
    names: dict[str, object] = {}
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"README block {number}", "exec"), names)
    assert "2 layers run sparse" in capsys.readouterr().out


def test_three_lines_are_three_lines() -> None:
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "explain" in b]
    assert len([line for line in block.splitlines() if line.strip()]) == 3


@pytest.mark.parametrize("words", re.findall(r"^\| `sparselt ([^`]*)`", README, re.MULTILINE))
def test_commands_of_the_table_parse(words: str) -> None:
    given = shlex.split(words)
    assert callable(cli.parser(given).parse_args(given).run)


def test_linked_files_exist() -> None:
    text = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]


def test_tables_are_those_of_the_committed_results() -> None:
    readme = pytest.importorskip("bench.readme", reason="the bench folder is not in this checkout")
    assert readme.filled(README) == README, "run python -m bench.readme"
    assert report.read_json(readme.RESULTS / "quickstart.json")["machine"]["cpu"] in README
