# SPDX-License-Identifier: Apache-2.0
"""What is in a ticket or checkpoint: the `inspect` command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparselt import ops
from sparselt.measure.report import Column
from sparselt.packed import zero_block
from sparselt.plan import Facts, choose
from sparselt.tickets import Ticket, load_ticket

__all__ = ["INSPECT_COLUMNS", "inspect_file", "sizes_line", "summary"]

INSPECT_COLUMNS = (
    Column("tensor", lambda row: str(row["tensor"]), right=False),
    Column("shape", lambda row: "x".join(str(length) for length in row["shape"]), right=False),
    Column("kept", lambda row: f"{row['kept']:,}"),
    Column("density", lambda row: f"{row['density']:.2%}"),
    Column("empty rows", lambda row: f"{row['empty_rows']:,}"),
    Column("zeros in blocks", lambda row: _block(row["block"])),
    Column("kernel by rule", lambda row: str(row["kernel"]), right=False),
)

_OPS = {2: "linear", 3: "conv1d", 4: "conv2d"}


def _block(block: list[int]) -> str:
    return "no" if block == [1, 1] else f"{block[0]}x{block[1]}"


def inspect_file(path: str | Path, **hints: Any) -> dict[str, Any]:
    """Read any file that `load_ticket` reads, and describe its masked tensors.

    The kernel named for a tensor is what the pure rule would take; with example inputs,
    `sparselt.convert` measures and may choose otherwise.

    Args:
        path: a ticket, checkpoint or pattern file.
        **hints: as for `load_ticket`.

    Returns:
        {"kind": "inspect", "rows": one for each masked tensor, "density", "kept", "total",
        "tensors", "file_bytes", "dense_bytes", "has_initial", "meta"}.

    Raises:
        TicketNotFoundError: there is no such file.
        TicketFileError: it cannot be read.
    """
    path = Path(path)
    ticket = load_ticket(path, **hints)
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    rows = _rows(ticket)
    return {
        "kind": "inspect",
        "file": path.name,
        "rows": rows,
        "density": ticket.density,
        "kept": sum(row["kept"] for row in rows),
        "total": sum(row["total"] for row in rows),
        "tensors": len(ticket.weights),
        "file_bytes": sum(file.stat().st_size for file in files),
        "dense_bytes": dense_bytes(ticket),
        "has_initial": bool(ticket.initial),
        "meta": ticket.meta,
    }


def dense_bytes(ticket: Ticket) -> int:
    """Bytes of the trained network's tensors without any sparsity (masks only: as float32)."""
    if not ticket.weights:
        return sum(4 * mask.numel() for mask in ticket.masks.values())
    return sum(x.numel() * x.element_size() for x in ticket.weights.values())


def _rows(ticket: Ticket) -> list[dict[str, Any]]:
    rows = []
    for layer in ticket.layers():
        mask = ticket.masks[layer.name]
        block = zero_block(mask) if mask.ndim in _OPS else (1, 1)
        kernel = "-"
        if mask.ndim in _OPS:
            facts = Facts(_OPS[mask.ndim], layer.shape, layer.kept, block=block)
            kernel = choose(facts, ops.kernels()).kernel
        rows.append(
            {
                "tensor": layer.name,
                "shape": list(layer.shape),
                "kept": layer.kept,
                "total": layer.total,
                "density": layer.density,
                "empty_rows": int((~mask.flatten(1).any(1)).sum()) if mask.ndim > 1 else 0,
                "block": list(block),
                "kernel": kernel,
            }
        )
    return rows


def summary(result: dict[str, Any]) -> str:
    """Two or three sentences under the table."""
    lines = [
        f"{result['kept']:,} of {result['total']:,} prunable weights kept "
        f"({result['density']:.2%}) in {len(result['rows'])} tensors.",
        sizes_line(result["file_bytes"], result["dense_bytes"]),
    ]
    recipe = result["meta"].get("recipe")
    if recipe:
        lines.append(f"Found by: {recipe}.")
    started = "with" if result["has_initial"] else "without"
    lines.append(f"The file comes {started} the original weights.")
    return "\n".join(lines)


def sizes_line(file_bytes: int, dense_bytes: int) -> str:
    """How large the file is against the dense tensors.

    Example:
        >>> sizes_line(1000, 8000)
        '1.0 kB on disk; the dense network has 8.0 kB of tensors (8.0 times as much).'
    """
    times = dense_bytes / file_bytes if file_bytes else 0.0
    return (
        f"{kilobytes(file_bytes)} on disk; the dense network has {kilobytes(dense_bytes)} of "
        f"tensors ({times:.1f} times as much)."
    )


def kilobytes(count: float) -> str:
    """A size with the unit, 1 kB = 1000 bytes.

    Example:
        >>> kilobytes(12345), kilobytes(2_500_000)
        ('12.3 kB', '2.5 MB')
    """
    for unit, scale in (("kB", 1e3), ("MB", 1e6)):
        if count < 999.95 * scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 1e9:.1f} GB"
