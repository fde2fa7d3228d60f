# SPDX-License-Identifier: Apache-2.0
"""Pruning at initialisation on the bundled digits: each criterion against its own shuffled mask.

Run from the repository; nothing has to be downloaded::

    python -m bench.lottery.at_initialisation_digits

LeNet-300-100 on 8x8 digits is pruned before training to a total density, trained, and compared with
the same number of weights in each layer at random places: what is left of the claim that the
criterion finds *which* weights matter, and not only how many a layer needs (Frankle et al. 2020).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from sparselt import lottery
from sparselt.lottery.chart import Line, Panel, draw_chart
from sparselt.lottery.initialisation import prune_at_initialisation
from sparselt.lottery.networks import build, factory_of
from sparselt.lottery.seeds import derived_seed, generator
from sparselt.measure.machine import header
from sparselt.measure.report import write_json
from sparselt.tickets import Ticket

OUT = Path(__file__).resolve().parent.parent / "results" / "lottery"
CRITERIA = ("snip", "grasp", "synflow", "magnitude_at_start", "random")
DENSITIES = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
RECIPE = lottery.Recipe(data="digits", lr=3e-3, iterations=500, evaluate_every=250)


def trained(data: lottery.Data, ticket: Ticket, seed: int) -> float:
    """Test accuracy after training the ticket from its initial weights."""
    model = ticket.apply(build(factory_of(RECIPE.network, data.shape, data.classes), 0))
    how = lottery.Training(RECIPE, order_seed=derived_seed(seed, "order"))
    return lottery.train(model, data, how, ticket.masks).test_accuracy


def shuffled(ticket: Ticket, state: dict[str, torch.Tensor], seed: int) -> Ticket:
    """As many weights in each layer, at random places."""
    source = generator(seed, "shuffle")
    masks = {
        name: mask.flatten()[torch.randperm(mask.numel(), generator=source)].reshape(mask.shape)
        for name, mask in ticket.masks.items()
    }
    return Ticket(masks, state)


def rows_of(data: lottery.Data, seed: int) -> list[dict[str, Any]]:
    """Every criterion at every density, with global competition; random also by ERK."""
    factory = factory_of(RECIPE.network, data.shape, data.classes)
    state = dict(build(factory, derived_seed(seed, "weights")).state_dict())
    cases = [(name, "global") for name in CRITERIA] + [("random", "erk")]
    rows = []
    for criterion, budget in cases:
        for density in DENSITIES:
            ticket = prune_at_initialisation(
                RECIPE.network, data, criterion, density, budget=budget, seed=seed
            )
            rows.append(
                {
                    "criterion": criterion,
                    "budget": budget,
                    "density": ticket.density,
                    "seed": seed,
                    "kept": [layer.kept for layer in ticket.layers()],
                    "test_accuracy": trained(data, ticket, seed),
                    "shuffled_test_accuracy": trained(data, shuffled(ticket, state, seed), seed),
                }
            )
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Runs everything and writes the record and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=OUT, help="default: bench/results/lottery")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    data = lottery.load_data("digits")
    machine = header(
        command=f"python -m bench.lottery.at_initialisation_digits --seeds {chosen.seeds}"
    )
    rows = [row for seed in range(chosen.seeds) for row in rows_of(data, seed)]
    result = {
        "kind": "at_initialisation",
        "machine": machine,
        "settings": {"recipe": vars(RECIPE), "data": "digits", "seeds": chosen.seeds},
        "rows": rows,
    }
    write_json(chosen.out / "at_initialisation_digits.json", result)
    draw(result, chosen.out / "at_initialisation_digits.png")


def draw(result: dict[str, Any], path: Path) -> None:
    """Accuracy against density, of the masks and of their shuffles."""
    kinds = list(dict.fromkeys((row["criterion"], row["budget"]) for row in result["rows"]))
    panels = []
    for value, title in (
        ("test_accuracy", "LeNet-300-100 on 8x8 digits, pruned before training"),
        ("shuffled_test_accuracy", "The same counts by layer at random places"),
    ):
        lines = [Line(label(*kind), points(result["rows"], kind, value)) for kind in kinds]
        panels.append(
            Panel(title, "weights remaining (%)", "test accuracy (%)", lines, even=True, bottom=0.0)
        )
    seeds = result["settings"]["seeds"]
    caption = f"{RECIPE.iterations} iterations; mean, least and largest of {seeds} seeds"
    draw_chart(panels, caption, path)


def label(criterion: str, budget: str) -> str:
    """As the legend says it."""
    return criterion.replace("_at_start", "") + ("" if budget == "global" else f", {budget}")


def points(
    rows: list[dict[str, Any]], kind: tuple[str, str], value: str
) -> dict[float, list[float]]:
    """Percentages at each percentage of weights remaining."""
    found: dict[float, list[float]] = {}
    for row in rows:
        if (row["criterion"], row["budget"]) == kind:
            at = float(f"{100 * row['density']:.2g}")
            found.setdefault(at, []).append(100 * row[value])
    return found


if __name__ == "__main__":
    main()
