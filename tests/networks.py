# SPDX-License-Identifier: Apache-2.0
"""Small pruned networks with what real ones have, for the tests of conversion and compilation."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["NETWORKS", "Branching", "Encoder", "Residual", "input_for", "make", "prune_randomly"]


def prune_randomly(model: nn.Module, density: float = 0.1, seed: int = 0) -> nn.Module:
    """Random zeros in every layer, and batch norms that do something; in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            kept = torch.rand(layer.weight.shape, generator=generator) < density
            layer.weight.data.mul_(kept)
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            for tensor in (layer.running_mean, layer.bias.data):
                tensor.normal_(0, 0.1, generator=generator)
            for tensor in (layer.running_var, layer.weight.data):
                tensor.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


class Block(nn.Module):
    """A residual block whose addition and activation work in place."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.down: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.down = nn.Conv2d(channels_in, channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.down(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        x += shortcut
        return self.relu(x)


class Residual(nn.Sequential):
    """A ResNet of three blocks for (B, 3, H, W)."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 16, 3, 1, 1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            Block(16, 16, 1),
            Block(16, 32, 2),
            Block(32, 32, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, 10),
        )


class Separable(nn.Module):
    """Depthwise convolutions, ReLU6, hardswish, and a layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU6(inplace=True))
        self.depth = nn.Conv2d(16, 16, 3, 1, 1, groups=16)
        self.point = nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(2):
            x = F.hardswish(self.point(F.relu6(self.depth(x))))
        return self.head(x.mean([2, 3]))


class InPlace(nn.Module):
    """In-place changes around layers, and a nested result."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, 1, 1)
        self.norm = nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, 16, 3, 1, 1)
        self.third = nn.Conv2d(16, 16, 3, 1, 1)

    def forward(self, x: Tensor) -> dict[str, object]:
        x = self.first(x)
        y = F.relu(self.norm(x), inplace=True)
        y = self.third(F.relu(self.second(y)))
        x += y
        z = self.second(x)
        x.relu_()
        return {"sum": z + x, "parts": [x, y.clamp(min=-1)]}


class Signal(nn.Module):
    """1-D convolutions with paddings that need a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(3, 16, 7, padding="same"),
            nn.BatchNorm1d(16),
            nn.ReLU(),
            nn.Conv1d(16, 16, 3, padding=1, padding_mode="circular"),
            nn.ReLU(),
            nn.Dropout(),
            nn.Conv1d(16, 16, 3, stride=2),
        )
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).mean(-1))


class Perceptron(nn.Module):
    """Linear layers with batch norm, residual, clamp, and as addmm and matmul."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(48, 64)
        self.norm = nn.BatchNorm1d(64)
        self.second = nn.Linear(64, 64)
        self.third = nn.Linear(64, 10)
        self.fourth = nn.Linear(10, 7, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        x = torch.relu(x + self.second(x))
        x = torch.addmm(self.third.bias, x, self.third.weight.t())
        return F.hardtanh(x @ self.fourth.weight.T, -0.5, 0.5)


class Encoder(nn.Module):
    """A transformer encoder with the embedding's weight tied to the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, scale: float = 1.0, *, best: bool = True) -> object:
        logits = self.head(self.encoder(self.embed(ids))) * scale
        return (logits, logits.argmax(-1)) if best else logits


class Branching(nn.Module):
    """What torch.export cannot capture: a branch on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(32, 32)
        self.right = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) if x.sum() > 0 else self.right(x)


# Class, shape behind the batch, and another such shape that the network takes too.
NETWORKS: dict[str, tuple[type[nn.Module], tuple[int, ...], tuple[int, ...] | None]] = {
    "residual": (Residual, (3, 17, 15), (3, 20, 20)),
    "separable": (Separable, (3, 16, 16), (3, 19, 24)),
    "in place": (InPlace, (3, 12, 12), (3, 9, 11)),
    "signal": (Signal, (3, 40), (3, 33)),
    "perceptron": (Perceptron, (48,), None),
    "encoder": (Encoder, (9,), (5,)),
    "branching": (Branching, (32,), None),
}


def make(name: str, density: float = 0.1) -> nn.Module:
    """A network of the table, pruned."""
    torch.manual_seed(0)
    return prune_randomly(NETWORKS[name][0](), density)


def input_for(name: str, batch: int, shape: tuple[int, ...] | None = None) -> Tensor:
    """An input of a network of the table."""
    shape = NETWORKS[name][1] if shape is None else shape
    if name == "encoder":
        return torch.randint(0, 50, (batch, *shape))
    return torch.randn(batch, *shape)
