# SPDX-License-Identifier: Apache-2.0
"""Finds winning lottery tickets, and runs them fast with sparse kernels of its own.

The public names load on first use, so ``import sparselt`` stays cheap.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from sparselt import errors, formats, ops, plan, tickets
from sparselt.formats import SparseWeight, pack
from sparselt.tickets import Ticket, load_ticket

if TYPE_CHECKING:
    from sparselt import lottery, measure, nn, reference
    from sparselt.conversion import convert
    from sparselt.explanation import explain
    from sparselt.program import compile, load_program

__version__ = "0.1.0"

__all__ = [
    "SparseWeight",
    "Ticket",
    "__version__",
    "compile",
    "convert",
    "errors",
    "explain",
    "formats",
    "load_program",
    "load_ticket",
    "lottery",
    "measure",
    "nn",
    "ops",
    "pack",
    "plan",
    "reference",
    "tickets",
]

_HOMES = {
    "compile": "sparselt.program",
    "convert": "sparselt.conversion",
    "explain": "sparselt.explanation",
    "load_program": "sparselt.program",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'sparselt' has no attribute {name!r}")
    home = _HOMES.get(name)
    value = (
        getattr(importlib.import_module(home), name)
        if home
        else importlib.import_module(f"sparselt.{name}")
    )
    setattr(sys.modules[__name__], name, value)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
