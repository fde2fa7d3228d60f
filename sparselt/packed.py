# SPDX-License-Identifier: Apache-2.0
"""The packed weight of a layer as a module, and its passage through state dicts.

A layer's sparse parts are buffers of a `PackedWeight` that stands where the dense weight stood, so
that state dict keys read `<layer>.weight.values`, and files stay portable: nothing of one CPU's
choice is saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparselt.errors import FormatError, ShapeError, SparseltError, explain_mismatch
from sparselt.extension import code_bytes, watch
from sparselt.formats import FORMATS, SparseWeight, pack

__all__ = ["PackedWeight", "accept_packed_keys", "pack_as", "pack_dense_key", "zero_block"]

# Block shapes that conversion looks for, largest first: (rows, cols). Tensor cores want large ones.
_BLOCKS = ((16, 16), (16, 1), (8, 1), (4, 1))
_CUDA_BLOCKS = ((128, 128), (64, 64), (32, 32), *_BLOCKS)
# The share of the zeros that must lie in whole zero blocks, and of the stored blocks that must be
# kept weights, for a block format to be considered.
_WHOLE = 0.9


class PackedWeight(nn.Module):
    """A sparse weight whose parts are buffers; stands where a layer's `weight` Parameter stood.

    Code that reads the weight as a tensor still works, slowly: torch functions that are handed a
    PackedWeight see the dense weight, and so do methods of a tensor that a module lacks.

    Args:
        packed: the weight; its parts are shared, not copied.
        groups: of the convolution that it is packed for.

    Attributes:
        format: key of `sparselt.formats.FORMATS`.
        shape: the logical dense shape.
        block: (rows, cols); (1, 1) for a format without blocks.
        lifted_meta: `meta()` of the filters as those of a conv2d, of height 1 where they have none.

    Example:
        >>> import torch
        >>> from sparselt.formats import pack
        >>> PackedWeight(pack(torch.eye(4)))
        PackedWeight(shape=(4, 4), nnz=4, density=0.25, format=csr)
    """

    format: str
    shape: tuple[int, ...]
    block: tuple[int, int]
    lifted_meta: list[int]
    _meta: list[int]
    _nnz: int

    def __init__(self, packed: SparseWeight, groups: int = 1) -> None:
        super().__init__()
        self.groups = groups
        self._adopt(packed)

    def _adopt(self, packed: SparseWeight) -> None:
        self.format, self.shape, self.block = packed.name, packed.shape, packed.block
        self._meta, self._nnz, self._kept = packed.meta(), packed.nnz, packed.kept
        self.lifted_meta = [*self._meta[:4], *[1] * (4 - len(self.shape)), *self._meta[4:]]
        # Not register_buffer, which asks for the name as an attribute first: see __getattr__.
        self._buffers.update(zip(packed.part_names, packed.parts(), strict=True))
        watch(self.format, self.parts(), self.block[0])

    def parts(self) -> list[Tensor]:
        """The buffers in the order of the format's `part_names`."""
        return list(self._buffers.values())  # type: ignore[arg-type]

    def meta(self) -> list[int]:
        """[block_rows, block_cols, *shape], as the operators take it."""
        return self._meta

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, or of what was pickled: its tensors are new."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        watch(self.format, self.parts(), self.block[0])

    def packed(self) -> SparseWeight:
        """The weight as an immutable, fully checked `SparseWeight` of float32 values."""
        *indices, values = self.parts()
        return FORMATS[self.format].from_parts(
            [*indices, values.float()], self.shape, None if self.block == (1, 1) else self.block
        )

    def repack(self, format: str, block: tuple[int, int]) -> None:
        """Changes the format in place; the type of the values stays.

        Args:
            format: key of `sparselt.formats.FORMATS`.
            block: (rows, cols); (1, 1) for the format's own.
        """
        if format == self.format and block in ((1, 1), self.block):
            return
        packed, dtype = self.packed(), self.dtype
        made = pack_as(packed.to_dense(), packed.mask(), format, block, self.groups)
        self._buffers.clear()
        self._adopt(made)
        self._buffers["values"] = made.parts()[-1].to(dtype)

    def to_dense(self) -> Tensor:
        """The dense weight of shape `shape`, in the type of the stored values."""
        return self.packed().to_dense().to(self.dtype)

    @property
    def nnz(self) -> int:
        """Number of stored values, as the format counts them."""
        return self._nnz

    @property
    def density(self) -> float:
        """Kept weights over the size of the dense weight."""
        return self._kept / max(1, self.numel())

    @property
    def nbytes(self) -> int:
        """Bytes of all parts, indices included, and of the code generated for them, if any."""
        parts = self.parts()
        return sum(part.numel() * part.element_size() for part in parts) + code_bytes(parts)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the stored values."""
        return self.parts()[-1].dtype

    @property
    def device(self) -> torch.device:
        """Where the parts are."""
        return self.parts()[-1].device

    @property
    def requires_grad(self) -> bool:
        """Always False: packed weights only run forward."""
        return False

    def numel(self) -> int:
        """Size of the dense weight."""
        return int(torch.Size(self.shape).numel())

    def extra_repr(self) -> str:
        """Shape, stored values, density and format."""
        block = "" if self.block == (1, 1) else f", block={self.block}"
        return (
            f"shape={self.shape}, nnz={self.nnz}, density={self.density:.3g}, "
            f"format={self.format}{block}"
        )

    def __getattr__(self, name: str) -> Any:
        """What a Module lacks and a tensor has (`t`, `T`, `view`) is the dense weight's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or not hasattr(Tensor, name):
                raise
        return getattr(self.to_dense(), name)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Lets `F.linear(x, layer.weight)` and the like see the dense weight."""

        def dense(value: Any) -> Any:
            return value.to_dense() if isinstance(value, PackedWeight) else value

        args, kwargs = pytree.tree_map(dense, (tuple(args), dict(kwargs or {})))
        return func(*args, **kwargs)

    def _save_to_state_dict(
        self, destination: MutableMapping[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        """Saves what any machine reads: a kernel's own layout goes as compressed rows or blocks."""
        if _portable_name(self) == self.format:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            return
        portable = _portable(self.packed())
        *indices, values = portable.parts()
        parts = [*indices, values.to(self.dtype)]
        for name, part in zip(portable.part_names, parts, strict=True):
            destination[prefix + name] = part

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Adopts the parts found, whatever their number of values, after checking every index."""
        names = FORMATS[_portable_name(self)].part_names
        absent = [prefix + name for name in names if prefix + name not in state_dict]
        if absent:
            missing_keys.extend(absent if strict else [])
            return
        try:
            packed = _from_state(state_dict, prefix, self.shape)
            if (packed.name, packed.block) != (self.format, self.block):
                dense, mask = packed.to_dense(), packed.mask()
                packed = pack_as(dense, mask, self.format, self.block, self.groups)
        except SparseltError as error:
            error_msgs.append(f"{prefix[:-1]}: {error}")
            return
        dtype, device = self.dtype, self.device
        self._adopt(packed.to(device))
        for name, part in self._buffers.items():
            assert part is not None
            # A state dict shares memory with the model it came from; this module must not.
            copied = part.clone()
            self._buffers[name] = copied.to(dtype) if copied.is_floating_point() else copied


def _portable(packed: SparseWeight) -> SparseWeight:
    """The weight as state dicts hold it: as compressed rows or blocks, which any machine reads."""
    name, block = packed.portable(packed.block)
    if name == packed.name:
        return packed
    return pack_as(packed.to_dense(), packed.mask(), name, block)


def _portable_name(weight: PackedWeight) -> str:
    """The format of `_portable`."""
    return FORMATS[weight.format].portable(weight.block)[0]


def pack_as(
    dense: Tensor, mask: Tensor | None, format: str, block: tuple[int, int], groups: int = 1
) -> SparseWeight:
    """`sparselt.formats.pack` for the block of a plan: (1, 1) means the format's own."""
    return pack(dense, mask, format, None if block == (1, 1) else block, groups)


