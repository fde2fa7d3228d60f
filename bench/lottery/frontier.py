# SPDX-License-Identifier: Apache-2.0
"""Accuracy against measured latency over structures of pruning, for one network.

Run from the repository with SPARSELT_DATA set to a folder that holds MNIST's four files in
``mnist/``::

    python -m bench.lottery.frontier

Recipe flags (``--network conv_2 --data cifar10 --iterations 20000`` ...) choose another network.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from sparselt.frontier import draw_frontier, measure_frontier, undominated, write_frontier
from sparselt.lottery import Recipe, load_data
from sparselt.lottery.structured_search import STRUCTURE

OUT = Path(__file__).resolve().parent.parent / "results" / "lottery"
STRUCTURES = ("1x1", "4x1", "16x1", "2:4", STRUCTURE)
RECIPE = Recipe(
    network="conv_small", data="mnist", lr=2e-3, iterations=400, evaluate_every=200, levels=6,
    rate=0.4, conv_rate=0.4,
)  # fmt: skip


def main() -> None:
    """Finds, times, and writes the record and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--structures", nargs="+", default=STRUCTURES, help="default: %(default)s")
    add("--seeds", type=int, default=1, help="default: %(default)s")
    add("--batches", type=int, nargs="+", default=(1, 64), help="default: %(default)s")
    add("--examples", type=int, help="only that many of the training split (default: all)")
    add("--threads", type=int, default=1, help="default: %(default)s")
    add("--out", type=Path, default=OUT, help="default: bench/results/lottery")
    add("--runs", type=Path, help="folder that keeps the searches; by default nothing is kept")
    Recipe.add_flags(parser)
    chosen = parser.parse_args()
    recipe = Recipe.from_flags(chosen, RECIPE)
    torch.set_num_threads(chosen.threads)
    data = load_data(recipe.data)
    data = replace(data, train=(data.train[0][: chosen.examples], data.train[1][: chosen.examples]))
    with tempfile.TemporaryDirectory() as scratch:
        points = measure_frontier(
            recipe,
            chosen.structures,
            seeds=range(chosen.seeds),
            batches=chosen.batches,
            data=data,
            folder=chosen.runs or scratch,
            progress=lambda line: print(line, flush=True),
        )
    stem = chosen.out / f"frontier_{recipe.network}_{recipe.data}"
    command = shlex.join(["python", "-m", "bench.lottery.frontier", *sys.argv[1:]])
    write_frontier(points, recipe, stem.with_suffix(".json"), command)
    title = f"{recipe.network} on {recipe.data}, {recipe.iterations} iterations"
    if chosen.examples:
        title += f", {chosen.examples} examples"
    draw_frontier(points, title, stem.with_suffix(".png"))
    for batch in chosen.batches:
        print(f"frontier at batch {batch}:")
        for point in undominated(points, batch):
            print(
                f"  {point.structure} level {point.level}: {point.test_accuracy:.4f}, "
                f"{point.latency_us:.0f} us, {point.dense_us:.0f} us dense"
            )


if __name__ == "__main__":
    main()
