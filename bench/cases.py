# SPDX-License-Identifier: Apache-2.0
"""What the regression benchmarks time, and how one entry is checked and timed.

Patterns are those of a pruned ResNet-50 where SPARSELT_DATA points at the Deep Learning Matrix
Collection, and random ones of the same shapes and densities otherwise.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from sparselt import ops
from sparselt.measure.layers import Problem, contenders, problem
from sparselt.measure.machine import header
from sparselt.measure.suites import SUITES, Layer, real_mask

DENSITIES = (0.2, 0.1, 0.05)
MATRICES = (*SUITES["matrix"], Layer("transformer.ffn", 2048, 512, columns=256), *SUITES["mlp"][:1])
CONVOLUTIONS = (*SUITES["resnet20"], *(x for x in SUITES["resnet50"] if x.kernel))
DENSE = {"spmm": ("torch_dense", "torch_csr"), "conv2d": ("torch_dense", "torch_channels_last")}


def engines(op: str) -> list[str]:
    """Names of all that can be timed for "spmm" or "conv2d": torch's, then our CPU kernels."""
    ours = [k for k in ops.kernels() if op in k.operations and k.device == "cpu"]
    return [*DENSE[op], *(k.name for k in ours if k.format != "bsr")]


def case_id(layer: Layer, density: float) -> str:
    """`resnet50.layer1.conv2@density=0.1`."""
    return f"{layer.name}@density={density:g}"


@lru_cache(maxsize=1)
def drawn(layer: Layer, density: float) -> Problem:
    """The problem of one case; the entries of a case follow each other, so one is kept."""
    return problem(layer, density, mask=real_mask(layer, density))


def check_and_time(benchmark: BenchmarkFixture, layer: Layer, density: float, engine: str) -> None:
    """Check the output, then time it; a wrong output fails the test and gets no figure."""
    case = drawn(layer, density)
    (item,) = contenders(case, only=(engine,))
    if item.absent:
        pytest.skip(f"{engine}: {item.absent}")
    benchmark.group = case_id(layer, density)
    benchmark.extra_info |= {"machine": header(), "weight_bytes": item.weight_bytes}
    with torch.inference_mode():
        error, within = case.error(item.run())
        assert within, f"{engine} is wrong on {layer.case}: error {error:.2g}"
        benchmark(item.run)
