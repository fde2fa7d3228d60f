# SPDX-License-Identifier: Apache-2.0
"""Accuracy against measured latency, for one network over structures of pruning and densities.

FLOPs and parameters say little about time. Here every ticket of every structure is run on this
machine: masks through ``sparselt.compile``, whole channels as the smaller dense networks they are.
"""

from __future__ import annotations

import argparse
import csv
import io
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import sparselt
from sparselt import lottery
from sparselt.errors import MissingDependencyError, OptionError, explain_mismatch
from sparselt.lottery.command import check_flags, recipe_from, seeds_of
from sparselt.lottery.networks import Factory, build, factory_of
from sparselt.lottery.seeds import derived_seed
from sparselt.lottery.structured_search import STRUCTURE, run_structured_levels
from sparselt.lottery.structures import NOfM, parse_structure
from sparselt.measure.machine import header, one_line
from sparselt.measure.report import write_json, write_text
from sparselt.measure.timer import interleave, speedup
from sparselt.measure.worker import output_error
from sparselt.tickets.file import replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "Point",
    "draw_frontier",
    "find_frontier",
    "measure_frontier",
    "undominated",
    "write_frontier",
]

DENSE = "dense"
_TOLERANCE = 1e-4
# Okabe and Ito's colours, which colour-blind readers can tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_GREY = "#666666"
# Tickets that lost more than this would squeeze those that matter into a line.
_SHOWN_POINTS = 10.0
_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10)


@dataclass(frozen=True)
class Point:
    """One ticket of one structure, run at one batch size.

    Attributes:
        structure: ``dense`` for the original network, ``channels`` for a shrunk one, otherwise a
            pruning unit such as ``4x1``.
        seed: Of the search.
        level: Pruning rounds.
        density: Weights left, over those of the original network that can be pruned.
        test_accuracy: From 0 to 1.
        batch: Inputs a call.
        latency_us: Median time of a call of ``sparselt.compile``'s program.
        eager_us: The same network, zeros and all, in torch eager.
        dense_us: The original network in torch eager, in turns with the two above.
        speedup: ``dense_us / latency_us``, with its 95 % interval.
        error: Largest output error against torch eager, relative to the largest output; above
            0.0001 there are no times.
    """

    structure: str
    seed: int
    level: int
    density: float
    test_accuracy: float
    batch: int
    latency_us: float | None
    eager_us: float | None
    dense_us: float | None
    speedup: tuple[float, float, float] | None
    error: float


@dataclass(frozen=True)
class _Found:
    """A ticket in its network, before it is timed."""

    structure: str
    level: int
    density: float
    accuracy: float
    model: nn.Module


def measure_frontier(
    recipe: lottery.Recipe,
    structures: Sequence[str] = ("1x1", "4x1", "16x1", STRUCTURE),
    *,
    seeds: Sequence[int] = (0,),
    batches: Sequence[int] = (1, 64),
    network: str | Factory | None = None,
    data: str | lottery.Data | None = None,
    folder: str | Path | None = None,
    seconds: float = 0.3,
    progress: Callable[[str], None] | None = None,
) -> list[Point]:
    """Finds tickets of every structure and times them on this machine.

    Args:
        recipe: Settings of the searches; ``structure`` is set to each in turn. N:M takes M - N
            levels whatever the recipe says.
        structures: What ``Recipe.structure`` takes, and ``channels``; at most six.
        seeds: One search a structure each.
        batches: Batch sizes to time.
        network: By default the recipe's.
        data: By default the recipe's.
        folder: Where the searches are kept and go on.
        seconds: Least measured time of each network.
        progress: Called with a line about what was just found.

    Returns:
        The original network first, then the tickets, for each seed and batch size.

    Raises:
        OptionError: A structure, batch or setting makes no sense.
        DataError: The data are absent, or training diverged.
    """
    if not 0 < len(structures) <= len(_COLOURS) or min(batches, default=0) < 1:
        expected = f"1 to {len(_COLOURS)} structures and batches of at least 1"
        got = f"{len(structures)} and {list(batches)}"
        raise OptionError(explain_mismatch("frontier", expected, got))
    chosen = data if data is not None else recipe.data
    loaded = lottery.load_data(chosen) if isinstance(chosen, str) else chosen
    factory = factory_of(network or recipe.network, loaded.shape, loaded.classes)
    points = []
    for seed in seeds:
        dense: nn.Module | None = None
        for structure in structures:
            one = replace(_for_structure(recipe, structure), seed=seed)
            for found in _tickets(factory, loaded, one, folder):
                if not found.level and dense is not None:
                    continue
                dense = dense or found.model
                for batch in batches:
                    inputs = loaded.test[0][:batch]
                    points.append(_timed(found, dense, inputs, seed, seconds))
                    if progress is not None:
                        progress(_line(points[-1]))
    return points


