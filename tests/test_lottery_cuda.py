# SPDX-License-Identifier: Apache-2.0
"""Searches on a CUDA device: the same masks from the same weights, and weights that stay zero."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lottery_cases import RECIPE, blobs, network

from sparselt.lottery import run_levels
from sparselt.lottery.masks import Group, prune
from sparselt.lottery.structures import parse_structure

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("text", ["1x1", "4x1", "2:4"])
def test_equal_scores_give_equal_masks_on_both_devices(text: str) -> None:
    structure = parse_structure(text)
    scores = {
        "w": torch.randint(0, 5, (32, 64), generator=torch.Generator().manual_seed(0)).float()
    }
    masks = {"w": torch.ones(32, 64, dtype=torch.bool)}
    groups = [Group(("w",), structure.count([(32, 64)], 0.5, 2))]

    on_cpu = prune(scores, masks, groups, structure)
    on_cuda = prune({"w": scores["w"].cuda()}, masks, groups, structure)

    assert torch.equal(on_cpu["w"], on_cuda["w"])


def test_a_search_on_cuda_starts_from_the_same_weights_and_keeps_the_counts() -> None:
    recipe = replace(RECIPE, rewind=5)
    options = {"controls": ("reinit", "shuffle")}
    on_cpu = list(run_levels(network, blobs(), recipe, **options))
    on_cuda = list(run_levels(network, blobs(), recipe, device="cuda", **options))

    for a, b in zip(on_cpu, on_cuda, strict=True):
        assert a.density == b.density
        for name, mask in b.ticket.masks.items():
            assert mask.device.type == "cpu"
            assert not b.ticket.weights[name][~mask].any()
    first = on_cuda[0].ticket
    for name, value in on_cpu[0].ticket.initial.items():
        assert torch.equal(first.initial[name], value)
