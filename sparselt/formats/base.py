# SPDX-License-Identifier: Apache-2.0
"""The contract every sparse format keeps.

A format turns a dense weight and a mask into a few flat tensors ("parts") that a kernel reads
through raw pointers. Nothing behind this module tests an index again, so a `SparseWeight` is
checked in full whenever it is made from parts that did not come from `from_dense`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from sparselt.errors import FormatError, explain_mismatch
from sparselt.formats.checks import (
    check_fits_int32,
    check_on_cpu,
    check_parts,
    check_shape,
    kept_weights,
)

__all__ = ["Part", "SparseWeight", "compress", "entry_rows", "run_of_each"]


class Part:
    """One of a weight's parts as an attribute of it.

    Args:
        place: the part's place in `SparseWeight.parts()`.
    """

    def __init__(self, place: int) -> None:
        self.place = place

    def __get__(self, weight: SparseWeight, owner: type[SparseWeight] | None = None) -> Tensor:
        return weight._parts[self.place]


class SparseWeight(ABC):
    """A weight matrix or filter bank in a sparse format: immutable parts plus the logical shape.

    A convolution's filters (C_out, C_in/groups, R, S) are kept as the matrix
    (M, K) = (C_out, C_in/groups * R * S), flattened in row-major order.

    A subclass says how its parts are packed, read and checked; the last part holds the values.

    Args:
        parts: the tensors named in `part_names`, in that order; they are not copied.
        shape: the logical dense shape, 2 to 4 sizes, rows (output features) first.
        block: (block_rows, block_cols); None means the format's default.

    Raises:
        FormatError, DtypeError, ShapeError, DeviceError: as `validate` does.

    Example:
        >>> import torch
        >>> from sparselt.formats import CSR
        >>> weight = CSR.from_dense(torch.tensor([[0.0, 2.0], [0.0, 0.0]]))
        >>> weight.nnz, weight.density, weight.shape
        (1, 0.25, (2, 2))
    """

    name: ClassVar[str]
    part_names: ClassVar[tuple[str, ...]]
    # Of every part but the values: int32 for those that are not named.
    index_dtypes: ClassVar[dict[str, torch.dtype]] = {}
    cpu_only: ClassVar[bool] = False

    values = Part(-1)

    shape: tuple[int, ...]
    block: tuple[int, int]
    _parts: tuple[Tensor, ...]

    def __init__(
        self, parts: Sequence[Tensor], shape: Sequence[int], block: tuple[int, int] | None = None
    ) -> None:
        self._fill(tuple(parts), check_shape(shape), self.check_block(block))
        self.validate(full=True)
        # Parameters would drag autograd into an inference-only format.
        self._fill(tuple(part.detach() for part in self._parts), self.shape, self.block)

    def _fill(
        self, parts: tuple[Tensor, ...], shape: tuple[int, ...], block: tuple[int, int]
    ) -> None:
        object.__setattr__(self, "_parts", parts)
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "block", block)

    @classmethod
    def _trusted(
        cls, parts: tuple[Tensor, ...], shape: tuple[int, ...], block: tuple[int, int]
    ) -> Self:
        """Build without the O(nnz) checks, for parts this package has just computed itself."""
        weight = cls.__new__(cls)
        weight._fill(parts, shape, block)
        weight.validate(full=False)
        return weight

    def __setattr__(self, key: str, value: object) -> None:
        raise AttributeError(
            f"{type(self).__name__} is immutable: cannot set {key!r}; pack the weight again"
        )

    def __delattr__(self, key: str) -> None:
        raise AttributeError(f"{type(self).__name__} is immutable: cannot delete {key!r}")

    def __repr__(self) -> str:
        block = "" if self.block == (1, 1) else f", block={self.block}"
        return (
            f"{type(self).__name__}(shape={self.shape}, nnz={self.nnz}, "
            f"density={self.density:.4g}{block}, device={self.device})"
        )

    @property
    def format(self) -> str:
        """The format's key in `FORMATS`."""
        return self.name

    @property
    def rows(self) -> int:
        """M, the number of output features or channels."""
        return self.shape[0]

    @property
    def cols(self) -> int:
        """K, the number of columns of the flattened matrix: the product of `shape[1:]`."""
        return math.prod(self.shape[1:])

    @property
    def nnz(self) -> int:
        """Number of stored values; what a block format pads is counted."""
        return self.values.numel()

    @property
    def kept(self) -> int:
        """Number of kept weights: `nnz` without what fills rows up."""
        return self.nnz

    @property
    def density(self) -> float:
        """Stored values over the size of the dense weight; 0.0 for an empty weight.

        Blocks that overhang the matrix count in full, so a block format may exceed 1.
        """
        size = self.rows * self.cols
        return self.nnz / size if size else 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of all parts, indices included."""
        return sum(part.numel() * part.element_size() for part in self._parts)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the stored values."""
        return self._parts[-1].dtype

    @property
    def device(self) -> torch.device:
        """Where the parts are."""
        return self._parts[0].device

    def parts(self) -> tuple[Tensor, ...]:
        """The tensors in the order of `part_names`, as the operators take them."""
        return self._parts

    def meta(self) -> list[int]:
        """[block_rows, block_cols, *shape], as the operators take it."""
        return [*self.block, *self.shape]

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """The same weight elsewhere or in another type; parts that need no change are shared.

        Args:
            device: where to; None leaves the parts where they are.
            dtype: of the values: float32, on CUDA also float16 or bfloat16. None leaves it.

        Raises:
            DeviceError, DtypeError: the format does not exist there, or not in that type.
        """
        *indices, values = (part.to(device) for part in self._parts)
        values = values if dtype is None else values.to(dtype)
        return self._trusted((*indices, values), self.shape, self.block)

    @classmethod
    def from_parts(
        cls,
        parts: Sequence[Tensor],
        shape: Sequence[int],
        block: tuple[int, int] | None = None,
    ) -> Self:
        """Adopt parts that were made elsewhere (a file, a state dict), after checking all of them.

        Args:
            parts: tensors in the order of `part_names`; contiguous, not copied.
            shape: logical dense shape, 2 to 4 sizes.
            block: (block_rows, block_cols) for a block format.

        Returns:
            The weight; its `parts()` are the tensors given.

        Raises:
            FormatError, DtypeError, ShapeError, DeviceError: as `validate(full=True)` does.

        Example:
            >>> import torch
            >>> from sparselt.formats import CSR
            >>> index = lambda *values: torch.tensor(values, dtype=torch.int32)
            >>> CSR.from_parts((index(0, 1, 1), index(1), torch.tensor([2.0])), (2, 2)).to_dense()
            tensor([[0., 2.],
                    [0., 0.]])
        """
        return cls(parts, shape, block)

    @classmethod
    @abstractmethod
    def check_block(cls, block: tuple[int, int] | None) -> tuple[int, int]:
        """The block to use for what was asked; raises FormatError if the format has no such."""

    @classmethod
    def portable(cls, block: tuple[int, int]) -> tuple[str, tuple[int, int]]:
        """The format and block that state dicts hold a weight of this block in."""
        return "csr", (1, 1)

    @classmethod
    def from_dense(
        cls,
        weight: Tensor,
        mask: Tensor | None = None,
        block: tuple[int, int] | None = None,
        groups: int = 1,
    ) -> Self:
        """Pack the kept weights; a block format packs every block that holds one.

        Args:
            weight: (M, K), (C_out, C_in/groups, S) or (C_out, C_in/groups, R, S); float32, float16
                or bfloat16 (both exact in float32), any strides.
            mask: the same shape, bool or 0/1; a kept 0.0 stays stored. None means `weight != 0`.
            block: as `check_block` takes it; None means the format's own.
            groups: of the convolution; formats of slices keep the rows of each apart.

        Returns:
            The packed weight, on the weight's device.

        Raises:
            DtypeError, ShapeError, DeviceError, FormatError: what was given is none of the above.

        Example:
            >>> import torch
            >>> from sparselt.formats import CSR
            >>> CSR.from_dense(torch.eye(3)).nnz
            3
        """
        block = cls.check_block(block)
        dense, kept = kept_weights(weight, mask)
        if cls.cpu_only:
            check_on_cpu(dense, cls.name)
        shape = tuple(weight.shape)
        if groups < 1 or shape[0] % groups:
            raise FormatError(explain_mismatch("groups", f"a divisor of {shape[0]} rows", groups))
        return cls._trusted(cls._pack(dense, kept, shape, block, groups), shape, block)

    @classmethod
    @abstractmethod
    def _pack(
        cls,
        dense: Tensor,
        kept: Tensor,
        shape: tuple[int, ...],
        block: tuple[int, int],
        groups: int,
    ) -> tuple[Tensor, ...]:
        """The parts for a matrix (M, K) float32 and what is kept of it, both contiguous."""

    def _stored(self) -> tuple[Tensor, Tensor]:
        """Of each stored value its place in the flattened dense matrix and in `values`, int64."""
        raise NotImplementedError  # by a format that overrides _spread

    def _spread(self, values: Tensor) -> Tensor:
        """The dense tensor that holds `values`, one for each place or one for all, and zeros."""
        dense = values.new_zeros(self.rows * self.cols)
        positions, places = self._stored()
        dense[positions] = values.reshape(-1)[places] if values.dim() else values
        return dense.view(self.shape)

    def to_dense(self) -> Tensor:
        """The dense float32 weight of shape `shape`: stored values bit for bit, 0.0 elsewhere."""
        return self._spread(self.values.float())

    def mask(self) -> Tensor:
        """Bool tensor of shape `shape`: True where a value is stored."""
        return self._spread(torch.ones((), dtype=torch.bool, device=self.device))

    def validate(self, full: bool = True) -> None:
        """Check the parts: types, ranks and lengths in O(1); with `full` every index in O(nnz).

        Raises:
            DtypeError: indices or values are of another type.
            FormatError: a part is missing, of the wrong length or not contiguous, or an index is
                out of range, unsorted or repeated.
            DeviceError: the parts are on different devices, or where the format has no kernels.
        """
        check_parts(self._parts, self.part_names, self.name, self.index_dtypes)
        if self.cpu_only:
            check_on_cpu(self._parts[0], self.name)
        self._check_lengths()
        if full:
            self._check_indices()

    @abstractmethod
    def _check_lengths(self) -> None:
        """Ranks and lengths of the parts, whose types are right."""

    @abstractmethod
    def _check_indices(self) -> None:
        """Every index, where the lengths are right."""


