# SPDX-License-Identifier: Apache-2.0
"""Networks that run dense with prepacked weights give torch's results, however they are built."""

from __future__ import annotations

import pytest
import torch
from networks import NETWORKS, input_for, make
from torch import Tensor, nn
from torch.nn import functional as F

import sparselt
from sparselt.measure import architectures
from sparselt.measure.networks import prune_randomly

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch is built without oneDNN"
)


@pytest.fixture(autouse=True)
def prepacked_wins(monkeypatch):
    """Every layer is dense, and of whole networks the one with prepacked weights is faster."""
    torch.set_num_threads(1)
    monkeypatch.setattr("sparselt.tune.glance", lambda *_: None)

    def measure(calls, **_):
        first = "prepacked" if "prepacked" in calls else next(iter(calls))
        return {name: 1.0 if name == first else 2.0 for name in calls}

    monkeypatch.setattr("sparselt.tune.measure", measure)


def planned_of(program):
    """What the program runs, size by size."""
    return [p for family in program._families for p in family.planned.values()]


def check(model, x, tolerance=1e-5):
    """Compiles, and compares with the model in float64; the program and what it runs."""
    program = sparselt.compile(model, x)
    got, want = program(x), model.double()(x.double()).detach()
    model.float()
    assert got.dtype == x.dtype
    assert got.is_contiguous() == model(x).is_contiguous()
    assert (got - want).abs().max() <= tolerance * max(1.0, float(want.abs().max()))
    (planned,) = planned_of(program)
    assert planned.prepacked
    return program, planned


class Ends(nn.Module):
    """Convolutions with all that may follow one, and readers that want contiguous images."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, 1, 1) for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.convs[0](x))
        y = F.silu(self.convs[1](x))
        y = F.hardswish(self.convs[2](y)) + F.relu6(self.convs[3](y) + x)
        y = F.gelu(self.convs[4](y), approximate="tanh") * torch.sigmoid(self.convs[5](y))
        y = torch.clamp(self.convs[6](y), min=-0.5) + F.gelu(self.convs[7](x))
        batch, channels, height, width = y.shape
        y = y.view(batch, 2, channels // 2, height, width).transpose(1, 2)
        return y.reshape(batch, channels, height, width)


class Geometry(nn.Module):
    """Groups, one a channel too, strides, dilation, paddings by name, and a map as the result."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(8, 16, 3, (2, 1), 1, groups=4)
        self.depthwise = nn.Conv2d(16, 16, (5, 3), 1, (2, 3), (1, 3), groups=16)
        self.same = nn.Conv2d(16, 16, (2, 4), padding="same")
        self.valid = nn.Conv2d(16, 8, (3, 2), padding="valid", bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.depthwise(self.grouped(x)))
        return self.valid(F.pad(self.same(x), (1, 0, 0, 2)))


class Shared(nn.Module):
    """Sums whose operands are read afterwards, so that none may be overwritten."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, 1, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        first = self.convs[0](x)
        second = F.relu(self.convs[1](x) + first)
        seen = first.flatten(1)
        third = F.relu(self.convs[2](second) + x)
        fourth = self.convs[3](third) + second
        return torch.cat([fourth, second, third], 1).flatten(1) + seen.repeat(1, 3)


@pytest.mark.parametrize("made", [Ends, Geometry, Shared])
@pytest.mark.parametrize("batch", [1, 3])
def test_what_follows_and_surrounds_a_layer_is_computed_as_in_torch(made, batch):
    torch.manual_seed(0)
    check(made().eval(), torch.randn(batch, 8, 9, 11))


def test_a_classifier_rounds_as_torch_does():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 2048, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000)
    ).eval()
    x = torch.rand(16, 3, 4, 4)
    program, _ = check(model, x)
    own, got = model(x), program(x)
    exact = model.double()(x.double())
    torch_error, error = ((y - exact).square().mean().sqrt() for y in (own, got))
    assert error <= 1.5 * torch_error


@pytest.mark.parametrize("name", ["residual", "separable", "perceptron", "encoder"])
def test_networks_of_all_kinds_run_prepacked_at_any_size(name):
    model = make(name)
    program = sparselt.compile(model, input_for(name, 2))
    other = NETWORKS[name][2]
    inputs = [input_for(name, batch) for batch in (1, 2, 5)]
    inputs += [input_for(name, 3, other)] if other else []
    for x in inputs:
        with torch.inference_mode():
            torch.testing.assert_close(program(x), model(x), rtol=1e-3, atol=1e-4)
    assert planned_of(program)[0].prepacked
    notes = " ".join(sparselt.explain(program).notes)
    assert "the whole network runs dense" in notes
    assert "prepacked 1 us" in notes


@pytest.mark.parametrize("name", ["resnet18", "wide_resnet", "mobilenet", "vit", "uneven"])
def test_images_are_converted_once(name):
    torch.manual_seed(0)
    build = getattr(architectures, name)
    model = prune_randomly(
        build(width=64, depth=1, size=32) if name == "vit" else build(width=8), 1
    )
    _, planned = check(model, torch.randn(2, 3, 32, 32), tolerance=1e-4)
    assert planned.lowered.others["contiguous"] == 1


def test_a_matrix_times_one_row_is_left_to_torch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
    for rows, prepacked in ((1, False), (2, True)):
        x = torch.randn(rows, 32)
        program = sparselt.compile(model, x)
        assert [planned.prepacked for planned in planned_of(program)] == [prepacked]
        torch.testing.assert_close(program(x), model(x).detach())


def test_batch_sizes_share_prepacked_weights():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    program = sparselt.compile(model, torch.randn(2, 3, 9, 9))
    weights = dict(program._families[0].prepacked_weights)
    program(torch.randn(20, 3, 9, 9))
    assert [planned.prepacked for planned in planned_of(program)] == [True, True]
    assert len(weights) == 2
    again = program._families[0].prepacked_weights
    assert all(again[name] is weight for name, weight in weights.items())


def test_a_tensor_changed_in_place_that_others_read_stays_with_torch():
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            y.flatten(1).mul_(2.0)
            return y + 1

    torch.manual_seed(0)
    model, x = Changing().eval(), torch.randn(2, 3, 8, 8)
    program = sparselt.compile(model, x)
    torch.testing.assert_close(program(x), model(x).detach())
    assert [planned.prepacked for planned in planned_of(program)] == [False]


def test_autocast_and_other_layouts_compute_as_torch_does():
    model, x = make("residual"), input_for("residual", 2)
    program = sparselt.compile(model, x)
    last = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(program(last), model(x).detach(), rtol=1e-3, atol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = program(x), model(x).detach()
    assert got.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.05 * float(want.abs().max()))


def test_a_saved_program_runs_prepacked_again_without_a_clock(tmp_path, monkeypatch):
    model, x = make("residual"), input_for("residual", 2)
    program = sparselt.compile(model, x)
    program.save(tmp_path / "program.safetensors")
    monkeypatch.setattr("sparselt.tune.measure", lambda *_, **__: pytest.fail("timed again"))
    loaded = sparselt.load_program(tmp_path / "program.safetensors")
    assert [planned.prepacked for planned in planned_of(loaded)] == [True]
    assert torch.equal(loaded(x), program(x))


def test_without_onednn_networks_run_as_before(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    program = sparselt.compile(make("residual"), input_for("residual", 2))
    assert [planned.prepacked for planned in planned_of(program)] == [False]
