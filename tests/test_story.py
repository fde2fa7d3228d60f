# SPDX-License-Identifier: Apache-2.0
"""One tiny story, end to end: train, prune, save the ticket, load it, run it sparse, explain it."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.utils import prune

import sparselt


def clusters(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points around ten fixed centres in 64 dimensions, and the number of each point's centre."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(10, 64, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 10, (count,), generator=generator)
    return centres[labels] + 0.7 * torch.randn(count, 64, generator=generator), labels


def trained(model: nn.Module, steps: int) -> nn.Module:
    x, labels = clusters(512, seed=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
    return model


def accuracy(call, x: torch.Tensor, labels: torch.Tensor) -> float:
    with torch.no_grad():
        return float((call(x).argmax(-1) == labels).float().mean())


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 10))


def test_a_pruned_network_runs_sparse_from_its_ticket_with_the_same_predictions(tmp_path):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = trained(network(), 40)
    for layer in (model[0], model[3]):
        prune.l1_unstructured(layer, "weight", 0.8)
    trained(model, 40).eval()
    x, labels = clusters(300, seed=2)
    dense_accuracy = accuracy(model, x, labels)
    assert dense_accuracy > 0.9

    torch.save(model.state_dict(), tmp_path / "pruned.pt")
    sparselt.load_ticket(tmp_path / "pruned.pt").save(tmp_path / "ticket.safetensors")
    saved, whole = (tmp_path / name for name in ("ticket.safetensors", "pruned.pt"))
    assert saved.stat().st_size < whole.stat().st_size / 2

    ticket = sparselt.load_ticket(saved)
    assert abs(ticket.density - 0.2) < 0.01
    fresh = network()
    ticket.apply(fresh)
    fresh.eval()
    with torch.no_grad():
        want = model(x)
        runs = {
            "converted": sparselt.convert(fresh, x, format="csr"),
            "measured": sparselt.convert(fresh, x),
            "compiled": sparselt.compile(fresh, x),
        }
        for name, run in runs.items():
            torch.testing.assert_close(run(x), want, rtol=1e-3, atol=1e-4, msg=name)
            assert accuracy(run, x, labels) == dense_accuracy
        again = copy.deepcopy(runs["converted"])
        again.load_state_dict(runs["measured"].state_dict())
        torch.testing.assert_close(again(x), want, rtol=1e-3, atol=1e-4)

    table = str(sparselt.explain(runs["converted"]))
    assert "2 of 2 layers run sparse" in table
    assert "0.200" in table
    assert [row.layer for row in sparselt.explain(runs["compiled"])] == ["0", "3"]
