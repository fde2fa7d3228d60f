# SPDX-License-Identifier: Apache-2.0
"""Engines in processes of their own, and the networks they are timed on."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sparselt.errors import DataError, OptionError
from sparselt.measure import baselines, model, networks, report
from sparselt.measure.engine import Engine
from sparselt.measure.worker import Worker, output_error


class ChangesInAnotherProcess(nn.Module):
    """Behaves in the process that made it; elsewhere adds 1, ends the process, or sleeps."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.how = how
        self.home = os.getpid()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        if os.getpid() == self.home:
            return y
        if self.how == "crashes":
            os.abort()
        if self.how == "raises":
            raise ValueError("no such luck")
        return y + 1


def test_output_error_is_relative_to_the_largest_output() -> None:
    want = (torch.tensor([1.0, -4.0], dtype=torch.float64),)
    assert output_error([torch.tensor([1.0, -3.0])], want) == 0.25
    with pytest.raises(DataError, match="shapes"):
        output_error([torch.ones(3)], want)


def test_every_engine_has_its_name_and_says_why_it_is_absent() -> None:
    for name, baseline in baselines.BASELINES.items():
        assert baseline.name == name
        assert isinstance(baseline.usable(), str)
    assert "torch_channels_last" in baselines.usable_engines([torch.ones(1, 3, 4, 4)])
    assert "torch_channels_last" not in baselines.usable_engines([torch.ones(1, 3)])


def test_folding_keeps_the_result_and_removes_batch_norm() -> None:
    network = networks.pruned_network("resnet20", density=0.2).model
    x = networks.example_inputs((3, 32, 32), 2)
    with torch.no_grad():
        folded = baselines.folded(network)
        assert torch.allclose(folded(x), network(x), atol=1e-4)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded.modules())


def test_worker_answers_mistakes_instead_of_dying() -> None:
    worker = Worker()
    assert worker.answer({"do": "dance"})["reason"].startswith("do: expected")
    assert "no engine is loaded" in worker.answer({"do": "check"})["reason"]
    absent = worker.answer({"do": "load", "engine": "x", "folder": "nowhere", "threads": 1})
    assert not absent["ok"]


def test_engine_reports_a_process_that_ends() -> None:
    with Engine("broken") as engine:
        engine._process.kill()
        answer = engine.ask({"do": "check"}, timeout=30)
        assert not answer["ok"]
        assert "SIGKILL" in answer["reason"]


def test_engine_stops_a_worker_that_does_not_answer() -> None:
    with Engine("slow") as engine:  # importing torch takes longer than this
        answer = engine.ask({"do": "check"}, timeout=0.01)
        assert "no answer within" in answer["reason"]


def test_bench_model_times_only_engines_whose_output_is_right(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5))
    networks.prune_randomly(network, 0.2)
    steps: list[str] = []
    found = model.bench_model(
        network,
        torch.randn(2, 2, 6, 6),
        ["torch_eager", "torch_channels_last"],
        rounds=4,
        samples=2,
        seconds=0.01,
        threads=1,
        progress=steps.append,
    )
    result = found.as_json()
    assert [row["status"] for row in result["rows"]] == ["ok", "ok"]
    assert all(row["error"] < 1e-5 and row["median_us"] > 0 for row in result["rows"])
    assert min(row["speedup"] for row in result["rows"]) <= 1.0
    assert found.best_dense in ("torch_eager", "torch_channels_last")
    assert result["cases"][0]["reference"] == "float64"
    assert found.machine["threads"] == 1
    # Rounds are interleaved, and each starts with another engine.
    rounds = [step for step in steps if step.startswith("round")]
    assert rounds[:4] == [
        "round 1 of 4: torch_eager",
        "round 1 of 4: torch_channels_last",
        "round 2 of 4: torch_channels_last",
        "round 2 of 4: torch_eager",
    ]
    report.write_json(tmp_path / "r.json", result)
    assert report.read_json(tmp_path / "r.json")["rows"] == json.loads(json.dumps(result["rows"]))


