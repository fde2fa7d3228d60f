# SPDX-License-Identifier: Apache-2.0
"""Units whose ReLU never fires: found by running data, and removed without changing the outputs.

A channel is idle if every weight that reads it reads nothing but zeros on the data given, or is
zero itself. Removing idle channels leaves the outputs on that data as they are, up to the rounding
of sums in another order; on other data an idle channel may have fired.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sparselt.errors import DataError
from sparselt.lottery.structured import Shrunk, remove_channels
from sparselt.lottery.structured_graph import call_of, trace_channels
from sparselt.tickets.architecture import ChannelGroup, Delta

__all__ = ["Activity", "idle_channels", "relu_activity", "remove_idle"]

_RELUS = (F.relu, F.relu_, F.relu6, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)


@dataclass(frozen=True)
class Activity:
    """How much one ReLU fires on given data.

    Attributes:
        name: The module that calls it, and which call it is where there are several: ``blocks.0#2``
            is the second.
        units: Channels (axis 1, or features of a (B, K) value).
        dead: Channels that never fire, increasing.
        density: Share of the outputs that are above 0.
    """

    name: str
    units: int
    dead: tuple[int, ...]
    density: float


@dataclass
class _Tally:
    fired: Tensor
    positive: int = 0
    total: int = 0


def relu_activity(model: nn.Module, batches: Iterable[Any]) -> tuple[Activity, ...]:
    """Runs ``model`` in evaluation mode and counts where its ReLUs fire.

    ReLU modules and functions (``F.relu``, ``torch.relu``, their in-place forms, ``relu6``) are
    seen.

    Args:
        model: The network; its mode is put back.
        batches: Inputs, each a tensor, a tuple of arguments or a dictionary of keyword arguments.

    Returns:
        One row a ReLU, in the order they run.

    Raises:
        DataError: There is no batch.

    Example:
        >>> model = nn.Sequential(nn.Linear(1, 2), nn.ReLU())
        >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0], [-1.0]]))
        >>> _ = model[0].bias.data.zero_()
        >>> relu_activity(model, [torch.ones(4, 1)])
        (Activity(name='1', units=2, dead=(1,), density=0.5),)
    """
    watch = _Watch()
    with ExitStack() as stack:
        for name, module in model.named_modules():
            entering = module.register_forward_pre_hook(watch.entering(name))
            leaving = module.register_forward_hook(watch.leaving(), always_call=True)
            stack.callback(entering.remove)
            stack.callback(leaving.remove)
        stack.enter_context(watch)
        _run(model, batches, watch.start_batch)
    return tuple(
        Activity(
            name,
            tally.fired.numel(),
            tuple((~tally.fired).nonzero().reshape(-1).tolist()),
            tally.positive / max(tally.total, 1),
        )
        for name, tally in watch.tallies.items()
    )


def idle_channels(model: nn.Module, batches: Iterable[Any]) -> Delta:
    """The channels of ``model`` that no layer reads anything from on ``batches``.

    Args:
        model: The network; not changed.
        batches: Inputs, as for :func:`relu_activity`; the first also serves to trace the network.

    Returns:
        A delta that removes them; one channel of a group stays even if all are idle.

    Raises:
        DataError: There is no batch.
        FormatError: The network cannot be traced, or nothing in it can be removed.
    """
    batches = list(batches)
    if not batches:
        raise DataError("batches: expected at least one, got none")
    channels = trace_channels(model, batches[0])
    used = _used_columns(model, batches)
    groups, kept = [], []
    for group in channels.groups:
        busy = _busy(group, used)
        if bool(busy.all()):
            continue
        if not bool(busy.any()):
            busy[0] = True
        groups.append(group)
        kept.append(tuple(busy.nonzero().reshape(-1).tolist()))
    return Delta(tuple(groups), tuple(kept))


def remove_idle(model: nn.Module, batches: Iterable[Any]) -> Shrunk:
    """Shrinks a copy of ``model`` by its idle channels; see :func:`idle_channels`.

    Returns:
        The small network and its delta. Its outputs on ``batches`` are those of ``model`` up to
        rounding.

    Raises:
        DataError: There is no batch.
        FormatError: The network cannot be traced or shrunk, or nothing in it can be removed.

    Example:
        >>> model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0], [-1.0]]))
        >>> _ = model[0].bias.data.zero_()
        >>> remove_idle(model, [torch.ones(4, 1)]).delta.kept
        ((0,),)
    """
    batches = list(batches)
    return remove_channels(model, idle_channels(model, batches), batches[0])


class _Watch(TorchFunctionMode):
    """Sees every call of a ReLU, and knows the module it comes from."""

    def __init__(self) -> None:
        super().__init__()
        self.tallies: dict[str, _Tally] = {}
        self._within: list[str] = []
        self._calls: dict[str, int] = {}

    def entering(self, name: str) -> Callable[..., None]:
        """A hook that notes the module being run."""
        return lambda module, given: self._within.append(name)

    def leaving(self) -> Callable[..., None]:
        """A hook that notes the return to the module above."""

        def leave(module: nn.Module, given: Any, result: Any) -> None:
            self._within.pop()

        return leave

    def start_batch(self) -> None:
        """Counts the calls of each module anew."""
        self._calls.clear()
        self._within.clear()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _RELUS or (func is F.hardtanh and _from_zero(*args, **(kwargs or {}))):
            self._add(result.detach())
        return result

    def _add(self, result: Tensor) -> None:
        module = self._within[-1] if self._within else ""
        call = self._calls[module] = self._calls.get(module, 0) + 1
        name = module if call == 1 else f"{module}#{call}"
        positive = result > 0
        fired = _by_channel(positive, min(1, result.dim() - 1)).any(1)
        tally = self.tallies.setdefault(name, _Tally(torch.zeros_like(fired)))
        tally.fired |= fired
        tally.positive += int(positive.count_nonzero())
        tally.total += positive.numel()


def _from_zero(x: Tensor, min_val: float = -1.0, *rest: Any, **named: Any) -> bool:
    """Whether a hardtanh is a ReLU6, as ``nn.ReLU6`` calls it."""
    return min_val == 0


def _run(model: nn.Module, batches: Iterable[Any], before: Callable[[], None]) -> None:
    """Runs every batch in evaluation mode, and puts the mode of each module back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    count = 0
    try:
        with torch.no_grad():
            for count, batch in enumerate(batches, 1):  # noqa: B007
                before()
                given, named = call_of(batch)
                model(*given, **named)
    finally:
        for module, training in modes.items():
            module.training = training
    if not count:
        raise DataError("batches: expected at least one, got none")


