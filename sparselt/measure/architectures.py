# SPDX-License-Identifier: Apache-2.0
"""The networks that are timed, each a function that builds it with fresh weights.

`width` scales the number of channels: at its default the network is the published one, and narrow
ones let tests run the same graph in a moment.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "lenet",
    "mlp",
    "mobilenet",
    "resnet18",
    "resnet20",
    "resnet50",
    "signal",
    "uneven",
    "vgg19",
    "vit",
    "wide_resnet",
]


def lenet() -> nn.Module:
    """LeNet-300-100: 784-300-100-10."""
    return _mlp(784, 300, 100, 10)


def mlp(width: int = 4096) -> nn.Module:
    """A wide perceptron: 1024-4096-4096-1024."""
    return _mlp(1024, width, width, 1024)


def _mlp(*widths: int) -> nn.Module:
    layers: list[nn.Module] = []
    for wide, next_wide in itertools.pairwise(widths):
        layers += [nn.Linear(wide, next_wide), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _conv(cin: int, cout: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(cout),
    )


def _head(channels: int, classes: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]


class Residual(nn.Module):
    """A residual block: two 3x3 convolutions, or 1x1, 3x3, 1x1 where `width` is given."""

    def __init__(self, cin: int, cout: int, stride: int = 1, width: int = 0) -> None:
        super().__init__()
        if width:
            parts = [_conv(cin, width, 1), nn.ReLU(), _conv(width, width, 3, stride), nn.ReLU()]
            parts.append(_conv(width, cout, 1))
        else:
            parts = [_conv(cin, cout, 3, stride), nn.ReLU(), _conv(cout, cout, 3)]
        self.body = nn.Sequential(*parts)
        same = cin == cout and stride == 1
        self.shortcut = nn.Identity() if same else _conv(cin, cout, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) to (B, C_out, H / stride, W / stride)."""
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet20(width: int = 16) -> nn.Module:
    """ResNet-20 for 32x32 images (He et al., arXiv 1512.03385, section 4.2), 1x1 shortcuts."""
    layers: list[nn.Module] = [_conv(3, width, 3), nn.ReLU()]
    cin = width
    for cout in (width, 2 * width, 4 * width):
        for _ in range(3):
            layers.append(Residual(cin, cout, 2 if cin != cout else 1))
            cin = cout
    return nn.Sequential(*layers, *_head(cin, 10))


