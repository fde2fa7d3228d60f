# SPDX-License-Identifier: Apache-2.0
"""Whole networks against the strongest dense engines: checked first, then timed in turns."""

from __future__ import annotations

import copy
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sparselt.errors import DataError, OptionError
from sparselt.measure.baselines import BASELINES, flat_tensors, usable_engines
from sparselt.measure.engine import Engine
from sparselt.measure.machine import Others, header
from sparselt.measure.timer import Timing, speedup
from sparselt.measure.worker import output_error

__all__ = [
    "EngineRow",
    "ModelReport",
    "bench_model",
    "bench_variants",
    "double_reference",
    "merged",
    "prunable_density",
    "write_folder",
]

# Spinning threads of one engine go to sleep before the next engine's round begins.
_SETTLE_SECONDS = 0.02
_LOAD_TIMEOUT = 900.0
_ROUND_TIMEOUT = 300.0


@dataclass
class EngineRow:
    """One engine's line: `status` is "ok", "FAIL" (no figure) or "absent" (not installed)."""

    engine: str
    dense: bool
    reason: str = ""
    status: str = "ok"
    error: float | None = None
    load_seconds: float | None = None
    timing: Timing | None = None
    speedup: tuple[float, float, float] | None = None

    def as_json(self) -> dict[str, Any]:
        """A flat dictionary; the times are missing where the engine failed."""
        row: dict[str, Any] = {
            "engine": self.engine,
            "dense": self.dense,
            "status": self.status,
            "reason": self.reason,
            "error": self.error,
            "load_seconds": self.load_seconds,
        }
        if self.timing is not None:
            row |= self.timing.as_json()
        if self.speedup is not None:
            row["speedup"], row["speedup_low"], row["speedup_high"] = self.speedup
        return row


@dataclass
class ModelReport:
    """What `bench_model` found.

    Attributes:
        name: what the network is called in the tables.
        facts: parameters, density, input shapes, reference dtype, tolerance, the error of torch's
            own float32 run, and the cores that others used during the rounds.
        rows: one for each engine asked for, in that order.
        best_dense: the fastest engine that multiplies by the zeros, or "" if none ran.
        machine: the header of `machine.header`.
    """

    name: str
    facts: dict[str, Any]
    rows: list[EngineRow]
    best_dense: str = ""
    machine: dict[str, Any] = field(default_factory=header)

    def as_json(self) -> dict[str, Any]:
        """Everything, for `report.write_json`."""
        key = {name: self.facts[name] for name in ("density", "batch")}
        case = {"case": self.name, **self.facts, "best_dense": self.best_dense}
        rows = [{"case": self.name, **key, **row.as_json()} for row in self.rows]
        return {"kind": "model", "machine": self.machine, "cases": [case], "rows": rows}


def double_reference(model: nn.Module, inputs: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], str]:
    """Outputs of the model in float64, and the dtype used: float32 where float64 cannot run.

    Example:
        >>> outputs, dtype = double_reference(nn.Linear(2, 1), [torch.ones(1, 2)])
        >>> dtype
        'float64'
    """
    with torch.no_grad():
        try:
            double = copy.deepcopy(model).eval().double()
            output = double(*(x.double() if x.is_floating_point() else x for x in inputs))
            dtype = "float64"
        except RuntimeError:
            output = copy.deepcopy(model).eval()(*inputs)
            dtype = "float32"
    return tuple(x.double() for x in flat_tensors(output)), dtype


def write_folder(
    folder: Path, model: nn.Module, inputs: Sequence[Tensor], reference: Sequence[Tensor]
) -> None:
    """Leave the model, inputs and reference outputs where the workers look for them.

    Raises:
        DataError: if a worker could not rebuild the model: it holds something that cannot be
            stored, or a class that only exists in the running script.
    """
    file = folder / "model.pt"
    try:
        torch.save(model, file)
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception as error:
        raise DataError(
            f"model: cannot be stored for the engines' own processes ({error}); remove lambdas and "
            "parametrizations, or give a plain torch.nn.Module"
        ) from error
    here = sorted(name for name in names if name.startswith("__main__."))
    if here:
        raise DataError(
            f"model: {', '.join(here)} exist only in the running script; move them to a module of "
            "their own, so that the engines' processes can import them"
        )
    pairs = [_module_and_name(name) for name in names]
    (folder / "classes.json").write_text(json.dumps(pairs), encoding="utf-8")
    for name, tensors in (("inputs", inputs), ("reference", reference)):
        numbered = {str(i): x.detach().contiguous() for i, x in enumerate(tensors)}
        save_file(numbered, folder / f"{name}.safetensors")


