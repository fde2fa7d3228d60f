# SPDX-License-Identifier: Apache-2.0
"""What all tests share: a fixed thread count, and the summary of which kernels were run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import TypeAlias

import pytest
import torch

THREADS = 2

Recorder: TypeAlias = Callable[[str, object], None]

_counter = itertools.count()


@pytest.fixture(autouse=True)
def fixed_threads() -> Iterator[None]:
    """Give every test the same number of threads, whatever the test before it set."""
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Give every test a cache of measured times of its own, and leave the user's alone."""
    folder = tmp_path_factory.getbasetemp() / "caches" / str(next(_counter))
    monkeypatch.setenv("SPARSELT_CACHE", str(folder))


@pytest.fixture(autouse=True)
def free_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the times that a test makes up stand as they are, in programs too."""
    monkeypatch.setattr("sparselt.tune.call_us", lambda: 0.0)


@pytest.fixture(autouse=True)
def recorded_kernel(request: pytest.FixtureRequest, record_property: Recorder) -> None:
    """Note the kernel that a test is parametrised with, for the summary."""
    kernel = getattr(request.node, "callspec", None) and request.node.callspec.params.get("kernel")
    if kernel:
        record_property("kernel", getattr(kernel, "name", kernel))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many of the registered kernels a passing test has run by name."""
    passed = terminalreporter.stats.get("passed", [])
    tested = {
        str(value) for report in passed for key, value in report.user_properties if key == "kernel"
    }
    if not tested:
        return
    from sparselt import ops

    registered = ops.kernels()
    terminalreporter.write_line(f"tested {len(tested)} of {len(registered)} registered kernels")
    for kernel in registered:
        if kernel.name not in tested:
            reason = kernel.reason or f"no {kernel.device} test was selected"
            terminalreporter.write_line(f"  not tested: {kernel.name}: {reason}")
