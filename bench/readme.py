# SPDX-License-Identifier: Apache-2.0
"""Writes the README's tables and picture from committed results: `python -m bench.readme`.

With `--quickstart FOLDER` it first takes over what `make demo` left in FOLDER.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from sparselt import quickstart
from sparselt.measure import report, table
from sparselt.measure.machine import one_line

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PICTURE = ROOT / "docs" / "images" / "quickstart.png"


def quickstart_table(result: dict[str, Any]) -> str:
    """The quickstart's table, its sentences, and the machine."""
    rows = result["rows"]
    text = report.markdown(quickstart.columns(rows), quickstart.table_rows(rows))
    sentences = "\n".join(
        f"  - {line.strip()}" if line.startswith(" ") else f"- {line}"
        for line in quickstart.verdicts(result)
    )
    indented = text.replace("|   ", "| &nbsp;&nbsp;")
    return f"{indented}\n\n{sentences}\n\nMachine: {one_line(result['machine'])}."


def kernel_table(result: dict[str, Any]) -> str:
    """One matrix product on every kernel and library."""
    text = report.markdown(report.LAYER_COLUMNS, result["rows"])
    return f"{text}\n\nMachine: {one_line(result['machine'])}. Command: `{command(result)}`."


def networks_table(result: dict[str, Any]) -> str:
    """Whole networks against the fastest dense engine of each."""
    text = report.markdown(table.TABLE_COLUMNS, table.summary(result))
    missing = " ".join(f"{sentence}." for sentence in table.absent(result))
    return f"{text}\n\nMachine: {one_line(result['machine'])}. {missing}".rstrip()


def command(result: dict[str, Any]) -> str:
    """The command a result was made with."""
    return str(result["machine"]["command"])


TABLES = {
    "quickstart": quickstart_table,
    "kernel": kernel_table,
    "networks": networks_table,
    "small_networks": networks_table,
    "networks_avx2": networks_table,
}


def filled(text: str) -> str:
    """The README's text with every table written anew of which there is a committed result."""
    for name, write in TABLES.items():
        file = RESULTS / f"{name}.json"
        if file.exists():
            text = report.fill_markers(text, name, write(report.read_json(file)))
    return text


def main() -> None:
    """Take over a demo's folder if asked, then rewrite README.md."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quickstart", metavar="FOLDER", type=Path)
    folder = parser.parse_args().quickstart
    if folder is not None:
        report.write_json(RESULTS / "quickstart.json", report.read_json(folder / "quickstart.json"))
        PICTURE.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / "quickstart.png", PICTURE)
    readme = ROOT / "README.md"
    report.write_text(readme, filled(readme.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