def _used_columns(model: nn.Module, batches: Iterable[Any]) -> dict[str, Tensor]:
    """Per weight the (columns,) bool of inputs that were ever not zero and meet a weight that is
    not; the reading layers are the modules that own these weights.
    """
    used: dict[str, Tensor] = {}

    def hook(name: str, axis_from_end: int) -> Callable[..., None]:
        def look(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            inputs = given[0].detach()
            nonzero = _by_channel(inputs != 0, inputs.dim() - axis_from_end).any(1)
            used[name] = used.get(name, torch.zeros_like(nonzero)) | nonzero

        return look

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                from_end = 1 if isinstance(module, nn.Linear) else module.weight.dim() - 1
                key = f"{name}.weight" if name else "weight"
                stack.callback(module.register_forward_pre_hook(hook(key, from_end)).remove)
        _run(model, batches, lambda: None)
    weights = dict(model.named_parameters(remove_duplicate=False))
    for name, columns in used.items():
        if weights[name].shape[1] == len(columns):
            used[name] = columns & _by_channel(weights[name].detach() != 0, 1).any(1)
    return used


def _by_channel(flags: Tensor, axis: int) -> Tensor:
    """(channels, everything else) bool."""
    first = flags.movedim(axis, 0)
    return first.flatten(1) if first.dim() > 1 else first[:, None]


def _busy(group: ChannelGroup, used: dict[str, Tensor]) -> Tensor:
    """(channels,) bool: which channels something reads."""
    busy = torch.zeros(group.channels, dtype=torch.bool)
    for slot in group.slots:
        if slot.axis == 1:
            columns = used.get(slot.tensor)
            if columns is None:
                # Read by a functional call that no hook sees, so nothing is known.
                busy[:] = True
            else:
                busy |= columns.cpu()[slot.positions(group.channels)].any(1)
    return busy
