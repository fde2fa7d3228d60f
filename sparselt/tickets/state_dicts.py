# SPDX-License-Identifier: Apache-2.0
"""From a state dict, in any of the conventions in use, to a ticket.

Conventions read, in this order; the first that gives a mask for a tensor wins:

* ``torch.nn.utils.prune``: ``X_orig`` and ``X_mask``;
* weight and mask side by side: ``X`` and ``X_mask``;
* ``torch.ao.pruning``: ``M.parametrizations.X.original`` and ``M.parametrizations.X.0.mask``;
* open_lth's pruned models: ``mask_M___X``;
* hidden-networks: ``M.weight`` and ``M.scores``, with an explicit ``keep_fraction``;
* compressed-tensors' sparse bitmask: ``P.shape``, ``P.bitmask``, ``P.compressed``;
* torch's sparse layouts, where the stored positions are the mask;
* plain weights, where exact zeros are taken as pruned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparselt.errors import FormatError, ShapeError, TicketFileError, explain_mismatch
from sparselt.tickets.ticket import Ticket

__all__ = ["binary_mask", "is_mask_file", "tensors_of", "ticket_from_state_dict"]

_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")


def tensors_of(loaded: object) -> dict[str, Tensor]:
    """The named tensors of a loaded file: unwraps checkpoints, drops other entries, strips wrapper
    prefixes.

    Args:
        loaded: A state dict, or a checkpoint that holds one under ``state_dict``,
            ``model_state_dict`` or ``model``.

    Raises:
        TicketFileError: There is no dictionary of named tensors inside.
    """
    inner = loaded
    if isinstance(inner, Mapping):
        for key in _WRAPPERS:
            if isinstance(inner.get(key), Mapping):
                inner = inner[key]
                break
    if isinstance(inner, Mapping):
        state = {name: value for name, value in inner.items() if isinstance(value, Tensor)}
        if state and all(isinstance(name, str) for name in state):
            return _strip(state)
    raise TicketFileError(
        explain_mismatch(
            "checkpoint",
            "a dictionary of named tensors",
            type(loaded).__name__,
            "save model.state_dict()",
        )
    )


def ticket_from_state_dict(
    state: Mapping[str, Tensor],
    masks: Mapping[str, Tensor] | None = None,
    keep_fraction: float | None = None,
) -> Ticket:
    """Builds a ticket from a state dict in any convention of this module.

    Args:
        state: Named tensors.
        masks: Masks by tensor name, where they live apart; without it they are looked for in
            ``state``.
        keep_fraction: Fraction of each layer that an edge-popup network keeps; needed if there are
            scores.

    Returns:
        A ticket whose ``meta["notes"]`` says what a reader should know, for example that kept zeros
        cannot be told from pruned ones.

    Raises:
        FormatError: A mask is not made of zeros and ones, or ``keep_fraction`` is missing or out of
            range.
        ShapeError: A mask and its weight differ in shape.

    Example:
        >>> state = {"fc.weight": torch.tensor([[0.0, 2.0]]), "fc.bias": torch.zeros(1)}
        >>> ticket_from_state_dict(state).density
        0.5
    """
    weights = dict(state)
    found: dict[str, Tensor] = {}
    if masks is not None:
        found = {name: binary_mask(name, mask) for name, mask in masks.items()}
    else:
        _take_torch_prune(weights, found)
        _take_parametrizations(weights, found)
        _take_open_lth(weights, found)
        _take_scores(weights, found, keep_fraction)
        _take_bitmasks(weights, found)
    _densify(weights, found)
    notes: list[str] = []
    if not found:
        found = {name: value != 0 for name, value in weights.items() if _prunable(name, value)}
        notes.append(
            "no masks in the file: exact zeros were taken as pruned, kept zeros cannot be told "
            "apart"
        )
    _check(weights, found, notes)
    return Ticket(found, weights, {}, {"notes": notes})


def binary_mask(name: str, mask: Tensor) -> Tensor:
    """``mask`` as bool, provided that it holds nothing but zeros and ones.

    Raises:
        FormatError: Another value, NaN included, is in it.
    """
    dense = mask.to_dense() if mask.layout is not torch.strided else mask
    if dense.dtype is torch.bool:
        return dense
    kept = dense == 1
    if not bool((kept | (dense == 0)).all()):
        raise FormatError(
            explain_mismatch(
                f"mask of {name}", "only 0 and 1", "other values", "threshold it before saving"
            )
        )
    return kept


def is_mask_file(state: Mapping[str, Tensor]) -> bool:
    """Whether every tensor is an integer or bool tensor of zeros and ones, as in open_lth's
    ``mask.pth``.
    """
    return all(
        not value.is_floating_point()
        and not value.is_complex()
        and value.dim() > 0
        and bool(((value == 0) | (value == 1)).all())
        for value in state.values()
    )


def _strip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _PREFIXES * 2:
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return {name.replace("._orig_mod.", "."): value for name, value in state.items()}


def _take_torch_prune(weights: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """``X_orig`` with ``X_mask``, or ``X`` with ``X_mask``."""
    for key in [name for name in weights if name.endswith("_mask")]:
        name = key.removesuffix("_mask")
        if f"{name}_orig" in weights:
            weights[name] = weights.pop(f"{name}_orig")
        elif name not in weights:
            continue
        found[name] = binary_mask(name, weights.pop(key))


def _take_parametrizations(weights: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    marker, ending = ".parametrizations.", ".original"
    for key in [name for name in weights if marker in name and name.endswith(ending)]:
        stem = key.removesuffix(ending)
        module, tensor = stem.split(marker, 1)
        mask = weights.pop(f"{stem}.0.mask", None)
        if mask is None:
            continue
        name = f"{module}.{tensor}"
        weights[name] = weights.pop(key)
        found[name] = binary_mask(name, mask)


def _take_open_lth(weights: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    keys = [name for name in weights if name.startswith("mask_") and "___" in name]
    for key in keys:
        name = key.removeprefix("mask_").replace("___", ".")
        found[name] = binary_mask(name, weights.pop(key))
    if keys and all(name.startswith("model.") for name in weights):
        for key in list(weights):
            weights[key.removeprefix("model.")] = weights.pop(key)


def _take_scores(
    weights: dict[str, Tensor], found: dict[str, Tensor], keep_fraction: float | None
) -> None:
    """Edge-popup: the largest scores of each layer decide; ties go to the later position."""
    for key in [name for name in weights if name.endswith(".scores")]:
        name = key.removesuffix("scores") + "weight"
        if name not in weights or weights[name].shape != weights[key].shape:
            continue
        if keep_fraction is None or not 0 <= keep_fraction <= 1:
            raise FormatError(
                explain_mismatch(
                    "keep_fraction",
                    "a number from 0 to 1",
                    keep_fraction,
                    f"{key} holds scores, and the file does not say which share of them is kept",
                )
            )
        scores = weights.pop(key).abs().reshape(-1)
        dropped = int((1 - keep_fraction) * scores.numel())
        mask = torch.ones(scores.numel(), dtype=torch.bool)
        mask[torch.argsort(scores, stable=True)[:dropped]] = False
        found[name] = mask.reshape(weights[name].shape)


def _take_bitmasks(weights: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """compressed-tensors' sparse-bitmask: rows x ceil(cols / 8) bytes, little bit order along the
    last axis.
    """
    for key in [name for name in weights if name.endswith(".bitmask")]:
        stem = key.removesuffix(".bitmask")
        if not {f"{stem}.shape", f"{stem}.compressed"} <= set(weights):
            continue
        bits, values = weights.pop(key), weights.pop(f"{stem}.compressed").reshape(-1)
        shape = tuple(int(size) for size in weights.pop(f"{stem}.shape").reshape(-1).tolist())
        weights.pop(f"{stem}.row_offsets", None)
        name = stem if stem.endswith(("weight", "bias")) else f"{stem}.weight"
        mask = _unpack_rows(name, bits, shape)
        if int(mask.count_nonzero()) != values.numel():
            raise TicketFileError(
                explain_mismatch(
                    f"{name}: number of values",
                    int(mask.count_nonzero()),
                    values.numel(),
                    "the file is damaged",
                )
            )
        dense = torch.zeros(shape, dtype=values.dtype)
        dense[mask] = values
        weights[name], found[name] = dense, mask


def _unpack_rows(name: str, bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    columns = shape[-1] if shape else 1
    rows = math.prod(shape[:-1])
    width = (columns + 7) // 8
    if min(shape, default=0) < 0 or bits.dtype is not torch.uint8 or bits.numel() != rows * width:
        raise TicketFileError(
            explain_mismatch(
                f"{name}: bitmask",
                f"{rows} x {width} uint8 for shape {shape}",
                f"{tuple(bits.shape)} {bits.dtype}",
                "the file is damaged",
            )
        )
    flags = np.unpackbits(bits.numpy().reshape(rows, width), axis=-1, bitorder="little")
    return torch.from_numpy(flags[:, :columns].astype(bool)).reshape(shape)


def _densify(weights: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    for name, value in list(weights.items()):
        if value.layout is torch.strided:
            continue
        weights[name] = value.to_dense()
        if name not in found:
            found[name] = _stored(value).to_dense() != 0


def _stored(value: Tensor) -> Tensor:
    """The same sparse layout with every stored value replaced by 1."""
    if value.layout is torch.sparse_coo:
        value = value.coalesce()
        return torch.sparse_coo_tensor(
            value.indices(), torch.ones_like(value.values()), value.shape
        )
    rows, columns = (
        (value.crow_indices(), value.col_indices())
        if value.layout in (torch.sparse_csr, torch.sparse_bsr)
        else (value.ccol_indices(), value.row_indices())
    )
    ones = torch.ones_like(value.values())
    return torch.sparse_compressed_tensor(
        rows, columns, ones, value.shape, layout=value.layout, check_invariants=True
    )


def _prunable(name: str, value: Tensor) -> bool:
    return name.endswith("weight") and value.dim() >= 2 and value.is_floating_point()


def _check(weights: Mapping[str, Tensor], found: Mapping[str, Tensor], notes: list[str]) -> None:
    """Refuses masks that do not fit; notes what is legal and yet worth knowing."""
    packed = [name for name in weights if name.endswith(".crow_indices")]
    if packed:
        raise FormatError(
            explain_mismatch(
                packed[0],
                "dense weights or masks",
                "the packed weights of a converted model",
                "their dense shapes are not in the file; load the ticket it was converted from",
            )
        )
    if not found:
        raise FormatError(
            explain_mismatch(
                "state dict",
                "at least one weight of two or more dimensions, or masks",
                sorted(weights)[:4],
            )
        )
    for name, mask in found.items():
        if weights and name not in weights:
            raise FormatError(explain_mismatch(f"mask of {name}", "a weight of that name", "none"))
        weight: Any = weights.get(name)
        if weight is None:
            continue
        if weight.shape != mask.shape:
            raise ShapeError(
                explain_mismatch(f"mask of {name}", tuple(weight.shape), tuple(mask.shape))
            )
        _note(notes, name, "kept weights that are 0.0", mask & (weight == 0))
        _note(notes, name, "nonzero weights under the mask, now 0.0", ~mask & (weight != 0))
        _note(notes, name, "NaN", weight.isnan() & mask)
        if mask.numel() and not mask.any():
            notes.append(f"{name}: no weight is kept")


def _note(notes: list[str], name: str, what: str, where: Tensor) -> None:
    count = int(where.count_nonzero())
    if count:
        notes.append(f"{name}: {count} {what}")
