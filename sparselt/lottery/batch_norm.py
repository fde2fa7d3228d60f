# SPDX-License-Identifier: Apache-2.0
"""Batch normalisation where a network is looked at rather than trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["batch_norms", "recompute_statistics", "use_batch_statistics"]

_BATCH = 500


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """The batch-norm layers of ``model``."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def use_batch_statistics(model: nn.Module) -> None:
    """Puts ``model`` in evaluation mode except for batch norm, which normalises by the batch.

    A network that has seen no data has no running statistics worth using, and dropout would make
    what is measured random.
    """
    model.eval()
    for module in batch_norms(model):
        module.train()


def recompute_statistics(model: nn.Module, inputs: Tensor) -> None:
    """Replaces the running mean and variance of every batch norm by the averages over ``inputs``.

    Args:
        model: Its weights are left as they are, and so is the mode it is in.
        inputs: (n, ...), at least 2, passed through in order.
    """
    layers = batch_norms(model)
    if not layers:
        return
    was_training, momenta = model.training, [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        # None makes the running statistics a plain average over all batches.
        layer.momentum = None
    use_batch_statistics(model)
    with torch.no_grad():
        # Equal batches: a short last one would count too much, and one of 1 has no variance.
        for batch in torch.tensor_split(inputs, -(-len(inputs) // _BATCH)):
            model(batch)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    model.train(was_training)
