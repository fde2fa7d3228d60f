# SPDX-License-Identifier: Apache-2.0
"""Units of pruning: blocks all kept or all pruned, exact counts, ragged edges, N of M."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lottery_cases import RECIPE, blobs, one_thread, run_ladder  # noqa: F401
from torch import nn

from sparselt import errors
from sparselt.lottery import Recipe, find_ticket
from sparselt.lottery.masks import Group, groups_at, prune
from sparselt.lottery.structures import Blocks, parse_structure


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 5),
    cols=st.integers(0, 5),
    shape=st.sampled_from([(7, 3), (8, 2, 3), (5, 3, 2, 2), (16, 16), (1, 1)]),
    seed=st.integers(0, 99),
)
def test_blocks_are_all_kept_or_all_pruned_and_ragged_edges_are_accounted(
    rows: int, cols: int, shape: tuple[int, ...], seed: int
) -> None:
    blocks = Blocks(rows, cols)
    generator = torch.Generator().manual_seed(seed)
    height, width = blocks.grid(shape)
    kept = torch.rand(height * width, generator=generator) < 0.5

    mask = blocks.spread(kept, shape)

    assert mask.shape == shape
    assert torch.equal(blocks.collapse(mask), kept)
    matrix = mask.reshape(shape[0], -1)
    step = cols or matrix.shape[1]
    for i in range(height):
        for j in range(width):
            block = matrix[i * rows : (i + 1) * rows, j * step : (j + 1) * step]
            assert block.all() if kept[i * width + j] else not block.any()


def test_a_blocks_score_is_the_mean_of_what_it_holds() -> None:
    scores = torch.tensor([[1.0, 2.0, 6.0], [3.0, 4.0, 8.0], [5.0, 7.0, 9.0]])

    assert Blocks(2, 2).pool(scores).tolist() == [2.5, 7.0, 6.0, 9.0]
    assert Blocks(1, 0).pool(scores).tolist() == [3.0, 5.0, 7.0]


@pytest.mark.parametrize("text", ["4x1", "8x1", "16x1", "16x16", "32x32", "1x4", "filter"])
def test_a_ladder_of_blocks_keeps_exact_numbers_of_whole_blocks(text: str) -> None:
    structure = parse_structure(text)
    scores = {"w": torch.rand(70, 9, 3, 3, generator=torch.Generator().manual_seed(0))}

    steps = run_ladder(scores, Recipe(rate=0.3, levels=3), structure)

    height, width = structure.grid((70, 9, 3, 3))
    for level, masks in enumerate(steps):
        kept = structure.collapse(masks["w"])
        assert torch.equal(structure.spread(kept, (70, 9, 3, 3)), masks["w"])
        assert int(kept.sum()) == round(height * width * 0.7**level)


def test_rounding_never_prunes_a_layer_whole() -> None:
    blocks, small = Blocks(16, 1), (16, 1, 3, 3)
    assert [blocks.count([small], 0.2**level, level) for level in range(5)] == [9, 2, 1, 1, 1]
    assert blocks.count([small], 0.0, 1) == 0


@pytest.mark.parametrize("text", ["2:4", "1:4", "4:8", "1:2"])
@pytest.mark.parametrize("shape", [(6, 16), (6, 16, 3, 3), (5, 10), (4, 1, 5, 5)])
def test_n_of_m_keeps_the_n_largest_of_every_m_input_channels(
    text: str, shape: tuple[int, ...]
) -> None:
    n, m = (int(word) for word in text.split(":"))
    scores = {"w": torch.rand(shape, generator=torch.Generator().manual_seed(0))}

    steps = run_ladder(scores, Recipe(levels=m), parse_structure(text))

    for level, masks in enumerate(steps):
        kept = max(n, m - level)
        lanes = masks["w"].movedim(1, -1).reshape(-1, shape[1])
        values = scores["w"].movedim(1, -1).reshape(-1, shape[1])
        for lane, value in zip(lanes, values, strict=True):
            for start in range(0, shape[1], m):
                group, score = lane[start : start + m], value[start : start + m]
                assert int(group.sum()) == min(kept, len(group))
                if group.any() and not group.all():
                    assert score[group].min() > score[~group].max()


def test_n_of_m_leaves_layers_of_rate_zero_dense() -> None:
    masks = {name: torch.ones(4, 8, dtype=torch.bool) for name in ("a", "b")}
    structure = parse_structure("2:4")
    groups = groups_at({"a": 0.2, "b": 0.0}, masks, Recipe(), 2, structure)

    assert [group.keep for group in groups] == [16, 32]


def test_n_of_m_refuses_counts_that_are_not_whole_groups() -> None:
    masks = {"w": torch.ones(4, 8, dtype=torch.bool)}
    with pytest.raises(errors.OptionError, match="2:4"):
        prune({"w": torch.rand(4, 8)}, masks, [Group(("w",), 15)], parse_structure("2:4"))


@pytest.mark.parametrize(
    "text", ["4:2", "0:4", "2:", "0x4", "4", "x", "4x", "rows", "-1x2", "4x1x1"]
)
def test_malformed_structures_are_refused(text: str) -> None:
    with pytest.raises(errors.OptionError, match="structure"):
        parse_structure(text)


def test_a_criterion_of_many_steps_serves_n_of_m_in_a_search() -> None:
    recipe = replace(RECIPE, iterations=2, levels=2, structure="2:4", criterion="synflow")
    make = lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))  # noqa: E731

    ticket = find_ticket(make, blobs(), recipe)

    assert ticket.masks["0.weight"].sum(1).tolist() == [4] * 8
    assert ticket.masks["2.weight"].sum(1).tolist() == [4] * 3
