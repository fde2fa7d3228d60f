# SPDX-License-Identifier: Apache-2.0
"""Units that never fire are reported, and removed without changing the outputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparselt.errors import DataError, FormatError
from sparselt.lottery.dead_units import idle_channels, relu_activity, remove_idle
from sparselt.lottery.networks import build
from sparselt.lottery.structured import shrunk_ticket
from sparselt.tickets import Ticket, load_ticket
from sparselt.tickets.architecture import Delta, shrink


def inputs(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Small(nn.Module):
    """Convolutions with a residual sum, a flatten and a hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.hidden = nn.Linear(6 * 4, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = torch.relu(x + self.conv2(x))
        x = F.max_pool2d(x, 4).flatten(1)
        return self.last(self.hidden(x).relu())


def killed(*units: int) -> nn.Module:
    """A network whose hidden units ``units`` never fire, and all others do."""
    model = build(Small, 0).eval()
    with torch.no_grad():
        for bias in (model.bn1.bias, model.conv2.bias):
            bias.fill_(2.0)
        model.hidden.bias.fill_(50.0)
        model.hidden.bias[list(units)] = -1e4
    return model


def test_activity_by_hand() -> None:
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU())
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, -1.0], [0.0, 1.0]]))
    # Rows give (1, -1, 0), (2, -5, 3): unit 1 never fires, three of six outputs are above 0.
    rows = [torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 3.0]])]
    (activity,) = relu_activity(model, rows)
    assert (activity.name, activity.units, activity.dead) == ("1", 3, (1,))
    assert activity.density == pytest.approx(3 / 6)


def test_every_spelling_of_relu_is_seen_once() -> None:
    class Spelt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ReLU(inplace=True)
            self.six = nn.ReLU6()

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(x) - 1
            x = torch.relu(x) - 1
            x = self.six(self.inner(x) - 1) - 1
            return F.relu(x.clone(), inplace=True) + x.clone().relu_()

    found = relu_activity(Spelt(), [inputs(4, 5)])
    assert [row.name for row in found] == ["", "#2", "inner", "six", "#3", "#4"]


def test_channels_of_images_are_counted_over_all_pixels_and_batches() -> None:
    x = torch.zeros(2, 3, 2, 2) - 1
    x[1, 2, 0, 1] = 5.0
    y = torch.zeros(1, 3, 2, 2)
    y[0, 0, 1, 1] = 1.0
    (activity,) = relu_activity(nn.ReLU(), [x, y])
    assert (activity.units, activity.dead) == (3, (1,))
    assert activity.density == pytest.approx(2 / 36)


def test_report_leaves_no_hook_and_the_mode_as_it_was() -> None:
    model = killed(1).train()
    model.bn1.eval()
    relu_activity(model, [inputs(2, 2, 8, 8)])
    idle_channels(model, [inputs(2, 2, 8, 8)])
    assert model.training
    assert not model.bn1.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_failing_network_leaves_no_hook_behind() -> None:
    model = killed(1)
    with pytest.raises(RuntimeError):
        relu_activity(model, [inputs(2, 9, 8, 8)])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_no_data_is_refused() -> None:
    with pytest.raises(DataError, match="at least one"):
        relu_activity(nn.ReLU(), [])
    with pytest.raises(DataError, match="at least one"):
        idle_channels(killed(1), [])


def test_dead_units_are_removed_and_outputs_stay() -> None:
    model, batches = killed(0, 3, 7), [inputs(5, 2, 8, 8), inputs(3, 2, 8, 8, seed=4)]
    rows = {row.name: row for row in relu_activity(model, batches)}
    assert rows["#3"].dead == (0, 3, 7)
    shrunk = remove_idle(model, batches)
    assert shrunk.model.hidden.out_features == 5
    assert shrunk.model.last.in_features == 5
    with torch.no_grad():
        for x in batches:
            torch.testing.assert_close(shrunk.model(x), model(x), rtol=1e-6, atol=1e-6)


