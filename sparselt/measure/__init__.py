# SPDX-License-Identifier: Apache-2.0
"""Timing that can be believed: outputs checked, rounds interleaved, the machine beside a figure.

`bench_model` compares whole networks, each engine in a process of its own; `bench_layers`
compares single operations inside one process. Both check the outputs before they time anything,
and write the same JSON (see `report`).
"""

from __future__ import annotations

from sparselt.measure.baselines import BASELINES, Baseline
from sparselt.measure.layers import bench_layers
from sparselt.measure.machine import header
from sparselt.measure.model import ModelReport, bench_model
from sparselt.measure.timer import Timing, interleave, measure

__all__ = [
    "BASELINES",
    "Baseline",
    "ModelReport",
    "Timing",
    "bench_layers",
    "bench_model",
    "header",
    "interleave",
    "measure",
]
