# SPDX-License-Identifier: Apache-2.0
"""VGG and ResNet: the deep networks of the lottery-ticket and filter-pruning papers.

Convolutions start from Kaiming's normal distribution, batch norms from scale 1 and shift 0, both as
in He et al. (arXiv 1512.03385). Biases stand only where no batch norm follows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparselt.errors import DataError, explain_mismatch

__all__ = ["DEEP_NETWORKS", "CifarResNet", "ImageNetResNet", "vgg"]

_VGG_STAGES = {
    16: ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)),
    19: ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4)),
}


class PaddedShortcut(nn.Module):
    """The shortcut without weights: every second pixel, and zeros for the channels that are new."""

    def __init__(self, new_channels: int, stride: int) -> None:
        super().__init__()
        self.new_channels, self.stride = new_channels, stride

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C + new_channels, H / stride, W / stride)."""
        front = self.new_channels // 2
        pads = (0, 0, 0, 0, front, self.new_channels - front)
        return F.pad(x[:, :, :: self.stride, :: self.stride], pads)

    def extra_repr(self) -> str:
        """What distinguishes one from another."""
        return f"new_channels={self.new_channels}, stride={self.stride}"


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, added to the shortcut."""

    def __init__(self, channels_in: int, channels: int, stride: int, projection: bool) -> None:
        super().__init__()
        self.conv1 = _conv(channels_in, channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _conv(channels, channels, 3)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = _shortcut(channels_in, channels, stride, projection)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels_in, H, W) to (B, channels, H / stride, W / stride)."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 (which has the stride) and 1x1 convolutions with batch norm, added to the shortcut;
    four times as many channels come out as the middle has.
    """

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(channels_in, channels, 1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _conv(channels, channels, 3, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = _conv(channels, 4 * channels, 1)
        self.bn3 = nn.BatchNorm2d(4 * channels)
        self.shortcut = _shortcut(channels_in, 4 * channels, stride, projection=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels_in, H, W) to (B, 4 * channels, H / stride, W / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(y)))))
        return F.relu(y + self.shortcut(x))


