# SPDX-License-Identifier: Apache-2.0
"""Linear layers that stay dense, with their weights laid out as MKL's product reads them.

MKL lays a weight out for a number of rows of the input, and multiplies by it without the copies
that it makes of a plain one at every call: at 16 to 256 rows in 0.7 to 0.97 of the time, on
AVX-512. The plain weight stays, for other numbers of rows.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparselt.shapes import drawn

__all__ = ["Chooser", "PackedRows", "pack_rows", "packed_linear", "packs_rows"]

# Fewer rows read the weight about once, as it is; beside more, MKL's own copies do not show.
_LEAST_ROWS, _MOST_ROWS = 4, 1024
# Each packed weight is as large as the plain one: for the numbers of rows met first, and no more.
_MOST_PACKED = 2


class Chooser(Protocol):
    """What tells which of several calls is fastest: `sparselt.tune.Tuner`."""

    @property
    def is_forced(self) -> bool:
        """Whether there is nothing to choose."""

    def fastest(self, calls: dict[str, Callable[[], object]], key: object) -> str:
        """The name of the fastest; the first unless another clearly is."""


class PackedRows:
    """A layer's packed weights, for the numbers of rows for which plain ones measured no faster.

    What was chosen for a number of rows stays, so that results are the same bit for bit.

    Args:
        module: of any kind; one that `packs_rows` can have some.
        chooser: times.
    """

    def __init__(self, module: nn.Module, chooser: Chooser) -> None:
        self.module, self.chooser = module, chooser
        self._packed: dict[int, Tensor | None] = {}
        self._lock = threading.Lock()

    def packed(self, rows: int) -> Tensor | None:
        """The weight for inputs of so many rows, opaque to torch; None where plain is faster."""
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if rows not in self._packed:
                full = sum(x is not None for x in self._packed.values()) >= _MOST_PACKED
                none = full or self.chooser.is_forced or not packs_rows(self.module, rows)
                self._packed[rows] = None if none else self._faster(rows)
            return self._packed[rows]

    def _faster(self, rows: int) -> Tensor | None:
        module = self.module
        assert isinstance(module, nn.Linear)
        packed = pack_rows(module, rows)
        x = drawn((1, module.in_features)).repeat(rows, 1)
        calls: dict[str, Callable[[], object]] = {
            "packed": lambda: packed_linear(x, packed, module),
            "plain": lambda: F.linear(x, module.weight, module.bias),
        }
        key = ("packed rows", rows, tuple(module.weight.shape), module.bias is not None)
        return packed if self.chooser.fastest(calls, key) == "packed" else None


def packs_rows(module: nn.Module, rows: int = _LEAST_ROWS) -> bool:
    """Whether a layer can have packed weights, and may gain by them.

    Args:
        module: any layer.
        rows: of its input.

    Example:
        >>> packs_rows(nn.Linear(8, 8), rows=1), packs_rows(nn.Conv2d(8, 8, 3))
        (False, False)
    """
    if type(module) is not nn.Linear or not _LEAST_ROWS <= rows <= _MOST_ROWS or not _has_mkl():
        return False
    weight = module.weight
    return weight.dtype is torch.float32 and weight.is_cpu and weight.numel() > 0


def pack_rows(module: nn.Linear, rows: int) -> Tensor:
    """The weight for inputs of so many rows, opaque to torch."""
    packed: Tensor = torch.ops.mkl._mkl_reorder_linear_weight(module.weight.detach(), rows)
    return packed


def packed_linear(x: Tensor, packed: Tensor, module: nn.Linear) -> Tensor:
    """The layer's result, by a weight that was packed for as many rows as x has."""
    rows = x.numel() // module.in_features
    y: Tensor = torch.ops.mkl._mkl_linear(x, packed, module.weight, module.bias, rows)
    return y


@cache
def _has_mkl() -> bool:
    available: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    return available and hasattr(torch.ops.mkl, "_mkl_linear")
