# SPDX-License-Identifier: Apache-2.0
"""Every example in a docstring of the package runs and prints what it says."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from collections.abc import Iterator

import pytest
import torch

import sparselt

# What a reader may assume is imported.
NAMES = {"torch": torch, "sparselt": sparselt}
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
EXTENSIONS = {"_C", "_C_cuda"}


def modules() -> Iterator[str]:
    yield "sparselt"
    for module in pkgutil.walk_packages(sparselt.__path__, "sparselt."):
        if module.name.rpartition(".")[2] not in {"__main__", *EXTENSIONS}:
            yield module.name


@pytest.mark.parametrize("name", tuple(modules()))
def test_examples_run(name: str, tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(str(tmp_path))
    module = importlib.import_module(name)
    failures = []
    runner = doctest.DocTestRunner(verbose=False, optionflags=OPTIONS)
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, name):
        test.globs.update(NAMES)
        runner.run(test, out=failures.append)
    assert not failures, "".join(failures)


def test_examples_are_found() -> None:
    found = doctest.DocTestFinder().find(importlib.import_module("sparselt.formats.csr"), "csr")
    assert sum(len(test.examples) for test in found) >= 3