def find_frontier(arguments: argparse.Namespace) -> dict[str, Any]:
    """What ``sparselt find --frontier`` does: measures, writes the record, prints the frontier.

    Args:
        arguments: From a parser with the flags of :mod:`sparselt.lottery.command`.

    Returns:
        Plain values for JSON: the recipe, and one row a ticket and batch size.

    Raises:
        OptionError: Flags that do not go together, or a value out of its range.
        DataError: The data are absent, or training diverged.
    """
    check_flags(arguments)
    recipe = recipe_from(arguments)
    points = measure_frontier(
        recipe,
        arguments.frontier,
        seeds=seeds_of(arguments, recipe),
        batches=arguments.batches or (1, 64),
        data=lottery.load_data(recipe.data, arguments.data_folder),
        folder=arguments.runs,
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    )
    title = f"{recipe.network} on {recipe.data}, {recipe.iterations} iterations"
    if arguments.record:
        write_frontier(points, recipe, arguments.record)
        with suppress(MissingDependencyError):
            draw_frontier(points, title, Path(arguments.record).with_suffix(".png"))
    for batch in dict.fromkeys(point.batch for point in points):
        print(f"What nothing beats in accuracy and latency at batch {batch}, {title}:")
        for point in undominated(points, batch):
            print(f"  {_line(point)}")
    return {"recipe": asdict(recipe), "rows": [asdict(point) for point in points]}


def undominated(points: Sequence[Point], batch: int) -> list[Point]:
    """The frontier: points of one batch size that no other beats in accuracy and in latency.

    Latencies are compared relative to the dense network's in the same turns, which on a machine
    that is busy at times is worth more than the times themselves. Points of several seeds count by
    their means; the first seed's point stands for them.

    Args:
        points: From :func:`measure_frontier`; those without times are left out.
        batch: The batch size.

    Returns:
        Fastest first, so least accurate first.
    """
    means = []
    for group in _by_ticket(points, batch):
        latency, accuracy = _means(group)
        means.append((latency, -accuracy, group[0]))
    best: list[Point] = []
    least_error = float("inf")
    for _, negative_accuracy, point in sorted(means, key=lambda entry: entry[:2]):
        if negative_accuracy < least_error:
            best.append(point)
            least_error = negative_accuracy
    return best


def write_frontier(
    points: Sequence[Point], recipe: lottery.Recipe, path: str | Path, command: str | None = None
) -> None:
    """Writes the record as JSON with the machine's header, and the same rows as CSV beside it.

    Args:
        points: From :func:`measure_frontier`.
        recipe: What they were found with.
        path: The JSON file; the CSV has the same stem.
        command: What to record as the command.
    """
    path = Path(path)
    machine = header() if command is None else header(command)
    rows = [asdict(point) for point in points]
    result = {"kind": "frontier", "machine": machine, "recipe": asdict(recipe), "rows": rows}
    write_json(path, result)
    text = io.StringIO()
    writer = csv.DictWriter(text, [item.name for item in fields(Point)], lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "speedup": (row["speedup"] or [""])[0]} for row in rows)
    write_text(path.with_suffix(".csv"), text.getvalue())