def _from_state(state_dict: Mapping[str, Any], prefix: str, shape: Sequence[int]) -> SparseWeight:
    """The packed weight under `prefix`; three-dimensional values tell BSR from CSR."""
    values = state_dict[prefix + "values"]
    if not isinstance(values, Tensor):
        raise FormatError(explain_mismatch(prefix + "values", "a tensor", type(values).__name__))
    name = "bsr" if values.dim() == 3 else "csr"
    block = (values.shape[1], values.shape[2]) if name == "bsr" else None
    *indices, last = FORMATS[name].part_names
    parts = [state_dict[prefix + part] for part in indices]
    return FORMATS[name].from_parts([*parts, state_dict[prefix + last].float()], shape, block)


def pack_dense_key(weight: PackedWeight, state_dict: MutableMapping[str, Any], prefix: str) -> None:
    """Replaces a dense `<layer>.weight` of a state dict by the packed keys that `weight` takes.

    Args:
        weight: the layer's packed weight: format and block to pack into.
        state_dict: changed in place; left alone if it holds no dense weight for the layer.
        prefix: the layer's prefix, dot included.

    Raises:
        ShapeError: the dense weight has another shape than the layer.
        SparseltError: it cannot be packed.
    """
    dense = state_dict.get(prefix + "weight")
    if not isinstance(dense, Tensor):
        return
    if tuple(dense.shape) != weight.shape:
        raise ShapeError(explain_mismatch("weight", weight.shape, tuple(dense.shape)))
    packed = _portable(pack_as(dense.detach().float(), None, weight.format, weight.block))
    del state_dict[prefix + "weight"]
    for name, part in zip(packed.part_names, packed.parts(), strict=True):
        state_dict[f"{prefix}weight.{name}"] = part


