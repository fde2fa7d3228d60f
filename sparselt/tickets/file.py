# SPDX-License-Identifier: Apache-2.0
"""The ticket file: one safetensors file of bitmasks, kept values and a JSON header.

A masked tensor ``n`` is stored as ``n.bitmask`` (one bit a weight, numpy's little bit order over
the flattened tensor) and ``n.values`` (the kept values in the same order), with
``n.initial_values`` where the original weights are known. Kept values that are all plus or minus
one number are stored as ``n.signs`` (one bit a kept weight) and ``n.scale`` instead, and a tensor
too dense for a bitmask to pay is stored plainly as ``n``. Everything else in the state dict is
stored plainly. Names, shapes and densities are repeated in the header and checked when reading.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from sparselt.errors import TicketFileError, explain_mismatch
from sparselt.tickets.ticket import Ticket

__all__ = [
    "FORMAT",
    "VERSION",
    "count_bits",
    "pack_bits",
    "read_ticket",
    "replace_file",
    "unpack_bits",
    "write_ticket",
]

FORMAT = "sparselt.ticket"
VERSION = "1"
_BITS_OF_BYTE = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1, np.uint8)


def pack_bits(flags: Tensor) -> Tensor:
    """One bit a flag, little bit order, over the flattened tensor.

    Args:
        flags: bool tensor of any shape with n elements.

    Returns:
        (ceil(n / 8),) uint8; unused bits of the last byte are 0.
    """
    packed = np.packbits(flags.detach().cpu().reshape(-1).numpy(), bitorder="little")
    return torch.from_numpy(packed)


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """The inverse of :func:`pack_bits`.

    Args:
        packed: (ceil(count / 8),) uint8.
        count: Number of flags.

    Returns:
        (count,) bool.

    Raises:
        TicketFileError: Wrong dtype or length, or a bit beyond ``count`` is set.
    """
    _check_bits(packed, count)
    flags = np.unpackbits(packed.cpu().numpy(), bitorder="little", count=count)
    return torch.from_numpy(flags.view(bool))


def count_bits(packed: Tensor, count: int) -> int:
    """How many flags are set; takes no memory for them.

    Args:
        packed: (ceil(count / 8),) uint8, as of :func:`pack_bits`.
        count: Number of flags.

    Raises:
        TicketFileError: As :func:`unpack_bits`.
    """
    _check_bits(packed, count)
    return int(_BITS_OF_BYTE[packed.numpy()].sum(dtype=np.int64))


def _check_bits(packed: Tensor, count: int) -> None:
    if packed.dtype is not torch.uint8 or packed.dim() != 1 or packed.numel() != (count + 7) // 8:
        raise TicketFileError(
            explain_mismatch(
                "bitmask",
                f"({(count + 7) // 8},) uint8",
                f"{tuple(packed.shape)} {packed.dtype}",
                "the file is damaged or was written by something else",
            )
        )
    if count % 8 and int(packed[-1]) >> count % 8:
        raise TicketFileError("bitmask: bits beyond the last weight are set; the file is damaged")


def replace_file(path: Path, data: bytes) -> None:
    """Writes ``data`` beside ``path`` and renames it, so that readers see the old file or the whole
    new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(beside, 0o644)
        os.replace(beside, path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise


def write_ticket(ticket: Ticket, path: Path) -> None:
    """Writes ``ticket`` to ``path``; see :meth:`sparselt.tickets.Ticket.save`."""
    parts: dict[str, Tensor] = {}
    entries: dict[str, Any] = {}
    for name, mask in ticket.masks.items():
        weight, initial = ticket.weights.get(name), ticket.initial.get(name)
        entry = {"shape": list(mask.shape), "density": _density(mask)}
        _add_masked(parts, name, mask, weight, initial)
        if weight is not None:
            entry["dtype"] = str(weight.dtype).removeprefix("torch.")
        entries[name] = entry
    for name, tensor in ticket.weights.items():
        if name not in ticket.masks:
            _add(parts, name, tensor)
    header = {
        "tensors": entries,
        "order": list(ticket.weights),
        "meta": ticket.meta,
        "sha256": _digest(parts),
    }
    try:
        text = json.dumps(header, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TicketFileError(
            f"ticket metadata: expected only what JSON can hold, got {error}; convert tensors and "
            "paths "
            "to numbers and strings"
        ) from error
    metadata = {"format": FORMAT, "version": VERSION, "sparselt": text}
    replace_file(path, safetensors.torch.save(parts, metadata=metadata))


def read_ticket(path: Path) -> Ticket:
    """Reads a ticket file written by :func:`write_ticket`, checking every part.

    Raises:
        TicketFileError: The file is truncated, altered, of another version, or inconsistent.
    """
    parts, metadata = read_safetensors(path)
    if metadata.get("format") != FORMAT:
        raise TicketFileError(
            explain_mismatch(
                f"{path}: format", FORMAT, metadata.get("format"), "use load_ticket, which sniffs"
            )
        )
    if metadata.get("version") != VERSION:
        raise TicketFileError(
            explain_mismatch(
                f"{path}: ticket version",
                VERSION,
                metadata.get("version"),
                "update sparselt to read it",
            )
        )
    header = _parse_header(path, metadata.get("sparselt", ""))
    if header["sha256"] != _digest(parts):
        raise TicketFileError(
            f"{path}: the checksum does not match; the file was altered after saving"
        )
    masks: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}
    initial: dict[str, Tensor] = {}
    for name, entry in header["tensors"].items():
        mask, weight, first = _take_masked(parts, name, tuple(entry["shape"]))
        masks[name] = mask
        if weight is not None:
            weights[name] = weight
        if first is not None:
            initial[name] = first
    weights.update(parts)
    if sorted(weights) != sorted(header["order"]):
        raise TicketFileError(
            f"{path}: the tensors are not those the header lists; the file is damaged"
        )
    ordered = {name: weights[name] for name in header["order"]}
    return Ticket(masks, ordered, initial, header["meta"])


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata of one safetensors file.

    Raises:
        TicketFileError: It is no whole safetensors file.
    """
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:
        raise TicketFileError(
            f"{path}: expected a whole safetensors file, got {error}; it may be truncated, copy "
            "it again"
        ) from error


def _add(parts: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    if name in parts:
        raise TicketFileError(
            f"tensor name {name!r} is taken by a part of another tensor; rename the layer"
        )
    parts[name] = tensor.detach().cpu().contiguous().clone()


def _add_masked(
    parts: dict[str, Tensor], name: str, mask: Tensor, weight: Tensor | None, initial: Tensor | None
) -> None:
    mask = mask.cpu()
    if weight is not None and _plain_is_smaller(mask, weight.cpu()):
        _add(parts, name, weight)
    else:
        _add(parts, f"{name}.bitmask", pack_bits(mask))
        if weight is not None:
            values = weight.cpu()[mask]
            scale = _common_magnitude(values)
            if scale is None:
                _add(parts, f"{name}.values", values)
            else:
                _add(parts, f"{name}.scale", scale)
                _add(parts, f"{name}.signs", pack_bits(values > 0))
    if initial is not None:
        _add(parts, f"{name}.initial_values", initial.cpu()[mask])


def _plain_is_smaller(mask: Tensor, weight: Tensor) -> bool:
    """Whether the dense tensor alone says the same in fewer bytes: only possible if no kept weight
    is 0.
    """
    saved = int((~mask).count_nonzero()) * weight.element_size()
    return saved <= (mask.numel() + 7) // 8 and torch.equal(mask, weight != 0)


def _common_magnitude(values: Tensor) -> Tensor | None:
    """The one magnitude all kept values share, or None; one value alone gains nothing."""
    if values.numel() < 2 or not values.is_floating_point():
        return None
    scale = values[:1].abs()
    shared = bool((values.abs() == scale).all()) and float(scale) > 0
    return scale if shared else None


def _take_masked(
    parts: dict[str, Tensor], name: str, shape: tuple[int, ...]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Removes the parts of one masked tensor and rebuilds (mask, weight, initial)."""
    weight: Tensor | None = None
    if name in parts:
        weight = parts.pop(name)
        if tuple(weight.shape) != shape:
            raise TicketFileError(explain_mismatch(f"{name}: shape", shape, tuple(weight.shape)))
        mask = weight != 0
    else:
        mask = unpack_bits(_take(parts, f"{name}.bitmask"), math.prod(shape)).reshape(shape)
        if f"{name}.signs" in parts:
            scale = _take(parts, f"{name}.scale")
            signs = unpack_bits(_take(parts, f"{name}.signs"), int(mask.count_nonzero()))
            if scale.shape != (1,):
                raise TicketFileError(
                    explain_mismatch(f"{name}.scale: shape", (1,), tuple(scale.shape))
                )
            weight = _scatter(name, mask, torch.where(signs, scale, -scale))
        elif f"{name}.values" in parts:
            weight = _scatter(name, mask, parts.pop(f"{name}.values"))
    first = parts.pop(f"{name}.initial_values", None)
    return mask, weight, None if first is None else _scatter(f"{name}, initial", mask, first)


def _take(parts: dict[str, Tensor], name: str) -> Tensor:
    if name not in parts:
        raise TicketFileError(
            f"{name} is missing from the file; it is damaged or was written by something else"
        )
    return parts.pop(name)


def _scatter(name: str, mask: Tensor, values: Tensor) -> Tensor:
    kept = int(mask.count_nonzero())
    if values.shape != (kept,):
        raise TicketFileError(
            explain_mismatch(
                f"{name}: number of kept values",
                (kept,),
                tuple(values.shape),
                "the mask and the values disagree",
            )
        )
    dense = torch.zeros(mask.shape, dtype=values.dtype)
    dense[mask] = values
    return dense


def _parse_header(path: Path, text: str) -> dict[str, Any]:
    try:
        header = json.loads(text)
        shapes = [entry["shape"] for entry in header["tensors"].values()]
        sound = (
            all(type(size) is int and size >= 0 for shape in shapes for size in shape)
            and isinstance(header["meta"], dict)
            and isinstance(header["sha256"], str)
            and all(isinstance(name, str) for name in header["order"])
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TicketFileError(
            f"{path}: the ticket header is not readable ({type(error).__name__}: {error}); the "
            "file is damaged"
        ) from error
    if not sound:
        raise TicketFileError(
            f"{path}: the ticket header has entries of the wrong type; the file is damaged"
        )
    return dict(header)


def _digest(parts: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in name order."""
    total = hashlib.sha256()
    for name in sorted(parts):
        tensor = parts[name]
        total.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        total.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _density(mask: Tensor) -> float:
    return int(mask.count_nonzero()) / mask.numel() if mask.numel() else 1.0
