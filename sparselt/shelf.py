# SPDX-License-Identifier: Apache-2.0
"""Where a program keeps the dense weights that its sparse layers have made superfluous.

They are wanted again only to plan for other sizes. Until then each is stored as one bit a weight
and the kept values, exact to the bit, and the tensor itself is emptied. A plan takes them one at a
time, so that no more than those that it leaves dense are there at once.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparselt.shapes import outline
from sparselt.tickets.file import pack_bits, unpack_bits

__all__ = ["Shelf"]

# Smaller tensors are not worth the call.
_SMALLEST = 256


@dataclass
class _Stored:
    tensor: Tensor
    bits: Tensor
    values: Tensor
    shape: torch.Size


class Shelf:
    """Tensors that are emptied in place, and filled again when they are wanted.

    Example:
        >>> import torch
        >>> shelf, weight = Shelf(), torch.eye(32)
        >>> shelf.put(weight)
        >>> weight.numel()
        0
        >>> with shelf.out():
        ...     torch.equal(weight, torch.eye(32))
        True
    """

    def __init__(self) -> None:
        self._stored: dict[int, _Stored] = {}

    def put(self, tensor: Tensor) -> None:
        """Empties a tensor, unless that would save no memory."""
        kept = tensor != 0
        size = tensor.element_size()
        saved = (tensor.numel() - int(kept.count_nonzero())) * size - tensor.numel() // 8
        if tensor.numel() < _SMALLEST or saved <= 0 or not tensor.is_cpu:
            return
        # Weights are kept in rows; a transposed one would come back with other strides.
        if not tensor.is_contiguous():
            return
        stored = _Stored(tensor, pack_bits(kept), tensor[kept].clone(), tensor.shape)
        self._stored[id(tensor)] = stored
        tensor.data = tensor.new_empty(0)

    def adopt(self, bits: Tensor, values: Tensor, shape: Sequence[int]) -> Tensor:
        """A new tensor that is here from the begin.

        Args:
            bits: (ceil(n / 8),) uint8, one bit a weight, as of `pack_bits`.
            values: the kept ones.
            shape: of n weights.
        """
        tensor = values.new_empty(0)
        self._stored[id(tensor)] = _Stored(tensor, bits, values, torch.Size(shape))
        return tensor

    def outline(self, tensor: Tensor) -> Tensor:
        """A tensor of the shape that one here has when it is filled; any other as it is."""
        stored = self._stored.get(id(tensor))
        return tensor if stored is None else outline(stored.shape, tensor.dtype)

    def take(self, tensor: Tensor) -> Tensor:
        """The tensor, filled if it is here and empty."""
        stored = self._stored.get(id(tensor))
        if stored is not None and not tensor.numel():
            with torch.inference_mode(False), torch.no_grad():
                tensor.data = _dense(stored)
        return tensor

    def back(self, tensor: Tensor) -> None:
        """Empties a tensor again if it is one from here."""
        if id(tensor) in self._stored:
            tensor.data = tensor.new_empty(0)
            self.trim()

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """At the end, all tensors that were taken are emptied again."""
        try:
            yield
        finally:
            for stored in self._stored.values():
                self.back(stored.tensor)

    @contextlib.contextmanager
    def out(self) -> Iterator[None]:
        """Fills all tensors, and empties them again at the end."""
        with self.lent():
            self.fill()
            yield

    def fill(self) -> None:
        """Takes all tensors."""
        for stored in self._stored.values():
            self.take(stored.tensor)

    def trim(self) -> None:
        """Hands memory that was freed back to the system, which glibc puts off."""
        trim = None
        # A platform without the call gives memory back by itself, or cannot.
        with contextlib.suppress(OSError, AttributeError, TypeError):
            trim = ctypes.CDLL(None).malloc_trim
        if trim is not None and self._stored:
            trim(0)

    def keep(self, tensors: Iterable[Tensor]) -> None:
        """Fills tensors for good."""
        for tensor in tensors:
            self.take(tensor)
            self._stored.pop(id(tensor), None)


def _dense(stored: _Stored) -> Tensor:
    count = stored.shape.numel()
    flat = torch.zeros(count, dtype=stored.values.dtype)
    flat[unpack_bits(stored.bits, count)] = stored.values
    return flat.view(stored.shape)
