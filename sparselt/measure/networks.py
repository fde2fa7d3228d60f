# SPDX-License-Identifier: Apache-2.0
"""Networks to time, by name or from a user's file, with random or a ticket's zeros."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sparselt.errors import DataError, OptionError
from sparselt.measure import architectures
from sparselt.measure.suites import random_mask
from sparselt.tickets import load_ticket

__all__ = [
    "NETWORKS",
    "Network",
    "Pruned",
    "example_inputs",
    "has_real_masks",
    "network",
    "prune_as_dlmc",
    "prune_randomly",
    "pruned_network",
]


# First convolutions read an image's or a sound's few channels, depthwise ones a single channel.
_FEW_CHANNELS = 4


def prune_randomly(model: nn.Module, density: float, seed: int = 0) -> nn.Module:
    """Zero random weights of linear and convolution layers, in place, and give batch norms
    running statistics that are not the identity; the exact kept share is `density` in each layer.

    Convolutions that read at most four channels a group, so first and depthwise ones, stay whole:
    they hold next to no weights, and networks that are pruned for accuracy keep them.

    Example:
        >>> model = prune_randomly(nn.Linear(10, 10), 0.3)
        >>> int((model.weight != 0).sum())
        30
    """
    generator = torch.Generator().manual_seed(seed)
    for index, layer in enumerate(model.modules()):
        if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d)) and not _is_small(layer):
            mask = random_mask(tuple(layer.weight.shape), density, seed=seed + index)
            layer.weight.data.mul_(mask / max(density, 1e-6) ** 0.5)
        elif isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            layer.running_mean.normal_(0.0, 0.1, generator=generator)
            layer.running_var.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def _is_small(layer: nn.Linear | nn.Conv1d | nn.Conv2d) -> bool:
    if isinstance(layer, nn.Linear):
        return False
    return layer.in_channels // layer.groups <= _FEW_CHANNELS


def prune_as_dlmc(model: nn.Module, density: float, seed: int = 0) -> nn.Module:
    """Give a ResNet-50 of `architectures.resnet50` the zeros of a magnitude-pruned one, in place.

    The patterns are those of the Deep Learning Matrix Collection, first convolution and output
    layer included; it has no values, so the weights stay the model's own, scaled as random ones.

    Args:
        model: changed.
        density: 0.2, 0.1 or 0.05: of the whole network, a layer's own differs.
        seed: of the batch norms' statistics.

    Raises:
        DataError: the collection is not at hand: SPARSELT_DATA names the folder that holds it.
    """
    prune_randomly(model, 1.0, seed)
    folder = _real_masks() / f"{1 - density:.2f}".rstrip("0")
    for name, layer in _dlmc_names(model):
        file = folder / f"{name}.smtx"
        if not file.is_file():
            raise DataError(
                f"resnet50_dlmc: there is no {file}; set SPARSELT_DATA to a folder that holds the "
                "matrices in dlmc/, and ask for density 0.2, 0.1 or 0.05"
            )
        weight = layer.weight.data
        (mask,) = load_ticket(file, shape=tuple(weight.shape)).masks.values()
        weight.mul_(mask / max(float(mask.float().mean()), 1e-6) ** 0.5)
    return model


def has_real_masks() -> bool:
    """Whether SPARSELT_DATA names a folder with the masks for `prune_as_dlmc`."""
    return _real_masks().is_dir()


def _real_masks() -> Path:
    return Path(os.environ.get("SPARSELT_DATA", "")) / "dlmc" / "rn50" / "magnitude_pruning"


def _dlmc_names(model: nn.Module) -> Iterator[tuple[str, nn.Conv2d | nn.Linear]]:
    """Each layer of a ResNet-50 with its file's name in the collection."""
    layers = iter(m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
    yield "initial_conv", next(layers)
    for group, count in enumerate((3, 4, 6, 3), start=1):
        for index in range(count):
            block = f"{group}_{index}_1" if index else f"_projection_block_group{group}"
            for part in (1, 2, 3) if index else (1, 2, 3, "projection"):
                yield f"bottleneck_{part}_block_group{block}", next(layers)
    yield "final_dense", next(layers)


@dataclass(frozen=True)
class Network:
    """How to build a network, and the shape of one input without the batch (None: unknown).

    `prune` takes the model, the density and a seed, and changes the model in place.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...] | None = None
    prune: Callable[[nn.Module, float, int], nn.Module] = prune_randomly


NETWORKS: dict[str, Network] = {
    "lenet": Network(architectures.lenet, (784,)),
    "mlp": Network(architectures.mlp, (1024,)),
    "resnet20": Network(architectures.resnet20, (3, 32, 32)),
    "vgg19": Network(architectures.vgg19, (3, 32, 32)),
    "resnet50": Network(architectures.resnet50, (3, 224, 224)),
    "resnet50_dlmc": Network(architectures.resnet50, (3, 224, 224), prune_as_dlmc),
    "mobilenet": Network(architectures.mobilenet, (3, 224, 224)),
    "resnet18": Network(architectures.resnet18, (3, 224, 224)),
    "wide_resnet": Network(architectures.wide_resnet, (3, 32, 32)),
    "signal": Network(architectures.signal, (1, 8000)),
    "vit": Network(architectures.vit, (3, 224, 224)),
    "uneven": Network(architectures.uneven, (3, 65, 63)),
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
            f"network: expected one of {', '.join(NETWORKS)} or file.py:function, got {spec!r}; "
            "one that `sparselt find` knows takes --input, the shape of one input"
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
        density: share of kept weights without a ticket.
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
        return Pruned(found.prune(model, density, seed), shape)
    return Pruned(load_ticket(ticket).apply(model).eval(), shape)


def example_inputs(shape: tuple[int, ...], batch: int, seed: int = 0) -> Tensor:
    """A seeded normal input, float32 (batch, *shape).

    Raises:
        OptionError: if the batch or a length is below 1.
    """
    if batch < 1 or min(shape, default=1) < 1:
        raise OptionError(f"input: expected batch and lengths >= 1, got {batch} and {shape}")
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed))