def accept_packed_keys(layer: nn.Module) -> None:
    """Lets a dense layer load the state dict of one whose weight was packed.

    Args:
        layer: any module with a dense `weight`; gets a load_state_dict pre-hook, once.
    """
    hooks = layer._load_state_dict_pre_hooks.values()
    if not any(getattr(hook, "hook", None) is _unpack_keys for hook in hooks):
        layer.register_load_state_dict_pre_hook(_unpack_keys)  # type: ignore[no-untyped-call]


def _unpack_keys(
    layer: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Mapping[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """The hook: `<layer>.weight.values` and its indices become a dense `<layer>.weight`."""
    packed_prefix = prefix + "weight."
    keys = [key for key in state_dict if key.startswith(packed_prefix)]
    if packed_prefix + "values" not in keys:
        return
    weight = layer.weight
    assert isinstance(weight, Tensor)
    try:
        packed = _from_state(state_dict, packed_prefix, tuple(weight.shape))
    except (SparseltError, KeyError) as error:
        error_msgs.append(f"{prefix}weight: {error}")
        return
    for key in keys:
        del state_dict[key]
    state_dict[prefix + "weight"] = packed.to_dense()


def zero_block(kept: Tensor, device: str = "") -> tuple[int, int]:
    """The largest block shape that the zeros of a weight come in; (1, 1) if they do not.

    Args:
        kept: (M, ...) bool, True where a weight is kept; flattened to (M, K).
        device: "cpu" or "cuda", where the weight is to be; empty for where `kept` is.

    Returns:
        (rows, cols): at least 90 % of the zeros lie in whole zero blocks of that shape, and at
        least 90 % of what the other blocks hold is kept.

    Example:
        >>> import torch
        >>> zero_block(torch.eye(4).repeat_interleave(4, 0) > 0)
        (4, 1)
    """
    device = device or kept.device.type
    # A convolution's blocks on CUDA are of channels, under one tap each.
    matrix = (kept.flatten(2).mT if device == "cuda" and kept.dim() > 2 else kept).flatten(1)
    rows, cols = matrix.shape
    kept_count = int(matrix.sum())
    zeros = matrix.numel() - kept_count
    for block_rows, block_cols in _CUDA_BLOCKS if device == "cuda" else _BLOCKS:
        if zeros == 0 or kept_count == 0 or rows % block_rows or cols % block_cols:
            continue
        tiles = matrix.view(rows // block_rows, block_rows, cols // block_cols, block_cols)
        stored = int(tiles.any(dim=3).any(dim=1).sum()) * block_rows * block_cols
        if matrix.numel() - stored >= _WHOLE * zeros and kept_count >= _WHOLE * stored:
            return block_rows, block_cols
    return 1, 1
