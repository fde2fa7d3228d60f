# SPDX-License-Identifier: Apache-2.0
"""How far a compiled network's float32 outputs are from float64, beside torch's own float32.

Errors are the largest difference of any output from float64, over several images together, relative
to the largest output: a single image's largest error is a matter of luck.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import sparselt
from sparselt.measure.machine import header
from sparselt.measure.model import double_reference
from sparselt.measure.networks import example_inputs, pruned_network
from sparselt.measure.report import Column
from sparselt.measure.table import Case
from sparselt.measure.worker import output_error

__all__ = ["ACCURACY_COLUMNS", "ROUNDING", "accuracy", "check_networks"]

# Half a unit in the last place of the largest output: it is lost when that output is stored,
# however exactly it was computed. A smaller error of torch's is luck.
ROUNDING = 2.0**-24
_FACTOR = 2.0
# Few outputs need more images until the largest error is no longer luck.
_IMAGES, _FEW_IMAGES, _SMALL_IMAGE = 48, 16, 10_000


def accuracy(
    model: nn.Module,
    images: Tensor,
    batches: Sequence[int] = (1, 3, 16),
    progress: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Compile a network at the first batch, run all images at each, and compare with float64.

    Args:
        model: the network, in eval mode; not changed.
        images: (N, ...) its inputs.
        batches: images a call; the last call takes what is left.
        progress: called with a short sentence on each step.

    Returns:
        For each batch: batch, error, torch_error, ratio (to torch's largest error at any batch, or
        to rounding alone, whichever is larger), status ("ok", or "FAIL" where the ratio is over 2)
        and sparse (how many of the network's layers run sparse).

    Example:
        >>> (row,) = accuracy(nn.Linear(4, 2), torch.randn(5, 4), batches=(2,))
        >>> row["status"]
        'ok'
    """
    say = progress or (lambda text: None)
    say("float64")
    model = copy.deepcopy(model).eval().requires_grad_(False)
    reference, _ = double_reference(model, [images])
    say("compiling")
    program = sparselt.compile(model, images[: batches[0]])
    outputs = {}
    for batch in batches:
        say(f"batch {batch}")
        outputs[batch] = [_in_batches(run, images, batch) for run in (program, model)]
    errors = {
        batch: [output_error([output], reference) for output in pair]
        for batch, pair in outputs.items()
    }
    # The images are the same at every batch, and torch sums in another order: luck again.
    allowed = max(ROUNDING, *(torch_error for _, torch_error in errors.values()))
    sparse = sum(row.kernel != "dense" for row in sparselt.explain(program))
    return [
        {
            "batch": batch,
            "error": error,
            "torch_error": torch_error,
            "ratio": error / allowed,
            "status": "ok" if error <= _FACTOR * allowed else "FAIL",
            "sparse": sparse,
        }
        for batch, (error, torch_error) in errors.items()
    ]


def check_networks(
    cases: Sequence[Case], progress: Callable[[int, str], None] | None = None
) -> dict[str, Any]:
    """The accuracy of every network of some cases, at every share of zeros.

    On 48 images; on 16 where images are large, whose networks have a thousand outputs each.

    Args:
        cases: of `table.CASES`; their batches do not matter here.
        progress: called with the number of cases done and a short sentence on each step.

    Returns:
        A result of kind "accuracy" with one row for each network, density and batch.
    """
    say = progress or (lambda done, text: None)
    rows = []
    seen = set()
    for done, case in enumerate(cases):
        for name in case.names():
            for density in case.densities:
                if (name, density) in seen:
                    continue
                seen.add((name, density))
                say(done, f"{name}, {1 - density:.0%} zeros")
                built = pruned_network(name, density=density)
                count = _IMAGES if math.prod(built.shape) < _SMALL_IMAGE else _FEW_IMAGES
                found = accuracy(built.model, example_inputs(built.shape, count))
                rows += [{"case": name, "zeros": 1 - density, **row} for row in found]
    return {"kind": "accuracy", "machine": header(), "rows": rows}


def _in_batches(model: Callable[[Tensor], Tensor], images: Tensor, batch: int) -> Tensor:
    with torch.inference_mode():
        return torch.cat([model(part) for part in torch.split(images, batch)])


ACCURACY_COLUMNS = (
    Column("network", lambda row: str(row["case"]), right=False, whole=True),
    Column("zeros", lambda row: f"{row['zeros']:.0%}"),
    Column("batch", lambda row: str(row["batch"])),
    Column("sparse layers", lambda row: str(row["sparse"])),
    Column("error", lambda row: f"{row['error']:.1e}"),
    Column("torch's", lambda row: f"{row['torch_error']:.1e}"),
    Column("ratio", lambda row: f"{row['ratio']:.2f}"),
    Column("", lambda row: str(row["status"]), right=False),
)
