# SPDX-License-Identifier: Apache-2.0
"""Runs the CUDA kernels of csrc/cuda on this CPU, from the same sources.

`host()` builds the program of this folder once a version of the sources and keeps it in the
temporary directory; `Host` talks to it. A kernel that breaks a rule of the machine (cuda_host.h)
ends the program, and the call raises `KernelFaultError` with what it said.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparselt.formats import SparseWeight

__all__ = [
    "DTYPES",
    "MAX_PARTS",
    "ROOT",
    "Host",
    "KernelFaultError",
    "built",
    "compile_program",
    "dtype_of",
    "host",
    "registered",
]

ROOT = Path(__file__).resolve().parents[2]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
FLAGS = ["-std=c++20", "-O1", "-g1", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
MAX_PARTS = 4
# Elements that parts of a format are read by, where that is more than one.
PART_ALIGNMENT = {"tile8": 4, "patch8": 4, "bitmask": 8}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class KernelFaultError(AssertionError):
    """The program stopped: a kernel broke a rule, or was refused."""


@functools.cache
def registered() -> dict[str, tuple[str, str, str]]:
    """(op, format, dtype) of every CUDA kernel of csrc/kernels.inc, in its order."""
    kernels = {}
    for line in (ROOT / "csrc" / "kernels.inc").read_text(encoding="utf-8").splitlines():
        if line.startswith("KERNEL("):
            name, op, sparse_format, device, *_, dtype = line[7:-1].split(", ")
            if device == "cuda":
                kernels[name] = (op, sparse_format, dtype)
    return kernels


def dtype_of(kernel: str) -> torch.dtype:
    """The type of weights, x and y of a registered kernel; faults.cpp knows float32 alone."""
    return DTYPES[registered()[kernel][2]] if kernel in registered() else torch.float32


@functools.cache
def host() -> Host:
    """The running program; skips the test where there is no C++ compiler."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        pytest.skip(f"no C++ compiler ({compiler}) to build the CUDA kernels for this CPU with")
    sanitized = can_sanitize(compiler)
    return Host(build(compiler, sanitized), sanitized)


def build(compiler: str, sanitized: bool) -> Path:
    """The program, built if this version of its sources was not built before."""
    kernels = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    program = sorted(Path(__file__).parent.glob("*.cpp"))
    headers = [*(ROOT / "csrc" / "cuda").glob("*.*h"), *Path(__file__).parent.glob("*.h")]
    headers.append(ROOT / "csrc" / "kernels.inc")
    flags = [*FLAGS, *(SANITIZERS if sanitized else [])]

    def make(to: Path) -> None:
        compile_program(compiler, flags, [*kernels, *program], to)

    return built("kernels", [compiler, *flags], [*kernels, *program, *headers], make)


def built(
    name: str, flags: Sequence[str], sources: Sequence[Path], make: Callable[[Path], None]
) -> Path:
    """What `make` writes, kept in the temporary directory for this version of flags and sources."""
    key = hashlib.sha256(" ".join(flags).encode())
    for path in sorted(sources):
        key.update(path.name.encode() + path.read_bytes())
    folder = Path(tempfile.gettempdir(), f"sparselt-cuda-host-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    place = f"{hashlib.sha256(str(ROOT).encode()).hexdigest()[:8]}-{name}"
    to = folder / f"{place}-{key.hexdigest()[:16]}"
    with locked(folder / f"{place}.lock"):
        if not to.exists():
            for old in folder.glob(f"{place}-*"):
                old.unlink()
            with tempfile.TemporaryDirectory(dir=folder) as unfinished:
                whole = Path(unfinished, name)
                make(whole)
                os.replace(whole, to)
    return to


def can_sanitize(compiler: str) -> bool:
    """Whether the compiler has the sanitizers' libraries."""
    with tempfile.TemporaryDirectory() as folder:
        command = [compiler, *SANITIZERS, "-x", "c++", "-", "-o", str(Path(folder, "empty"))]
        done = subprocess.run(command, input=b"int main() {}", capture_output=True, check=False)
    return done.returncode == 0


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lets one process at a time build."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def compile_program(
    compiler: str, flags: Sequence[str], sources: list[Path], to: Path, link: Sequence[str] = ()
) -> None:
    """Compiles two units at a time and links them."""
    include = [f"-I{ROOT / 'csrc'}", f"-I{Path(__file__).parent}", "-DSPARSELT_CUDA_HOST"]
    objects = [to.parent / f"{source.stem}.o" for source in sources]

    def run(*command: str) -> None:
        done = subprocess.run(
            [compiler, *flags, *command], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr

    def compiled(source: Path, target: Path) -> None:
        run(*include, "-x", "c++", "-c", str(source), "-o", str(target))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compiled, sources, objects))
    run(*map(str, objects), *link, "-o", str(to))


