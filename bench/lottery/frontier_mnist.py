# SPDX-License-Identifier: Apache-2.0
"""Accuracy against measured latency for one network over structures and densities.

Run from the repository with SPARSELT_DATA set to a folder that holds MNIST's four files in
``mnist/``::

    python -m bench.lottery.frontier_mnist          # minutes on two idle cores
    python -m bench.lottery.frontier_mnist --fast   # bundled digits, seconds; the figures mean
    little

Every structure is searched with the same loop: train, prune units of that shape, rewind to the
original weights. Each ticket is then timed against the best dense torch in turns, its output
checked first. Accuracy is the mean over the seeds; the first seed's ticket is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparselt import lottery
from sparselt.lottery.chart import Line, Panel, draw_chart
from sparselt.lottery.networks import build, factory_of
from sparselt.lottery.progress import progress_bars
from sparselt.measure.baselines import BASELINES, Run
from sparselt.measure.machine import header
from sparselt.measure.model import double_reference
from sparselt.measure.report import write_json
from sparselt.measure.timer import interleave
from sparselt.measure.worker import output_error

OUT = Path(__file__).resolve().parent.parent / "results" / "lottery"
STRUCTURES = ("1x1", "4x1", "16x1", "16x16", "filter")
DENSE = ("torch_eager", "torch_channels_last", "torch_compile")
FULL = lottery.Recipe(
    network="conv_small",
    lr=2e-3,
    iterations=1000,
    evaluate_every=250,
    levels=4,
    rate=0.5,
    conv_rate=0.45,
    output_rate=0.2,
)
FAST = replace(FULL, data="digits", iterations=30, evaluate_every=30, levels=1)
TOLERANCE = 1e-4


def search(
    recipe: lottery.Recipe, seeds: int, runs: Path, data: lottery.Data
) -> list[list[lottery.Level]]:
    """All levels of every seed."""
    found = []
    with progress_bars() as report:
        for seed in range(seeds):
            levels = lottery.run_levels(
                recipe.network,
                data,
                replace(recipe, seed=seed),
                folder=runs,
                progress=lambda now, seed=seed: report(seed, now),  # type: ignore[misc]
            )
            found.append(list(levels))
    return found


def row(
    structure: str, levels: Sequence[lottery.Level], model: nn.Module, x: Tensor, seconds: float
) -> dict[str, Any]:
    """One point of the frontier: a level of one structure over the seeds."""
    ticket = levels[0].ticket
    ticket.apply(model).eval()
    reference, _ = double_reference(model, [x])
    engines = [name for name in DENSE if not BASELINES[name].usable()]
    runs = {name: BASELINES[name].load(model, (x,)) for name in (*engines, "sparselt")}
    error = max(output_error(run(x), reference) for run in runs.values())
    times = interleave({name: bound(run, x) for name, run in runs.items()}, seconds=seconds)
    best = min(engines, key=lambda name: times[name].median_us)
    return {
        "structure": structure,
        "level": levels[0].index,
        "density": ticket.density,
        "test_accuracies": [level.outcome.test_accuracy for level in levels],
        "best_dense": best,
        "dense_us": times[best].median_us,
        "sparse_us": times["sparselt"].median_us,
        "error": error,
        "status": "ok" if error <= TOLERANCE else "FAIL",
        "engines": {name: timing.as_json() for name, timing in times.items()},
    }


def bound(run: Run, x: Tensor) -> Callable[[], object]:
    """The run on ``x``, without arguments."""
    return lambda: run(x)


def draw(result: dict[str, Any], path: Path) -> None:
    """Accuracy against latency, one line a structure, and latency against weights remaining."""
    rows = [point for point in result["rows"] if point["status"] == "ok"]
    frontier, latency = [], []
    for structure in dict.fromkeys(point["structure"] for point in rows):
        mine = [point for point in rows if point["structure"] == structure]
        frontier.append(
            Line(
                structure,
                {p["sparse_us"]: [100 * a for a in p["test_accuracies"]] for p in mine},
            )
        )
        latency.append(Line(structure, {100 * p["density"]: [p["sparse_us"]] for p in mine}))
    dense = min(point["dense_us"] for point in rows)
    settings = result["settings"]
    title = f"{settings['recipe']['network']} on {settings['recipe']['data']}"
    panels = [
        Panel(f"{title}, batch {settings['batch']}", "latency (us)", "test accuracy (%)", frontier),
        Panel(
            "what each structure buys", "weights remaining (%)", "latency (us)", latency,
            {"best dense torch": dense}, shrinking=True, bottom=0.0,
        ),
    ]  # fmt: skip
    caption = f"{settings['recipe']['iterations']} iterations a level, {settings['seeds']} seeds"
    draw_chart(panels, caption, path)


def main() -> None:
    """Runs everything and writes record and picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="a smoke test on bundled digits")
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=OUT, help="default: %(default)s")
    flags = parser.parse_args()
    recipe, seeds = (FAST, 1) if flags.fast else (FULL, flags.seeds)
    data = lottery.load_data(recipe.data)
    model = build(factory_of(recipe.network, data.shape, data.classes), 0)
    x = data.test[0][: flags.batch].contiguous()
    rows = []
    for structure in STRUCTURES:
        found = search(replace(recipe, structure=structure), seeds, flags.runs, data)
        for index in range(1, len(found[0])):
            level = [levels[index] for levels in found]
            rows.append(row(structure, level, model, x, 0.02 if flags.fast else 0.5))
            print({key: rows[-1][key] for key in ("structure", "density", "dense_us", "sparse_us")})
    command = f"python -m bench.lottery.frontier_mnist --seeds {seeds} --batch {flags.batch}"
    result = {
        "kind": "frontier",
        "machine": header(command=command),
        "settings": {"recipe": asdict(recipe), "seeds": seeds, "batch": flags.batch,
                     "threads": torch.get_num_threads()},
        "rows": rows,
    }  # fmt: skip
    write_json(flags.out / "frontier_mnist.json", result)
    draw(result, flags.out / "frontier_mnist.png")


if __name__ == "__main__":
    main()
