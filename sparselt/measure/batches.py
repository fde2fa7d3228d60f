# SPDX-License-Identifier: Apache-2.0
"""Time per image from batch to batch: layers and networks, compiled for each batch.

A batch is served by another kernel than its neighbour where that is faster, and vectors of a batch
are not always full. What must not be is a jump: time per image that rises by a quarter or more from
one batch to the next larger one of the list.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import sparselt
from sparselt.measure.networks import NETWORKS, Network, example_inputs, pruned_network
from sparselt.measure.report import Column, microseconds, rich_table
from sparselt.measure.sweep import Item, Row, Sweep, caption, timed
from sparselt.measure.timer import interleave

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["BATCHES", "SWEEP", "batches_items", "batches_table", "jumps"]

BATCHES = (1, 2, 3, 7, 15, 16, 17, 31, 32, 64)
_JUMP = 1.25
_DENSITIES = (0.2, 0.1)
# How far an output may be from float64, in units of torch's own error, and of the largest output.
_TORCHS_ERRORS, _LEAST_ERROR = 4.0, 1e-6


def _linear(features: int) -> Network:
    return Network(partial(nn.Linear, features, features), (features,))


def _conv2d(channels: int, filters: int, kernel: int, size: int) -> Network:
    build = partial(nn.Conv2d, channels, filters, kernel, padding=kernel // 2)
    return Network(build, (channels, size, size))


_CASES: dict[str, Network] = {
    "linear 1024x1024": _linear(1024),
    "linear 4096x4096": _linear(4096),
    "conv 3x3 256x256 14x14": _conv2d(256, 256, 3, 14),
    "conv 3x3 64x64 7x7": _conv2d(64, 64, 3, 7),
    "conv 1x1 256x1024 14x14": _conv2d(1024, 256, 1, 14),
    **{name: NETWORKS[name] for name in ("lenet", "mlp", "resnet20")},
}


def batches_items(quick: bool = False) -> list[Item]:
    """A measurement for each layer or network and share of zeros; quick: one share."""
    return [
        Item(f"{name} density {density:g}", partial(_bench, name, density))
        for density in _DENSITIES[1 if quick else 0 :]
        for name in _CASES
    ]


def _bench(name: str, density: float) -> list[Row]:
    built = pruned_network(_CASES[name], density=density)
    programs: dict[str, Callable[[], object]] = {}
    rows: list[Row] = []
    for batch in BATCHES:
        x = example_inputs(built.shape, batch)
        program = sparselt.compile(built.model, x)
        kernels = list(dict.fromkeys(row.kernel for row in sparselt.explain(program)))
        row: Row = {"case": name, "density": density, "batch": batch, "engine": "sparselt"}
        rows.append(row | {"threads": torch.get_num_threads(), "kernel": ", ".join(kernels)})
        rows[-1]["status"] = "ok"
        if not _is_right(program, built.model, x):
            rows[-1] |= {"status": "FAIL", "reason": "wrong output"}
            continue
        programs[f"sparselt@{batch}"] = partial(program, x)
        programs[f"torch_eager@{batch}"] = partial(built.model, x)
    with torch.inference_mode():
        times = interleave(programs, seconds=0.02, warmup_seconds=0.01) if programs else {}
    for row in timed(rows):
        timing, dense = (times[f"{name}@{row['batch']}"] for name in ("sparselt", "torch_eager"))
        row |= {
            "median_us": timing.median_us,
            "image_us": timing.median_us / row["batch"],
            "noise": timing.noise,
            "dense_us": {"torch_eager": dense.median_us},
            "speedup": dense.median_us / timing.median_us,
        }
    return rows


def _is_right(program: Callable[[Tensor], Any], model: nn.Module, x: Tensor) -> bool:
    with torch.inference_mode():
        exact = copy.deepcopy(model).double()(x.double())
        errors = [float((run(x) - exact).abs().max()) for run in (program, model)]
    least = _LEAST_ERROR * float(exact.abs().max())
    return errors[0] <= max(_TORCHS_ERRORS * errors[1], least)


def jumps(rows: Sequence[Row]) -> list[tuple[Row, float]]:
    """Each row with its time per image over that of the next smaller batch, the largest first.

    Example:
        >>> row = {"case": "a", "density": 0.1, "status": "ok"}
        >>> (_, ratio), = jumps([row | {"batch": b, "image_us": us} for b, us in ((1, 4), (2, 6))])
        >>> ratio
        1.5
    """
    cases: dict[tuple[str, float], list[Row]] = {}
    for row in timed(rows):
        cases.setdefault((row["case"], row["density"]), []).append(row)
    found = [
        (row, row["image_us"] / before["image_us"])
        for own in cases.values()
        for before, row in pairwise(sorted(own, key=lambda row: int(row["batch"])))
    ]
    return sorted(found, key=lambda pair: -pair[1])


def batches_table(result: dict[str, Any]) -> Table:
    """Time per image, a row a case and a column a batch, and below it the jumps."""
    cases: dict[tuple[str, float], dict[str, Any]] = {}
    for row in timed(result["rows"]):
        case = {"case": row["case"], "density": row["density"]}
        cases.setdefault((row["case"], row["density"]), case)[str(row["batch"])] = row["image_us"]
    columns = (
        Column("time per image", lambda row: str(row["case"]), right=False, whole=True),
        Column("zeros", lambda row: f"{1 - row['density']:.0%}"),
        *(Column(str(batch), partial(_image, batch)) for batch in BATCHES),
    )
    found = jumps(result["rows"])
    told = [
        f"{row['case']} at {1 - row['density']:.0%}, batch {row['batch']}: {ratio:.2f}"
        for row, ratio in found
        if ratio > _JUMP
    ]
    largest = f"largest {found[0][1]:.2f}" if found else "nothing timed"
    note = f"Over {_JUMP} times the next smaller batch's ({largest}): {'; '.join(told) or 'none'}"
    return rich_table("", columns, cases.values(), caption(result, note))


def _image(batch: int, row: dict[str, Any]) -> str:
    return microseconds(row.get(str(batch)))


SWEEP = Sweep("batches", batches_items, batches_table)