class CifarResNet(nn.Module):
    """ResNets for small images: three stages of 16, 32 and 64 channels, shortcuts without weights.

    Blocks are numbered through (``blocks.0`` ...): convolutions of block b are layers 2 + 2b and
    3 + 2b of the network.

    Args:
        depth: 6n + 2 layers: 20, 56, 110.
        channels_in: Channels of an image.
        classes: Number of classes.
    """

    def __init__(self, depth: int, channels_in: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.conv = _conv(channels_in, 16, 3)
        self.bn = nn.BatchNorm2d(16)
        blocks, width_in = [], 16
        for width in (16, 32, 64):
            for _ in range((depth - 2) // 6):
                stride = 1 if width == width_in else 2
                blocks.append(BasicBlock(width_in, width, stride, projection=False))
                width_in = width
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels_in, H, W) to (B, classes)."""
        x = self.blocks(F.relu(self.bn(self.conv(x))))
        return self.linear(torch.flatten(self.pool(x), 1))  # type: ignore[no-any-return]


class ImageNetResNet(nn.Module):
    """ResNets for large images: a 7x7 convolution, pooling, four stages, projection shortcuts.

    Blocks are numbered through (``blocks.0`` ...).

    Args:
        counts: Blocks of each stage.
        bottleneck: Whether blocks have three convolutions instead of two.
        channels_in: Channels of an image.
        classes: Number of classes.
    """

    def __init__(
        self, counts: Sequence[int], bottleneck: bool, channels_in: int = 3, classes: int = 1000
    ) -> None:
        super().__init__()
        self.conv = _conv(channels_in, 64, 7, 2)
        self.bn = nn.BatchNorm2d(64)
        self.first_pool = nn.MaxPool2d(3, 2, 1)
        blocks: list[nn.Module] = []
        width_in = 64
        for stage, count in enumerate(counts):
            width = 64 * 2**stage
            for index in range(count):
                stride = 2 if stage and not index else 1
                if bottleneck:
                    blocks.append(Bottleneck(width_in, width, stride))
                else:
                    blocks.append(BasicBlock(width_in, width, stride, projection=True))
                width_in = width * (4 if bottleneck else 1)
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(width_in, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels_in, H, W) to (B, classes)."""
        x = self.first_pool(F.relu(self.bn(self.conv(x))))
        x = torch.flatten(self.pool(self.blocks(x)), 1)
        return self.linear(x)  # type: ignore[no-any-return]


def vgg(
    depth: int, shape: tuple[int, ...], classes: int, hidden: tuple[int, ...] = ()
) -> nn.Sequential:
    """VGG for images of 32x32 and more: 3x3 convolutions with batch norm, five poolings.

    Args:
        depth: 16 or 19.
        shape: (C, H, W) of an image.
        classes: Number of classes.
        hidden: Widths of hidden linear layers, each with batch norm; Li et al. (2016) have one of
            512, the lottery-ticket papers none.

    Raises:
        DataError: The images are too small.
    """
    width_in, height, width = _image(shape, 32)
    layers: list[nn.Module] = []
    for channels, count in _VGG_STAGES[depth]:
        for _ in range(count):
            layers += [_conv(width_in, channels, 3), nn.BatchNorm2d(channels), nn.ReLU()]
            width_in = channels
        layers.append(nn.MaxPool2d(2))
    layers.append(nn.Flatten())
    units = width_in * (height // 32) * (width // 32)
    for size in hidden:
        layers += [nn.Linear(units, size), nn.BatchNorm1d(size), nn.ReLU()]
        units = size
    network = nn.Sequential(*layers, nn.Linear(units, classes))
    _initialise(network)
    return network


def vgg_16(shape: tuple[int, ...], classes: int) -> nn.Module:
    """VGG-16 in its CIFAR form: 13 convolutions and one linear layer; 14.7 million weights."""
    return vgg(16, shape, classes)


def vgg_19(shape: tuple[int, ...], classes: int) -> nn.Module:
    """VGG-19 in its CIFAR form: 16 convolutions and one linear layer; 20 million weights."""
    return vgg(19, shape, classes)


def resnet_20(shape: tuple[int, ...], classes: int) -> nn.Module:
    """ResNet-20 for CIFAR-10, 270 thousand weights; Frankle and Carbin (2018) call it Resnet-18."""
    return _cifar_resnet(20, shape, classes)


def resnet_56(shape: tuple[int, ...], classes: int) -> nn.Module:
    """ResNet-56 for CIFAR-10; 850 thousand weights."""
    return _cifar_resnet(56, shape, classes)


def resnet_110(shape: tuple[int, ...], classes: int) -> nn.Module:
    """ResNet-110 for CIFAR-10; 1.7 million weights."""
    return _cifar_resnet(110, shape, classes)


def resnet_18(shape: tuple[int, ...], classes: int) -> nn.Module:
    """ResNet-18 for ImageNet; 11.7 million weights."""
    return _imagenet_resnet((2, 2, 2, 2), False, shape, classes)


def resnet_34(shape: tuple[int, ...], classes: int) -> nn.Module:
    """ResNet-34 for ImageNet; 21.8 million weights."""
    return _imagenet_resnet((3, 4, 6, 3), False, shape, classes)


def resnet_50(shape: tuple[int, ...], classes: int) -> nn.Module:
    """ResNet-50 for ImageNet; 25.5 million weights."""
    return _imagenet_resnet((3, 4, 6, 3), True, shape, classes)


DEEP_NETWORKS: dict[str, Callable[[tuple[int, ...], int], nn.Module]] = {
    "vgg_16": vgg_16,
    "vgg_19": vgg_19,
    "resnet_20": resnet_20,
    "resnet_56": resnet_56,
    "resnet_110": resnet_110,
    "resnet_18": resnet_18,
    "resnet_34": resnet_34,
    "resnet_50": resnet_50,
}


def _cifar_resnet(depth: int, shape: tuple[int, ...], classes: int) -> nn.Module:
    network = CifarResNet(depth, _image(shape, 4)[0], classes)
    _initialise(network)
    return network


def _imagenet_resnet(
    counts: Sequence[int], bottleneck: bool, shape: tuple[int, ...], classes: int
) -> nn.Module:
    network = ImageNetResNet(counts, bottleneck, _image(shape, 32)[0], classes)
    _initialise(network)
    return network


def _conv(channels_in: int, channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels, kernel, stride, kernel // 2, bias=False)


def _shortcut(channels_in: int, channels: int, stride: int, projection: bool) -> nn.Module:
    if channels_in == channels and stride == 1:
        return nn.Identity()
    if not projection:
        return PaddedShortcut(channels - channels_in, stride)
    return nn.Sequential(_conv(channels_in, channels, 1, stride), nn.BatchNorm2d(channels))


def _initialise(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * math.prod(module.kernel_size)
            nn.init.normal_(module.weight, 0.0, math.sqrt(2 / fan_out))
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight)
            nn.init.zeros_(module.bias)


def _image(shape: tuple[int, ...], smallest: int) -> tuple[int, int, int]:
    if len(shape) != 3 or min(shape[1:]) < smallest:
        expected = f"(C, H, W) of {smallest}x{smallest} and more"
        raise DataError(explain_mismatch("input shape", expected, shape))
    return shape[0], shape[1], shape[2]