@pytest.mark.parametrize(
    ("how", "reason"),
    [("adds", "wrong output"), ("crashes", "SIGABRT"), ("raises", "no such luck")],
)
def test_bench_model_gives_a_failing_engine_no_figure(how: str, reason: str) -> None:
    found = model.bench_model(
        ChangesInAnotherProcess(how), torch.randn(2, 6), ["torch_eager"], rounds=1
    )
    (row,) = found.as_json()["rows"]
    assert row["status"] == "FAIL"
    assert reason in row["reason"]
    assert "median_us" not in row
    assert found.best_dense == ""


def test_bench_model_explains_what_it_cannot_hand_over() -> None:
    network = nn.Linear(2, 2)
    network.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(DataError, match="cannot be stored"):
        model.bench_model(network, torch.ones(1, 2), ["torch_eager"])
    with pytest.raises(OptionError, match="engines: expected some of"):
        model.bench_model(nn.Linear(2, 2), torch.ones(1, 2), ["fastest"])
    with pytest.raises(OptionError, match="rounds"):
        model.bench_model(nn.Linear(2, 2), torch.ones(1, 2), rounds=0)


def test_reference_falls_back_to_float32_and_says_so() -> None:
    class Single(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x @ torch.ones(2, 2)

    outputs, dtype = model.double_reference(Single(), [torch.ones(1, 2)])
    assert dtype == "float32"
    assert outputs[0].dtype == torch.float64


@pytest.mark.parametrize("name", sorted(set(networks.NETWORKS) - {"resnet50", "resnet50_dlmc"}))
def test_named_networks_have_the_density_asked_for_and_run(name: str) -> None:
    built = networks.pruned_network(name, density=0.1)
    for layer in built.model.modules():
        if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            size, count = layer.weight.numel(), int(layer.weight.count_nonzero())
            # First and depthwise convolutions stay whole.
            few = not isinstance(layer, nn.Linear) and layer.in_channels // layer.groups <= 4
            # One draw in millions of a normal is 0.
            assert abs(count - (size if few else 0.1 * size)) < 3
    with torch.no_grad():
        y = built.model(networks.example_inputs(built.shape, 2))
    assert y.shape[0] == 2
    assert torch.isfinite(y).all()


def test_real_masks_are_those_of_the_collection() -> None:
    if not os.environ.get("SPARSELT_DATA"):
        pytest.skip("SPARSELT_DATA names no folder with the Deep Learning Matrix Collection")
    model = networks.pruned_network("resnet50_dlmc", density=0.1).model
    folder = Path(os.environ["SPARSELT_DATA"]) / "dlmc" / "rn50" / "magnitude_pruning" / "0.9"
    stored = sorted(
        int(file.read_text(encoding="ascii").split("\n", 1)[0].split(",")[2])
        for file in folder.glob("*.smtx")
    )
    found = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    assert sorted(int(layer.weight.count_nonzero()) for layer in found) == stored


def test_real_masks_that_are_not_there_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPARSELT_DATA", raising=False)
    with pytest.raises(DataError, match="SPARSELT_DATA"):
        networks.pruned_network("resnet50_dlmc")


@pytest.mark.parametrize(("name", "parameters"), [("lenet", 266_610), ("resnet50", 25_557_032)])
def test_network_sizes_are_the_published_ones(name: str, parameters: int) -> None:
    built = networks.NETWORKS[name].build()
    assert sum(p.numel() for p in built.parameters()) == parameters


def test_network_comes_from_a_users_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    (tmp_path / "my_network.py").write_text(
        "from torch import nn\ndef build():\n    return nn.Linear(4, 2)\nsize = 3\n"
    )
    built = networks.pruned_network(f"{tmp_path}/my_network.py:build", (4,))
    assert isinstance(built.model, nn.Linear)
    for spec, error, text in (
        (f"{tmp_path}/my_network.py:size", OptionError, "no function or class"),
        (f"{tmp_path}/absent.py:build", DataError, "there is no file"),
        ("no.such.module:build", DataError, "cannot be imported"),
        ("nonsense", OptionError, "expected one of"),
    ):
        with pytest.raises(error, match=text):
            networks.network(spec)
    with pytest.raises(OptionError, match="shape of one input"):
        networks.pruned_network(f"{tmp_path}/my_network.py:build")
