# SPDX-License-Identifier: Apache-2.0
"""Every CUDA source compiles with nvcc against this torch's headers, CPU build or not, unspilled.

Neither a GPU nor a CUDA build of torch is needed: sources of the stable ABI include no header that
only a CUDA build has. Nothing is linked or run here, but what a unit would be linked with is read:
that tells that no operator allocates, waits or makes a stream by itself.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch
from cuda_host import built
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent.parent
KERNELS = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
HOST_UNITS = sorted((ROOT / "csrc" / "cuda").glob("*.cpp"))
ARCHITECTURES = ("80", "90a")

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


# What a unit may ask of CUDA's runtime: to launch on a stream that it is given, to raise a kernel's
# limit of shared memory, what went wrong, and what device this is.
RUNTIME = {
    "cudaDeviceGetAttribute",
    "cudaFuncSetAttribute",
    "cudaGetLastError",
    "cudaLaunchKernel",
    "cudaRuntimeGetVersion",
}
# What of torch's C interface is about a device's time or memory, and what of that it may use.
DEVICE_WORK = re.compile("stream|event|synchroni[sz]e|alloc")
CURRENT_STREAM = "aoti_torch_get_current_cuda_stream"


@functools.cache
def compiler() -> str:
    """What nvcc calls itself."""
    return subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout


def compile_unit(source: Path, *flags: str) -> str:
    """Compiles one unit and returns what the compiler said; every warning is an error.

    What it said of the same sources, flags and compiler is kept, as the stand-in's program is.
    """
    command = ["nvcc", "-c", "-O3", "-std=c++20", "-DUSE_CUDA", f"-I{ROOT / 'csrc'}"]
    command += ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_EXTENSION_NAME=_C_cuda"]
    command += ["-Xcompiler", "-Wall,-Werror,-fvisibility=hidden", *flags]
    for include in [*cpp_extension.include_paths(), sysconfig.get_path("include")]:
        command += ["-isystem", include]

    def make(to: Path) -> None:
        unit = to.with_suffix(".o")
        done = subprocess.run(
            [*command, str(source), "-o", str(unit)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        missing = subprocess.run(["nm", "-u", unit], capture_output=True, text=True, check=True)
        to.write_text(json.dumps([done.stderr, missing.stdout]))

    headers = [*(ROOT / "csrc" / "cuda").glob("*.*h"), ROOT / "csrc" / "kernels.inc"]
    key = [*command, compiler(), torch.__version__]
    kept = built(f"nvcc-{source.stem}", key, [source, *headers], make)
    report, missing = json.loads(kept.read_text())
    asks_for_nothing_else(missing)
    return str(report)


def asks_for_nothing_else(missing: str) -> None:
    """Fails where a unit is to be linked with what allocates, waits or makes a stream."""
    names = {line.split()[-1].split("@")[0] for line in missing.splitlines()}
    assert {name for name in names if re.match("cu(da)?[A-Z]", name)} <= RUNTIME
    shims = {name for name in names if name.startswith(("torch_", "aoti_"))}
    assert {name for name in shims if DEVICE_WORK.search(name)} <= {CURRENT_STREAM}


@pytest.mark.parametrize("source", KERNELS, ids=lambda path: path.stem)
def test_kernels_compile_without_warning_or_spill(source: Path) -> None:
    flags = ["-Werror", "all-warnings", "-Xptxas", "-v"]
    for architecture in ARCHITECTURES:
        flags += ["-gencode", f"arch=compute_{architecture},code=sm_{architecture}"]
    report = compile_unit(source, *flags)
    compiled = re.findall(r"Compiling entry function '(\w+)'", report)
    spilled = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert compiled, "no kernel was compiled"
    assert len(spilled) >= len(compiled)
    assert all(stores == loads == "0" for stores, loads in spilled), report


@pytest.mark.parametrize("source", HOST_UNITS, ids=lambda path: path.stem)
def test_host_units_compile_without_warning(source: Path) -> None:
    compile_unit(source, "-Xcompiler", "-Wextra")
