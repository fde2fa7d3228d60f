# SPDX-License-Identifier: Apache-2.0
"""The registry of ticket file formats and ``load_ticket``, which sniffs.

To add a format, write ``accepts(path)`` (cheap, never raises on foreign files) and ``read(path,
hints)``, and add one line to ``LOADERS``; the first loader that accepts a file reads it.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparselt.errors import (
    OptionError,
    SparseltError,
    TicketFileError,
    TicketNotFoundError,
    explain_mismatch,
)
from sparselt.tickets import arrays
from sparselt.tickets.file import FORMAT, read_safetensors, read_ticket
from sparselt.tickets.state_dicts import (
    binary_mask,
    is_mask_file,
    tensors_of,
    ticket_from_state_dict,
)
from sparselt.tickets.ticket import Ticket

__all__ = ["LOADERS", "Loader", "load_ticket"]

Hints = Mapping[str, Any]


@dataclass(frozen=True)
class Loader:
    """One file format.

    Attributes:
        accepts: Whether a path looks like this format.
        read: Reads it, given the caller's hints.
        hints: Names of the hints it understands.
    """

    accepts: Callable[[Path], bool]
    read: Callable[[Path, Hints], Ticket]
    hints: tuple[str, ...] = ()


def load_ticket(path: str | Path, **hints: Any) -> Ticket:
    """Reads a ticket from any file or folder of a format in ``LOADERS``. Nothing is ever unpickled.

    Args:
        path: A sparselt ticket, a torch state dict (.pt, .pth), safetensors (plain or
            compressed-tensors), a folder of safetensors, scipy's .npz, DLMC's .smtx, or a folder of
            .npy masks.
        **hints: What the file does not say. ``format``: name of a loader, instead of sniffing.
            ``model``, ``initial``: file with the trained and the original weights of a mask file.
            ``keep_fraction``: of an edge-popup checkpoint. ``name``, ``shape``, ``seed``: of a
            single matrix.

    Returns:
        The ticket; ``meta["source"]`` names the file, its format and its SHA-256 unless it is a
        sparselt ticket.

    Raises:
        TicketNotFoundError: There is no such file.
        TicketFileError: The file is damaged, hostile, or of no known format.
        OptionError: A hint the format does not understand.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"fc.weight": torch.eye(4)}, f"{folder}/pruned.pt")
        ...     load_ticket(f"{folder}/pruned.pt").density
        0.25
    """
    path = Path(path)
    if not os.path.exists(path):  # unlike Path.exists, False for a name that cannot be one
        raise TicketNotFoundError(f"{path}: there is no such file; check the path")
    name, loader = _pick(path, hints.pop("format", None))
    unknown = sorted(set(hints) - set(loader.hints))
    if unknown:
        raise OptionError(
            explain_mismatch(
                f"hints for {name}", loader.hints or "none", unknown, "leave the others out"
            )
        )
    try:
        ticket = loader.read(path, hints)
    except SparseltError:
        raise
    except Exception as error:
        raise TicketFileError(
            f"{path}: could not be read as {name} ({type(error).__name__}: {error}); it may be "
            "damaged"
        ) from error
    if name == "sparselt":
        return ticket
    source = {"file": path.name, "format": name, "sha256": _file_hash(path)}
    return replace(ticket, meta={**ticket.meta, "source": source})


def _pick(path: Path, wanted: str | None) -> tuple[str, Loader]:
    if wanted is not None:
        if wanted not in LOADERS:
            raise OptionError(explain_mismatch("format", f"one of {', '.join(LOADERS)}", wanted))
        return wanted, LOADERS[wanted]
    for name, loader in LOADERS.items():
        if loader.accepts(path):
            return name, loader
    raise TicketFileError(
        explain_mismatch(
            str(path),
            f"one of the formats {', '.join(LOADERS)}",
            "none of them",
            "save the network with torch.save(model.state_dict(), path)",
        )
    )


def _read_torch(path: Path, hints: Hints) -> Ticket:
    state = tensors_of(_load_weights_only(path))
    model, initial = hints.get("model"), hints.get("initial")
    if is_mask_file(state):
        masks = {name: binary_mask(name, value) for name, value in state.items()}
        weights = tensors_of(_load_weights_only(Path(model))) if model is not None else {}
        ticket = ticket_from_state_dict(weights, masks)
    elif model is not None:
        raise OptionError(
            f"{path}: the hint model is for files of masks, and this one holds weights"
        )
    else:
        ticket = ticket_from_state_dict(state, keep_fraction=hints.get("keep_fraction"))
    if initial is None:
        return ticket
    first = tensors_of(_load_weights_only(Path(initial)))
    return replace(ticket, initial={name: first[name] for name in ticket.masks if name in first})


def _load_weights_only(path: Path) -> object:
    if not os.path.exists(path):  # unlike Path.exists, False for a name that cannot be one
        raise TicketNotFoundError(f"{path}: there is no such file; check the path")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise TicketFileError(
            f"{path}: refused, because reading it would run code stored in the file, as in a "
            "whole pickled model "
            f"({reason}); load it where you trust it and save model.state_dict() instead"
        ) from error
    except Exception as error:
        raise TicketFileError(
            f"{path}: expected a file written by torch.save, got {type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no detail'}; it may be truncated, "
            "copy it again"
        ) from error


def _read_safetensors(path: Path, hints: Hints) -> Ticket:
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    state: dict[str, Tensor] = {}
    for file in files:
        tensors, metadata = read_safetensors(file)
        if metadata.get("format") == "sparselt.program":
            raise TicketFileError(
                f"{file}: expected weights or a ticket, got a compiled program; use "
                "sparselt.load_program, which runs it"
            )
        state.update(tensors)
    return ticket_from_state_dict(tensors_of(state), keep_fraction=hints.get("keep_fraction"))


def _is_sparselt(path: Path) -> bool:
    # The header may be long, but our metadata names the format; the name alone is enough to sniff
    # by.
    return _is_safetensors(path) and f'"{FORMAT}"'.encode() in _header(path)


def _is_safetensors(path: Path) -> bool:
    return path.is_file() and (path.suffix == ".safetensors" or _header(path).startswith(b"{"))


def _header(path: Path) -> bytes:
    """The JSON header of a safetensors file, or nothing."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return file.read(size) if size <= min(path.stat().st_size, 100_000_000) else b""