def compress(kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row offsets and column indices of the True entries of a matrix, in row-major order.

    Args:
        kept: (R, C) bool, contiguous.

    Returns:
        crow_indices (R + 1) int32, col_indices (n) int32, and the flat positions (n) int64.

    Raises:
        FormatError: more than 2**31 - 1 entries are kept.
    """
    rows, cols = kept.shape
    positions = kept.view(-1).nonzero().view(-1)
    check_fits_int32(positions.numel())
    row_starts = torch.arange(rows + 1, device=kept.device) * cols
    crow = torch.searchsorted(positions, row_starts)
    return crow.to(torch.int32), (positions % cols).to(torch.int32), positions


def run_of_each(counts: Tensor) -> Tensor:
    """The run of each entry, for runs of these lengths (R) int64: (entries) int64."""
    if counts.device.type != "cpu":
        return torch.repeat_interleave(counts)
    # Torch's function wakes all threads for a single entry: milliseconds on a busy machine.
    return torch.from_numpy(np.repeat(np.arange(counts.numel()), counts.numpy()))


def entry_rows(crow: Tensor, entries: int) -> Tensor:
    """The row of each of `entries` stored entries, (entries) int64, from offsets (R + 1) int32."""
    # An entry's row is the number of later rows that start at or before it.
    return torch.bincount(crow[1:-1], minlength=entries + 1)[:entries].cumsum(0)
