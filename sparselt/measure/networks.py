# SPDX-License-Identifier: Apache-2.0
"""Networks to time, by name or from a user's file, with random or a ticket's zeros."""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sparselt.errors import DataError, OptionError
from sparselt.measure.suites import random_mask
from sparselt.tickets import load_ticket

__all__ = [
    "NETWORKS",
    "Network",
    "Pruned",
    "example_inputs",
    "network",
    "prune_randomly",
    "pruned_network",
]


def lenet() -> nn.Module:
    """LeNet-300-100: 784-300-100-10."""
    return _mlp(784, 300, 100, 10)


def mlp() -> nn.Module:
    """A wide perceptron: 1024-4096-4096-1024."""
    return _mlp(1024, 4096, 4096, 1024)


def _mlp(*widths: int) -> nn.Module:
    layers: list[nn.Module] = []
    for wide, next_wide in itertools.pairwise(widths):
        layers += [nn.Linear(wide, next_wide), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _conv(cin: int, cout: int, kernel: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(cin, cout, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(cout)
    )


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


def resnet20() -> nn.Module:
    """ResNet-20 for 32x32 images (He et al., arXiv 1512.03385, section 4.2), 1x1 shortcuts."""
    layers: list[nn.Module] = [_conv(3, 16, 3), nn.ReLU()]
    cin = 16
    for width in (16, 32, 64):
        for _ in range(3):
            layers.append(Residual(cin, width, 2 if cin != width else 1))
            cin = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def resnet50() -> nn.Module:
    """ResNet-50 (He et al., arXiv 1512.03385), the stride in the 3x3 convolution."""
    layers: list[nn.Module] = [_conv(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    cin = 64
    for group, (width, count) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
        for index in range(count):
            stride = 2 if group and not index else 1
            layers.append(Residual(cin, 4 * width, stride, width))
            cin = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))


def vgg19() -> nn.Module:
    """VGG-19 for 32x32 images: sixteen 3x3 convolutions with batch norm, one linear layer."""
    layers: list[nn.Module] = []
    cin = 3
    for width, count in ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4)):
        for _ in range(count):
            layers += [_conv(cin, width, 3), nn.ReLU()]
            cin = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10))


@dataclass(frozen=True)
class Network:
    """How to build a network, and the shape of one input without the batch (None: unknown)."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...] | None = None


NETWORKS: dict[str, Network] = {
    "lenet": Network(lenet, (784,)),
    "mlp": Network(mlp, (1024,)),
    "resnet20": Network(resnet20, (3, 32, 32)),
    "vgg19": Network(vgg19, (3, 32, 32)),
    "resnet50": Network(resnet50, (3, 224, 224)),
}


def network(spec: str) -> Network:
    """Find a network by its name in `NETWORKS`, or as "package.module:name" or "file.py:name".

    The name after the colon is a function or class that builds the network without arguments.

    Raises:
        OptionError: for an unknown name, or one that is not callable.
        DataError: if the file or module cannot be imported.

    Example:
        >>> network("lenet").shape
        (784,)
    """
    if spec in NETWORKS:
        return NETWORKS[spec]
    where, colon, name = spec.partition(":")
    if not colon:
        raise OptionError(
            f"network: expected one of {', '.join(NETWORKS)} or file.py:function, got {spec!r}"
        )
    module_name = where
    if where.endswith(".py"):
        file = Path(where).resolve()
        if not file.is_file():
            raise DataError(f"network: there is no file {where}")
        module_name = file.stem
        # The engines' processes import the module by this name, so its folder must be found.
        sys.path.insert(0, str(file.parent))
    try:
        found = getattr(importlib.import_module(module_name), name, None)
    except Exception as error:
        raise DataError(f"network: {where} cannot be imported: {error}") from error
    if not callable(found):
        raise OptionError(f"network: {where} has no function or class {name!r}")
    return Network(found)


def prune_randomly(model: nn.Module, density: float, seed: int = 0) -> nn.Module:
    """Zero random weights of every linear and convolution layer, in place, and give batch norms
    running statistics that are not the identity; the exact kept share is `density` in each layer.

    Example:
        >>> model = prune_randomly(nn.Linear(10, 10), 0.3)
        >>> int((model.weight != 0).sum())
        30
    """
    generator = torch.Generator().manual_seed(seed)
    for index, layer in enumerate(model.modules()):
        if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            mask = random_mask(tuple(layer.weight.shape), density, seed=seed + index)
            layer.weight.data.mul_(mask / max(density, 1e-6) ** 0.5)
        elif isinstance(layer, nn.BatchNorm2d):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            layer.running_mean.normal_(0.0, 0.1, generator=generator)
            layer.running_var.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


@dataclass(frozen=True)
class Pruned:
    """A network with its zeros in place, and the shape of one input without the batch."""

    model: nn.Module
    shape: tuple[int, ...]


def pruned_network(
    spec: str | Network,
    shape: tuple[int, ...] | None = None,
    ticket: str | Path | None = None,
    density: float = 0.1,
    seed: int = 0,
) -> Pruned:
    """Build a network and put a ticket's weights, or random zeros, into it.

    Args:
        spec: a `Network`, or what `network` takes.
        shape: of one input; needed for networks that are not in `NETWORKS`.
        ticket: any file that `load_ticket` reads.
        density: share of kept weights of every layer without a ticket.
        seed: of the weights and random zeros.

    Raises:
        OptionError: an unknown network, or no input shape for it.
        FormatError, ShapeError: the ticket belongs to another network.

    Example:
        >>> pruned_network("lenet").shape
        (784,)
    """
    found = network(spec) if isinstance(spec, str) else spec
    shape = shape or found.shape
    if shape is None:
        raise OptionError(f"{spec}: say the shape of one input, for example --input 3,32,32")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = found.build()
    if not isinstance(model, nn.Module):
        raise OptionError(f"{spec}: expected a torch.nn.Module, got {type(model).__name__}")
    if ticket is None:
        return Pruned(prune_randomly(model, density, seed), shape)
    return Pruned(load_ticket(ticket).apply(model).eval(), shape)


def example_inputs(shape: tuple[int, ...], batch: int, seed: int = 0) -> Tensor:
    """A seeded normal input, float32 (batch, *shape).

    Raises:
        OptionError: if the batch or a length is below 1.
    """
    if batch < 1 or min(shape, default=1) < 1:
        raise OptionError(f"input: expected batch and lengths >= 1, got {batch} and {shape}")
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed))
