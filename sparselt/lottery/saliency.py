# SPDX-License-Identifier: Apache-2.0
"""Scores of weights before any training: SNIP, GraSP and SynFlow.

Each is a criterion of :mod:`sparselt.lottery.criteria`; larger scores are kept. They work on a
copy, so the network they are shown is left as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparselt.lottery.batch_norm import batch_norms, use_batch_statistics

if TYPE_CHECKING:
    from sparselt.lottery.criteria import Scores, Subject

__all__ = ["SYNFLOW_STEPS", "grasp", "snip", "synflow"]

SYNFLOW_STEPS = 100
_EXAMPLES_A_CLASS = 10
_TEMPERATURE = 200.0
_BATCH = 1000


def snip(subject: Subject) -> Scores:
    """``|g w|``: how much the loss feels a weight, on 10 training examples of each class.

    Batch norm normalises by the batch, dropout is off.

    Source: Lee et al. 2019, "SNIP: single-shot network pruning based on connection sensitivity".
    """
    model, weights = _copied(subject)
    gradient = [torch.zeros_like(weight) for weight in weights.values()]
    batches = list(_sample(subject))
    count = sum(len(labels) for _, labels in batches)
    for inputs, labels in batches:
        loss = F.cross_entropy(model(inputs), labels, reduction="sum") / count
        torch._foreach_add_(gradient, _gradient(loss, weights))
    return {
        name: (weight * slope).abs().detach()
        for (name, weight), slope in zip(weights.items(), gradient, strict=True)
    }


def grasp(subject: Subject) -> Scores:
    """``w (H g)``: how much removing a weight would lower the norm of the gradient.

    H is the Hessian and g the gradient of the cross-entropy of the outputs over temperature 200, on
    10 training examples of each class. Scores have signs: a weight whose removal raises the
    gradient's norm goes first, however large it is.

    Source: Wang et al. 2020, "Picking winning tickets before training by preserving gradient flow".
    """
    model, weights = _copied(subject)
    batches = list(_sample(subject))
    count = sum(len(labels) for _, labels in batches)

    def loss(inputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(inputs) / _TEMPERATURE, labels, reduction="sum") / count

    gradient = [torch.zeros_like(weight) for weight in weights.values()]
    for inputs, labels in batches:
        torch._foreach_add_(gradient, _gradient(loss(inputs, labels), weights))
    product = [torch.zeros_like(weight) for weight in weights.values()]
    for inputs, labels in batches:
        slopes = _gradient(loss(inputs, labels), weights, create_graph=True)
        inner = torch.stack([(s * g).sum() for s, g in zip(slopes, gradient, strict=True)]).sum()
        torch._foreach_add_(product, _gradient(inner, weights))
    return {
        name: (weight * curved).detach()
        for (name, weight), curved in zip(weights.items(), product, strict=True)
    }


def synflow(subject: Subject) -> Scores:
    """Synaptic flow ``(dR/d|w|) |w|``, R being the sum of the outputs of the network with absolute
    weights for an input of ones; no data are looked at.

    Each layer's scores add up to the same R, so a layer that loses weights gains in score for the
    rest: pruned in many small steps, no layer is emptied before all others hold one weight. Biases
    and running means count as 0, as in the published formula, which has weights only; the published
    code takes their absolute values. Computed in float64, in evaluation mode, and divided by the
    largest score.

    Source: Tanaka et al. 2020, "Pruning neural networks without any data by iteratively conserving
    synaptic flow".
    """
    model = copy.deepcopy(subject.model).cpu().double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.zero_() if name.rpartition(".")[2] == "bias" else parameter.abs_()
        for layer in batch_norms(model):
            if layer.running_mean is not None:
                layer.running_mean.zero_()
    weights = {name: model.get_parameter(name).requires_grad_() for name in subject.masks}
    ones = torch.ones(1, *subject.data.shape, dtype=torch.float64)
    slopes = _gradient(model(ones).sum(), weights)
    flows = [
        weight.detach() * slope for weight, slope in zip(weights.values(), slopes, strict=True)
    ]
    # Products over many layers leave the range of float32, in which masks are chosen.
    largest = max((float(flow.max()) for flow in flows if flow.numel()), default=0.0) or 1.0
    return {name: (flow / largest).float() for name, flow in zip(weights, flows, strict=True)}


def _copied(subject: Subject) -> tuple[nn.Module, dict[str, Tensor]]:
    model = copy.deepcopy(subject.model)
    use_batch_statistics(model)
    return model, {name: model.get_parameter(name).requires_grad_() for name in subject.masks}


def _sample(subject: Subject) -> Iterator[tuple[Tensor, Tensor]]:
    """Random training examples, as many of each class as there are up to 10, in large batches."""
    inputs, labels = subject.data.train
    on_cpu = labels.cpu()
    order = torch.randperm(len(on_cpu), generator=subject.generator)
    shuffled = on_cpu[order]
    places = [
        order[shuffled == number][:_EXAMPLES_A_CLASS] for number in range(subject.data.classes)
    ]
    for chosen in torch.split(torch.cat(places), _BATCH):
        chosen = chosen.to(labels.device)
        yield inputs[chosen], labels[chosen]


def _gradient(
    output: Tensor, weights: dict[str, Tensor], create_graph: bool = False
) -> tuple[Tensor, ...]:
    """Gradients of a scalar, 0.0 for weights that it does not depend on."""
    return torch.autograd.grad(
        output, list(weights.values()), create_graph=create_graph, materialize_grads=True
    )
