# SPDX-License-Identifier: Apache-2.0
"""Random convolutional networks through compile, convert and torch.compile, against float64.

Every choice between kernels falls at random, so that all of them meet all kinds of neighbours.
A problem is its number: the same one again is the same network.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import random
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparselt
from sparselt.dynamo import backend
from sparselt.errors import ProgramFileError

ACTIVATIONS: tuple[Callable[[], nn.Module], ...] = (
    nn.ReLU,
    nn.ReLU6,
    nn.SiLU,
    nn.Hardswish,
    nn.GELU,
    nn.Sigmoid,
    nn.Hardsigmoid,
    nn.LeakyReLU,
    nn.PReLU,
    nn.ELU,
    nn.Tanh,
    nn.Hardtanh,
    nn.Softplus,
    nn.Identity,
    lambda: nn.ReLU(inplace=True),
    lambda: nn.SiLU(inplace=True),
)
POOLS: tuple[Callable[[], nn.Module], ...] = (
    lambda: nn.MaxPool2d(2),
    lambda: nn.MaxPool2d(3, 2, 1),
    lambda: nn.MaxPool2d(3, 1, 1, ceil_mode=True),
    lambda: nn.AvgPool2d(2),
    lambda: nn.AvgPool2d(3, 1, 1),
    lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    lambda: nn.AdaptiveAvgPool2d((3, 4)),
    lambda: nn.AdaptiveMaxPool2d(3),
)
FUNCTIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: x * 0.5 + 0.1,
    lambda x: x.clamp(-1, 2),
    lambda x: x.abs(),
    lambda x: x.pow(2),
    lambda x: x + torch.ones_like(x),
    lambda x: x - x.mean((2, 3), keepdim=True),
    lambda x: x[:, :, ::2],
    lambda x: x.transpose(2, 3),
    lambda x: F.softmax(x, 1),
    lambda x: F.pad(x, (1, 0, 2, 1)),
    lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    lambda x: F.interpolate(x, scale_factor=2.0),
    lambda x: torch.cat([x, x], 0)[: x.shape[0]],
    lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    lambda x: x.to(memory_format=torch.channels_last),
)
JOINS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    lambda x, y: F.relu(x + y),
    lambda x, y: y.add_(x),
    lambda x, y: torch.add(x, y, alpha=0.5),
    lambda x, y: x - y,
    lambda x, y: x * y,
    lambda x, y: torch.maximum(x, y),
    lambda x, y: torch.cat([x, y], 1),
)
LARGEST_MAP = 200_000  # elements of two samples
TIMES_TORCH = 4.0
ROUNDING = 4e-6


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Branch(nn.Module):
    """What goes in, joined with what `inner` makes of it."""

    def __init__(self, inner: nn.Module, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.join = inner, join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(x, self.inner(x))


class Halves(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        return torch.cat([left, self.inner(right)], 1)


class Excitation(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layer = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.layer(x.mean((2, 3))))[:, :, None, None]


class Shuffle(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        split = x.view(batch, 2, channels // 2, height, width)
        return split.transpose(1, 2).reshape(x.shape)


def convolution(chance: random.Random, channels: int, out: int, same: bool) -> nn.Conv2d:
    """A convolution with all that may differ; `same` keeps the size of the map."""
    kernel = chance.choice([1, 3] if same else [1, 1, 2, 3, 3, 5, (1, 3), (3, 1)])
    groups = chance.choice([g for g in (1, 1, 1, 2, 3, channels) if not (channels % g or out % g)])
    bias = chance.random() < 0.5
    if same:
        return nn.Conv2d(channels, out, kernel, 1, kernel // 2, 1, groups, bias)
    stride = chance.choice([1, 1, 1, 2, (2, 1)])
    padding = chance.choice([0, 1, 2, (1, 0), *["same"] * (stride == 1)])
    mode = chance.choice(["zeros", "zeros", "reflect", "circular"]) if padding == 1 else "zeros"
    dilation = chance.choice([1, 1, 2])
    return nn.Conv2d(channels, out, kernel, stride, padding, dilation, groups, bias, mode)


def norm(chance: random.Random, channels: int) -> nn.Module:
    made = nn.BatchNorm2d(channels, affine=chance.random() < 0.8)
    assert made.running_mean is not None
    assert made.running_var is not None
    made.running_mean.uniform_(-1, 1)
    made.running_var.uniform_(0.3, 2)
    others = [nn.GroupNorm(1, channels), nn.InstanceNorm2d(channels), nn.Identity()]
    return chance.choice([made, made, made, *others])


def block(chance: random.Random, channels: int) -> nn.Module:
    kind = chance.choice(["plain"] * 3 + ["branch", "halves", "pool", "function", "other"])
    activation = chance.choice(ACTIVATIONS)()
    if kind == "plain":
        out = chance.choice([channels, 8, 12, 16, 24, 33])
        layer = convolution(chance, channels, out, same=False)
        return nn.Sequential(layer, norm(chance, out), activation, nn.Dropout(0.5))
    if kind == "branch":
        wide = chance.choice([8, 12, 17])
        first = convolution(chance, channels, wide, same=True)
        last = convolution(chance, wide, channels, same=True)
        inner = nn.Sequential(first, norm(chance, wide), activation, last, norm(chance, channels))
        return Branch(inner, chance.choice(JOINS))
    if kind == "halves":
        half = channels // 2
        return Halves(nn.Sequential(convolution(chance, half, half, same=True), activation))
    if kind == "pool":
        return chance.choice(POOLS)()
    if kind == "function":
        return Function(chance.choice(FUNCTIONS))
    return chance.choice([activation, Excitation(channels), Shuffle()])


def network(chance: random.Random) -> tuple[nn.Module, tuple[int, ...]]:
    """A network, and the shape of one sample; blocks that do not fit the map are left out."""
    channels, size = chance.choice([3, 4, 8]), chance.choice([9, 12, 16, 17, 20])
    shape = (channels, size, size + chance.choice([0, 3]))
    body = nn.Sequential()
    maps = torch.randn(2, *shape)
    for _ in range(chance.randint(2, 7)):
        try:
            more = block(chance, maps.shape[1]).eval()
            found = more(maps.clone())
        except (RuntimeError, ValueError, IndexError):
            continue
        if 0 < found.numel() < LARGEST_MAP and found.isfinite().all():
            body.append(more)
            maps = found
    if chance.random() < 0.5:
        body.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(maps.shape[1], 20)])
        body.extend([chance.choice(ACTIVATIONS)(), nn.Linear(20, 7)])
    elif chance.random() < 0.6:
        body.extend([nn.Flatten(), nn.Linear(maps[0].numel(), 16), nn.ReLU(), nn.Softmax(1)])
    return body.eval(), shape


@contextlib.contextmanager
def choices_at_random(chance: random.Random) -> Iterator[None]:
    """In place of the clock; dense wins seldom. What cannot run fails here as it would there."""

    def measure(calls: Mapping[str, Callable[[], object]], **_: object) -> dict[str, float]:
        with torch.inference_mode():
            for call in calls.values():
                call()
        dense = {"dense", "all dense"}
        return {name: chance.uniform(1, 100) * (5 if name in dense else 1) for name in calls}

    with mock.patch("sparselt.tune.measure", measure):
        yield


def error(y: Tensor, wanted: Tensor) -> float:
    if not y.numel():
        return 0.0
    return float((y.double() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))


def made_fast(
    how: str, model: nn.Module, x: Tensor, chance: random.Random
) -> tuple[str, Callable[[Tensor], Tensor]]:
    if how == "convert":
        return how, sparselt.convert(model, x)
    if how == "dynamo":
        torch._dynamo.reset()
        return how, torch.compile(model, backend=backend)
    program = sparselt.compile(model, x)
    if chance.random() < 0.3:
        with tempfile.TemporaryDirectory() as folder, contextlib.suppress(ProgramFileError):
            program.save(Path(folder) / "program.safetensors")
            return "load", sparselt.load_program(Path(folder) / "program.safetensors")
    return how, program


@torch.no_grad()
def run_problem(number: int) -> str:
    """How the network was made fast; AssertionError where it computes something else."""
    chance = random.Random(number)
    torch.manual_seed(number)
    torch.set_num_threads(chance.choice([1, 2]))
    model, shape = network(chance)
    density = chance.choice([0.05, 0.1, 0.3, 0.5])
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.weight.mul_(torch.rand(layer.weight.shape) < density).div_(density**0.5)
    double = copy.deepcopy(model).double()
    batch = chance.choice([1, 2, 3, 5])
    inputs = [torch.randn(size, *shape) for size in (batch, chance.choice([1, 2, 4, 7]), batch)]
    with choices_at_random(chance):
        how = chance.choice(["compile", "compile", "compile", "convert", "dynamo"])
        how, fast = made_fast(how, model, inputs[0], chance)
        for x in inputs:
            if chance.random() < 0.3:
                x = x.to(memory_format=torch.channels_last)
            wanted = double(x.double())
            ours, torchs = fast(x.clone()), model(x.clone())
            assert ours.shape == wanted.shape
            assert ours.dtype == torch.float32
            allowed = max(TIMES_TORCH * error(torchs, wanted), ROUNDING)
            assert error(ours, wanted) <= allowed, (
                f"{how}: {error(ours, wanted):.1e} > {allowed:.1e}"
            )
    return how


def main(arguments: list[str] | None = None) -> int:
    """Run the problems; 0 if all are right, 1 at the first that is not."""
    parser = argparse.ArgumentParser(description="Fuzz whole networks against float64.")
    parser.add_argument("--problems", type=int, default=300, help="how many (300)")
    parser.add_argument("--first", type=int, default=0, help="number of the first problem (0)")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")  # torch's own, on odd networks
    counts: Counter[str] = Counter()
    for number in range(options.first, options.first + options.problems):
        try:
            counts[run_problem(number)] += 1
        except Exception as failure:
            print(f"network {number} failed: {type(failure).__name__}: {failure}", file=sys.stderr)
            again = f"python tests/fuzz_networks.py --first {number} --problems 1"
            print(f"again: {again}", file=sys.stderr)
            return 1
    ran = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    print(f"{options.problems} networks right: {ran}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
