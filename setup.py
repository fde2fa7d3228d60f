# SPDX-License-Identifier: Apache-2.0
"""Builds ``sparselt._C``, and ``sparselt._C_cuda`` where torch and a CUDA toolkit fit together.

Names, versions and tool settings are in pyproject.toml. What the environment can say:

- ``SPARSELT_CUDA``: ``0`` leaves the CUDA module out, ``1`` makes it an error not to build it;
  unset, it is built where torch is a CUDA build and nvcc of the same major version is found.
- ``SPARSELT_SANITIZE=1``: Address- and UndefinedBehaviorSanitizer (``make test-sanitized``).
- ``TORCH_CUDA_ARCH_LIST``, ``CUDA_HOME``, ``MAX_JOBS``, ``CXX``, ``CFLAGS``: as usual with torch.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    torch = None

ROOT = Path(__file__).resolve().parent
CPU_SOURCES = (
    "csrc/*.cpp",
    "csrc/ops/*.cpp",
    "csrc/formats/*.cpp",
    "csrc/cpu/*.cpp",
    "csrc/jit/*.cpp",
    "csrc/program/*.cpp",
)
CUDA_SOURCES = ("csrc/cuda/*.cu", "csrc/cuda/*.cpp")

# The oldest libtorch whose stable ABI is used: one binary serves 2.11 and everything newer.
TORCH_TARGET_VERSION = "0x020b000000000000"
# Fixed here because torch reads the visible GPUs otherwise, and fails on a machine without one.
# PTX of 8.9 is what GPUs newer than this list run; PTX of 9.0a would serve Hopper alone.
DEFAULT_CUDA_ARCHS = "8.0;8.6;8.9+PTX;9.0a"
BYTES_PER_COMPILE = 2 << 30


@dataclass(frozen=True)
class Cuda:
    """Whether the CUDA module is built, and why or why not."""

    build: bool
    reason: str


def stop(message: str) -> NoReturn:
    """Ends the build with one sentence; an exception would reach the user as a traceback."""
    raise SystemExit(f"sparselt: {message}")


def sources(patterns: tuple[str, ...]) -> list[str]:
    """The files that match, sorted, relative to the root as setuptools wants them."""
    found: Iterator[Path] = (path for pattern in patterns for path in ROOT.glob(pattern))
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


def nvcc_version(cuda_home: str | None) -> str | None:
    """The release of the toolkit's nvcc, such as ``"13.0"``; None where there is none."""
    nvcc = Path(cuda_home or "", "bin", "nvcc")
    if cuda_home is None or not nvcc.is_file():
        return None
    answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    release = re.search(r"release (\d+\.\d+)", answer.stdout)
    return release.group(1) if release else None


def decide_cuda(wish: str | None, torch_cuda: str | None, nvcc: str | None) -> Cuda:
    """Decides about the CUDA module from facts alone, never from a visible GPU.

    Args:
        wish: the value of SPARSELT_CUDA, None where it is unset.
        torch_cuda: the CUDA version that torch was built with, None for a CPU build.
        nvcc: the release of the nvcc found, None where there is none.
    """
    if wish not in (None, "", "0", "1"):
        stop(f"SPARSELT_CUDA: expected 0, 1 or nothing, got {wish!r}.")
    if wish == "0":
        return Cuda(False, "SPARSELT_CUDA=0")
    if torch_cuda is None:
        missing = "the installed torch is a CPU build; install a CUDA build of torch first"
    elif nvcc is None:
        missing = f"no nvcc was found; install the CUDA {torch_cuda} toolkit or set CUDA_HOME to it"
    elif nvcc.split(".")[0] != torch_cuda.split(".")[0]:
        missing = (
            f"nvcc is of CUDA {nvcc} and torch of CUDA {torch_cuda}; "
            f"set CUDA_HOME to a CUDA {torch_cuda.split('.')[0]} toolkit"
        )
    else:
        return Cuda(True, f"torch is built with CUDA {torch_cuda}, nvcc is {nvcc}")
    if wish == "1":
        stop(f"SPARSELT_CUDA=1 asks for the CUDA module, but {missing}.")
    return Cuda(False, missing)


def check_compiler(environment: Mapping[str, str]) -> None:
    """Stops with one sentence where no C++ compiler or no Python header can be found."""
    command = shlex.split(environment.get("CXX", "") or "c++")[0]
    if shutil.which(command, path=environment.get("PATH")) is None:
        stop(
            f"the C++ compiler {command!r} was not found; install one that knows C++20 "
            "(Debian and Ubuntu: apt install g++; macOS: xcode-select --install) or set CXX."
        )
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.is_file():
        stop(
            f"{header} was not found; install the headers of this Python "
            "(Debian and Ubuntu: apt install python3-dev)."
        )


