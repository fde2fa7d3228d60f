# SPDX-License-Identifier: Apache-2.0
"""Turns a pruned model into one whose layers run sparse where that is faster.

The model is copied, pruning and parametrizations are baked into plain weights, every layer gets a
plan, and those whose plan is sparse are swapped.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.utils import _pytree as pytree

from sparselt.errors import OptionError, explain_mismatch
from sparselt.facts import LAYER_OPS
from sparselt.nn import SPARSE_LAYERS, SparseLayer
from sparselt.packed import accept_packed_keys
from sparselt.plan import FORMAT_CHOICES, SEMI_STRUCTURED, Plan
from sparselt.semi_structured import SemiStructuredLinear
from sparselt.shapes import drawn
from sparselt.tune import Tuner

__all__ = ["PLAN_ATTRIBUTE", "Prepared", "as_call", "convert", "densify", "prepare"]

# Where a layer that conversion left dense keeps its plan.
PLAN_ATTRIBUTE = "sparselt_plan"

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


@dataclass
class Prepared:
    """A copy of a model, ready to be planned.

    Attributes:
        model: the copy: eval mode, no gradients, pruning and parametrizations baked.
        masks: what the pruning of a layer keeps, where a mask said so; by layer.
        obstacles: why a layer must stay dense, by layer.
    """

    model: nn.Module
    masks: dict[nn.Module, Tensor] = field(default_factory=dict)
    obstacles: dict[nn.Module, str] = field(default_factory=dict)


def convert(model: nn.Module, example_inputs: Any = None, format: str = "auto") -> nn.Module:
    """A copy of a pruned model whose layers run sparse where that is faster.

    nn.Linear, nn.Conv1d and nn.Conv2d are swapped for their counterparts in `sparselt.nn`; state
    dicts, deepcopy, pickle, torch.export and torch.compile keep working. Masks of
    torch.nn.utils.prune and parametrizations are baked in. The copy only runs forward.

    Args:
        model: any module; not changed.
        example_inputs: what the model is called with: a tensor, a tuple of arguments or a
            dictionary of keyword arguments. The shapes that reach each layer are recorded, and
            dense and sparse are timed on them. None times linear layers at batch 1 and lets a rule
            decide about convolutions.
        format: "auto" (whatever is fastest, dense included), another one of
            `sparselt.plan.FORMAT_CHOICES` (used wherever a layer has zeros and a kernel applies,
            faster or not) or "dense" (swaps nothing).

    Returns:
        The copy, in eval mode. `sparselt.explain` says what became of each layer and why.

    Raises:
        OptionError: the model is no module, the format is unknown, or the model fails on the
            example inputs.
        KernelError: SPARSELT_KERNEL names a kernel that is unknown or does not fit a layer.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU())
        >>> sparse = convert(model, torch.ones(1, 8))
        >>> torch.equal(sparse(torch.ones(2, 8)), model(torch.ones(2, 8)))
        True
    """
    if format not in FORMAT_CHOICES:
        raise OptionError(explain_mismatch("format", f"one of {FORMAT_CHOICES}", repr(format)))
    prepared = prepare(model)
    layers = [m for m in prepared.model.modules() if isinstance(m, tuple(LAYER_OPS))]
    called = None if example_inputs is None else _record(prepared.model, layers, example_inputs)
    tuner = Tuner(format, sum(_weight_bytes(layer) for layer in layers))
    plans = {layer: _plan(tuner, prepared, layer, called) for layer in layers}
    return _swap(prepared, plans)


def prepare(model: nn.Module) -> Prepared:
    """Copies a model for inference, and bakes what recomputes its weights.

    Raises:
        OptionError: `model` is not a module, or one of TorchScript.
    """
    if not isinstance(model, nn.Module):
        raise OptionError(explain_mismatch("model", "a torch.nn.Module", type(model).__name__))
    if isinstance(model, torch.jit.ScriptModule):
        expected = "the module that TorchScript was made from"
        raise OptionError(explain_mismatch("model", expected, type(model).__name__))
    prepared = Prepared(_copy(model).eval().requires_grad_(False))
    for module in list(prepared.model.modules()):
        mask = _bake(module)
        if not isinstance(module, tuple(LAYER_OPS)):
            continue
        if mask is not None:
            prepared.masks[module] = mask
        if type(module) not in LAYER_OPS:
            kind = type(module).__name__
            prepared.obstacles[module] = f"{kind} may use its weight in a way of its own"
        elif not isinstance(module._parameters.get("weight"), Tensor):
            prepared.obstacles[module] = "its weight is computed anew by a hook at every call"
    return prepared


def densify(model: nn.Module) -> nn.Module:
    """Swaps the sparse layers of a model for torch's, in place; the opposite of `convert`.

    Args:
        model: changed, unless it is itself a sparse layer.

    Returns:
        The model; its dense counterpart if it is itself a sparse layer.
    """
    kinds = (SparseLayer, SemiStructuredLinear)
    sparse = [module for module in model.modules() if isinstance(module, kinds)]
    return _replace(model, {layer: layer.to_dense() for layer in sparse})


def as_call(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as positional and keyword arguments of the model.

    Args:
        example_inputs: a dictionary of keyword arguments, a tuple or list of positional ones, or
            the only argument itself.
    """
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def run_once(model: nn.Module, example_inputs: Any) -> Any:
    """The result of a model on its examples; both are left as they were.

    Args:
        model: may change its inputs and its buffers when it runs.
        example_inputs: as `as_call` takes them.

    Raises:
        OptionError: the model fails on them.
    """
    args, kwargs = pytree.tree_map_only(Tensor, torch.clone, as_call(example_inputs))
    state = [
        (module, name, buffer, buffer._version, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and not buffer.is_inference()
    ]
    try:
        with torch.no_grad():
            return model(*args, **kwargs)
    except Exception as error:
        kind = type(error).__name__
        raise OptionError(f"example_inputs: the model fails on them: {kind}: {error}") from error
    finally:
        for module, name, buffer, version, value in state:
            module._buffers[name] = buffer
            if buffer._version != version:
                buffer.copy_(value)


def _copy(model: nn.Module) -> nn.Module:
    """A deep copy, also where torch refuses one: pruning keeps weights that are no leaves."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


def _bake(module: nn.Module) -> Tensor | None:
    """Makes computed weights plain ones; returns the pruning mask of `weight` if there was one."""
    mask: Tensor | None = None
    for hook in list(module._forward_pre_hooks.values()):
        name = getattr(hook, "_tensor_name", None) or getattr(hook, "name", None)
        if isinstance(hook, prune.BasePruningMethod):
            if name == "weight":
                mask = getattr(module, "weight_mask") != 0  # noqa: B009
            prune.remove(module, name)  # type: ignore[no-untyped-call]
        elif type(hook).__name__ == "WeightNorm":
            nn.utils.remove_weight_norm(module, name or "weight")
        elif type(hook).__name__ == "SpectralNorm":
            nn.utils.remove_spectral_norm(module, name or "weight")
    if parametrize.is_parametrized(module):
        # Torch removes the property from the module's class, which the copy shares with the model.
        shared = type(module)
        module.__class__ = type(shared.__name__, shared.__bases__, dict(shared.__dict__))
        for name in list(module.parametrizations):  # type: ignore[arg-type]
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
            # Torch leaves a buffer where several tensors made up the weight.
            if name in ("weight", "bias") and name in module._buffers:
                value = module._buffers.pop(name)
                assert value is not None
                module.register_parameter(name, nn.Parameter(value.detach(), False))
    module.requires_grad_(False)
    return mask


def _record(
    model: nn.Module, layers: Iterable[nn.Module], example_inputs: Any
) -> dict[nn.Module, list[Tensor]]:
    """What each layer is called with when the model runs on the examples, as empty look-alikes."""
    seen: dict[nn.Module, Counter[tuple[Any, ...]]] = {layer: Counter() for layer in layers}

    def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs.get("input")
        if isinstance(x, Tensor):
            seen[layer][tuple(x.shape), x.stride(), x.dtype, x.device] += 1

    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in seen]
    try:
        run_once(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {layer: _look_alikes(shapes) for layer, shapes in seen.items()}


def _look_alikes(shapes: Counter[tuple[Any, ...]]) -> list[Tensor]:
    """Random tensors of the recorded shapes, the most frequent ones first, at most three."""
    made = []
    for (shape, stride, dtype, device), _ in shapes.most_common(3):
        x = torch.empty_strided(shape, stride, dtype=torch.float32, device=device)
        made.append(x.normal_().to(dtype) if dtype.is_floating_point else x.zero_())
    return made


def _plan(
    tuner: Tuner,
    prepared: Prepared,
    layer: nn.Module,
    called: Mapping[nn.Module, list[Tensor]] | None,
) -> Plan:
    obstacle = prepared.obstacles.get(layer, "")
    inputs = [] if called is None else called[layer]
    note = ""
    if not inputs:
        note = "no example inputs" if called is None else "the example inputs do not reach it"
        if isinstance(layer, nn.Linear):
            weight = layer.weight
            inputs = [drawn((1, layer.in_features)).to(weight.device, weight.dtype)]
            note += ": timed at batch 1"
    plan = tuner.plan(layer, prepared.masks.get(layer), inputs, obstacle)
    if note and (plan.dense_us is not None or "not measured" in plan.reason):
        plan = replace(plan, reason=f"{plan.reason} ({note})")
    return plan


def _swap(prepared: Prepared, plans: Mapping[nn.Module, Plan]) -> nn.Module:
    """Replaces, at every place they stand, the layers whose plan is sparse."""
    swapped: dict[nn.Module, nn.Module] = {}
    shared: dict[tuple[object, ...], SparseLayer] = {}
    for layer, plan in plans.items():
        if plan.is_dense:
            setattr(layer, PLAN_ATTRIBUTE, plan)
            accept_packed_keys(layer)
            continue
        if plan.format == SEMI_STRUCTURED:
            assert isinstance(layer, nn.Linear)
            halved = SemiStructuredLinear(layer, plan, prepared.masks.get(layer))
            accept_packed_keys(halved)
            swapped[layer] = _with_hooks(halved, layer)
            continue
        sparse = SPARSE_LAYERS[type(layer)](layer, plan, prepared.masks.get(layer))
        # Layers tied to one weight stay tied.
        tie = (id(layer.weight), plan.format, plan.block)
        sparse.weight = shared.setdefault(tie, sparse).weight
        swapped[layer] = _with_hooks(sparse, layer)
    return _replace(prepared.model, swapped)


def _with_hooks(made: nn.Module, layer: nn.Module) -> nn.Module:
    for name in _HOOKS:
        setattr(made, name, getattr(layer, name))
    return made


def _replace(model: nn.Module, by: Mapping[nn.Module, nn.Module]) -> nn.Module:
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in by:
                parent._modules[name] = by[child]
    return by.get(model, model)


def _weight_bytes(layer: nn.Module) -> int:
    weight = layer.weight
    return weight.numel() * weight.element_size() if isinstance(weight, Tensor) else 0
