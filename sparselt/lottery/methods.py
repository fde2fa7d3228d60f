# SPDX-License-Identifier: Apache-2.0
"""The ways of finding a ticket that ``sparselt find --method`` knows, behind one signature.

To add one, write a function ``(request) -> (rows, ticket)`` and add one line to ``METHODS``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sparselt.errors import DataError, OptionError
from sparselt.lottery.controls import Arm, Basis, make_control
from sparselt.lottery.data import Data
from sparselt.lottery.edge_popup import find_supermask
from sparselt.lottery.folder import RunFolder
from sparselt.lottery.initialisation import prune_at_initialisation
from sparselt.lottery.masks import full_masks
from sparselt.lottery.networks import build, factory_of
from sparselt.lottery.progress import progress_bars
from sparselt.lottery.recipe import Recipe
from sparselt.lottery.record import TICKET, Row, rows_of
from sparselt.lottery.replicates import run_replicates
from sparselt.lottery.schedules import number_of_levels
from sparselt.lottery.search import Level, Progress, run_levels
from sparselt.lottery.seeds import derived_seed
from sparselt.lottery.structured_search import run_structured_levels
from sparselt.lottery.structures import parse_structure
from sparselt.lottery.training import Outcome, Training, train
from sparselt.tickets import Ticket

__all__ = ["METHODS", "Method", "Request"]

Found = tuple[list[Row], Ticket]
Report = Callable[[int, Progress], None]


@dataclass(frozen=True)
class Request:
    """What to find, and how.

    Attributes:
        recipe: Settings; the seed is replaced by each of ``seeds``.
        seeds: One search each; the first one's ticket is kept.
        data: The data.
        controls: Names that the method knows.
        runs: Folder that keeps runs.
        kept: Whether that folder outlives the command, so that checkpoints pay.
        processes: Searches at a time, by the methods that run several.
        density: Share of the weights that stays, by the methods that prune once.
        budget: How that share is divided among the layers.
        frozen_weights: What edge-popup draws.
        scaled: Whether edge-popup counts kept inputs only.
    """

    recipe: Recipe
    seeds: Sequence[int]
    data: Data
    controls: Sequence[str]
    runs: Path
    kept: bool
    processes: int
    density: float
    budget: str
    frozen_weights: str
    scaled: bool

    @property
    def folder(self) -> Path | None:
        """Where runs go on, or None."""
        return self.runs if self.kept else None


def _iterative(request: Request) -> Found:
    """Iterative pruning; several seeds in processes of their own."""
    recipe = request.recipe
    with progress_bars(len(request.controls)) as report:
        if len(request.seeds) == 1:
            levels = list(
                run_levels(
                    recipe.network,
                    request.data,
                    recipe,
                    controls=request.controls,
                    folder=request.folder,
                    progress=lambda now: report(recipe.seed, now),
                )
            )
            return rows_of(levels, recipe.seed), levels[-1].ticket
        rows = run_replicates(
            recipe.network,
            request.data,
            recipe,
            request.seeds,
            controls=request.controls,
            folder=request.runs,
            processes=request.processes,
            progress=report,
        )
    ticket = RunFolder(request.runs, recipe).read_ticket(number_of_levels(recipe) - 1)
    if ticket is None:
        raise DataError(
            f"{request.runs}: the ticket of seed {recipe.seed} is gone; run the search again"
        )
    return rows, ticket


def _channels(request: Request) -> Found:
    """Iterative pruning of whole channels, which shrinks the network."""

    def search(recipe: Recipe, report: Report) -> Found:
        count = number_of_levels(recipe)
        # The recipe's default names what magnitude is for single weights; for filters that is l1.
        criterion = "l1" if recipe.criterion == "magnitude" else recipe.criterion
        levels = list(
            run_structured_levels(
                recipe.network,
                request.data,
                recipe,
                criterion=criterion,
                controls=request.controls,
                folder=request.folder,
                progress=lambda level, arm, step: report(
                    recipe.seed, Progress(level, count, arm, step)
                ),
            )
        )
        return rows_of(levels, recipe.seed), levels[-1].ticket

    return _one_by_one(request, search)


def _edge_popup(request: Request) -> Found:
    """A subnetwork of random weights, none of which is trained."""

    def search(recipe: Recipe, report: Report) -> Found:
        started = time.perf_counter()
        folder = RunFolder(_folder_of(request, "edge_popup"), recipe)
        ticket = find_supermask(
            recipe.network,
            request.data,
            recipe,
            request.density,
            weights=request.frozen_weights,
            scaled=request.scaled,
            progress=lambda step: report(recipe.seed, Progress(1, 2, TICKET, step)),
            checkpoint=folder.checkpoint(1, TICKET),
        )
        metrics = ticket.meta["metrics"]
        names = (
            "test_accuracy",
            "validation_accuracy",
            "train_accuracy",
            "early_stop_iteration",
            "early_stop_test_accuracy",
        )
        row = Row(
            seed=recipe.seed,
            level=1,
            arm=TICKET,
            density=ticket.density,
            seconds=time.perf_counter() - started,
            **{name: metrics[name] for name in names},
        )
        return [row], ticket

    return _one_by_one(request, search)


def _at_initialisation(request: Request) -> Found:
    """The dense network, one mask chosen before training, and its controls."""

    def search(recipe: Recipe, report: Report) -> Found:
        levels = list(_initial_levels(request, recipe, report))
        return rows_of(levels, recipe.seed), levels[-1].ticket

    return _one_by_one(request, search)


def _initial_levels(request: Request, recipe: Recipe, report: Report) -> Iterator[Level]:
    data = request.data
    factory = factory_of(recipe.network, data.shape, data.classes)
    model = build(factory, derived_seed(recipe.seed, "weights"))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    every = full_masks(model, recipe)
    folder = RunFolder(_folder_of(request, "at_initialisation"), recipe)

    def trained(index: int, name: str, arm: Arm) -> Outcome:
        model.load_state_dict(arm.state)
        how = Training(
            recipe,
            order_seed=derived_seed(recipe.seed, "order"),
            progress=lambda step: report(recipe.seed, Progress(index, 2, name, step)),
            checkpoint=folder.checkpoint(index, name),
        )
        outcome = train(model, data, how, arm.masks)
        folder.write_outcome(index, name, outcome)
        return outcome

    def level(index: int, chosen: Ticket) -> Level:
        arm = Arm(state, chosen.masks, 0)
        done, outcome = folder.read_ticket(index), folder.read_outcome(index, TICKET)
        if done is None or outcome is None:
            outcome = trained(index, TICKET, arm)
            done = Ticket(chosen.masks, model.state_dict(), chosen.initial, chosen.meta)
            folder.write_ticket(index, done)
        return Level(index, done, outcome, arm)

    chosen = prune_at_initialisation(
        recipe.network,
        data,
        recipe.criterion,
        request.density,
        budget=request.budget,
        structure=recipe.structure,
        ignore=recipe.ignore,
        seed=recipe.seed,
    )
    yield level(0, Ticket(every))
    found, unit = level(1, chosen), parse_structure(recipe.structure)
    for name in request.controls:
        if name.startswith("inverted"):
            raise OptionError("control inverted: expected a search over levels, got one mask")
        outcome = folder.read_outcome(1, name)
        if outcome is None:
            seed = derived_seed(recipe.seed, "control", name, 1)
            basis = Basis(found.arm, every, {}, state, factory, unit, seed)
            outcome = trained(1, name, make_control(name, basis))
        found.controls[name] = outcome
    yield found


def _one_by_one(request: Request, search: Callable[[Recipe, Report], Found]) -> Found:
    rows: list[Row] = []
    tickets: list[Ticket] = []
    with progress_bars(len(request.controls)) as report:
        for seed in request.seeds:
            found, ticket = search(replace(request.recipe, seed=seed), report)
            rows += found
            tickets.append(ticket)
    return rows, tickets[0]


def _folder_of(request: Request, method: str) -> Path | None:
    """A folder that runs of other settings, which are not in the recipe's hash, do not share."""
    choices = (request.density, request.budget, request.frozen_weights, request.scaled)
    return request.folder and request.folder / "-".join([method, *map(str, choices)])


@dataclass(frozen=True)
class Method:
    """A way of finding a ticket.

    Attributes:
        find: From a request to its rows and the first seed's ticket.
        controls: Trained unless others are asked for.
        density: Share of the weights that stays unless another is asked for.
        judged: Whether the rule for winning tickets applies.
        summary: For the help text.
    """

    find: Callable[[Request], Found]
    controls: tuple[str, ...]
    density: float
    judged: bool
    summary: str


METHODS: dict[str, Method] = {
    "imp": Method(_iterative, ("reinit",), 1.0, True, "train, prune, reset, repeat"),
    "channels": Method(
        _channels, ("scratch_e",), 1.0, False, "the same with whole channels, which shrinks it"
    ),
    "edge_popup": Method(
        _edge_popup, (), 0.5, False, "choose among random weights, and train none of them"
    ),
    "at_initialisation": Method(
        _at_initialisation,
        ("reinit", "shuffle"),
        0.1,
        True,
        "prune once before training, by --criterion snip, grasp, synflow ...",
    ),
}
