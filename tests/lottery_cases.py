# SPDX-License-Identifier: Apache-2.0
"""The tiny problem, network and recipe that the lottery tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from sparselt.lottery import Data, Recipe
from sparselt.lottery.masks import groups_at, prune
from sparselt.lottery.structures import Blocks

ONE = Blocks(1, 1)
Masks = dict[str, Tensor]

RECIPE = Recipe(
    network="tiny",
    data="blobs",
    lr=0.02,
    batch=16,
    iterations=30,
    evaluate_every=10,
    levels=3,
    rate=0.4,
)


class KilledError(Exception):
    """Stands for a process that is killed."""


def blobs(seed: int = 0) -> Data:
    """Three overlapping Gaussian clouds in 6 dimensions: 60 + 30 + 30 points."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(120) % 3
    x = torch.randn(120, 6, generator=generator)
    x[:, :3] += 2.0 * torch.eye(3)[y]
    return Data((x[:60], y[:60]), (x[60:90], y[60:90]), (x[90:], y[90:]), classes=3)


def network(dropout: float = 0.0) -> nn.Sequential:
    """96 + 48 prunable weights, with batch normalisation between."""
    return nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 3)
    )


def run_ladder(scores: dict[str, Tensor], recipe: Recipe, structure: Blocks = ONE) -> list[Masks]:
    """Masks of every level, the scores staying the same."""
    masks = {name: torch.ones(score.shape, dtype=torch.bool) for name, score in scores.items()}
    rates = dict.fromkeys(scores, recipe.rate)
    result = [masks]
    for level in range(1, recipe.levels + 1):
        masks = prune(scores, masks, groups_at(rates, masks, recipe, level, structure), structure)
        result.append(masks)
    return result


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny layers gain nothing from threads and wait long for them on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