def default_jobs() -> int:
    """Compilers to run at once: one a core, within the free memory, and at most eight."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        free = BYTES_PER_COMPILE
    return max(1, min(cores, free // BYTES_PER_COMPILE, 8))


def system_includes() -> list[str]:
    """Torch and pybind11 as system headers, so that only our own code can warn."""
    folders = cpp_extension.include_paths()
    try:
        import pybind11
    except ImportError:
        pass  # torch ships the headers of a pybind11 too
    else:
        folders.insert(0, pybind11.get_include())
    return [flag for folder in folders for flag in ("-isystem", folder)]


def cxx_flags() -> list[str]:
    """Flags of every C++ unit. Instruction sets are chosen inside the files, never here."""
    flags = [
        "-O3",
        "-std=c++20",
        "-Wall",
        "-Wextra",
        "-fvisibility=hidden",
        "-ffp-contract=off",  # a * b + c rounds alike in every kernel and on every compiler
        "-fno-trapping-math",  # else GCC leaves a branch, and no vectors, where a selection does
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
        f'-DSPARSELT_BUILT_WITH_TORCH="{torch.__version__}"',
    ]
    return flags + sanitizer_flags() + (["-O1", "-g"] if sanitizer_flags() else [])


def sanitizer_flags() -> list[str]:
    """What compiler and linker need for a sanitized build; nothing in an ordinary one."""
    if os.environ.get("SPARSELT_SANITIZE") != "1":
        return []
    return [
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        "-fno-omit-frame-pointer",
    ]


def cpu_extension() -> Extension:
    """Operators, registry and CPU kernels."""
    return Extension(
        "sparselt._C",
        sources(CPU_SOURCES),
        include_dirs=[str(ROOT / "csrc")],
        library_dirs=cpp_extension.library_paths(),
        libraries=["c10", "torch", "torch_cpu"],
        extra_compile_args={"cxx": cxx_flags() + system_includes()},
        extra_link_args=sanitizer_flags(),
        language="c++",
    )


def cuda_code() -> str:
    """What nvcc makes for TORCH_CUDA_ARCH_LIST: "sm_80" for machine code, "compute_89" for PTX."""
    flags = " ".join(cpp_extension._get_cuda_arch_flags())
    return " ".join(re.findall(r"code=(\w+)", flags))


def cuda_extension(cuda_home: str) -> Extension:
    """CUDA kernels: a module of its own, since a CPU build of torch could not load it."""
    toolkit = ["-isystem", str(Path(cuda_home, "include"))]
    toolkit.append(f'-DSPARSELT_CUDA_CODE="{cuda_code()}"')
    nvcc_flags = [
        "-O3",
        "-std=c++20",
        "-DUSE_CUDA",
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
        "-Xcompiler=-Wall,-fvisibility=hidden,-ffp-contract=off",
    ]
    return Extension(
        "sparselt._C_cuda",
        sources(CUDA_SOURCES),
        include_dirs=[str(ROOT / "csrc")],
        library_dirs=cpp_extension.library_paths("cuda"),
        libraries=["c10", "torch", "torch_cpu", "torch_cuda", "cudart"],
        extra_compile_args={
            "cxx": [*cxx_flags(), "-DUSE_CUDA", *system_includes(), *toolkit],
            "nvcc": nvcc_flags + system_includes(),
        },
        extra_link_args=sanitizer_flags(),
        language="c++",
    )


def extensions() -> list[Extension]:
    """The modules to build here; without torch only a stand-in, enough for an sdist."""
    if torch is None:
        return [Extension("sparselt._C", sources(CPU_SOURCES), language="c++")]
    home = cpp_extension.CUDA_HOME
    cuda = decide_cuda(os.environ.get("SPARSELT_CUDA"), torch.version.cuda, nvcc_version(home))
    print(
        f"sparselt: torch {torch.__version__}; CUDA {'yes' if cuda.build else 'no'}: {cuda.reason}"
    )
    if not cuda.build:
        return [cpu_extension()]
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_CUDA_ARCHS)
    return [cpu_extension(), cuda_extension(home)]


class NoTorch(build_ext):
    """Says what is missing when something is to be compiled without torch."""

    def run(self) -> None:
        """Stops before any work."""
        stop(
            "torch >= 2.11 is needed to build; install it with `pip install 'torch>=2.11'` "
            "and then run `pip install --no-build-isolation .`."
        )


def build_command() -> type[build_ext]:
    """Torch's build_ext with our checks in front of it."""
    if torch is None:
        return NoTorch

    class BuildSparselt(cpp_extension.BuildExtension):
        def finalize_options(self) -> None:
            super().finalize_options()
            if self.editable_mode:
                # An editable install would compile in a throw-away folder, and so anew each time.
                self.build_temp = str(
                    ROOT / "build" / f"temp.{self.plat_name}-{sys.implementation.cache_tag}"
                )

        def build_extensions(self) -> None:
            if sys.platform == "win32":
                stop("Windows is not supported yet; use Linux, macOS or WSL.")
            check_compiler(os.environ)
            os.environ.setdefault("MAX_JOBS", str(default_jobs()))
            super().build_extensions()

    return BuildSparselt


if __name__ == "__main__":
    setup(ext_modules=extensions(), cmdclass={"build_ext": build_command()})
