# SPDX-License-Identifier: Apache-2.0
"""Scores every array of a folder in batches, and writes one line of CSV for each.

    python examples/score_folder.py FOLDER [--program FILE] [--batch 64] [--out scores.csv]

A folder of *.npy files of shape (3, 32, 32), float32. Without a program's file (`Program.save`), a
made-up network is used; a folder that does not exist is filled with made-up arrays.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import sparselt
from sparselt.program import Program

SHAPE = (3, 32, 32)


def made_up_program() -> Program:
    """A small convolutional network with 90 % zeros."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    for layer in model:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.weight.data.mul_(torch.rand_like(layer.weight) < 0.1)
    return sparselt.compile(model, torch.randn(64, *SHAPE))


def batches(files: list[Path], size: int) -> Iterator[tuple[list[Path], Tensor]]:
    """Names and stacked arrays, `size` at a time; the last batch may be smaller."""
    for start in range(0, len(files), size):
        chosen = files[start : start + size]
        arrays = [np.load(file, allow_pickle=False) for file in chosen]
        wrong = [file for file, a in zip(chosen, arrays, strict=True) if a.shape != SHAPE]
        if wrong:
            raise SystemExit(f"{wrong[0]}: expected shape {SHAPE}")
        yield chosen, torch.from_numpy(np.stack(arrays).astype(np.float32))


def main(arguments: list[str] | None = None) -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="of *.npy files")
    parser.add_argument("--program", type=Path, help="a file of Program.save")
    parser.add_argument("--batch", type=int, default=64, help="arrays in a call (64)")
    parser.add_argument("--out", type=Path, default=Path("scores.csv"), help="scores.csv")
    options = parser.parse_args(arguments)
    if not options.folder.exists():
        options.folder.mkdir(parents=True)
        for i, array in enumerate(np.random.default_rng(0).normal(size=(150, *SHAPE))):
            np.save(options.folder / f"{i:03}.npy", array.astype(np.float32))
    program = sparselt.load_program(options.program) if options.program else made_up_program()
    files = sorted(options.folder.glob("*.npy"))
    with options.out.open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["file", "class", "score"])
        for chosen, x in batches(files, options.batch):
            scores, classes = program(x).softmax(1).max(1)
            rows = zip(chosen, classes.tolist(), scores.tolist(), strict=True)
            lines.writerows([name.name, best, f"{score:.4f}"] for name, best, score in rows)
    print(f"scored {len(files)} arrays, see {options.out}")


if __name__ == "__main__":
    main()
