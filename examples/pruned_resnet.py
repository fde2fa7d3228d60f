# SPDX-License-Identifier: Apache-2.0
"""A pruned ResNet from a plain state_dict: load it, compile it, look inside, keep the result.

    python examples/pruned_resnet.py [--state-dict FILE] [--density 0.1] [--out FOLDER]

Without a file, weights are made up. Zeros in the weights are all that sparselt needs to know.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import sparselt


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != channels_in:
            self.shortcut = nn.Conv2d(channels_in, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) to (B, C, H / stride, W / stride)."""
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def resnet() -> nn.Module:
    """A ResNet of four blocks for (B, 3, 32, 32) and 10 classes."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, 1, 1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        Block(32, 32, 1),
        Block(32, 64, 2),
        Block(64, 128, 2),
        Block(128, 128, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def make_up_weights(path: Path, density: float) -> None:
    """Writes what a pruning tool leaves behind: a state_dict with zeros in it."""
    torch.manual_seed(0)
    state = resnet().state_dict()
    for name, tensor in state.items():
        if tensor.dim() > 1:
            state[name] = tensor * (torch.rand_like(tensor) < density)
    torch.save(state, path)


def main(arguments: list[str] | None = None) -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--state-dict", type=Path, help="a .pt file for this ResNet")
    parser.add_argument("--density", type=float, default=0.1, help="of made-up weights (0.1)")
    parser.add_argument("--batch", type=int, default=8, help="images in a call (8)")
    parser.add_argument("--out", type=Path, help="folder for the trace and the program")
    options = parser.parse_args(arguments)
    out = options.out or Path(tempfile.mkdtemp(prefix="pruned-resnet-"))
    out.mkdir(parents=True, exist_ok=True)
    file = options.state_dict or out / "resnet.pt"
    if options.state_dict is None:
        make_up_weights(file, options.density)

    model = resnet()
    model.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(options.batch, 3, 32, 32)
    fast = sparselt.compile(model.eval(), x)

    with torch.inference_mode():
        error = (fast(x) - model(x)).abs().max()
    print(sparselt.explain(fast))
    print(f"\nlargest difference to the model: {error:.1e}\n")
    profile = fast.profile(x)
    print(profile)
    profile.save_trace(out / "trace.json")
    fast.save(out / "resnet-program.safetensors")
    again = sparselt.load_program(out / "resnet-program.safetensors")
    print(f"\nloaded from its file: {again}\ntrace and program are in {out}")


if __name__ == "__main__":
    main()