def _module_and_name(dotted: str) -> tuple[str, str]:
    parts = dotted.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:cut])
        if module in sys.modules:
            return module, ".".join(parts[cut:])
    raise DataError(f"model: the class {dotted} is in no imported module")


def prunable_density(model: nn.Module) -> tuple[int, float]:
    """Number of parameters, and the kept share of all weights of two and more dimensions."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    total = sum(p.numel() for p in weights)
    kept = sum(int(torch.count_nonzero(p)) for p in weights)
    return sum(p.numel() for p in model.parameters()), kept / total if total else 1.0


def _chosen(engines: Sequence[str] | None, inputs: Sequence[Tensor]) -> list[str]:
    if engines is None:
        return usable_engines(inputs)
    unknown = [name for name in engines if name not in BASELINES]
    if unknown or not engines:
        raise OptionError(
            f"engines: expected some of {', '.join(BASELINES)}, got {', '.join(unknown) or 'none'}"
        )
    return list(engines)


def _load(
    engine: str, folder: str, threads: int, tolerance: float, stack: ExitStack
) -> tuple[EngineRow, Engine | None]:
    """Load and check one engine; on any trouble the row says FAIL and why, and has no worker."""
    row = EngineRow(engine, BASELINES[engine].dense, BASELINES[engine].usable())
    if row.reason:
        row.status = "absent"
        return row, None
    worker = stack.enter_context(Engine(engine))
    request = {"do": "load", "engine": engine, "folder": folder, "threads": threads}
    answer = worker.ask(request, _LOAD_TIMEOUT)
    if answer["ok"]:
        row.load_seconds = answer["seconds"]
        answer = worker.ask({"do": "check"}, _ROUND_TIMEOUT)
    if not answer["ok"]:
        row.status, row.reason = "FAIL", answer["reason"]
    else:
        row.error = answer["error"]
        if not answer["finite"] or not answer["error"] <= tolerance:
            row.status = "FAIL"
            row.reason = f"wrong output: error {answer['error']:.2g}, allowed {tolerance:.0e}"
    if row.status == "ok":
        return row, worker
    worker.close()
    return row, None


def _time(
    rows: Sequence[EngineRow],
    workers: Mapping[int, Engine],
    rounds: int,
    samples: int,
    seconds: float,
    say: Callable[[str], None],
) -> None:
    """Rounds in turns over all engines that passed the check; workers by the id of their row."""
    taken: dict[int, list[tuple[float, ...]]] = {id(row): [] for row in rows}
    calls = dict.fromkeys(taken, 1)
    for turn in range(rounds):
        alive = [row for row in rows if row.status == "ok"]
        shift = turn % max(len(alive), 1)
        for row in alive[shift:] + alive[:shift]:
            say(f"round {turn + 1} of {rounds}: {row.engine}")
            time.sleep(_SETTLE_SECONDS)
            request = {"do": "round", "samples": samples, "seconds": seconds}
            answer = workers[id(row)].ask(request, _ROUND_TIMEOUT)
            if not answer["ok"]:
                row.status, row.reason = "FAIL", answer["reason"]
                continue
            taken[id(row)].append(tuple(answer["samples_us"]))
            calls[id(row)] = answer["calls"]
    for row in rows:
        if row.status == "ok":
            row.timing = Timing(tuple(taken[id(row)]), calls[id(row)])


def _compare(report: ModelReport) -> None:
    """Name the best dense engine and give every engine its speed-up against it."""
    timed = {row.engine: row.timing for row in report.rows if row.timing is not None}
    dense = [row.engine for row in report.rows if row.dense and row.engine in timed]
    if not dense:
        return
    report.best_dense = min(dense, key=lambda name: timed[name].median_us)
    for row in report.rows:
        if row.timing is not None:
            row.speedup = speedup(timed[report.best_dense], row.timing)


def bench_model(
    model: nn.Module,
    example: Tensor | Sequence[Tensor],
    engines: Sequence[str] | None = None,
    *,
    name: str = "",
    rounds: int = 10,
    samples: int = 5,
    seconds: float = 0.1,
    threads: int | None = None,
    tolerance: float = 1e-4,
    progress: Callable[[str], None] | None = None,
) -> ModelReport:
    """Time one network on several engines, each in its own process, in interleaved rounds.

    Every engine's outputs are compared with a float64 run of the same model first. An engine that
    fails there, or later, gets "FAIL" with the reason and no figure; nothing is hidden.

    Args:
        model: the pruned network, zeros in its weights; its classes must be importable.
        example: one input tensor or several; also the shape that is timed.
        engines: names from `BASELINES`; by default all that can run here.
        name: what the tables call the network.
        rounds: turns each engine gets.
        samples: least samples in a turn that lasts no longer than ten times `seconds`.
        seconds: least time of a turn, in seconds.
        threads: for every engine alike; by default torch's present number.
        tolerance: largest allowed error, relative to the largest output.
        progress: called with a short sentence on each step.

    Returns:
        A `ModelReport`; `report.model_table` prints it.

    Raises:
        OptionError: for an unknown engine or counts below 1.
        DataError: if the model cannot be handed to another process.
    """
    (found,) = bench_variants(
        {name or type(model).__name__: model},
        example,
        engines,
        rounds=rounds,
        samples=samples,
        seconds=seconds,
        threads=threads,
        tolerance=tolerance,
        progress=progress,
    )
    return found


def bench_variants(
    models: Mapping[str, nn.Module],
    example: Tensor | Sequence[Tensor],
    engines: Sequence[str] | None = None,
    *,
    rounds: int = 10,
    samples: int = 5,
    seconds: float = 0.1,
    threads: int | None = None,
    tolerance: float = 1e-4,
    progress: Callable[[str], None] | None = None,
) -> list[ModelReport]:
    """Time one network with several sets of zeros, all in the same interleaved rounds.

    Dense engines multiply by the zeros, so where those are changes nothing: they are loaded,
    checked and timed once, with the first set, and stand in the report of each.

    Args:
        models: networks that differ in the values of their weights alone, by what to call them.
        example: one input tensor or several; also the shape that is timed.
        engines: names from `BASELINES`; by default all that can run here.
        rounds: turns each engine gets.
        samples: least samples in a turn that lasts no longer than ten times `seconds`.
        seconds: least time of a turn, in seconds.
        threads: for every engine alike; by default torch's present number.
        tolerance: largest allowed error, relative to the largest output.
        progress: called with a short sentence on each step.

    Returns:
        One report for each model, in the given order.

    Raises:
        OptionError: for an unknown engine or counts below 1.
        DataError: if a model cannot be handed to another process.
    """
    inputs = (example,) if isinstance(example, Tensor) else tuple(example)
    chosen = _chosen(engines, inputs)
    if rounds < 1 or samples < 1:
        raise OptionError(f"rounds and samples: expected at least 1, got {rounds} and {samples}")
    say = progress or (lambda text: None)
    threads = torch.get_num_threads() if threads is None else threads
    machine = header() | {"threads": threads}
    reports: list[ModelReport] = []
    with tempfile.TemporaryDirectory(prefix="sparselt-bench-") as folder, ExitStack() as stack:
        workers: dict[int, Engine] = {}
        for name, model in models.items():
            say(f"computing the float64 reference of {name}")
            where = Path(folder, str(len(reports)))
            facts = _leave(where, model, inputs) | {"tolerance": tolerance, "rounds": rounds}
            report = ModelReport(name, facts, [], machine=machine)
            for engine in chosen:
                if reports and BASELINES[engine].dense:
                    report.rows.append(reports[0].rows[chosen.index(engine)])
                    continue
                say(f"loading and checking {engine}")
                row, worker = _load(engine, os.fspath(where), threads, tolerance, stack)
                report.rows.append(row)
                workers |= {id(row): worker} if worker is not None else {}
            reports.append(report)
        rows = list({id(row): row for report in reports for row in report.rows}.values())
        others = Others([os.getpid(), *(worker.process for worker in workers.values())])
        _time(rows, workers, rounds, samples, seconds, say)
        busy = others.cores()
    for report in reports:
        report.facts["busy_cores"] = busy
        _compare(report)
    return reports


def _leave(folder: Path, model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Any]:
    """Leave a model and its reference for the workers; gives what the report says of it."""
    folder.mkdir()
    model = copy.deepcopy(model).eval().requires_grad_(False).cpu()
    reference, dtype = double_reference(model, inputs)
    with torch.no_grad():
        error = output_error(flat_tensors(model(*inputs)), reference)
    write_folder(folder, model, inputs, reference)
    parameters, density = prunable_density(model)
    return {
        "parameters": parameters,
        "density": density,
        "batch": int(inputs[0].shape[0]) if inputs and inputs[0].ndim else 1,
        "inputs": [list(x.shape) for x in inputs],
        "reference": dtype,
        "torch_error": error,
    }


def merged(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Several results of `ModelReport.as_json` in one, under the first one's header."""
    return {
        "kind": "model",
        "machine": results[0]["machine"],
        "cases": [case for result in results for case in result["cases"]],
        "rows": [row for result in results for row in result["rows"]],
    }
