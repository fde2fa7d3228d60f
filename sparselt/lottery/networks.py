# SPDX-License-Identifier: Apache-2.0
"""The networks of the lottery-ticket papers that fit small images.

To add one, write a function ``(shape, classes) -> nn.Module`` and add one line to ``NETWORKS``.
Weights are drawn from the global generator, which the caller seeds; Gaussian Glorot with zero
biases, as in Frankle and Carbin (2018).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sparselt.errors import DataError, OptionError, explain_mismatch
from sparselt.lottery.deep_networks import DEEP_NETWORKS

__all__ = ["NETWORKS", "Factory", "build", "factory_of"]

Factory = Callable[[], nn.Module]


def lenet_300_100(shape: tuple[int, ...], classes: int) -> nn.Module:
    """Two hidden layers of 300 and 100 units; 266,200 weights for 28x28 images."""
    return _glorot(_classifier(math.prod(shape), (300, 100), classes, [nn.Flatten()]))


def lenet_5(shape: tuple[int, ...], classes: int) -> nn.Module:
    """Two 5x5 convolutions with pooling, then 120 and 84 units; for images of 12x12 and more."""
    channels, height, width = _image(shape, 12)
    features: list[nn.Module] = [
        nn.Conv2d(channels, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
    ]  # fmt: skip
    units = 16 * ((height // 2 - 4) // 2) * ((width // 2 - 4) // 2)
    return _glorot(_classifier(units, (120, 84), classes, features))


def conv_small(shape: tuple[int, ...], classes: int) -> nn.Module:
    """Two 3x3 convolutions of 16 and 32 channels, pooling, 64 units; for 8x8 digits."""
    return _conv_stack(shape, classes, [(16, 32)], (64,))


def conv_2(shape: tuple[int, ...], classes: int) -> nn.Module:
    """Conv-2: 64, 64, pool; 256, 256; 4.3 million weights for CIFAR-10."""
    return _conv_stack(shape, classes, [(64, 64)], (256, 256))


def conv_4(shape: tuple[int, ...], classes: int) -> nn.Module:
    """Conv-4: 64, 64, pool, 128, 128, pool; 256, 256; 2.4 million weights for CIFAR-10."""
    return _conv_stack(shape, classes, [(64, 64), (128, 128)], (256, 256))


def conv_6(shape: tuple[int, ...], classes: int) -> nn.Module:
    """Conv-6: Conv-4 with 256, 256, pool; 2.3 million weights for CIFAR-10."""
    return _conv_stack(shape, classes, [(64, 64), (128, 128), (256, 256)], (256, 256))


NETWORKS: dict[str, Callable[[tuple[int, ...], int], nn.Module]] = {
    "lenet_300_100": lenet_300_100,
    "lenet_5": lenet_5,
    "conv_small": conv_small,
    "conv_2": conv_2,
    "conv_4": conv_4,
    "conv_6": conv_6,
    **DEEP_NETWORKS,
}


def factory_of(
    network: str | nn.Module | Factory, shape: tuple[int, ...] = (), classes: int = 10
) -> Factory:
    """A function that builds the network anew, drawing its weights from the global generator.

    Args:
        network: A key of ``NETWORKS``; or a function that builds your module; or a module, whose
            layers are then redrawn by their own ``reset_parameters``.
        shape: Shape of one input, for a key.
        classes: Number of classes, for a key.

    Raises:
        OptionError: An unknown key.
    """
    if isinstance(network, nn.Module):
        return lambda: _redrawn(network)
    if callable(network):
        return network
    if network not in NETWORKS:
        raise OptionError(explain_mismatch("network", f"one of {', '.join(NETWORKS)}", network))
    return lambda: NETWORKS[network](shape, classes)


def build(factory: Factory, seed: int) -> nn.Module:
    """Calls ``factory`` with the global generator seeded, and leaves that generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return factory()


def _redrawn(network: nn.Module) -> nn.Module:
    fresh = copy.deepcopy(network)
    for module in fresh.modules():
        reset: Any = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()
        elif next(module.parameters(recurse=False), None) is not None:
            raise OptionError(
                f"network: {type(module).__name__} has weights but no reset_parameters, so it "
                "cannot be "
                "drawn anew; pass a function that builds the network instead"
            )
    return fresh


def _classifier(
    units: int, hidden: tuple[int, ...], classes: int, features: list[nn.Module]
) -> nn.Sequential:
    layers = list(features)
    for width in hidden:
        layers += [nn.Linear(units, width), nn.ReLU()]
        units = width
    return nn.Sequential(*layers, nn.Linear(units, classes))


def _conv_stack(
    shape: tuple[int, ...], classes: int, stages: list[tuple[int, ...]], hidden: tuple[int, ...]
) -> nn.Module:
    channels, height, width = _image(shape, 2 ** len(stages))
    features: list[nn.Module] = []
    for stage in stages:
        for out_channels in stage:
            features += [nn.Conv2d(channels, out_channels, 3, padding=1), nn.ReLU()]
            channels = out_channels
        features.append(nn.MaxPool2d(2))
        height, width = height // 2, width // 2
    features.append(nn.Flatten())
    return _glorot(_classifier(channels * height * width, hidden, classes, features))


def _image(shape: tuple[int, ...], smallest: int) -> tuple[int, int, int]:
    if len(shape) != 3 or min(shape[1:]) < smallest:
        raise DataError(
            explain_mismatch("input shape", f"(C, H, W) of {smallest}x{smallest} and more", shape)
        )
    return shape[0], shape[1], shape[2]


def _glorot(network: nn.Module) -> nn.Module:
    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return network