def resnet18(width: int = 64) -> nn.Module:
    """ResNet-18 (He et al., arXiv 1512.03385)."""
    layers: list[nn.Module] = [_conv(3, width, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    cin = width
    for cout in (width, 2 * width, 4 * width, 8 * width):
        layers += [Residual(cin, cout, 2 if cin != cout else 1), Residual(cout, cout)]
        cin = cout
    return nn.Sequential(*layers, *_head(cin, 1000))


def resnet50(width: int = 64) -> nn.Module:
    """ResNet-50 (He et al., arXiv 1512.03385), the stride in the 3x3 convolution."""
    layers: list[nn.Module] = [_conv(3, width, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    cin = width
    for group, count in enumerate((3, 4, 6, 3)):
        middle = width << group
        for index in range(count):
            stride = 2 if group and not index else 1
            layers.append(Residual(cin, 4 * middle, stride, middle))
            cin = 4 * middle
    return nn.Sequential(*layers, *_head(cin, 1000))


class Preactivated(nn.Module):
    """A residual block with batch norm and ReLU before each convolution, not after it."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(cin), nn.BatchNorm2d(cout)
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.shortcut = None if cin == cout else nn.Conv2d(cin, cout, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) to (B, C_out, H / stride, W / stride)."""
        y: Tensor = F.relu(self.norm1(x))
        shortcut: Tensor = x if self.shortcut is None else self.shortcut(y)
        y = self.conv2(F.relu(self.norm2(self.conv1(y))))
        return y + shortcut


def wide_resnet(width: int = 64) -> nn.Module:
    """WRN-16-4 for 32x32 images (Zagoruyko and Komodakis, arXiv 1605.07146)."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False)]
    cin = 16
    for cout in (width, 2 * width, 4 * width):
        layers += [Preactivated(cin, cout, 2 if cout > width else 1), Preactivated(cout, cout, 1)]
        cin = cout
    return nn.Sequential(*layers, nn.BatchNorm2d(cin), nn.ReLU(), *_head(cin, 10))


def vgg19(width: int = 64) -> nn.Module:
    """VGG-19 for 32x32 images: sixteen 3x3 convolutions with batch norm, one linear layer."""
    layers: list[nn.Module] = []
    cin = 3
    for factor, count in ((1, 2), (2, 2), (4, 4), (8, 4), (8, 4)):
        for _ in range(count):
            layers += [_conv(cin, factor * width, 3), nn.ReLU()]
            cin = factor * width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(cin, 10))


def mobilenet(width: int = 32) -> nn.Module:
    """MobileNetV1 (Howard et al., arXiv 1704.04861)."""
    layers: list[nn.Module] = [_conv(3, width, 3, 2), nn.ReLU()]
    cin = width
    for factor, stride in (
        (2, 1),
        (4, 2),
        (4, 1),
        (8, 2),
        (8, 1),
        (16, 2),
        *[(16, 1)] * 5,
        (32, 2),
    ):
        layers += [_conv(cin, cin, 3, stride, groups=cin), nn.ReLU()]
        layers += [_conv(cin, factor * width, 1), nn.ReLU()]
        cin = factor * width
    layers += [_conv(cin, cin, 3, groups=cin), nn.ReLU(), _conv(cin, cin, 1), nn.ReLU()]
    return nn.Sequential(*layers, *_head(cin, 1000))


def signal(width: int = 128) -> nn.Module:
    """M5, 1-D convolutions on a second of sound at 8 kHz (Dai et al., arXiv 1610.00087)."""
    layers: list[nn.Module] = []
    cin = 1
    for cout, kernel, stride in ((1, 79, 4), (1, 3, 1), (2, 3, 1), (4, 3, 1)):
        layers += [
            nn.Conv1d(cin, cout * width, kernel, stride, kernel // 2, bias=False),
            nn.BatchNorm1d(cout * width),
            nn.ReLU(),
            nn.MaxPool1d(4),
        ]
        cin = cout * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(cin, 10))


class EncoderLayer(nn.Module):
    """Attention and a perceptron, each after a layer norm and added to what it read."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) to the same."""
        batch, tokens, width = x.shape
        parts = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))
        y: Tensor = self.down(F.gelu(self.up(self.norm2(x))))
        return x + y


class VisionTransformer(nn.Module):
    """Patches of 16x16, learned positions, encoder layers, and the mean of all tokens."""

    def __init__(self, width: int, depth: int, heads: int, size: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.positions = nn.Parameter(0.02 * torch.randn(1, (size // 16) ** 2, width))
        self.layers = nn.Sequential(*(EncoderLayer(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, size, size) to (B, 1000)."""
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        y: Tensor = self.head(self.norm(self.layers(x)).mean(1))
        return y


def vit(width: int = 384, depth: int = 6, size: int = 224) -> nn.Module:
    """Half of ViT-S/16 (Dosovitskiy et al., arXiv 2010.11929): six layers, no class token."""
    return VisionTransformer(width, depth, width // 64, size)


class Uneven(nn.Module):
    """A residual block of what kernels like least: groups, dilation, a side and stride for each
    axis, padding on one side.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(channels, channels, 3, 1, 1, groups=4)
        self.dilated = nn.Conv2d(channels, channels, 3, 1, (2, 3), (2, 3))
        self.even = nn.Conv2d(channels, channels, (2, 4), padding="same")
        self.last = nn.Conv2d(channels, 2 * channels, (3, 5), (3, 2))

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) to (B, 2 * channels, about H / 3, about W / 2)."""
        y = F.relu(self.grouped(x))
        x = F.relu(x + self.even(F.relu(self.dilated(y))))
        return F.relu(self.last(F.pad(x, (1, 3, 2, 0))))


def uneven(width: int = 64) -> nn.Module:
    """Three blocks with groups, dilation, odd strides and asymmetric padding."""
    blocks = [Uneven(width << i) for i in range(2)]
    stem = nn.Conv2d(3, width, 5, (2, 1), (2, 1))
    return nn.Sequential(stem, nn.ReLU(), *blocks, *_head(4 * width, 10))
