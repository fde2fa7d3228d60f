# SPDX-License-Identifier: Apache-2.0
"""Eight threads call one program: every answer is right, and memory does not grow."""

from __future__ import annotations

import gc
import threading
import time
from pathlib import Path

import pytest
import torch
from networks import input_for, make

import sparselt
from sparselt.plan import DENSE

THREADS = 8


@pytest.fixture(autouse=True)
def always_sparse(fixed_threads, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(
        "sparselt.tune.measure",
        lambda calls, **_: {c: 100.0 if c == DENSE else float(i) for i, c in enumerate(calls)},
    )


def call_for(seconds: float, name: str) -> list[int]:
    """Eight threads call one program with inputs of several sizes; returns calls by thread."""
    model = make(name)
    # Only one size is planned; the threads meet at the others.
    program = sparselt.compile(model, input_for(name, 2))
    inputs = [input_for(name, batch) for batch in (1, 2, 3, 5, 8, 13)]
    if name == "residual":
        inputs.append(torch.randn(2, 3, 21, 23))
    with torch.no_grad():
        wanted = [model(x) for x in inputs]
    failures: list[BaseException] = []
    counts = [0] * THREADS
    begin = threading.Barrier(THREADS)
    end = time.monotonic() + seconds

    def work(own: int) -> None:
        begin.wait()
        while (time.monotonic() < end or counts[own] < len(inputs)) and not failures:
            k = (own + counts[own]) % len(inputs)
            try:
                torch.testing.assert_close(program(inputs[k]), wanted[k], rtol=1e-3, atol=1e-4)
            except BaseException as error:
                failures.append(error)
            counts[own] += 1

    threads = [threading.Thread(target=work, args=(own,)) for own in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
    return counts


@pytest.mark.parametrize("name", ["residual", "perceptron", "branching"])
def test_eight_threads_get_right_answers(name):
    assert min(call_for(0.5, name)) >= 6


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_eight_threads_for_a_minute_do_not_grow_memory():
    call_for(5.0, "residual")
    before = resident_mib()
    assert min(call_for(60.0, "residual")) > 50
    assert resident_mib() < before + 32


def resident_mib() -> float:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20