def draw_frontier(points: Sequence[Point], title: str, path: str | Path) -> None:
    """One panel a batch size: accuracy against latency, a line a structure, the frontier in grey.

    Latency is relative to the dense network's, and tickets more than 10 points below the best are
    outside the picture; the record has the times, and all of them.

    Args:
        points: From :func:`measure_frontier`; several seeds are drawn by their means.
        title: What was run.
        path: The PNG to write; an existing file is replaced whole.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "the picture needs matplotlib, which is not installed: pip install 'sparselt[report]'"
        ) from error
    batches = list(dict.fromkeys(point.batch for point in points))
    figure = Figure(figsize=(5.2 * len(batches), 4.2), dpi=140, layout="constrained")
    panels = figure.subplots(1, len(batches), squeeze=False)[0]
    for axes, batch in zip(panels, batches, strict=True):
        _draw(axes, points, batch)
        axes.set_title(f"{title}, batch {batch}", fontsize=10)
    figure.supxlabel(one_line(header()), fontsize=7, color=_GREY)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    replace_file(Path(path), buffer.getvalue())


def _draw(axes: Axes, points: Sequence[Point], batch: int) -> None:
    lines: dict[str, list[tuple[float, float]]] = {}
    places: dict[tuple[str, int], tuple[float, float]] = {}
    for group in _by_ticket(points, batch):
        key = group[0].structure, group[0].level
        latency, accuracy = _means(group)
        places[key] = latency, 100 * accuracy
        lines.setdefault(key[0], []).append(places[key])
    best = [places[point.structure, point.level] for point in undominated(points, batch)]
    axes.plot(*zip(*best, strict=True), "-", color="black", linewidth=3, alpha=0.2)
    structures = [name for name in lines if name != DENSE]
    for name, colour, marker in zip(structures, _COLOURS, "os^Dvx", strict=False):
        axes.plot(*zip(*lines[name], strict=True), marker=marker, color=colour, label=name)
    for latency, accuracy in lines.get(DENSE, []):
        axes.plot(latency, accuracy, "*", color=_GREY, markersize=12, label="dense")
        axes.axhline(accuracy, color=_GREY, linestyle=":", linewidth=1)
    accuracies = [accuracy for _, accuracy in places.values()]
    most = max(accuracies)
    axes.set_ylim(max(min(accuracies), most - _SHOWN_POINTS) - 0.5, most + 0.5)
    axes.set_xscale("log")
    least, largest = axes.get_xlim()
    axes.set_xticks([share for share in _TICKS if least <= share <= largest])
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("latency, over that of the dense network in torch eager")
    axes.set_ylabel("test accuracy (%)")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)


def _for_structure(recipe: lottery.Recipe, structure: str) -> lottery.Recipe:
    if structure == STRUCTURE:
        return replace(recipe, structure=STRUCTURE)
    unit = parse_structure(structure)
    levels = unit.m - unit.n if isinstance(unit, NOfM) else recipe.levels
    return replace(recipe, structure=structure, levels=levels)


def _tickets(
    factory: Factory, data: lottery.Data, recipe: lottery.Recipe, folder: str | Path | None
) -> Iterator[_Found]:
    """Every level of one search, its weights in a network in evaluation mode."""
    seed = derived_seed(recipe.seed, "weights")
    if recipe.structure == STRUCTURE:
        for small in run_structured_levels(factory, data, recipe, folder=folder):
            model = small.ticket.apply(build(factory, seed)).eval()
            name = STRUCTURE if small.index else DENSE
            yield _Found(name, small.index, small.density, small.outcome.test_accuracy, model)
        return
    for level in lottery.run_levels(factory, data, recipe, folder=folder):
        model = level.ticket.apply(build(factory, seed)).eval()
        name = recipe.structure if level.index else DENSE
        yield _Found(name, level.index, level.density, level.outcome.test_accuracy, model)


def _timed(found: _Found, dense: nn.Module, inputs: Tensor, seed: int, seconds: float) -> Point:
    with torch.inference_mode():
        program = sparselt.compile(found.model, (inputs,))
        wanted = found.model(inputs)
        error = output_error([program(inputs)], (wanted.double(),))
        point = Point(
            found.structure, seed, found.level, found.density, found.accuracy, len(inputs),
            None, None, None, None, error,
        )  # fmt: skip
        if error > _TOLERANCE:
            return point
        times = interleave(
            {
                "dense": lambda: dense(inputs),
                "eager": lambda: found.model(inputs),
                "sparselt": lambda: program(inputs),
            },
            seconds=seconds,
        )
    return replace(
        point,
        latency_us=times["sparselt"].median_us,
        eager_us=times["eager"].median_us,
        dense_us=times["dense"].median_us,
        speedup=speedup(times["dense"], times["sparselt"]),
    )


def _by_ticket(points: Sequence[Point], batch: int) -> list[list[Point]]:
    """Points of one batch size that have times, the seeds of each ticket together."""
    groups: dict[tuple[str, int], list[Point]] = {}
    for point in points:
        if point.batch == batch and point.latency_us is not None:
            groups.setdefault((point.structure, point.level), []).append(point)
    return list(groups.values())


def _means(group: Sequence[Point]) -> tuple[float, float]:
    """Mean latency, relative to the dense network's, and accuracy of the points of one ticket."""
    times = [p.latency_us / p.dense_us for p in group if p.latency_us and p.dense_us]
    return statistics.fmean(times), statistics.fmean(point.test_accuracy for point in group)


def _line(point: Point) -> str:
    time = "wrong output" if point.latency_us is None else f"{point.latency_us:.0f} us"
    if point.speedup is not None:
        time += f", {point.speedup[0]:.2f} times as fast as dense"
    return (
        f"seed {point.seed}, {point.structure} level {point.level}: density {point.density:.3f}, "
        f"accuracy {point.test_accuracy:.4f}, batch {point.batch}: {time}"
    )
