# SPDX-License-Identifier: Apache-2.0
"""What this installation can do here, and why not more: the `doctor` command."""

from __future__ import annotations

import itertools
import os
from importlib.util import find_spec
from typing import Any

import torch

import sparselt
from sparselt.errors import SparseltError
from sparselt.measure.baselines import BASELINES, compiler
from sparselt.measure.machine import header
from sparselt.measure.report import Column
from sparselt.measure.suites import Layer
from sparselt.plan import KernelInfo

__all__ = ["ADVICE", "FACT_COLUMNS", "KERNEL_COLUMNS", "doctor", "kernel_lines", "self_test"]

ADVICE = (
    "Masks alone give no speed: a pruned network still multiplies by its zeros, in torch, ONNX "
    "Runtime and OpenVINO alike. Only kernels that skip them do; sparselt.compile(model, inputs) "
    "swaps those in, and sparselt.explain says what each layer gained."
)

FACT_COLUMNS = (
    Column("what", lambda row: str(row["what"]), right=False),
    Column("finding", lambda row: str(row["finding"]), right=False),
)
KERNEL_COLUMNS = (
    Column("kernel", lambda row: str(row["kernel"]), right=False),
    Column("usable", lambda row: "yes" if row["usable"] else "no", right=False),
    Column("self-test", lambda row: str(row["test"]), right=False),
)

# Sizes next to no tile's multiple, so that every kernel's tail runs too.
_SELF_TESTS = {
    "spmm": Layer("self-test", 37, 53, columns=71),
    "conv2d": Layer("self-test", 13, 7, kernel=3, size=19),
}
# Blocks of zeros, and whether the weights of a row differ in sign alone.
_PATTERNS = (((1, 1), False), ((4, 1), False), ((1, 1), True))


def self_test(info: KernelInfo) -> str:
    """Run one kernel on small problems against float64; "passed", or why not.

    Kernels of another device are left to the test suite (`make test PYTEST_ARGS="-m cuda"`).
    """
    if info.device != "cpu":
        return f"not run here: {info.device}"
    from sparselt.measure.layers import contenders, problem  # needs the extension

    for op, layer in _SELF_TESTS.items():
        if op not in info.operations:
            continue
        # The first that suits the kernel's format.
        cases = (problem(layer, 0.2, block=block, signs=signs) for block, signs in _PATTERNS)
        found = ((case, contenders(case, only=(info.name,), kernels=(info,))) for case in cases)
        try:
            with torch.inference_mode():
                case, (item,) = next(pair for pair in found if pair[1])
                error, within = case.error(item.run())
        except (RuntimeError, ValueError, SparseltError) as failure:
            return f"FAILED: {str(failure).splitlines()[0]}"
        if not within:
            return f"FAILED: error {error:.2g} in {op}"
    return "passed"


def _isa_finding(machine: dict[str, Any]) -> str:
    forced = os.environ.get("SPARSELT_ISA", "")
    if forced:
        return f"{machine['isa']} (forced by SPARSELT_ISA={forced})"
    return f"{machine['isa']} (the best that this CPU has; SPARSELT_ISA overrides it)"


def _cuda_finding() -> str:
    if torch.version.cuda is None:
        return "no: the installed torch is a CPU build; install a CUDA build of torch first"
    if find_spec("sparselt._C_cuda") is None:
        return (
            f"no: sparselt was built without CUDA; it needs nvcc {torch.version.cuda.split('.')[0]}"
            ".x at build time (SPARSELT_CUDA=1 makes a missing one an error)"
        )
    if not torch.cuda.is_available():
        return "no: sparselt was built with CUDA, but torch sees no GPU here"
    return f"yes: {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"


def _compiler_finding() -> str:
    found = compiler()
    return f"yes, with {found}" if found else "no: there is no C++ compiler on the PATH"


def _facts(machine: dict[str, Any], first_choices: str) -> list[dict[str, str]]:
    versions = machine["versions"]
    threads = f"{machine['threads']} of {machine['cores']} cores"
    if machine["affinity"] and len(machine["affinity"]) != machine["cores"]:
        threads += f" (this process may use {len(machine['affinity'])})"
    engines = [name for name, baseline in BASELINES.items() if baseline.dense]
    absent = {name: BASELINES[name].usable() for name in engines}
    lines = {
        "sparselt": sparselt.__version__ + ("" if "sparselt" in versions else " (not installed)"),
        "python": f"{machine['python']} on {machine['system']} {machine['architecture']}",
        "torch": f"{versions['torch']}, its own kernels use {machine['torch_isa']}",
        "processor": machine["cpu"] + (" (virtual machine)" if machine["virtual_machine"] else ""),
        "its features": " ".join(machine["flags"]) or "unknown",
        "instruction set in use": _isa_finding(machine),
        "kernels tried first": first_choices or "none",
        "threads": f"{threads}; torch.set_num_threads or OMP_NUM_THREADS changes it",
        "CUDA": _cuda_finding(),
        "torch.compile": _compiler_finding(),
        "dense engines for bench": ", ".join(name for name in engines if not absent[name]),
    }
    for name, reason in absent.items():
        if reason:
            lines[f"without {name}"] = reason
    return [{"what": what, "finding": finding} for what, finding in lines.items()]


def _kernel_rows() -> list[dict[str, Any]]:
    try:
        from sparselt import ops

        kernels = ops.kernels()
    except ImportError as error:
        text = f"not run: {error}"
        return [
            {
                "kernel": "none: the extension does not load",
                "serves": "",
                "usable": False,
                "test": text,
            }
        ]
    return [
        {
            "kernel": info.name,
            "serves": f"{info.op} {info.format} {info.device}",
            "usable": info.usable,
            "test": self_test(info) if info.usable else f"not run: {info.reason}",
        }
        for info in kernels
    ]


def kernel_lines(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The kernel table's lines: unusable kernels that share a reason share a line.

    Example:
        >>> row = {"usable": False, "test": "no GPU"}
        >>> kernel_lines([{"kernel": "a", **row}, {"kernel": "b", **row}])[0]["kernel"]
        'a to b (2)'
    """
    lines = []
    for (usable, test), found in itertools.groupby(rows, lambda r: (r["usable"], r["test"])):
        same = list(found)
        if usable or len(same) == 1:
            lines += same
        else:
            kernel = f"{same[0]['kernel']} to {same[-1]['kernel']} ({len(same)})"
            lines.append({**same[0], "kernel": kernel, "test": test})
    return lines


def doctor() -> dict[str, Any]:
    """Look at this installation.

    Returns:
        {"kind": "doctor", "machine": header, "rows": what was found, "kernels": one row for each
        registered kernel, "healthy": whether every usable kernel passed its self-test}.
    """
    machine = header()
    kernels = _kernel_rows()
    usable = [row for row in kernels if row["usable"]]
    first = {row["serves"]: row["kernel"] for row in reversed(usable)}
    return {
        "kind": "doctor",
        "machine": machine,
        "rows": _facts(machine, ", ".join(first[key] for key in sorted(first))),
        "kernels": kernels,
        "healthy": bool(usable) and not any(row["test"].startswith("FAILED") for row in usable),
    }
