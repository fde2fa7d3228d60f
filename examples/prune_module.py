# SPDX-License-Identifier: Apache-2.0
"""A model pruned with torch.nn.utils.prune, made fast without `prune.remove` or any other change.

    python examples/prune_module.py [--amount 0.9]

Masks are baked into a copy; the model itself can go on training.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn
from torch.nn.utils import prune

import sparselt


def main(arguments: list[str] | None = None) -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--amount", type=float, default=0.9, help="of weights to prune (0.9)")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU())
    model.append(nn.Linear(1024, 10))
    for layer in model:
        if isinstance(layer, nn.Linear):
            prune.l1_unstructured(layer, "weight", amount=options.amount)

    x = torch.randn(16, 256)
    converted = sparselt.convert(model, x)  # a module like the model: state_dict, export, hooks
    program = sparselt.compile(model, x)  # a function, and the fastest
    print(sparselt.explain(converted))
    with torch.inference_mode():
        want = model.eval()(x)
        for name, fast in (("converted", converted), ("compiled", program)):
            print(f"{name}: largest difference {(fast(x) - want).abs().max():.1e}")


if __name__ == "__main__":
    main()
