# SPDX-License-Identifier: Apache-2.0
"""Dense linear layers of a program run by packed weights, for the numbers of rows that gain."""

from __future__ import annotations

import pytest
import torch
from networks import prune_randomly
from torch import nn

import sparselt
from sparselt import packed_rows
from sparselt.packed_rows import PackedRows, packs_rows
from sparselt.plan import DENSE

pytestmark = pytest.mark.skipif(
    not packs_rows(nn.Linear(4, 4)), reason="this torch is built without MKL"
)


class Fixed:
    """Prefers what it is told to, and counts how often it is asked."""

    is_forced = False

    def __init__(self, name: str) -> None:
        self.name, self.asked = name, 0

    def fastest(self, calls, key):
        self.asked += 1
        for call in calls.values():
            call()
        return self.name


def test_a_choice_for_a_number_of_rows_is_made_once_and_stays():
    chooser = Fixed("packed")
    packs = PackedRows(nn.Linear(24, 8), chooser)
    first = packs.packed(16)
    assert first is not None
    assert packs.packed(16) is first
    assert chooser.asked == 1


def test_plain_weights_run_where_they_are_faster_or_there_are_enough_packed_ones():
    assert PackedRows(nn.Linear(24, 8), Fixed("plain")).packed(16) is None
    packs = PackedRows(nn.Linear(24, 8), Fixed("packed"))
    assert [packs.packed(rows) is None for rows in (1, 5, 5000, 6, 7)] == [
        *(True, False, True, False, True)
    ]


def test_what_is_no_float32_linear_layer_is_not_packed():
    class Own(nn.Linear):
        pass

    for module in (nn.Conv2d(4, 4, 1), nn.Linear(4, 4).double(), Own(4, 4)):
        assert not packs_rows(module)


@pytest.mark.parametrize("bias", [True, False])
def test_a_program_runs_packed_weights_and_other_sizes_plain_ones(bias, monkeypatch):
    """A sparse layer before a dense one: both are in one native program."""
    torch.manual_seed(0)
    model = nn.Sequential(
        prune_randomly(nn.Linear(64, 64), 0.05), nn.ReLU(), nn.Linear(64, 48, bias), nn.GELU()
    )
    model[0].requires_grad_(False)
    asked = []
    faster = PackedRows._faster

    def packed_always(self, rows):
        monkeypatch.setattr(type(self.chooser), "fastest", lambda *_, **__: "packed")
        asked.append(rows)
        return faster(self, rows)

    monkeypatch.setattr(PackedRows, "_faster", packed_always)
    monkeypatch.setattr(
        "sparselt.tune.measure", lambda calls, **_: {c: i for i, c in enumerate(reversed(calls), 1)}
    )
    monkeypatch.setattr(packed_rows, "_MOST_PACKED", 1)
    monkeypatch.setattr("sparselt.tune.candidates", _only_for_pruned)
    program = sparselt.compile(model, torch.randn(4, 8, 64))
    assert [row.kernel == DENSE for row in sparselt.explain(program)] == [False, True]
    for batch in (4, 3):
        x = torch.randn(batch, 8, 64)
        want = model(x).detach()
        torch.testing.assert_close(program(x), want, rtol=1e-4, atol=1e-5)
        assert torch.equal(program(x), program(x))
    assert asked == [32]


def _only_for_pruned(facts, kernels):
    from sparselt.plan import candidates

    return candidates(facts, kernels) if facts.density < 0.5 else []
