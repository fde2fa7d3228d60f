# SPDX-License-Identifier: Apache-2.0
"""Compiled networks are at most twice as far from float64 as torch's own float32 is."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import nn

from sparselt import cli
from sparselt.measure import architectures, networks
from sparselt.measure.accuracy import accuracy
from sparselt.plan import DENSE

# The networks of the table, narrow and on small images: the same graphs, in a moment.
SMALL: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "lenet": (architectures.lenet, (784,)),
    "mlp": (lambda: architectures.mlp(512), (1024,)),
    "resnet20": (architectures.resnet20, (3, 32, 32)),
    "vgg19": (lambda: architectures.vgg19(16), (3, 32, 32)),
    "resnet50": (lambda: architectures.resnet50(16), (3, 64, 64)),
    "mobilenet": (lambda: architectures.mobilenet(16), (3, 64, 64)),
    "resnet18": (lambda: architectures.resnet18(16), (3, 64, 64)),
    "wide_resnet": (lambda: architectures.wide_resnet(32), (3, 32, 32)),
    "signal": (lambda: architectures.signal(32), (1, 2000)),
    "vit": (lambda: architectures.vit(128, 2, 64), (3, 64, 64)),
    "uneven": (lambda: architectures.uneven(32), (3, 35, 33)),
}
BATCHES = (1, 3, 16)


@pytest.fixture
def sparse_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever may run sparse does: the first sparse candidate of each layer measures fastest."""

    def measure(calls, **_):
        return {name: 100.0 if name in (DENSE, "all dense") else 1.0 for name in calls}

    monkeypatch.setattr("sparselt.tune.measure", measure)
    torch.set_num_threads(1)  # the results are the same, and tests run beside each other


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.usefixtures("sparse_is_faster")
def test_error_is_at_most_twice_torchs(name: str) -> None:
    build, shape = SMALL[name]
    built = networks.pruned_network(networks.Network(build, shape), density=0.1)
    rows = accuracy(built.model, networks.example_inputs(shape, 16), BATCHES)
    assert [row["batch"] for row in rows] == list(BATCHES)
    assert [row["ratio"] for row in rows if row["status"] != "ok"] == []
    layers = sum(isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d)) for m in built.model.modules())
    # All but first, depthwise and patch convolutions, and layers with nothing to skip.
    assert rows[0]["sparse"] >= layers // 3


@pytest.mark.usefixtures("sparse_is_faster")
def test_error_with_real_masks_is_at_most_twice_torchs() -> None:
    if not networks.has_real_masks():
        data = os.environ.get("SPARSELT_DATA", "")
        pytest.skip(f"SPARSELT_DATA={data!r} holds no matrices of the DLMC")
    built = networks.pruned_network("resnet50_dlmc", density=0.1)
    rows = accuracy(built.model, networks.example_inputs((3, 64, 64), 6), (1, 3))
    assert [row["ratio"] for row in rows if row["status"] != "ok"] == []
    assert rows[0]["sparse"] >= 50


def test_a_result_that_is_further_off_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that loses four bits of every output is found out."""
    layer, images = nn.Linear(64, 32), torch.randn(8, 64)

    def lossy(model: nn.Module, _: object) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: (model(x).view(torch.int32) & ~15).view(torch.float32)

    monkeypatch.setattr("sparselt.explain", lambda program: [])
    monkeypatch.setattr("sparselt.compile", lambda model, _: model)
    assert accuracy(layer, images, (2,))[0]["status"] == "ok"
    monkeypatch.setattr("sparselt.compile", lossy)
    (row,) = accuracy(layer, images, (2,))
    assert row["status"] == "FAIL"
    assert row["ratio"] > 2


def test_the_command_checks_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "model", "all", "--check", "--only", "lenet", "--quick"]
    assert cli.main(words) == 0
    assert capsys.readouterr().out.count(" ok") == 3
