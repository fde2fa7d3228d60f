# SPDX-License-Identifier: Apache-2.0
"""Networks whose channels run through every kind of coupling, for tests of structured pruning."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparselt.lottery.networks import build
from sparselt.lottery.structured_graph import Channels
from sparselt.tickets.architecture import Delta


class Plain(nn.Module):
    """Biases, batch norm, pooling and a flatten of 4 columns a channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 5, 3, padding=1)
        self.fc1 = nn.Linear(20, 7)
        self.fc2 = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn(self.conv1(x))), 2)
        x = F.max_pool2d(torch.relu(self.conv2(x)), 2)
        return self.fc2(F.dropout(F.relu(self.fc1(x.flatten(1))), training=self.training))


class Residual(nn.Module):
    """An identity shortcut, and one with a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(6)
        self.conv1, self.bn1 = nn.Conv2d(6, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.conv2, self.bn2 = nn.Conv2d(5, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv3 = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.projection = nn.Conv2d(6, 8, 1, stride=2)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem_bn(self.stem(x)))
        x = F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        x = F.relu_(self.conv3(x) + self.projection(x))
        return self.fc(x.mean((2, 3)))


class Dense(nn.Module):
    """Concatenations of features, and of features with the image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(7, 5, 3, padding=1)
        self.bn = nn.BatchNorm2d(9)
        self.conv3 = nn.Conv2d(9, 6, 1)
        self.fc = nn.Linear(6 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        first = F.relu(self.conv1(x))
        second = F.relu(self.conv2(torch.cat([x, first], 1)))
        x = self.conv3(F.relu(self.bn(torch.cat([first, second], 1))))
        return self.fc(F.avg_pool2d(F.silu(x), 2).reshape(x.shape[0], -1))


class Mobile(nn.Module):
    """Depthwise and grouped convolutions, squeeze and excitation, learned slopes."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(3, 8, 1)
        self.depthwise = nn.Conv2d(8, 16, 3, padding=1, groups=8)
        self.bn = nn.BatchNorm2d(16)
        self.squeeze, self.excite = nn.Linear(16, 3), nn.Linear(3, 16)
        self.grouped = nn.Conv2d(16, 8, 3, padding=1, groups=4)
        self.slopes = nn.PReLU(8)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 8)[:, None, None])
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.bn(self.depthwise(F.relu6(self.expand(x)))))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))
        x = self.slopes(self.grouped(x * gate[:, :, None, None])) * self.scale
        return self.head(x)


class Mixer(nn.Module):
    """A transformer's feed-forward block: the hidden width can go, the normed stream cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(64, 6)
        self.norm = nn.LayerNorm(6)
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(2))
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return self.head(x.transpose(1, 2).contiguous().transpose(1, 2))


class Functional(nn.Module):
    """No modules, one weight used twice, channels last before the flatten, a sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(6, 3, 3, 3))
        self.bias = nn.Parameter(torch.randn(6))
        self.twice = nn.Parameter(torch.randn(6, 6, 1, 1))
        self.last = nn.Parameter(torch.randn(4, 6 * 64))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(F.conv2d(x, self.first, self.bias, padding=1))
        x = F.conv2d(F.relu(F.conv2d(x, self.twice)), self.twice)
        return F.linear(x.permute(0, 2, 3, 1).flatten(1), self.last)


class Signal(nn.Module):
    """One-dimensional convolutions and instance norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(3, 6, 3, padding="same")
        self.norm = nn.InstanceNorm1d(6, affine=True, track_running_stats=True)
        self.conv2 = nn.Conv1d(6, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.leaky_relu(self.norm(self.conv1(x.flatten(2)))))


Factory = Callable[[], nn.Module]

FAMILIES: dict[str, Factory] = {
    "plain": Plain,
    "residual": Residual,
    "dense": Dense,
    "mobile": Mobile,
    "mixer": Mixer,
    "functional": Functional,
    "signal": Signal,
}
X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
REMOVABLE = {
    "plain": {"conv1": 6, "conv2": 5, "fc1": 7},
    "residual": {"stem": 6, "conv1": 5, "conv3": 8},
    "dense": {"conv1": 4, "conv2": 5, "conv3": 6},
    "mobile": {"expand": 4, "squeeze": 3},
    "mixer": {"up": 10},
    "functional": {"": 6},
    "signal": {"conv1": 6},
}


def lively(factory: Factory, seed: int = 0) -> nn.Module:
    """A network in which a forgotten bias, scale or statistic shows."""
    model = build(factory, seed)
    source = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if tensor.dim() == 1:
            tensor.copy_(torch.rand(tensor.shape, generator=source) + 0.5)
            if not name.endswith("var"):
                tensor.sub_(0.8)
    return model.eval()


def every_second(channels: Channels) -> Delta:
    """Drops the even channels of every group."""
    kept = tuple(tuple(range(group.channels))[1::2] or (0,) for group in channels.groups)
    return Delta(channels.groups, kept)


def assert_same(got: Tensor, expected: Tensor) -> None:
    largest = float(expected.abs().max())
    assert largest > 1e-3, "the outputs are all zero, so nothing is shown"
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * largest)
