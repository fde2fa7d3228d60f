# SPDX-License-Identifier: Apache-2.0
"""Matrix products and linear layers: every CSR kernel, and torch, on every case."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.cases import DENSITIES, MATRICES, case_id, check_and_time, engines
from sparselt.measure.suites import Layer

CASES = [
    pytest.param(layer, density, id=case_id(layer, density))
    for layer in MATRICES
    for density in DENSITIES
]


@pytest.mark.benchmark(warmup=True, min_rounds=20, max_time=0.3)
@pytest.mark.parametrize(("layer", "density"), CASES)
@pytest.mark.parametrize("engine", engines("spmm"))
def test_spmm(benchmark: BenchmarkFixture, layer: Layer, density: float, engine: str) -> None:
    check_and_time(benchmark, layer, density, engine)