def test_dead_channel_of_a_sum_goes_only_if_nothing_reads_it() -> None:
    model = build(Small, 0).eval()
    batches = [inputs(6, 2, 8, 8)]
    with torch.no_grad():
        model.bn1.bias[[1, 2]] = -1e4  # the first ReLU never fires there
        model.conv2.bias[2] = -1e4  # nor the second here
        model.conv2.bias[1] = 1.0
    shrunk = remove_idle(model, batches)
    kept = dict(zip((g.layers[0] for g in shrunk.delta.groups), shrunk.delta.kept, strict=True))
    assert kept["conv1"] == (0, 1, 3, 4, 5)
    assert shrunk.model.hidden.in_features == 5 * 4
    with torch.no_grad():
        torch.testing.assert_close(
            shrunk.model(batches[0]), model(batches[0]), rtol=1e-6, atol=1e-6
        )


def test_unit_that_fires_in_any_batch_stays() -> None:
    model = build(lambda: nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1)), 0)
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        model[0].bias.zero_()
    positive, negative = torch.ones(2, 1), -torch.ones(2, 1)
    assert idle_channels(model, [positive]).kept == ((0,),)
    assert idle_channels(model, [negative]).kept == ((1,),)
    assert idle_channels(model, [positive, negative]).kept == ()


def test_unit_that_no_weight_reads_goes_too() -> None:
    model = killed(4)
    with torch.no_grad():
        model.last.weight[:, 2] = 0.0
    shrunk = remove_idle(model, [inputs(4, 2, 8, 8)])
    assert not {2, 4} & set(shrunk.delta.kept[-1])
    with torch.no_grad():
        x = inputs(4, 2, 8, 8, seed=9)
        torch.testing.assert_close(shrunk.model(x), model(x), rtol=1e-6, atol=1e-6)


def test_layer_whose_units_are_all_dead_keeps_one() -> None:
    model = killed(*range(8))
    shrunk = remove_idle(model, [inputs(4, 2, 8, 8)])
    assert shrunk.model.hidden.out_features == 1


def test_lively_network_is_left_whole() -> None:
    model = build(lambda: nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 2)), 0)
    shrunk = remove_idle(model, [inputs(4, 3)])
    assert shrunk.delta.kept == ()
    assert torch.equal(shrunk.model(inputs(4, 3)), model(inputs(4, 3)))


def test_functional_reader_keeps_its_channels() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 4)
            self.weight = nn.Parameter(torch.ones(2, 4))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.relu(self.first(x) - 1e4), self.weight)

    assert idle_channels(Reader(), [inputs(4, 3)]).kept == ()


def test_sparse_ticket_keeps_its_masks_in_the_smaller_network(tmp_path: Path) -> None:
    model = killed(2, 5)
    source = torch.Generator().manual_seed(6)
    masks = {
        name: torch.rand(parameter.shape, generator=source) < 0.5
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1
    }
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ticket = Ticket(masks, weights, {"last.weight": weights["last.weight"]})
    x = inputs(4, 2, 8, 8)
    small = remove_idle(ticket.apply(model), [x])
    shrunk_ticket(ticket, small.delta).save(tmp_path / "small.ticket")
    loaded = load_ticket(tmp_path / "small.ticket")
    again = shrink(build(Small, 3), Delta.from_json(loaded.meta["architecture"]))
    with torch.no_grad():
        torch.testing.assert_close(loaded.apply(again).eval()(x), model(x), rtol=1e-6, atol=1e-6)
    kept = list(small.delta.kept[-1])
    assert not {2, 5} & set(kept)
    assert torch.equal(loaded.masks["last.weight"], masks["last.weight"][:, kept])
    assert torch.equal(loaded.initial["last.weight"], ticket.initial["last.weight"][:, kept])
    with pytest.raises(FormatError, match="already shrunk"):
        shrunk_ticket(loaded, small.delta)
