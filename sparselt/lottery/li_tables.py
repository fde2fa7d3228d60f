# SPDX-License-Identifier: Apache-2.0
"""The filter-pruning recipes of Li et al., "Pruning Filters for Efficient ConvNets" (arXiv
1608.08710), as data: which layers, how much, what is skipped, and the columns they print.

The paper counts multiply-accumulates and weights of convolutions and linear layers; projection
shortcuts of ResNet-34 are in neither of its columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from sparselt.errors import OptionError, explain_mismatch
from sparselt.lottery.counting import Cost, count
from sparselt.lottery.deep_networks import DEEP_NETWORKS, vgg
from sparselt.lottery.structured import Shrunk, choose_channels, remove_channels
from sparselt.lottery.structured_graph import Channels, trace_channels

__all__ = ["LI_NETWORKS", "LI_RECIPES", "LiNetwork", "LiRecipe", "li_costs", "li_prune"]


@dataclass(frozen=True)
class LiNetwork:
    """A network of the paper.

    Attributes:
        build: Builds it with new weights.
        shape: Shape of one input.
        blocks: Number of residual blocks in each stage; () for VGG.
        uncounted: Layers that the paper's columns leave out.
        macs: Printed multiply-accumulates of the whole network ("FLOP").
        weights: Printed number of parameters of the whole network.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    blocks: tuple[int, ...]
    macs: float
    weights: float
    uncounted: tuple[str, ...] = ()


@dataclass(frozen=True)
class LiRecipe:
    """One pruned network of the paper.

    Attributes:
        network: A key of ``LI_NETWORKS``.
        density: Share of the filters that stay in the first convolution of each block, by stage.
        skip: Layers that stay whole, numbered as in the paper: 1 is the first convolution, block b
            (from 0) has layers 2 + 2b and 3 + 2b.
        layers: Instead of both: share of the filters that stay, by layer name.
        macs: Printed multiply-accumulates, and the share pruned in percent.
        weights: Printed parameters, and the share pruned in percent.
    """

    network: str
    macs: tuple[float, float]
    weights: tuple[float, float]
    density: tuple[float, ...] = ()
    skip: tuple[int, ...] = ()
    layers: tuple[tuple[str, float], ...] = ()

    def by_layer(self) -> dict[str, float]:
        """Share of the filters that stay, for each pruned layer."""
        found, block = dict(self.layers), 0
        stages = zip(self.density, LI_NETWORKS[self.network].blocks, strict=False)
        for share, blocks in stages:
            for _ in range(blocks):
                if share < 1 and 2 + 2 * block not in self.skip:
                    found[f"blocks.{block}.conv1"] = share
                block += 1
        return found


LI_NETWORKS: dict[str, LiNetwork] = {
    "vgg_16": LiNetwork(
        lambda: vgg(16, (3, 32, 32), 10, hidden=(512,)), (3, 32, 32), (), 3.13e8, 1.5e7
    ),
    "resnet_56": LiNetwork(
        lambda: DEEP_NETWORKS["resnet_56"]((3, 32, 32), 10), (3, 32, 32), (9, 9, 9), 1.25e8, 8.5e5
    ),
    "resnet_110": LiNetwork(
        lambda: DEEP_NETWORKS["resnet_110"]((3, 32, 32), 10),
        (3, 32, 32),
        (18, 18, 18),
        2.53e8,
        1.72e6,
    ),
    "resnet_34": LiNetwork(
        lambda: DEEP_NETWORKS["resnet_34"]((3, 224, 224), 1000),
        (3, 224, 224),
        (3, 4, 6, 3),
        3.64e9,
        2.16e7,
        uncounted=("*.shortcut.0",),
    ),
}

_VGG_CONVOLUTIONS = (0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40)
_RESNET_34_SKIP = (2, 8, 14, 16, 26, 28, 30, 32)

LI_RECIPES: dict[str, LiRecipe] = {
    # Half of the first convolution and of the 8th to 13th.
    "vgg_16_a": LiRecipe(
        "vgg_16",
        (2.06e8, 34.2),
        (5.4e6, 64.0),
        layers=tuple((str(_VGG_CONVOLUTIONS[index]), 0.5) for index in (0, *range(7, 13))),
    ),
    "resnet_56_a": LiRecipe(
        "resnet_56", (1.12e8, 10.4), (7.7e5, 9.4), (0.9, 0.9, 0.9), skip=(16, 20, 38, 54)
    ),
    "resnet_56_b": LiRecipe(
        "resnet_56", (9.09e7, 27.6), (7.3e5, 13.7), (0.4, 0.7, 0.9), skip=(16, 18, 20, 34, 38, 54)
    ),
    "resnet_110_a": LiRecipe(
        "resnet_110", (2.13e8, 15.9), (1.68e6, 2.3), (0.5, 1.0, 1.0), skip=(36,)
    ),
    "resnet_110_b": LiRecipe(
        "resnet_110", (1.55e8, 38.6), (1.16e6, 32.4), (0.5, 0.6, 0.7), skip=(36, 38, 74)
    ),
    "resnet_34_a": LiRecipe(
        "resnet_34", (3.08e9, 15.5), (1.99e7, 7.6), (0.7, 0.7, 0.7), skip=_RESNET_34_SKIP
    ),
    "resnet_34_b": LiRecipe(
        "resnet_34", (2.76e9, 24.2), (1.93e7, 10.8), (0.5, 0.4, 0.6), skip=_RESNET_34_SKIP
    ),
    # The sums of the third stage, which its projection shortcut begins, lose a fifth.
    "resnet_34_c": LiRecipe(
        "resnet_34", (3.37e9, 7.5), (2.01e7, 7.2), layers=(("blocks.7.shortcut.0", 0.8),)
    ),
}


def li_prune(name: str, model: nn.Module | None = None) -> Shrunk:
    """Prunes a network as a recipe of the paper says: filters of the smallest L1 norm.

    Args:
        name: A key of ``LI_RECIPES``.
        model: The trained network, as ``LI_NETWORKS[...].build()`` builds it; without one, a
            network without values (on the meta device) for its shapes.

    Raises:
        OptionError: There is no such recipe.
    """
    if name not in LI_RECIPES:
        raise OptionError(explain_mismatch("recipe", f"one of {', '.join(LI_RECIPES)}", name))
    recipe = LI_RECIPES[name]
    network = LI_NETWORKS[recipe.network]
    # Without values every filter ranks alike.
    criterion = "random" if model is None else "l1"
    model = _without_values(recipe.network) if model is None else model
    delta = choose_channels(model, _channels(recipe.network), recipe.by_layer(), criterion)
    device = next(model.parameters()).device
    return remove_channels(model, delta, torch.zeros(1, *network.shape, device=device))


def li_costs(name: str) -> tuple[Cost, Cost]:
    """Costs of the whole and of the pruned network, counted as the paper counts them."""
    network = LI_NETWORKS[LI_RECIPES[name].network]
    small = li_prune(name).model
    return (
        count(_without_values(LI_RECIPES[name].network), network.shape, network.uncounted),
        count(small, network.shape, network.uncounted),
    )


def _without_values(network: str) -> nn.Module:
    with torch.device("meta"):
        return LI_NETWORKS[network].build()


@cache
def _channels(network: str) -> Channels:
    shape = LI_NETWORKS[network].shape
    return trace_channels(_without_values(network), torch.zeros(1, *shape, device="meta"))
