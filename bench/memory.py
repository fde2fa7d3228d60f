# SPDX-License-Identifier: Apache-2.0
"""Peak resident memory of a saved program against its dense model: `python -m bench.memory`.

Each side has a process of its own, which loads (the program's file, or a state dict into a model
without memory), calls twice, and tells the most that was ever resident, libraries and all. On
Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import sparselt
from sparselt.measure.machine import header, one_line
from sparselt.measure.networks import NETWORKS, example_inputs, pruned_network
from sparselt.measure.report import write_json

__all__ = ["main", "measure_memory"]

_BEGIN = """
import json, sys, torch
def mib(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(key)) / 1024
path, shape, network = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
"""
_SIDES = {
    "sparselt": """
import sparselt
run = sparselt.load_program(path)
""",
    "torch": """
from sparselt.measure.networks import NETWORKS
with torch.device("meta"):
    run = NETWORKS[network].build()
run.load_state_dict(torch.load(path, weights_only=True), assign=True)
run.eval()
""",
}
_END = """
loaded = mib("VmRSS"), mib("VmHWM")
x = torch.randn(shape)
with torch.inference_mode():
    run(x), run(x)
print(json.dumps({"loaded_mib": loaded[0], "loading_peak_mib": loaded[1],
                  "called_mib": mib("VmRSS"), "peak_mib": mib("VmHWM")}))
"""


def measure_memory(network: str, batch: int, density: float) -> list[dict[str, Any]]:
    """Resident memory of both sides, and of a process that has imported torch and nothing else.

    Args:
        network: a key of `NETWORKS`.
        batch: inputs a call.
        density: share of kept weights.

    Returns:
        One row a side: side, and MiB resident after loading and after two calls, and the most
        until then.
    """
    built = pruned_network(network, density=density)
    inputs = example_inputs(built.shape, batch)
    rows = [{"side": "torch imported", **_child(_BEGIN + "run = len\n" + _END, "", [1], network)}]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        sparselt.compile(built.model, inputs).save(path / "sparselt")
        torch.save(built.model.state_dict(), path / "torch")
        for side, load in _SIDES.items():
            code = _BEGIN + load + _END
            found = _child(code, str(path / side), list(inputs.shape), network)
            rows.append({"side": side, **found})
    return [{"network": network, "batch": batch, "density": density, **row} for row in rows]


def _child(code: str, path: str, shape: list[int], network: str) -> dict[str, float]:
    command = [sys.executable, "-c", code, path, json.dumps(shape), network]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = {key: round(mib, 1) for key, mib in json.loads(done.stdout).items()}
    return found


def main(argv: list[str] | None = None) -> int:
    """Measures some batches, prints the table, and writes it."""
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__)
    parser.add_argument("network", nargs="?", default="resnet50", choices=sorted(NETWORKS))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--json", metavar="FILE")
    given = parser.parse_args(argv)
    rows = [
        row for batch in given.batch for row in measure_memory(given.network, batch, given.density)
    ]
    names = [key.removesuffix("_mib").replace("_", " ") for key in rows[0]]
    table = Table(*names, title=f"MiB resident. {one_line(header())}")
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)
    if given.json:
        write_json(given.json, {"kind": "memory", "machine": header(), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
