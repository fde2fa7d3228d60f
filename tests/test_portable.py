# SPDX-License-Identifier: Apache-2.0
"""A compiled program goes through one file without pickle; damaged files are refused."""

from __future__ import annotations

import json
import operator
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from networks import NETWORKS, input_for, make
from torch import fx, nn
from torch.utils import _pytree as pytree

import sparselt
from sparselt import portable
from sparselt.errors import OptionError, ProgramFileError, ShapeError, TicketFileError
from sparselt.graph_text import GraphTextError, read_graph, read_structure, text_of
from sparselt.plan import DENSE
from sparselt.tickets.file import read_safetensors

CAPTURED = [name for name in NETWORKS if name != "branching"]


@pytest.fixture(autouse=True)
def one_thread(fixed_threads, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(
        "sparselt.tune.measure",
        lambda calls, **_: {c: 100.0 if c == DENSE else float(i) for i, c in enumerate(calls)},
    )


def saved(path: Path, name: str = "residual") -> tuple[nn.Module, Path]:
    model, file = make(name), path / f"{name}.safetensors"
    sparselt.compile(model, input_for(name, 2)).save(file)
    return model, file


def assert_same(got: object, want: object) -> None:
    for a, b in zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("name", CAPTURED)
def test_a_loaded_program_computes_what_the_model_does(tmp_path, name):
    model, file = saved(tmp_path, name)
    program = sparselt.load_program(file)
    with torch.no_grad():
        for batch in (2, 1, 5, 17):
            x = input_for(name, batch)
            assert_same(program(x.clone()), model(x.clone()))


def test_the_saved_choices_run_on_the_same_machine_and_are_made_anew_elsewhere(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("SPARSELT_CACHE", "0")
    _, file = saved(tmp_path)
    timed = []
    monkeypatch.setattr(
        "sparselt.tune.measure",
        lambda calls, **_: timed.append(calls) or {c: 1.0 + (c != DENSE) for c in calls},
    )
    same = sparselt.load_program(file)
    assert not timed
    assert DENSE not in {row.kernel for row in sparselt.explain(same)}
    monkeypatch.setattr(portable, "machine", lambda: {"cpu": "another one"})
    other = sparselt.load_program(file)
    assert timed
    assert {row.kernel for row in sparselt.explain(other)} == {DENSE}
    x = input_for("residual", 3)
    assert_same(same(x), other(x))


def test_the_file_is_smaller_than_the_dense_weights(tmp_path):
    model, file = saved(tmp_path)
    dense = safetensors.torch.save(model.state_dict())
    assert file.stat().st_size < 0.7 * len(dense) + 30_000


def test_another_process_loads_it_without_the_models_code(tmp_path):
    model, file = saved(tmp_path)
    x = input_for("residual", 3)
    safetensors.torch.save_file({"x": x}, tmp_path / "x.safetensors")
    code = (
        "import sys, pickle, safetensors.torch as s, torch, sparselt; torch.set_num_threads(1)\n"
        "sparselt.compile\n"
        "def refuse(*a, **k): raise SystemExit('unpickled')\n"
        "pickle.load = pickle.loads = torch.load = refuse\n"
        "program = sparselt.load_program(sys.argv[1])\n"
        "y = program(s.load_file(sys.argv[2])['x'])\n"
        "s.save_file({'y': y.clone()}, sys.argv[3])"
    )
    paths = [str(file), str(tmp_path / "x.safetensors"), str(tmp_path / "y.safetensors")]
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same(safetensors.torch.load_file(paths[2])["y"], model(x).detach())


def test_a_loaded_program_can_be_saved_again(tmp_path):
    model, file = saved(tmp_path, "encoder")
    again = tmp_path / "again.safetensors"
    sparselt.load_program(file).save(again)
    x = input_for("encoder", 3)
    assert_same(sparselt.load_program(again)(x), model(x))


def test_sizes_beyond_the_saved_graphs_are_refused_and_those_once_run_are_not(tmp_path):
    model, file = saved(tmp_path)
    with pytest.raises(ShapeError, match="compile the model"):
        sparselt.load_program(file)(torch.randn(2, 3, 20, 20))
    program = sparselt.compile(model, input_for("residual", 2))
    x = torch.randn(2, 3, 20, 20)
    program(x)
    program.save(file)
    loaded = sparselt.load_program(file)
    assert_same(loaded(x), model(x).detach())
    y = input_for("residual", 7)
    assert_same(loaded(y), model(y).detach())
    with pytest.raises(ShapeError):
        loaded(torch.randn(2, 3, 21, 20))


def test_what_was_not_captured_cannot_be_saved(tmp_path):
    program = sparselt.compile(make("branching"), torch.ones(2, 32))
    with pytest.raises(OptionError, match="no graph to save"):
        program.save(tmp_path / "p.safetensors")
    assert not list(tmp_path.iterdir())


def test_an_operation_that_is_not_listed_is_refused_by_name(tmp_path):
    class Odd(nn.Module):
        def forward(self, x):
            return torch.fft.fft(x).real

    program = sparselt.compile(Odd(), torch.ones(2, 8))
    with pytest.raises(OptionError, match=r"fft.* is not among those"):
        program.save(tmp_path / "p.safetensors")
    assert not list(tmp_path.iterdir())


def rewritten(file: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """The file with a changed header and a checksum that fits."""
    parts, metadata = read_safetensors(file)
    header = json.loads(metadata["sparselt"])
    change(header)
    text = json.dumps(header)
    metadata |= {"sparselt": text, "sha256": portable._digest(text, parts)}
    file.write_bytes(safetensors.torch.save(parts, metadata=metadata))
    return file


def call(graph: dict[str, Any]) -> dict[str, Any]:
    return next(line for line in graph["nodes"] if line["op"] not in ("placeholder", "output"))


HOSTILE: dict[str, Callable[[dict[str, Any]], object]] = {
    "system call": lambda h: call(h["graphs"][0]).update(op="os.system"),
    "file operator": lambda h: call(h["graphs"][0]).update(op="aten.from_file.default"),
    "attribute": lambda h: call(h["graphs"][0]).update(op="aten.__class__.default"),
    "overload": lambda h: call(h["graphs"][0]).update(op="aten.relu.__init__"),
    "keyword": lambda h: call(h["graphs"][0]).update(kwargs={"x=print(1)": 1}),
    "later node": lambda h: call(h["graphs"][0]).update(args={"tuple": [{"node": 10**6}]}),
    "wrong arguments": lambda h: call(h["graphs"][0]).update(args={"tuple": ["a", "b"]}),
    "string arithmetic": lambda h: call(h["graphs"][0]).update(
        op="operator.mul", args={"tuple": ["a", 10**12]}, kwargs={}
    ),
    "no result": lambda h: h["graphs"][0]["nodes"].pop(),
    "no graphs": lambda h: h.update(graphs=[]),
    "graphs no list": lambda h: h.update(graphs=3),
    "negative size": lambda h: h["tensors"][0].update(shape=[-1]),
    "other size": lambda h: h["tensors"][0].update(shape=[7]),
    "huge size": lambda h: h["tensors"][0].update(shape=[2**40, 2**20]),
    "type": lambda h: h["tensors"][0].update(dtype="object"),
    "missing tensor": lambda h: h["tensors"].append({"shape": [1], "dtype": "float32"}),
    "constant beyond": lambda h: h["graphs"][0]["constants"].append(10**6),
    "bool constant": lambda h: h["graphs"][0].update(constants=[True]),
    "kernel": lambda h: h["graphs"][0]["plans"][0][1].update(
        {k: {**v, "kernel": "nonesuch"} for k, v in h["graphs"][0]["plans"][0][1].items()}
    ),
    "kernel of another format": lambda h: h["graphs"][0]["plans"][0][1].update(
        {k: {**v, "kernel": "csr_spmm_scalar"} for k, v in h["graphs"][0]["plans"][0][1].items()}
    ),
    "structure": lambda h: h["graphs"][0].update(output={"set": [None]}),
    "never run": lambda h: h["graphs"][0].update(seen=[]),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_headers_are_refused(tmp_path, what):
    _, file = saved(tmp_path)
    with pytest.raises(ProgramFileError, match=re.escape(str(file))):
        sparselt.load_program(rewritten(file, HOSTILE[what]))


@pytest.mark.parametrize("samples", [-1, 2, 17, 10**30, 1.0, True, "16", None, [1]], ids=str)
def test_samples_at_a_time_that_no_program_runs_are_refused(tmp_path, samples):
    _, file = saved(tmp_path)
    rewritten(file, lambda h: operator.setitem(h["graphs"][0]["plans"][0], 2, samples))
    with pytest.raises(ProgramFileError, match=r"tensors: samples at a time: expected 0 .*, got"):
        sparselt.load_program(file)


def test_truncated_and_altered_files_are_refused(tmp_path):
    _, file = saved(tmp_path)
    data = file.read_bytes()
    for length in (0, 7, 8, 100, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:length])
        with pytest.raises(ProgramFileError):
            sparselt.load_program(file)
    for place in (-1, -500, 3000):
        changed = bytearray(data)
        changed[place] ^= 1
        file.write_bytes(changed)
        with pytest.raises(ProgramFileError):
            sparselt.load_program(file)
    with pytest.raises(ProgramFileError, match="no such file"):
        sparselt.load_program(tmp_path / "absent.safetensors")


def test_a_ticket_is_no_program(tmp_path):
    mask = torch.ones(4, 4, dtype=torch.bool)
    sparselt.Ticket({"w": mask}, {"w": torch.ones(4, 4)}).save(tmp_path / "t.safetensors")
    with pytest.raises(ProgramFileError, match=r"sparselt\.program"):
        sparselt.load_program(tmp_path / "t.safetensors")
    with pytest.raises(TicketFileError, match=r"use sparselt\.load_program"):
        sparselt.load_ticket(saved(tmp_path)[1])


def test_names_of_a_file_never_reach_the_source_of_a_graph():
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(torch.ops.aten.relu.default, (x,)),))
    lines = text_of(graph)
    lines[0]["name"] = lines[1]["name"] = "print('harm')"
    assert "harm" not in read_graph(lines, 1).code
    with pytest.raises(GraphTextError):
        read_graph(lines, 2)
    with pytest.raises(GraphTextError):
        read_structure(nested(100))


def nested(depth: int) -> Any:
    return None if depth == 0 else {"list": [nested(depth - 1)]}
