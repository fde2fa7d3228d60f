# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels without torch: those of aarch64 under an emulator, and those of this CPU.

`tests/neon` is one program for both. It runs every kernel that the CPU has over a table of its own
against sums in double, with arrays that end at pages nobody may touch.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
CROSS_COMPILER = "aarch64-linux-gnu-g++"  # Debian and Ubuntu: apt install g++-aarch64-linux-gnu
EMULATORS = ("qemu-aarch64-static", "qemu-aarch64")  # apt install qemu-user-static
FLAGS = ["-std=c++20", "-O3", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off"]  # as in setup.py
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
ON_AARCH64 = platform.machine() in ("aarch64", "arm64")
PATIENCE = 900  # seconds: an emulator on a busy machine


def built(compiler: str, flags: list[str], folder: Path) -> Path:
    program = folder / "kernels"
    sources = [*(ROOT / "tests" / "neon").glob("*.cpp"), *CSRC.glob("cpu/*.cpp")]
    sources += [CSRC / "registry.cpp", CSRC / "cpu_features.cpp"]
    command = [compiler, *FLAGS, *flags, f"-I{CSRC}", f"-I{ROOT / 'tests' / 'neon'}"]
    done = subprocess.run(
        [*command, *map(str, sorted(sources)), "-o", str(program)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return program


def solved(command: list[str], **environment: str) -> dict[str, int]:
    """Runs the program and returns how many problems each kernel that ran has solved."""
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.findall(r"^(\w+): (\d+) problems$", done.stdout, re.MULTILINE)
    return {name: int(count) for name, count in found}


def kernels(*instruction_sets: str) -> set[str]:
    """The registered kernels of these sets that tests/neon has problems for."""
    lines = re.findall(
        r"^KERNEL\((\w+), (?!depthwise)\w+, (?!window)\w+, cpu, (\w+),",
        (CSRC / "kernels.inc").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    return {name for name, isa in lines if isa in instruction_sets}


def kernels_of_aarch64() -> set[str]:
    """Those for NEON, and the portable ones of formats without one."""
    own = kernels("neon")
    return own | {name for name in kernels("scalar") if name.replace("_scalar", "_neon") not in own}


def cross_compiler() -> str:
    if ON_AARCH64:
        return native_compiler()
    if shutil.which(CROSS_COMPILER) is None:
        pytest.skip(f"{CROSS_COMPILER} is not installed")
    return CROSS_COMPILER


def native_compiler() -> str:
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        pytest.skip(f"no C++ compiler ({compiler})")
    return compiler


def emulator() -> list[str]:
    """What starts an aarch64 program here."""
    found = [name for name in EMULATORS if shutil.which(name)]
    if not found and not ON_AARCH64:
        pytest.skip(f"no emulator for aarch64 ({' or '.join(EMULATORS)}) is installed")
    return [] if ON_AARCH64 else found[:1]


def test_kernels_of_aarch64_are_right_and_stay_inside_their_arrays(tmp_path: Path) -> None:
    compiler, start = cross_compiler(), emulator()
    program = built(compiler, [] if ON_AARCH64 else ["-static"], tmp_path)
    wanted = kernels_of_aarch64()
    counts = solved([*start, str(program), *wanted], SPARSELT_ISA="neon")
    assert counts.keys() == wanted
    assert min(counts.values()) > 500


def test_kernels_of_this_cpu_are_right_and_stay_inside_their_arrays(tmp_path: Path) -> None:
    check_this_cpu(built(native_compiler(), [], tmp_path))


@pytest.mark.slow
def test_kernels_of_this_cpu_are_clean_under_sanitizers(tmp_path: Path) -> None:
    compiler = native_compiler()
    probe = subprocess.run(
        [compiler, *SANITIZERS, "-x", "c++", "-", "-o", str(tmp_path / "probe")],
        input="int main() {}",
        capture_output=True,
        text=True,
        check=False,
    )
    if probe.returncode != 0:
        pytest.skip("the C++ compiler has no sanitizers")
    check_this_cpu(built(compiler, ["-O1", "-g1", *SANITIZERS], tmp_path))


def check_this_cpu(program: Path) -> None:
    counts = solved([str(program)], LD_PRELOAD="", SPARSELT_ISA="")
    assert counts.keys() >= kernels("scalar")
    assert min(counts.values()) > 500


@pytest.mark.parametrize("source", sorted(CSRC.glob("cpu/*_neon.cpp")), ids=lambda path: path.stem)
def test_neon_kernels_have_no_weak_symbols(source: Path, tmp_path: Path) -> None:
    compiler, nm = cross_compiler(), "nm" if ON_AARCH64 else "aarch64-linux-gnu-nm"
    if shutil.which(nm) is None:
        pytest.skip(f"{nm} is not installed")
    compiled = tmp_path / "kernel.o"
    subprocess.run(
        [compiler, *FLAGS, "-fPIC", f"-I{CSRC}", "-c", str(source), "-o", str(compiled)], check=True
    )
    listing = subprocess.run([nm, compiled], capture_output=True, text=True, check=True).stdout
    weak = [line for line in listing.splitlines() if re.search(r" [WwVvu] ", line)]
    assert not weak, "\n".join(weak)
    assert re.search(rf" T \S*{source.stem}", listing)
