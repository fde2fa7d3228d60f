# SPDX-License-Identifier: Apache-2.0
"""Every CUDA source compiles with nvcc against this torch's headers, CPU build or not, unspilled.

Neither a GPU nor a CUDA build of torch is needed: sources of the stable ABI include no header that
only a CUDA build has. Nothing is linked or run here.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("80", "90a")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.skipif(not SOURCES, reason="there is no CUDA source")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_cuda_source_compiles_without_warning_or_spill(source: Path, tmp_path: Path) -> None:
    command = ["nvcc", "-c", "-O3", "-std=c++20", "-DUSE_CUDA", "-Xptxas", "-v"]
    command += ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-Werror", "all-warnings"]
    command += ["-Xcompiler", "-Wall,-Werror", f"-I{ROOT / 'csrc'}"]
    for folder in cpp_extension.include_paths():
        command += ["-isystem", folder]
    for architecture in ARCHITECTURES:
        command += ["-gencode", f"arch=compute_{architecture},code=sm_{architecture}"]
    done = subprocess.run(
        [*command, str(source), "-o", str(tmp_path / "kernel.o")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    compiled = re.findall(r"Compiling entry function '(\w+)'", done.stderr)
    spilled = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert compiled, "no kernel was compiled"
    assert len(spilled) >= len(compiled)
    assert all(stores == loads == "0" for stores, loads in spilled), done.stderr
