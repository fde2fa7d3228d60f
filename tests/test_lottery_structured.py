# SPDX-License-Identifier: Apache-2.0
"""Channels that go together are found, and removed through everything that carries them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shrinkable import FAMILIES, REMOVABLE, Plain, Residual, X, assert_same, every_second, lively
from torch import Tensor, nn
from torch.nn import functional as F

from sparselt.errors import FormatError, OptionError
from sparselt.lottery.networks import NETWORKS, build
from sparselt.lottery.structured import (
    drop_masked,
    prune_filters,
    remove_channels,
    structured_ticket,
    zeroed,
)
from sparselt.lottery.structured_graph import Channels, trace_channels
from sparselt.tickets import load_ticket
from sparselt.tickets.architecture import Delta, shrink


@pytest.fixture(scope="module")
def traced() -> dict[str, Channels]:
    return {name: trace_channels(lively(make), X) for name, make in FAMILIES.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_channels_that_can_go_are_found(family: str, traced: dict[str, Channels]) -> None:
    found = {group.layers[0]: group.channels for group in traced[family].groups}
    assert found == REMOVABLE[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_shrunk_network_equals_the_zeroed_one(family: str, traced: dict[str, Channels]) -> None:
    model = lively(FAMILIES[family])
    delta = every_second(traced[family])
    small = remove_channels(model, delta, X).model
    with torch.no_grad():
        assert_same(small(X), zeroed(model, delta)(X))
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("name", "size"), [("resnet_20", 16), ("resnet_18", 32)])
def test_residual_networks_shrink_to_the_zeroed_ones(name: str, size: int) -> None:
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(4))
    model = lively(lambda: NETWORKS[name]((3, size, size), 10))
    shrunk = prune_filters(model, x, 0.5, scope="global")
    with torch.no_grad():
        assert_same(shrunk.model(x), zeroed(model, shrunk.delta)(x))
    # Sums keep one width: that of the identity shortcut that runs through them.
    for block in shrunk.model.blocks:
        if isinstance(block.shortcut, nn.Identity):
            assert block.conv1.in_channels == block.conv2.out_channels


@pytest.mark.parametrize("family", FAMILIES)
def test_shrunk_network_reloads_from_numbers_alone(
    family: str, traced: dict[str, Channels]
) -> None:
    small = shrink(lively(FAMILIES[family]), every_second(traced[family]))
    text = json.dumps(every_second(traced[family]).to_json())
    again = shrink(build(FAMILIES[family], 99), Delta.from_json(json.loads(text))).eval()
    again.load_state_dict(small.state_dict())
    with torch.no_grad():
        assert torch.equal(again(X), small(X))
    assert str(again) == str(small)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_choice_of_channels_keeps_the_equality(
    traced: dict[str, Channels], data: st.DataObject
) -> None:
    family = data.draw(st.sampled_from(sorted(FAMILIES)))
    groups = traced[family].groups
    kept = tuple(
        tuple(sorted(data.draw(st.sets(st.integers(0, g.channels - 1), min_size=1))))
        for g in groups
    )
    model = lively(FAMILIES[family])
    expected = zeroed(model, Delta(groups, kept))
    with torch.no_grad():
        wanted = expected(X)
        got = shrink(model, Delta(groups, kept))(X)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max() + 1))


@pytest.mark.parametrize("family", ["plain", "residual", "dense"])
def test_zero_filters_biases_and_batch_norms_equal_removed_ones(
    family: str, traced: dict[str, Channels]
) -> None:
    model, delta = lively(FAMILIES[family]), every_second(traced[family])
    with torch.no_grad():
        expected = shrink(lively(FAMILIES[family]), delta)(X)
        parameters = dict(model.named_parameters())
        for name, axes in delta.masks({n: t.shape for n, t in model.state_dict().items()}).items():
            if name in parameters and 0 in axes:
                parameters[name][~axes[0]] = 0.0
        assert_same(model(X), expected)


def test_zero_filters_alone_still_emit_a_constant(traced: dict[str, Channels]) -> None:
    model = lively(Plain)
    delta = every_second(traced["plain"])
    with torch.no_grad():
        expected = shrink(lively(Plain), delta)(X)
        for name, axes in delta.masks({n: t.shape for n, t in model.state_dict().items()}).items():
            tensor = model.get_parameter(name) if "running" not in name else None
            if tensor is not None and tensor.dim() > 1 and 0 in axes:
                tensor[~axes[0]] = 0.0
        assert not torch.allclose(model(X), expected, rtol=1e-3)


def test_training_goes_on_after_shrinking(traced: dict[str, Channels]) -> None:
    model = shrink(lively(Residual), every_second(traced["residual"])).train()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    model(X).square().mean().backward()
    optimiser.step()
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert sum(moved) > len(moved) / 2


def test_original_network_is_left_alone() -> None:
    model = lively(Plain).train()
    model.bn.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small = prune_filters(model, X, 0.5).model
    assert model.training
    assert not model.bn.training
    assert small.training
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_tied_weights_are_cut_once_and_stay_tied() -> None:
    def make() -> nn.Module:
        shared = nn.Linear(6, 6)
        return nn.Sequential(nn.Linear(4, 6), shared, nn.ReLU(), shared, nn.Linear(6, 2))

    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(2))
    small = prune_filters(build(make, 0), x, 0.5).model
    assert small[1].weight is small[3].weight
    assert small[1].weight.shape == (3, 3)


class CountsChannels(Plain):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(F.relu(self.bn(self.conv1(x))).reshape(-1, 6, 8, 8))
        return self.fc2(self.fc1(F.max_pool2d(x, 4).reshape(-1, 20)))


class Branches(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else x


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class Computed(Plain):
    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(x, self.conv1.weight * 2, padding=1))
        x = F.max_pool2d(F.relu(self.conv2(x)), 4)
        return self.fc2(self.fc1(x.flatten(1)))


def test_network_that_counts_its_channels_is_refused() -> None:
    with pytest.raises(FormatError, match="does not run without these channels"):
        prune_filters(lively(CountsChannels), X, 0.5)


def test_network_that_cannot_be_traced_is_refused() -> None:
    with pytest.raises(FormatError, match="cannot be traced"):
        prune_filters(lively(Branches), X, 0.5)


def test_network_without_removable_channels_says_why() -> None:
    with pytest.raises(FormatError, match=r"group_norm .* mixes or counts channels"):
        prune_filters(lively(Normed), X, 0.5)


def test_computed_weights_keep_their_channels_and_say_why() -> None:
    channels = trace_channels(lively(Computed), X)
    assert [group.layers[0] for group in channels.groups] == ["conv2", "fc1"]
    with pytest.raises(OptionError, match="computes with its weights"):
        prune_filters(lively(Computed), X, {"conv1": 0.5})


def test_padded_shortcuts_keep_the_number_of_channels() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 1)
            self.inner = nn.Conv2d(6, 5, 1)
            self.outer = nn.Conv2d(5, 6, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv1(x)
            x = F.pad(x, (0, 0, 0, 0, 1, 1)) + self.conv2(x)
            return x + self.outer(self.inner(F.pad(x, (1, 1, 1, 1)))[:, :, 1:-1, 1:-1])

    channels = trace_channels(lively(Padded), X)
    assert [group.layers for group in channels.groups] == [("inner",)]
    assert "adds channels" in channels.fixed["conv1"]


def test_pruned_filters_of_a_ticket_are_removed_with_their_constants() -> None:
    model, channels = lively(Residual), trace_channels(lively(Residual), X)
    masks = {n: torch.ones_like(p, dtype=torch.bool) for n, p in model.named_parameters()}
    masks["conv1.weight"][[1, 3]] = False
    masks["stem.weight"][[0, 2]] = False
    masks["conv2.weight"][[2, 4]] = False  # summed with stem: only channel 2 is gone in both
    masks["conv3.weight"][:] = False
    del masks["projection.weight"]  # never pruned, so all its channels stay
    delta = drop_masked(model, channels, masks)
    kept = dict(zip((g.layers[0] for g in delta.groups), delta.kept, strict=True))
    assert kept == {"stem": (0, 1, 3, 4, 5), "conv1": (0, 2, 4)}


def test_layer_pruned_whole_keeps_one_channel() -> None:
    model, channels = lively(Plain), trace_channels(lively(Plain), X)
    masks = {"conv1.weight": torch.zeros_like(model.conv1.weight, dtype=torch.bool)}
    assert drop_masked(model, channels, masks).kept == ((0,),)


def test_structured_ticket_survives_its_file(tmp_path: Path) -> None:
    original = lively(Residual)
    initial = {name: p.detach() for name, p in original.named_parameters() if p.dim() > 1}
    shrunk = prune_filters(lively(Residual, seed=5), X, 0.5)
    path = tmp_path / "small.ticket"
    structured_ticket(shrunk.model, shrunk.delta, initial, {"note": "half"}).save(path)
    loaded = load_ticket(path)
    delta = Delta.from_json(loaded.meta["architecture"])
    again = loaded.apply(shrink(build(Residual, 7), delta)).eval()
    with torch.no_grad():
        assert torch.equal(again(X), shrunk.model.eval()(X))
    assert loaded.meta["note"] == "half"
    assert torch.equal(loaded.initial["stem.weight"], delta.slice(initial)["stem.weight"])
    assert loaded.initial["conv1.weight"].shape == again.conv1.weight.shape
