# SPDX-License-Identifier: Apache-2.0
"""Recipes by name: the published settings, and small ones that run in seconds."""

from __future__ import annotations

from sparselt.errors import OptionError, explain_mismatch
from sparselt.lottery.recipe import Recipe

__all__ = ["RECIPES", "recipe_of"]

RECIPES: dict[str, Recipe] = {
    # Bundled digits, seconds on two cores; learning rate, iterations and rates were chosen on the
    # validation split.
    "digits_lenet": Recipe(
        data="digits", lr=3e-3, iterations=600, evaluate_every=100, levels=12, rate=0.3
    ),
    "digits_conv": Recipe(
        network="conv_small",
        data="digits",
        lr=3e-3,
        iterations=400,
        evaluate_every=100,
        levels=9,
        rate=0.35,
        conv_rate=0.2,
    ),
    # Frankle and Carbin 2018, figure 2.
    "mnist_lenet": Recipe(evaluate_every=500),
    "cifar10_conv_2": Recipe(
        network="conv_2", data="cifar10", lr=2e-4, iterations=20_000, levels=20, conv_rate=0.1
    ),
    "cifar10_conv_4": Recipe(
        network="conv_4", data="cifar10", lr=3e-4, iterations=25_000, levels=20, conv_rate=0.1
    ),
    "cifar10_conv_6": Recipe(
        network="conv_6", data="cifar10", lr=3e-4, iterations=30_000, levels=20, conv_rate=0.15
    ),
    # The same paper's VGG-19: at this learning rate there are tickets only after a warm-up.
    "cifar10_vgg_19": Recipe(
        network="vgg_19",
        data="cifar10",
        optimiser="sgd",
        lr=0.1,
        momentum=0.9,
        weight_decay=1e-4,
        batch=64,
        iterations=112_000,
        warmup=10_000,
        lr_drops=(56_250, 84_375),
        augment=True,
        evaluate_every=1000,
        output_rate=0.0,
        scope="global",
    ),
    # Frankle et al. 2019: stable, and so matching, from iteration 500 on.
    "cifar10_resnet_20": Recipe(
        network="resnet_20",
        data="cifar10",
        optimiser="sgd",
        lr=0.1,
        momentum=0.9,
        weight_decay=1e-4,
        batch=128,
        iterations=63_000,
        lr_drops=(32_000, 48_000),
        augment=True,
        evaluate_every=1000,
        levels=9,
        output_rate=0.0,
        scope="global",
        rewind=500,
    ),
}


def recipe_of(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        OptionError: There is none.
    """
    if name not in RECIPES:
        raise OptionError(explain_mismatch("recipe", f"one of {', '.join(RECIPES)}", name))
    return RECIPES[name]
