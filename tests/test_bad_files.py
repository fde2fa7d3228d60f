# SPDX-License-Identifier: Apache-2.0
"""Files that are no tickets: each is refused by an exception of ours, and nothing in them runs."""

from __future__ import annotations

import math
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from sparselt.errors import SparseltError, TicketFileError, TicketNotFoundError
from sparselt.tickets import Ticket, load_ticket


def good_ticket() -> Ticket:
    mask = torch.rand(8, 6, generator=torch.Generator().manual_seed(0)) < 0.4
    return Ticket({"fc.weight": mask}, {"fc.weight": torch.ones(8, 6), "fc.bias": torch.ones(8)})


def ticket_bytes(path: Path) -> bytes:
    good_ticket().save(path)
    return path.read_bytes()


def with_header_length(path: Path, length: int) -> None:
    data = ticket_bytes(path)
    path.write_bytes(struct.pack("<Q", length) + data[8:])


def write_pickle_bomb(path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, (f"echo harm > {path.with_suffix('.harm')}",)

    path.write_bytes(pickle.dumps({"weight": Bomb()}, protocol=2))


def write_archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../../escape.txt", "harm")


def write_masks(path: Path, value: float) -> None:
    state = {"fc.weight_orig": torch.ones(2, 2), "fc.weight_mask": torch.full((2, 2), value)}
    torch.save(state, path)


FILES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "empty": ("t.safetensors", lambda path: path.write_bytes(b"")),
    "text": ("t.safetensors", lambda path: path.write_text("hello, this is no ticket")),
    "zeros": ("t.safetensors", lambda path: path.write_bytes(b"\0" * 4096)),
    "cut in the header": (
        "t.safetensors",
        lambda path: path.write_bytes(ticket_bytes(path)[:40]),
    ),
    "cut in the data": ("t.safetensors", lambda path: path.write_bytes(ticket_bytes(path)[:-5])),
    "longer than it says": (
        "t.safetensors",
        lambda path: path.write_bytes(ticket_bytes(path) + b"more"),
    ),
    "huge header length": ("t.safetensors", lambda path: with_header_length(path, 2**62)),
    "negative header length": ("t.safetensors", lambda path: with_header_length(path, 2**64 - 1)),
    "short header length": ("t.safetensors", lambda path: with_header_length(path, 3)),
    "header no json": (
        "t.safetensors",
        lambda path: path.write_bytes(struct.pack("<Q", 8) + b"{broken "),
    ),
    "tensor beyond the file": (
        "t.safetensors",
        lambda path: path.write_bytes(
            struct.pack("<Q", 64)
            + b'{"w":{"dtype":"F32","shape":[9,9],"data_offsets":[0,324]}}'.ljust(64)
        ),
    ),
    "tensor of no weights": (
        "t.safetensors",
        lambda path: safetensors.torch.save_file({"step": torch.tensor([3])}, path),
    ),
    "png": ("t.png", lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 64)),
    "pickle that runs code": ("model.pt", write_pickle_bomb),
    "pickle that runs code, old name": ("model.pkl", write_pickle_bomb),
    "archive with an escaping path": ("model.pt", write_archive),
    "whole module": ("model.pt", lambda path: torch.save(nn.Linear(2, 2), path)),
    "list of tensors": ("model.pt", lambda path: torch.save([torch.ones(2, 2)], path)),
    "state of numbers": ("model.pt", lambda path: torch.save({"epoch": 3}, path)),
    "cut checkpoint": (
        "model.pt",
        lambda path: (
            torch.save(nn.Linear(20, 20).state_dict(), path),
            path.write_bytes(path.read_bytes()[:500]),
        ),
    ),
    "mask of scores": ("model.pt", lambda path: write_masks(path, 0.5)),
    "mask of nan": ("model.pt", lambda path: write_masks(path, math.nan)),
    "object array": (
        "m.npz",
        lambda path: np.savez(path, weight=np.array([{"a": 1}], dtype=object)),
    ),
    "bad smtx": ("m.smtx", lambda path: path.write_text("2, 2, 9\n0 1 2\n0 1\n")),
    "empty folder": ("folder", lambda path: path.mkdir()),
}


@pytest.mark.parametrize("name", FILES)
def test_files_are_refused_and_nothing_in_them_runs(name: str, tmp_path: Path) -> None:
    file_name, write = FILES[name]
    path = tmp_path / file_name
    write(path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SparseltError) as caught:
        load_ticket(path)
    assert len(str(caught.value)) > 20
    assert sorted(tmp_path.rglob("*")) == before, "reading a file made another one"
    assert not (tmp_path.parent.parent / "escape.txt").exists()


@pytest.mark.parametrize(
    "path", ["no/such/file.safetensors", "no_such_file.pt", "", "a\0b", "x" * 5000]
)
def test_a_file_that_is_not_there_is_said_so(path: str) -> None:
    with pytest.raises((TicketNotFoundError, TicketFileError)) as caught:
        load_ticket(path)
    assert len(str(caught.value)) > 20


def test_a_ticket_that_cannot_be_saved_leaves_no_file(tmp_path: Path) -> None:
    ticket = good_ticket()
    ticket.meta["loss"] = object()
    with pytest.raises(TicketFileError, match="JSON"):
        ticket.save(tmp_path / "t.safetensors")
    assert list(tmp_path.iterdir()) == []
