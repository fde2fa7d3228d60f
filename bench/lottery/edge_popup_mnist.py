# SPDX-License-Identifier: Apache-2.0
"""Edge-popup on MNIST: above 90 % test accuracy with no weight ever trained.

Run from the repository with SPARSELT_DATA set to a folder that holds MNIST's four files in
``mnist/``::

    python -m bench.lottery.edge_popup_mnist

LeNet-300-100, every layer keeping the same fraction of its random weights; signed constants and
Kaiming-normal weights; beside them the same network trained, and random subnetworks untrained.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from sparselt import lottery
from sparselt.lottery.chart import Line, Panel, draw_chart
from sparselt.lottery.edge_popup import add_supermasks, find_supermask, read_supermasks
from sparselt.lottery.networks import build, factory_of
from sparselt.lottery.seeds import derived_seed
from sparselt.measure.machine import header
from sparselt.measure.report import write_json

OUT = Path(__file__).resolve().parent.parent / "results" / "lottery"
FRACTIONS = (0.1, 0.3, 0.5, 0.7, 0.9)
RECIPE = lottery.Recipe(
    optimiser="adam", lr=1.2e-3, lr_schedule="cosine", batch=128, iterations=1500,
    evaluate_every=500,
)  # fmt: skip


def supermask_row(data: lottery.Data, weights: str, fraction: float, seed: int) -> dict[str, Any]:
    """One search, the accuracy of its start, and the size of its ticket."""
    recipe = lottery.Recipe(**{**vars(RECIPE), "seed": seed})
    ticket = find_supermask(recipe.network, data, recipe, fraction, weights=weights)
    network = build(factory_of(recipe.network, data.shape, data.classes), seed)
    untrained = read_supermasks(add_supermasks(network, fraction, weights=weights, seed=seed))
    model = build(factory_of(recipe.network, data.shape, data.classes), seed)
    random_accuracy = lottery.evaluate(untrained.apply(model), data.test)[1]
    return {
        "weights": weights,
        "keep_fraction": fraction,
        "seed": seed,
        "kept": sum(layer.kept for layer in ticket.layers()),
        "prunable": sum(layer.total for layer in ticket.layers()),
        "test_accuracy": ticket.meta["metrics"]["test_accuracy"],
        "validation_accuracy": ticket.meta["metrics"]["validation_accuracy"],
        "random_subnetwork_test_accuracy": random_accuracy,
        "ticket_bytes": file_bytes(ticket),
    }


def file_bytes(ticket: Any) -> int:
    """Size of the saved ticket."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ticket.safetensors"
        ticket.save(path)
        return path.stat().st_size


def trained_accuracy(data: lottery.Data, seed: int) -> float:
    """The dense network, its weights trained for as many iterations."""
    factory = factory_of(RECIPE.network, data.shape, data.classes)
    model = build(factory, derived_seed(seed, "weights"))
    how = lottery.Training(RECIPE, order_seed=derived_seed(seed, "order"))
    return lottery.train(model, data, how).test_accuracy


def main() -> None:
    """Runs everything and writes the record and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=OUT, help="default: bench/results/lottery")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    data = lottery.load_data("mnist")
    machine = header(command=f"python -m bench.lottery.edge_popup_mnist --seeds {chosen.seeds}")
    rows = []
    for weights in ("signed_constant", "kaiming_normal"):
        for fraction in FRACTIONS:
            for seed in range(chosen.seeds):
                rows.append(supermask_row(data, weights, fraction, seed))
                print(rows[-1], flush=True)
    dense = [trained_accuracy(data, seed) for seed in range(chosen.seeds)]
    result = {
        "kind": "edge_popup",
        "machine": machine,
        "settings": {"recipe": vars(RECIPE), "data": "mnist", "seeds": chosen.seeds},
        "trained_dense_test_accuracies": dense,
        "rows": rows,
    }
    write_json(chosen.out / "edge_popup_mnist.json", result)
    draw(result, chosen.out / "edge_popup_mnist.png")


def draw(result: dict[str, Any], path: Path) -> None:
    """Accuracy against the fraction kept."""
    names = {"signed_constant": "signed constant", "kaiming_normal": "Kaiming normal"}
    lines = [
        Line(f"edge-popup, {label}", points(result["rows"], weights, "test_accuracy"))
        for weights, label in names.items()
    ]
    dense = result["trained_dense_test_accuracies"]
    panel = Panel(
        "LeNet-300-100 on MNIST: no weight ever trained",
        "weights kept in each layer (%)",
        "test accuracy (%)",
        lines,
        {"all weights trained": 100 * sum(dense) / len(dense)},
    )
    recipe, seeds = result["settings"]["recipe"], result["settings"]["seeds"]
    caption = (
        f"{recipe['iterations']} iterations of batch {recipe['batch']}, {recipe['optimiser']} "
        f"{recipe['lr']:g}; mean, least and largest of {seeds} seeds"
    )
    draw_chart([panel], caption, path)


def points(rows: list[dict[str, Any]], weights: str, value: str) -> dict[float, list[float]]:
    """Percentages of one kind of weights at each percentage kept."""
    found: dict[float, list[float]] = {}
    for row in rows:
        if row["weights"] == weights:
            found.setdefault(100 * row["keep_fraction"], []).append(100 * row[value])
    return found


if __name__ == "__main__":
    main()
