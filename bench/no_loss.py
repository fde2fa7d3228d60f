# SPDX-License-Identifier: Apache-2.0
"""A search for networks that `sparselt.compile` makes slower: `python -m bench.no_loss`.

Small networks of random sizes, with few zeros or none, at the batches that are hard to serve. Each
is checked and then timed in turns with torch eager and, with --compile, torch.compile, in one
process. What loses is timed again for longer, and only what loses twice is reported.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import sparselt
from sparselt.measure.machine import header, one_line
from sparselt.measure.networks import prune_randomly
from sparselt.measure.report import write_json
from sparselt.measure.timer import interleave

__all__ = ["KINDS", "Sample", "find_losses", "main", "samples"]

DENSITIES = (1.0, 0.7, 0.5, 0.3)
BATCHES = (1, 3, 15, 17)
# A loss is at least so large, in both measurements, and more than the noise of either.
_MARGIN = 1.05
_SECONDS, _MORE_SECONDS = 0.05, 0.4
_CLOSE = 1e-3


def _stack(layers: Callable[[int], nn.Module], channels: int, norm: type[nn.Module]) -> nn.Module:
    parts = [part for i in range(3) for part in (layers(i), norm(channels), nn.ReLU())]
    return nn.Sequential(*parts)


def _conv2d(channels: int, **geometry: object) -> nn.Module:
    def layer(index: int) -> nn.Module:
        return nn.Conv2d(channels, channels, **geometry)  # type: ignore[arg-type]

    return _stack(layer, channels, nn.BatchNorm2d)


def _asymmetric(channels: int) -> nn.Module:
    def layer(index: int) -> nn.Module:
        pad = nn.ZeroPad2d((1, 0, 2, 1))
        return nn.Sequential(pad, nn.Conv2d(channels, channels, (3, 2), padding=(0, 0)))

    return _stack(layer, channels, nn.BatchNorm2d)


def _separable(channels: int) -> nn.Module:
    def layer(index: int) -> nn.Module:
        depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        return nn.Sequential(depthwise, nn.Conv2d(channels, channels, 1))

    return _stack(layer, channels, nn.BatchNorm2d)


def _conv1d(channels: int) -> nn.Module:
    return _stack(
        lambda index: nn.Conv1d(channels, channels, 5, padding=2), channels, nn.BatchNorm1d
    )


def _linear(features: int) -> nn.Module:
    return _stack(lambda index: nn.Linear(features, features), features, nn.BatchNorm1d)


# How a network of so many channels is built, which counts of these, and sizes of a map's axes.
KINDS: dict[str, tuple[Callable[[int], nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "linear": (_linear, (16, 64, 100, 256, 500), ()),
    "wide linear": (_linear, (1024, 2048), ()),
    "conv 1-D": (_conv1d, (16, 32, 64, 128), (50, 128, 500)),
    "conv 1x1": (lambda n: _conv2d(n, kernel_size=1), (16, 64, 256), (7, 14, 28)),
    "conv 3x3": (lambda n: _conv2d(n, kernel_size=3, padding=1), (16, 32, 64, 128), (7, 14, 28)),
    "wide conv": (lambda n: _conv2d(n, kernel_size=3, padding=1), (256, 512), (4, 7, 13)),
    "grouped": (
        lambda n: _conv2d(n, kernel_size=3, padding=1, groups=4),
        (32, 64, 128),
        (7, 14, 28),
    ),
    "dilated": (lambda n: _conv2d(n, kernel_size=3, padding=2, dilation=2), (16, 64), (9, 14, 28)),
    "odd strides": (
        lambda n: _conv2d(n, kernel_size=(3, 5), stride=(1, 2), padding=(1, 2)),
        (16, 64),
        (13, 28, 33),
    ),
    "asymmetric": (_asymmetric, (16, 64), (9, 14, 28)),
    "separable": (_separable, (32, 128), (7, 14, 28)),
}


@dataclass(frozen=True)
class Sample:
    """One network of the search."""

    kind: str
    channels: int
    size: int
    batch: int
    density: float

    def build(self) -> nn.Module:
        """The network with its zeros, in eval mode."""
        torch.manual_seed(0)
        return prune_randomly(KINDS[self.kind][0](self.channels), self.density)

    def inputs(self) -> Tensor:
        """What it is called with."""
        axes = 0 if "linear" in self.kind else 1 if "1-D" in self.kind else 2
        return torch.randn(self.batch, self.channels, *[self.size] * axes)

    def __str__(self) -> str:
        size = f" at {self.size}" if self.size else ""
        return (
            f"{self.kind} {self.channels}{size}, batch {self.batch}, {1 - self.density:.0%} zeros"
        )


def samples(seed: int) -> Iterator[Sample]:
    """Endlessly many, the kinds in turns."""
    rng = random.Random(seed)
    while True:
        for kind, (_, channels, sizes) in KINDS.items():
            size = rng.choice(sizes) if sizes else 0
            yield Sample(
                kind, rng.choice(channels), size, rng.choice(BATCHES), rng.choice(DENSITIES)
            )


def time_one(sample: Sample, with_compile: bool) -> dict[str, object]:
    """The row of one network: microseconds of each engine, the ratio, and whether it lost twice."""
    model, x = sample.build(), sample.inputs()
    program = sparselt.compile(model, x)
    calls: dict[str, Callable[[], object]] = {
        "sparselt": lambda: program(x),
        "torch": lambda: model(x),
    }
    with torch.inference_mode():
        if with_compile:
            torch._dynamo.reset()
            # Freezing folds batch norm and prepacks the weights: the strong form.
            compiled = torch.compile(model.requires_grad_(False), options={"freezing": True})
            calls["torch.compile"] = lambda: compiled(x)
        wanted = model(x)
        scale = float(wanted.abs().max())
        wrong = not torch.allclose(program(x), wanted, _CLOSE, _CLOSE * scale)
        row: dict[str, object] = {"case": str(sample), "wrong": wrong, "lost": True}
        for seconds in (_SECONDS, _MORE_SECONDS):
            found = interleave(calls, repeats=30, seconds=seconds, warmup_seconds=0.02)
            times = {name: timing.quantile_us(0.25) for name, timing in found.items()}
            best = min(times[name] for name in times if name != "sparselt")
            noise = max(timing.noise for timing in found.values())
            row |= {"us": times, "ratio": times["sparselt"] / best, "noise": noise}
            if times["sparselt"] <= best * max(_MARGIN, 1 + noise):
                return row | {"lost": False}
    return row


def find_losses(
    seconds: float, seed: int, with_compile: bool, progress: Callable[[str], None]
) -> list[dict[str, object]]:
    """Rows of as many networks as `seconds` allow."""
    rows = []
    end = time.monotonic() + seconds
    for sample in samples(seed):
        if time.monotonic() > end:
            return rows
        progress(str(sample))
        rows.append(time_one(sample, with_compile))
    raise AssertionError("there is always one more sample")


def main(words: list[str] | None = None) -> int:
    """The command; 1 where a network is slower or wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench.no_loss", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to search")
    parser.add_argument("--seed", type=int, default=0, help="of the networks' sizes")
    parser.add_argument("--compile", action="store_true", help="against torch.compile as well")
    parser.add_argument("--threads", type=int, help="for all alike; by default torch's number")
    parser.add_argument("--json", metavar="FILE", help="write all rows here")
    arguments = parser.parse_args(words)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    say = Console(stderr=True)
    rows = find_losses(arguments.seconds, arguments.seed, arguments.compile, say.print)
    lost = [row for row in rows if row["lost"] or row["wrong"]]
    table = Table(
        "network", "ratio", "noise", "us", title=f"{len(lost)} of {len(rows)} networks lose"
    )
    for row in sorted(lost, key=lambda row: -float(str(row["ratio"]))):
        times = row["us"]
        assert isinstance(times, dict)
        told = ", ".join(f"{name} {us:.1f}" for name, us in times.items())
        name = f"WRONG: {row['case']}" if row["wrong"] else str(row["case"])
        table.add_row(name, f"{row['ratio']:.2f}", f"{row['noise']:.0%}", told)
    table.caption = one_line(header())
    Console().print(table)
    if arguments.json:
        write_json(arguments.json, {"kind": "no_loss", "machine": header(), "rows": rows})
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
