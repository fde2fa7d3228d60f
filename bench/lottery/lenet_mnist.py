# SPDX-License-Identifier: Apache-2.0
"""Tickets of LeNet-300-100 on MNIST against two controls, over three seeds.

Run from the repository with SPARSELT_DATA set to a folder that holds MNIST's four files in
``mnist/``::

    python -m bench.lottery.lenet_mnist            # 3,000 iterations a level
    python -m bench.lottery.lenet_mnist --paper    # 50,000, five seeds, as published

Optimiser, learning rate, batch and pruning rates are the published ones in both (Frankle and Carbin
2018, figure 2). A call that was killed goes on where it stopped.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from sparselt import lottery
from sparselt.lottery.experiment import Experiment, run_experiment
from sparselt.lottery.progress import progress_bars

OUT = Path(__file__).resolve().parent.parent / "results" / "lottery"
CONTROLS = ("reinit", "shuffle")
PAPER = lottery.Recipe(evaluate_every=500)
SHORT = replace(PAPER, iterations=3000, evaluate_every=250, levels=15)


def table(found: Experiment) -> str:
    """One line a level: weights remaining, accuracies, verdict."""
    lines = ["weights   ticket  reinit  shuffle"]
    for verdict in found.verdicts:
        shown = [verdict.ticket, *(verdict.controls[name] for name in CONTROLS)]
        accuracies = "  ".join(f"{100 * spread.mean:5.2f} %" for spread in shown)
        outcome = "wins" if verdict.wins else "; ".join(verdict.reasons)
        lines.append(f"{100 * verdict.density:5.1f} %  {accuracies}  {outcome}")
    lines.insert(1, f"100.0 %  {100 * found.verdicts[0].dense.mean:5.2f} %")
    return "\n".join(lines)


def main() -> None:
    """Runs everything and writes record and picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--paper", action="store_true", help="as published: days on one machine")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="default: %(default)s")
    parser.add_argument("--processes", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=OUT, help="default: %(default)s")
    flags = parser.parse_args()
    with progress_bars(len(CONTROLS)) as progress:
        found = run_experiment(
            PAPER if flags.paper else SHORT,
            flags.out,
            seeds=range(5 if flags.paper else 3),
            controls=CONTROLS,
            runs=flags.runs,
            processes=flags.processes,
            progress=progress,
        )
    print(table(found))
    for advice in found.advice:
        print(advice)


if __name__ == "__main__":
    main()
