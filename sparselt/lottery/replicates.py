# SPDX-License-Identifier: Apache-2.0
"""The same search under several seeds, in processes of their own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import torch

from sparselt.errors import OptionError, explain_mismatch
from sparselt.lottery.data import Data
from sparselt.lottery.networks import Factory
from sparselt.lottery.recipe import Recipe
from sparselt.lottery.record import Row, rows_of
from sparselt.lottery.search import Progress, run_levels

__all__ = ["run_replicates"]

_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class _Job:
    """What a process needs; all of it can be sent to one."""

    network: str | Factory
    data: str | Data
    recipe: Recipe
    controls: tuple[str, ...]
    folder: str | Path | None
    threads: int


def run_replicates(
    network: str | Factory,
    data: str | Data,
    recipe: Recipe,
    seeds: Sequence[int],
    *,
    controls: Sequence[str] = (),
    folder: str | Path | None = None,
    processes: int = 2,
    threads: int = 1,
    progress: Callable[[int, Progress], None] | None = None,
) -> list[Row]:
    """Runs one search a seed, several at a time, each as :func:`sparselt.lottery.run_levels` would.

    Args:
        network: A key of ``NETWORKS``, or a function at the top of a module, so that another
            process finds it.
        data: A key of ``DATASETS``, or your tensors.
        recipe: Settings of all; the seed is replaced.
        seeds: One search each.
        controls: As for ``run_levels``.
        folder: Where the runs are kept; a killed call goes on where each of its searches stopped.
        processes: How many run at a time.
        threads: Torch threads of each process.
        progress: Called with (seed, progress), in this process.

    Returns:
        The rows of all searches, in the order of ``seeds``.

    Raises:
        OptionError: No seeds, the same seed twice, or fewer than one process.
    """
    if not seeds or len(set(seeds)) != len(seeds):
        raise OptionError(explain_mismatch("seeds", "different numbers, at least one", list(seeds)))
    if processes < 1:
        raise OptionError(explain_mismatch("processes", "at least 1", processes))
    jobs = [
        _Job(network, data, replace(recipe, seed=seed), tuple(controls), folder, threads)
        for seed in seeds
    ]
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        reports = manager.Queue()
        with ProcessPoolExecutor(processes, mp_context=context) as pool:
            futures = [pool.submit(_run, job, reports) for job in jobs]
            try:
                _pass_on(futures, reports, progress)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            return [row for future in futures for row in future.result()]


def _pass_on(
    futures: Sequence[Future[list[Row]]],
    reports: Queue[tuple[int, Progress]],
    progress: Callable[[int, Progress], None] | None,
) -> None:
    """Hands reports on until every process is done; the first failure is raised at once."""
    while not all(future.done() for future in futures) or not reports.empty():
        for future in futures:
            if future.done():
                future.result()
        try:
            seed, now = reports.get(timeout=_POLL_SECONDS)
        except Empty:
            continue
        if progress is not None:
            progress(seed, now)


def _run(job: _Job, reports: Any) -> list[Row]:
    torch.set_num_threads(job.threads)
    seed = job.recipe.seed
    levels = run_levels(
        job.network,
        job.data,
        job.recipe,
        controls=job.controls,
        folder=job.folder,
        progress=lambda now: reports.put((seed, now)),
    )
    return rows_of(levels, seed)
