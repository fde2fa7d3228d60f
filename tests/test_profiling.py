# SPDX-License-Identifier: Apache-2.0
"""The profile of a run accounts for all of its time, and can be looked at in a trace viewer."""

from __future__ import annotations

import json

import pytest
import torch
from networks import input_for, make

import sparselt
from sparselt.errors import OptionError
from sparselt.plan import DENSE


@pytest.fixture(autouse=True)
def one_thread(fixed_threads, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(
        "sparselt.tune.measure",
        lambda calls, **_: {c: 100.0 if c == DENSE else float(i) for i, c in enumerate(calls)},
    )


def test_the_rows_are_the_layers_the_rest_of_the_graph_and_what_is_between():
    program = sparselt.compile(make("residual"), input_for("residual", 2))
    profile = program.profile(input_for("residual", 4), runs=3)
    layers = [row for row in profile if row.nonzeros is not None]
    assert [row.layer for row in layers] == [row.layer for row in sparselt.explain(program)]
    assert {row.layer for row in profile} - {row.layer for row in layers} == {
        "(adaptive_avg_pool2d)",
        "(between)",
    }
    assert sum(row.us for row in profile) == pytest.approx(profile.total_us)
    assert sum(row.share for row in profile) == pytest.approx(1.0)
    assert all(row.us > 0 for row in profile)


def test_operations_are_counted_by_kept_weights_and_by_all():
    model = make("residual")
    program = sparselt.compile(model, input_for("residual", 2))
    row = program.profile(input_for("residual", 3), runs=2)[0]
    kept = int(model[0].weight.count_nonzero())
    columns = 3 * 17 * 15
    assert row.nonzeros == kept
    assert row.gflops == pytest.approx(2e-3 * kept * columns / row.us)
    assert row.dense_gflops == pytest.approx(2e-3 * model[0].weight.numel() * columns / row.us)


def test_the_table_and_the_trace_tell_the_same_run(tmp_path):
    program = sparselt.compile(make("encoder"), input_for("encoder", 2))
    profile = program.profile(input_for("encoder", 2), runs=2)
    table = str(profile)
    assert all(row.layer in table for row in profile)
    assert f"{profile.total_us:.0f} us in all" in table
    file = tmp_path / "new" / "trace.json"
    profile.save_trace(file)
    events = json.loads(file.read_text())["traceEvents"]
    assert {event["name"] for event in events} == {row.layer for row in profile[:-1]}
    assert all(event["ph"] == "X" and event["dur"] >= 0 for event in events)
    spent = sum(event["dur"] for event in events)
    assert spent == pytest.approx(profile.total_us - profile[-1].us)
    assert events[-1]["ts"] + events[-1]["dur"] <= profile.total_us
    assert json.loads(json.dumps(profile.to_dict()))["total_us"] == profile.total_us


def test_what_runs_layer_by_layer_is_profiled_too():
    program = sparselt.compile(make("branching"), torch.ones(2, 32))
    profile = program.profile(torch.ones(2, 32), runs=2)
    assert [row.layer for row in profile] == ["left", "right", "(between)"]
    assert profile[0].us > 0
    assert profile[1].us == 0
    assert sum(row.us for row in profile) == pytest.approx(profile.total_us)


def test_at_least_one_run_is_wanted():
    program = sparselt.compile(torch.nn.Linear(2, 2), torch.ones(1, 2))
    with pytest.raises(OptionError, match="at least 1"):
        program.profile(torch.ones(1, 2), runs=0)
