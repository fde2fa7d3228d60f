# SPDX-License-Identifier: Apache-2.0
"""The network as planned is measured as a whole, and dense wins where it is faster."""

from __future__ import annotations

import pytest
import torch
from networks import input_for, make, prune_randomly

import sparselt
from sparselt.plan import DENSE
from sparselt.tune_cache import cache_folder


def favour(monkeypatch, whole, layer_us=1.5):
    """Each layer is measured faster sparse, `layer_us` dense against little more than 1; of the two
    whole networks, the one that is named. There is no third one with prepacked weights.
    """
    torch.set_num_threads(1)
    monkeypatch.setattr("sparselt.family.prepack", lambda *_: None)
    monkeypatch.setattr("sparselt.tune.glance", lambda *_: None)

    def measure(calls, **_):
        if "planned" in calls:
            return {name: 1.0 if name == whole else 2.0 for name in calls}
        return {name: layer_us if name == DENSE else 1 + i / 100 for i, name in enumerate(calls)}

    monkeypatch.setattr("sparselt.tune.measure", measure)


@pytest.mark.parametrize("whole", ["planned", "all dense"])
def test_the_faster_whole_runs_and_the_explanation_says_so(monkeypatch, whole):
    favour(monkeypatch, whole)
    model = make("residual")
    program = sparselt.compile(model, input_for("residual", 2))
    explanation = sparselt.explain(program)
    dense = {row.kernel == DENSE for row in explanation}
    note = explanation.notes[0]
    if whole == "planned":
        assert dense == {False}
        assert note == "the whole network was measured too: planned 1 us, all dense 2 us"
    else:
        assert dense == {True}
        assert note == "the whole network runs dense: planned 2 us, all dense 1 us"
        assert explanation[0].reason.startswith("stays dense: the whole network measured")
        assert all(parameter.numel() for parameter in program._prepared.parameters())
    for batch in (1, 2, 9):
        x = input_for("residual", batch)
        torch.testing.assert_close(program(x), model(x).detach(), rtol=1e-3, atol=1e-4)


def test_a_network_whose_layers_gain_clearly_is_not_measured_again(monkeypatch):
    favour(monkeypatch, "all dense", layer_us=3.0)
    program = sparselt.compile(make("residual"), input_for("residual", 2))
    explanation = sparselt.explain(program)
    assert {row.kernel == DENSE for row in explanation} == {False}
    assert not [note for note in explanation.notes if "whole" in note]


@pytest.mark.parametrize(("disturbed", "notes"), [(1, 0), (99, 1)])
def test_disturbed_layers_are_timed_once_more_and_leave_the_whole_in_doubt(
    monkeypatch, disturbed, notes
):
    favour(monkeypatch, "all dense", layer_us=3.0)
    settled = []

    def is_settled(_):
        settled.append(len(settled) >= disturbed)
        return settled[-1]

    monkeypatch.setattr("sparselt.tune.is_settled", is_settled)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU())
    program = sparselt.compile(prune_randomly(model, 0.1), torch.ones(2, 64))
    # The last is of the whole network.
    assert len(settled) == 2 + notes
    assert len([note for note in sparselt.explain(program).notes if "whole" in note]) == notes


def test_a_network_without_sparse_layers_is_not_measured_twice(monkeypatch):
    favour(monkeypatch, "all dense")
    program = sparselt.compile(torch.nn.Linear(8, 8), torch.ones(2, 8))
    assert not [note for note in sparselt.explain(program).notes if "whole" in note]


@pytest.mark.parametrize("whole", ["planned", "all dense"])
def test_the_next_process_makes_the_same_choice_without_timing_it(monkeypatch, whole):
    favour(monkeypatch, whole)
    first = sparselt.explain(sparselt.compile(make("residual"), input_for("residual", 2)))
    favour(monkeypatch, "planned" if whole == "all dense" else "all dense")
    again = sparselt.explain(sparselt.compile(make("residual"), input_for("residual", 2)))
    assert again.notes == first.notes
    assert [row.kernel for row in again] == [row.kernel for row in first]


def test_other_sizes_and_weights_and_a_spoilt_entry_are_chosen_for_anew(monkeypatch):
    favour(monkeypatch, "all dense")

    def is_dense(batch=2, density=0.1):
        model = prune_randomly(make("residual"), density)
        rows = sparselt.explain(sparselt.compile(model, input_for("residual", batch)))
        return {row.kernel for row in rows} == {DENSE}

    assert is_dense()
    favour(monkeypatch, "planned")
    assert is_dense()
    assert not is_dense(batch=3)
    assert not is_dense(density=0.05)
    folder = cache_folder()
    assert folder is not None
    for path in folder.glob("*.json"):
        path.write_text(path.read_text().replace('"all dense": 1.0', '"all dense": "fast"'))
    assert not is_dense()