class Host:
    """The program that runs kernels; started again where a kernel ended it.

    Attributes:
        sanitized: whether it watches every access (address and undefined-behaviour sanitizers).
    """

    def __init__(self, program: Path, sanitized: bool) -> None:
        self.sanitized = sanitized
        self._program = program
        self._process: subprocess.Popen[bytes] | None = None

    def spmm(
        self,
        kernel: str,
        weight: SparseWeight,
        x: Tensor,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        lower: float | None = None,
        upper: float | None = None,
        *,
        batch_major: bool = False,
        schedule: int = 0,
        offset: int = 0,
        workspace: bool = True,
    ) -> Tensor:
        """Runs an spmm kernel.

        Args:
            kernel: its registered name.
            weight: (M, K) in the kernel's format; values are converted to the kernel's type.
            x: (..., K, N), leading sizes being products of a batch with the same weight.
            bias: (M,).
            residual: (..., M, N).
            lower: least value.
            upper: largest value.
            batch_major: hands x over as (..., N, K) and y as (..., N, M), as linear layers do.
            schedule: the order of threads: 0 ascending, 1 descending, others a seed.
            offset: elements by which arrays miss the alignment that fresh tensors have.
            workspace: whether the kernel gets the workspace it can use.

        Returns:
            (..., M, N), in the kernel's type.
        """
        rows, cols, columns = weight.rows, weight.cols, x.shape[-1]
        batch = math.prod(x.shape[:-2])
        shape = (*x.shape[:-2], rows, columns)
        strides = [columns, 1, cols * columns, columns, 1, rows * columns]
        if batch_major:
            strides = [1, cols, cols * columns, 1, rows, rows * columns]
            x, residual = x.mT, None if residual is None else residual.mT
        integers = [rows, cols, *weight.block, *strides, columns, batch]
        arrays = [*weight_arrays(weight), x, None, bias, residual]
        size = math.prod(shape)
        aligned = PART_ALIGNMENT.get(weight.name, 1)
        how = (schedule, workspace)
        y = self._call(kernel, how, integers, (lower, upper), arrays, size, offset, aligned)
        return y.view(*shape[:-2], columns, rows).mT if batch_major else y.view(shape)

    def conv2d(
        self,
        kernel: str,
        weight: SparseWeight,
        x: Tensor,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        lower: float | None = None,
        upper: float | None = None,
        *,
        out_size: tuple[int, int],
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
        schedule: int = 0,
        offset: int = 0,
        workspace: bool = True,
    ) -> Tensor:
        """Runs a conv2d kernel on x (B, C_in, H, W); arguments as of `spmm`.

        Kernels of format "bsr_nhwc" get x and the residual with channels last, and give y so.

        Returns:
            (B, C_out, *out_size), in the kernel's type.
        """
        shape = (x.shape[0], weight.rows, *out_size)
        integers = [weight.rows, weight.cols, *weight.block, *x.shape, *out_size]
        integers += [*weight.shape[2:], *stride, *padding, *dilation, groups]
        channels_last = weight.name == "bsr_nhwc"
        if channels_last:
            x = x.movedim(1, -1)
            residual = None if residual is None else residual.movedim(1, -1)
        arrays = [*weight_arrays(weight), x, None, bias, residual]
        how = (schedule, workspace)
        y = self._call(kernel, how, integers, (lower, upper), arrays, math.prod(shape), offset)
        if channels_last:
            return y.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
        return y.view(shape)

    def launch(
        self,
        kernel: str,
        integers: Sequence[int],
        arrays: Sequence[Tensor | None],
        limits: tuple[float, float],
        workspace: bool,
    ) -> Tensor:
        """Runs a kernel on the fields of its call.

        Args:
            kernel: its registered name.
            integers: of the call, in the order of runner.cpp.
            arrays: the weight's parts, x, y, bias and residual; of y only the size counts.
            limits: of the clamp.
            workspace: whether the kernel gets the workspace it can use.

        Returns:
            y, flat as it lies in memory, in the kernel's type.
        """
        y = arrays[MAX_PARTS + 1]
        assert y is not None
        return self._call(kernel, (0, workspace), integers, limits, arrays, y.numel(), 0)

    def _call(
        self,
        kernel: str,
        how: tuple[int, bool],
        integers: Sequence[int],
        limits: tuple[float | None, float | None],
        arrays: Sequence[Tensor | None],
        outputs: int,
        offset: int,
        part_alignment: int = 1,
    ) -> Tensor:
        dtype = dtype_of(kernel)
        sent, sizes = [], []
        for position, array in enumerate(arrays):
            if position == MAX_PARTS + 1:
                sizes.append(f"{outputs * dtype.itemsize} {offset * dtype.itemsize}")
            elif array is None:
                sizes.append("-1 0")
            else:
                array = array.to(dtype) if array.is_floating_point() else array
                sent.append(array.flatten().clone().view(torch.uint8).numpy().tobytes())
                shift = offset * part_alignment if position < MAX_PARTS else offset
                sizes.append(f"{len(sent[-1])} {shift * array.element_size()}")
        infinity = math.inf
        lower, upper = (-infinity if limits[0] is None else limits[0]), limits[1]
        header = (
            f"{kernel} {how[0]} {int(how[1])}\n{' '.join(map(str, integers))}\n"
            f"{lower} {infinity if upper is None else upper}\n{' '.join(sizes)}\n"
        )
        answer = self._exchange(header.encode() + b"".join(sent), outputs * dtype.itemsize)
        return (
            torch.frombuffer(bytearray(answer), dtype=dtype)
            if answer
            else torch.empty(0, dtype=dtype)
        )

    def _exchange(self, request: bytes, answer_bytes: int) -> bytes:
        if self._process is None or self._process.poll() is not None:
            self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the program)
            self._process = subprocess.Popen(
                [self._program],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0"},
            )
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(request)
            process.stdin.flush()
            status = process.stdout.readline().strip()
            answer = process.stdout.read(answer_bytes) if status == b"0" else b""
        except BrokenPipeError:
            status, answer = b"", b""
        if status == b"0" and len(answer) == answer_bytes:
            return answer
        if status and status != b"0":
            raise KernelFaultError(f"the launcher returned CUDA error {status.decode()}")
        process.wait()
        self._process = None
        self._errors.seek(0)
        raise KernelFaultError(self._errors.read().decode(errors="replace"))


def weight_arrays(weight: SparseWeight) -> list[Tensor | None]:
    """The parts in order, and None for those that a format does not have."""
    parts: list[Tensor | None] = list(weight.parts())
    return parts + [None] * (MAX_PARTS - len(parts))
