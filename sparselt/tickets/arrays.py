# SPDX-License-Identifier: Apache-2.0
"""Tickets from array files: scipy's .npz, DLMC's .smtx, and folders of .npy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparselt.errors import ShapeError, TicketFileError, explain_mismatch
from sparselt.tickets.state_dicts import binary_mask
from sparselt.tickets.ticket import Ticket

__all__ = ["read_lth_folder", "read_npz", "read_smtx"]

_MAX_ELEMENTS = 2**32


def read_npz(path: Path, name: str = "weight", shape: Sequence[int] | None = None) -> Ticket:
    """One sparse matrix saved by ``scipy.sparse.save_npz``; stored zeros stay kept.

    Args:
        path: The file.
        name: What to call the tensor.
        shape: Dense shape to give it, such as (C_out, C_in, R, S); by default the matrix's own.
    """
    from scipy import sparse

    try:
        matrix = sparse.load_npz(path)
        if matrix.format not in ("csr", "csc", "bsr", "coo"):
            raise TicketFileError(
                explain_mismatch(f"{path}: format", "csr, csc, bsr or coo", matrix.format)
            )
        if matrix.format != "coo":
            matrix.check_format(full_check=True)
    except TicketFileError:
        raise
    except Exception as error:
        raise TicketFileError(
            f"{path}: expected a matrix saved by scipy.sparse.save_npz, got "
            f"{type(error).__name__}: {error}"
        ) from error
    _check_size(path, matrix.shape)
    pattern = matrix.copy()
    pattern.data = np.ones_like(pattern.data, dtype=np.float32)
    mask = torch.from_numpy(np.asarray(pattern.todense()) != 0)
    weight = torch.from_numpy(np.asarray(matrix.todense()).copy())
    target = tuple(shape) if shape is not None else tuple(weight.shape)
    _check_shape(path, target, weight.numel())
    return Ticket({name: mask.reshape(target)}, {name: weight.reshape(target)})


def read_smtx(
    path: Path, name: str = "weight", shape: Sequence[int] | None = None, seed: int = 0
) -> Ticket:
    """One pattern of the Deep Learning Matrix Collection, with values drawn from a seeded standard
    normal.

    Args:
        path: The file: ``rows, cols, nonzeros``; row offsets; column indices.
        name: What to call the tensor.
        shape: (C_out, C_in, R, S) for a convolution; its columns are read with the input channel
            fastest.
        seed: Seed of the values.
    """
    try:
        lines = path.read_text(encoding="ascii").split("\n")
        rows, cols, count = (int(word) for word in lines[0].split(","))
        offsets = np.array(lines[1].split(), dtype=np.int64)
        columns = np.array(lines[2].split() if len(lines) > 2 else [], dtype=np.int64)
    except (ValueError, IndexError, UnicodeDecodeError, OverflowError) as error:
        raise TicketFileError(
            f"{path}: expected the three lines of an .smtx file (rows, cols, nonzeros; row "
            "offsets; column "
            f"indices), got {error}"
        ) from error
    _check_size(path, (rows, cols))
    _check_csr(path, rows, cols, count, offsets, columns)
    mask = torch.zeros(rows, cols, dtype=torch.bool)
    row_of = np.repeat(np.arange(rows), np.diff(offsets))
    mask[torch.from_numpy(row_of), torch.from_numpy(columns)] = True
    if int(mask.count_nonzero()) != count:
        raise TicketFileError(f"{path}: a row names the same column twice; the file is damaged")
    target = tuple(shape) if shape is not None else (rows, cols)
    _check_shape(path, target, rows * cols)
    if len(target) == 4:
        out_channels, in_channels, height, width = target
        # (C_out, R, S, C_in) to torch's (C_out, C_in, R, S)
        mask = (
            mask.reshape(out_channels, height, width, in_channels).permute(0, 3, 1, 2).contiguous()
        )
    mask = mask.reshape(target)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(target, generator=generator)
    notes = [f"the file holds no values: drawn from a standard normal with seed {seed}"]
    return Ticket({name: mask}, {name: weight}, {}, {"notes": notes})


def read_lth_folder(path: Path) -> Ticket:
    """The folders ``masks``, ``final`` and ``initial`` of one .npy file a tensor (google-research's
    experiments).

    Two-dimensional arrays are (in, out) there and are transposed to torch's (out, in); ``layer_w``
    and ``layer_b`` become ``layer.weight`` and ``layer.bias``.
    """
    masks = {name: binary_mask(name, value) for name, value in _read_folder(path / "masks").items()}
    weights = _read_folder(path / "final") if (path / "final").is_dir() else {}
    initial = _read_folder(path / "initial") if (path / "initial").is_dir() else {}
    for name in masks:
        if weights and name not in weights:
            raise TicketFileError(
                explain_mismatch(f"{path}/final", f"an array for the mask {name}", sorted(weights))
            )
    kept = {name: value for name, value in initial.items() if name in masks}
    return Ticket(masks, weights, kept)


def _read_folder(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.npy"))
    if not files:
        raise TicketFileError(explain_mismatch(str(folder), "one .npy file a tensor", "none"))
    return {_torch_name(file.stem): _read_npy(file) for file in files}


def _read_npy(file: Path) -> Tensor:
    try:
        array = np.load(file, allow_pickle=False)
        return torch.from_numpy(np.ascontiguousarray(array.T if array.ndim == 2 else array))
    except Exception as error:
        raise TicketFileError(f"{file}: expected a plain .npy array, got {error}") from error


def _torch_name(stem: str) -> str:
    for ending, tensor in (("_w", ".weight"), ("_b", ".bias")):
        if stem.endswith(ending):
            return stem.removesuffix(ending) + tensor
    return stem


def _check_csr(
    path: Path, rows: int, cols: int, count: int, offsets: np.ndarray, columns: np.ndarray
) -> None:
    claims: Mapping[str, bool] = {
        f"{rows + 1} row offsets": offsets.shape == (rows + 1,),
        f"{count} column indices": columns.shape == (count,),
    }
    for claim, holds in claims.items():
        if not holds:
            raise TicketFileError(
                explain_mismatch(str(path), claim, "another number; the file is truncated")
            )
    if offsets[0] != 0 or offsets[-1] != count or (np.diff(offsets) < 0).any():
        raise TicketFileError(
            f"{path}: row offsets must rise from 0 to {count}; the file is damaged"
        )
    if count and (columns.min() < 0 or columns.max() >= cols):
        raise TicketFileError(
            f"{path}: column indices must lie in 0..{cols - 1}; the file is damaged"
        )


def _check_size(path: Path, shape: Sequence[int]) -> None:
    if min(shape) < 0 or math.prod(shape) > _MAX_ELEMENTS:
        raise TicketFileError(
            explain_mismatch(f"{path}: matrix", f"at most {_MAX_ELEMENTS} elements", tuple(shape))
        )


def _check_shape(path: Path, shape: Sequence[int], numel: int) -> None:
    if math.prod(shape) != numel or min(shape, default=1) < 0:
        raise ShapeError(
            explain_mismatch(f"{path}: shape hint", f"a shape of {numel} elements", tuple(shape))
        )
