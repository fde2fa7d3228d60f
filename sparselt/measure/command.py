# SPDX-License-Identifier: Apache-2.0
"""What `sparselt bench model all` runs: the table of whole networks, or their accuracy."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from sparselt.measure import accuracy, report, table
from sparselt.measure.machine import one_line

__all__ = ["check_all", "time_all"]


@contextmanager
def _bar(total: int) -> Iterator[Callable[[int, str], None]]:
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("starting", total=total)
        yield lambda done, text: bar.update(task, completed=done, description=text)


def time_all(arguments: argparse.Namespace) -> tuple[dict[str, Any], Table]:
    """Time the cases that the arguments choose; the result, kept on the way, and its table."""
    cases = table.chosen_cases(arguments.only, arguments.quick)
    with _bar(len(cases)) as progress:
        result = table.bench_table(
            cases,
            path=arguments.json,
            resume=arguments.resume,
            rounds=arguments.rounds or (3 if arguments.quick else 8),
            threads=arguments.threads,
            engines=arguments.engines.split(",") if arguments.engines else None,
            progress=progress,
        )
    caption = "\n".join([*table.absent(result), one_line(result["machine"])])
    return result, report.rich_table("", table.TABLE_COLUMNS, table.summary(result), caption)


def check_all(arguments: argparse.Namespace) -> tuple[dict[str, Any], Table]:
    """Compare the chosen cases' outputs with float64; the result and its table."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    cases = table.chosen_cases(arguments.only, arguments.quick)
    with _bar(len(cases)) as progress:
        result = accuracy.check_networks(cases, progress)
    return result, report.rich_table("", accuracy.ACCURACY_COLUMNS, result["rows"])