def _is_torch(path: Path) -> bool:
    if not path.is_file():
        return False
    names = _zip_names(path)
    if names:
        return any(name.endswith("data.pkl") for name in names)
    with path.open("rb") as file:
        return path.suffix in (".pt", ".pth", ".bin", ".ckpt", ".tar") or file.read(1) == b"\x80"


def _is_npz(path: Path) -> bool:
    return path.suffix == ".npz" or any(name.endswith(".npy") for name in _zip_names(path))


def _zip_names(path: Path) -> list[str]:
    if not path.is_file() or not zipfile.is_zipfile(path):
        return []
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError):
        return []


def _file_hash(path: Path) -> str:
    total = hashlib.sha256()
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    for file in files:
        with file.open("rb") as opened:
            while chunk := opened.read(1 << 20):
                total.update(chunk)
    return total.hexdigest()


LOADERS: dict[str, Loader] = {
    "sparselt": Loader(_is_sparselt, lambda path, hints: read_ticket(path)),
    "safetensors": Loader(_is_safetensors, _read_safetensors, ("keep_fraction",)),
    "torch": Loader(_is_torch, _read_torch, ("model", "initial", "keep_fraction")),
    "npz": Loader(_is_npz, lambda path, hints: arrays.read_npz(path, **hints), ("name", "shape")),
    "smtx": Loader(
        lambda path: path.suffix == ".smtx",
        lambda path, hints: arrays.read_smtx(path, **hints),
        ("name", "shape", "seed"),
    ),
    "lth-folder": Loader(
        lambda path: (path / "masks").is_dir(), lambda path, hints: arrays.read_lth_folder(path)
    ),
    "safetensors-folder": Loader(
        lambda path: path.is_dir() and any(path.glob("*.safetensors")),
        _read_safetensors,
        ("keep_fraction",),
    ),
}
