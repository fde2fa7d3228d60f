# SPDX-License-Identifier: Apache-2.0
"""Instability of LeNet-300-100 on MNIST, dense, as a ticket and under a shuffled mask.

Run from the repository with SPARSELT_DATA set to a folder that holds MNIST's four files in
``mnist/``::

    python -m bench.lottery.stability_lenet_mnist

Two runs from the same weights of iteration k, in different data orders; 30 points along the line
between their ends. Optimiser, learning rate and batch are those published for the network (Frankle
et al. 2019: 24,000 iterations); iterations and rounds of pruning are cut to minutes on one thread.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sparselt import lottery
from sparselt.lottery.controls import Arm, Basis, make_control
from sparselt.lottery.networks import build, factory_of
from sparselt.lottery.stability import dense_arms, measure_stability
from sparselt.lottery.stability_record import StabilityRow, draw_stability, write_stability
from sparselt.lottery.structures import Blocks
from sparselt.measure.machine import header

OUT = Path(__file__).resolve().parent.parent / "results" / "lottery"
# Three rounds of 60 % keep 6.5 % of the weights (the output layer is pruned half as fast).
RECIPE = lottery.Recipe(iterations=2000, evaluate_every=1000, levels=3, rate=0.6)


def study(
    data: lottery.Data, recipe: lottery.Recipe, rewinds: list[int], folder: Path
) -> Iterator[StabilityRow]:
    """Dense network, last level's ticket and a shuffle of its mask at each rewinding point."""
    factory = factory_of(recipe.network, data.shape, data.classes)
    model = build(factory, 0)
    dense = dense_arms(recipe.network, data, recipe, rewinds)
    for point in rewinds:
        at_point = replace(recipe, rewind=point)
        ticket = list(lottery.run_levels(recipe.network, data, at_point, folder=folder))[-1].arm
        arms: dict[str, Arm] = {"dense": dense[point], "ticket": ticket}
        basis = Basis(ticket, ticket.masks, {}, ticket.state, factory, Blocks(1, 1), recipe.seed)
        arms["shuffled mask"] = make_control("shuffle", basis)
        for name, arm in arms.items():
            case = measure_stability(model, data, at_point, arm)
            yield StabilityRow(name, recipe.seed, 0, case)


def main() -> None:
    """Runs everything and writes the record and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--rewinds", type=int, nargs="+", default=[0, 200], help="default: 0 200")
    parser.add_argument("--out", type=Path, default=OUT, help="default: bench/results/lottery")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    data = lottery.load_data("mnist")
    points = " ".join(map(str, chosen.rewinds))
    command = (
        f"python -m bench.lottery.stability_lenet_mnist --seeds {chosen.seeds} --rewinds {points}"
    )
    machine = header(command=command)
    rows: list[StabilityRow] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(chosen.seeds):
            for row in study(data, replace(RECIPE, seed=seed), chosen.rewinds, Path(folder)):
                rows.append(row)
                print(row.arm, seed, row.case.start, f"{row.case.instability:.4f}", flush=True)
            save(rows, machine, seed + 1, chosen.out)


def save(rows: list[StabilityRow], machine: dict[str, Any], seeds: int, out: Path) -> None:
    """Writes the record and the picture of the seeds done so far."""
    meta = {
        "schema": 1,
        "kind": "stability",
        "machine": machine,
        "settings": {"recipe": vars(RECIPE), "data": "mnist", "seeds": seeds, "points": 30},
    }
    write_stability(rows, out / "stability_lenet_mnist.json", meta)
    caption = (
        f"{RECIPE.iterations} iterations of batch {RECIPE.batch}, {RECIPE.optimiser} "
        f"{RECIPE.lr:g}; ticket: {100 * rows[1].case.density:.1f} % of the weights; mean, least "
        f"and largest of {seeds} seeds"
    )
    draw_stability(rows, out / "stability_lenet_mnist.png", "LeNet-300-100 on MNIST", caption)


if __name__ == "__main__":
    main()
