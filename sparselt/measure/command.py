# SPDX-License-Identifier: Apache-2.0
"""What the commands on whole networks run: `sparselt profile` and `sparselt bench model`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console, Group
from rich.progress import Progress
from rich.table import Table

import sparselt
from sparselt.measure import accuracy, model, networks, report, sweep, table
from sparselt.measure.machine import header, one_line

__all__ = ["check_all", "profile", "time_all", "time_one", "time_sweep"]

Tell = Callable[[str], None]


def profile(
    arguments: argparse.Namespace, built: networks.Pruned, progress: Tell
) -> tuple[dict[str, Any], Group]:
    """Profile a compiled network at each batch; the result and what to print."""
    _, density = model.prunable_density(built.model)
    result: dict[str, Any] = {"kind": "profile", "machine": header(), "cases": []}
    shown = []
    for batch in arguments.batch:
        progress(f"compiling {arguments.network} at batch {batch}")
        inputs = networks.example_inputs(built.shape, batch)
        program = sparselt.compile(built.model, inputs)
        progress(f"running {arguments.network} at batch {batch}")
        found = program.profile(inputs)
        case = {"case": arguments.network, "batch": batch, "density": density}
        result["cases"].append(case | found.to_dict())
        shown.append(f"{arguments.network}, batch {batch}\n\n{found}\n")
        if arguments.trace:
            found.save_trace(arguments.trace)
    return result, Group(*shown, one_line(result["machine"]))


def time_one(
    arguments: argparse.Namespace, built: networks.Pruned, progress: Tell
) -> tuple[dict[str, Any], list[Table]]:
    """Time one network on every engine at each batch; the result and its tables."""
    results = [
        model.bench_model(
            built.model,
            networks.example_inputs(built.shape, batch),
            arguments.engines.split(",") if arguments.engines else None,
            name=arguments.network,
            rounds=arguments.rounds or 10,
            threads=arguments.threads,
            progress=progress,
        ).as_json()
        for batch in arguments.batch
    ]
    return model.merged(results), [report.model_table(result) for result in results]


@contextmanager
def _bar(total: float) -> Iterator[Callable[[float, str], None]]:
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


def time_sweep(arguments: argparse.Namespace) -> tuple[dict[str, Any], Table]:
    """Time the cases of a sweep that the arguments choose; the result and its table."""
    found = sweep.sweep(arguments.kind)
    options = {"quick": arguments.quick, "resume": arguments.resume}
    with _bar(1.0) as progress:
        result = sweep.run_sweep(
            found, arguments.only, path=arguments.json, progress=progress, **options
        )
    return result, found.table(result)


def check_all(arguments: argparse.Namespace) -> tuple[dict[str, Any], Table]:
    """Compare the chosen cases' outputs with float64; the result and its table."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    cases = table.chosen_cases(arguments.only, arguments.quick)
    with _bar(len(cases)) as progress:
        result = accuracy.check_networks(cases, progress)
    return result, report.rich_table("", accuracy.ACCURACY_COLUMNS, result["rows"])
