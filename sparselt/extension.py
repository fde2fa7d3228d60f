# SPDX-License-Identifier: Apache-2.0
"""Loads the compiled extension and completes its operators with what torch.compile needs.

The only module that imports ``sparselt._C``: importing it registers ``torch.ops.sparselt``.
"""

from __future__ import annotations

import hashlib
import importlib.util
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from sparselt.errors import KernelError, MissingDependencyError, explain_mismatch
from sparselt.registry import KernelInfo

try:
    from sparselt import _C
except ImportError as _error:
    # Without the file, Python would blame a circular import.
    _why = (
        "it was not built; run pip install --no-build-isolation -e . in the source folder"
        if importlib.util.find_spec("sparselt._C") is None
        else str(_error)
    )
    raise MissingDependencyError(f"sparselt's extension does not load: {_why}") from _error

# The CUDA half of the operators; None where it was not built.
_cuda = (
    None
    if importlib.util.find_spec("sparselt._C_cuda") is None
    else importlib.import_module("sparselt._C_cuda")
)

ArenaPool = _C.ArenaPool
NativeProgram = _C.Program
plan_memory = _C.plan_memory

__all__ = [
    "ArenaPool",
    "NativeProgram",
    "build_id",
    "check_kernel",
    "conv_shape",
    "isa",
    "kernels",
    "multiply_add_rate",
    "plan_memory",
    "read_rate",
    "served",
]


@cache
def kernels(cuda_device: int = 0) -> tuple[KernelInfo, ...]:
    """Every kernel of the registry, in order of preference, and whether it can run here.

    Args:
        cuda_device: the index of the CUDA device that CUDA kernels are asked about.

    Example:
        >>> [kernel.name for kernel in kernels() if kernel.op == "spmm" and kernel.usable][-1]
        'bsr_spmm_scalar'
    """
    found = (KernelInfo(**entry) for entry in _C.kernels())
    return tuple(_on_cuda(k, cuda_device) if k.device == "cuda" else k for k in found)


def _on_cuda(kernel: KernelInfo, device: int) -> KernelInfo:
    """A CUDA kernel as a device meets it; asked only here, since asking starts the driver."""
    reason = _NOT_BUILT if _cuda is None else _cuda.why_unusable(kernel.features[0], device)
    return replace(kernel, usable=not reason, reason=reason)


def isa() -> str:
    """The instruction set in use: "scalar", "avx2", "avx512" or "neon".

    It is the best that this CPU has, or the one that the environment variable ``SPARSELT_ISA``
    names when sparselt is first imported.
    """
    return _C.isa()


@cache
def build_id() -> str:
    """A hash of the compiled modules: kernels of the same name differ from build to build."""
    digest = hashlib.sha256()
    for name in ("sparselt._C", "sparselt._C_cuda"):
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:
            digest.update(Path(spec.origin).read_bytes())
    return digest.hexdigest()[:32]


def multiply_add_rate() -> float:
    """GFLOP/s of multiply-adds in registers: the peak of torch's threads with the ISA in use."""
    return _C.multiply_add_rate()


def read_rate(bytes: int) -> float:
    """GB/s at which torch's threads read a buffer of that many bytes again and again."""
    return _C.read_rate(bytes)


_NOT_BUILT = "sparselt was built without its CUDA module; `sparselt doctor` says what it takes"


def served() -> frozenset[tuple[str, str, str, str]]:
    """(device, operation, format, dtype) that some kernel of this build serves.

    Whether a GPU is new enough is left to the call: no device is asked.
    """
    return frozenset(
        (kernel["device"], op, kernel["format"], kernel["dtype"])
        for kernel in _C.kernels()
        if (kernel["usable"] if kernel["device"] == "cpu" else _cuda is not None)
        for op in KernelInfo(**kernel).operations
    )


# Constants, not cached functions: torch.compile traces through those.
_SERVED = served()

# (name, operation, format, slice rows or None for any) of the CPU kernels that run here.
_RUN_ON_CPU = frozenset(
    (kernel.name, op, kernel.format, kernel.slice_rows)
    for kernel in (KernelInfo(**entry) for entry in _C.kernels())
    if kernel.device == "cpu" and kernel.usable
    for op in kernel.operations
)


# Formats and slice heights of the kernels that run generated code.
_CODE = frozenset(
    (entry["format"], entry["tile_rows"])
    for entry in _C.kernels()
    if entry["op"] == "code" and entry["usable"]
)

# The format that each kernel reads; a format stands for the first of its kernels that fits.
_FORMATS: dict[str, str] = {entry["name"]: entry["format"] for entry in _C.kernels()}
_FORMATS.update({format: format for format in _FORMATS.values()})


def watch(format: str, parts: Sequence[Tensor], block_rows: int) -> None:
    """Has the code that is generated for a weight dropped when the weight's tensors die.

    The code belongs to no Python object: it is made at the first call of a kernel that runs it, and
    kept for the next ones. Weights that share their parts share it.

    Args:
        format: the weight's.
        parts: likewise.
        block_rows: rows of its blocks or slices.
    """
    if (format, block_rows) not in _CODE or torch.compiler.is_compiling():
        return
    steps = parts[1]
    if type(steps) is not Tensor or not steps.is_cpu:
        return
    # Kept on the tensor; a copy of it inherits the attribute, but not the address.
    address = steps.data_ptr()
    if getattr(steps, "_sparselt_watched", None) != address:
        steps._sparselt_watched = address  # type: ignore[attr-defined]
        weakref.finalize(steps, _C.release_code, address).atexit = False


def code_bytes(parts: Sequence[Tensor]) -> int:
    """Bytes of the code that was generated for a weight.

    Args:
        parts: the weight's.

    Returns:
        0 before a kernel that runs such code has met the weight, and for all others.

    Example:
        >>> sparselt.ops.code_bytes(sparselt.pack(torch.eye(3)).parts())
        0
    """
    return _C.code_bytes(parts[1].data_ptr()) if parts[1].is_cpu else 0


def check_kernel(
    name: str,
    op: str,
    format: str,
    parts: Sequence[Tensor],
    block_rows: int,
    dtype: str = "float32",
) -> None:
    """Refuses a kernel that cannot run `op` on a weight of a format, where its parts are.

    Args:
        name: the kernel's; empty for the first of the registry that fits.
        op: "spmm" or "conv2d".
        format: the weight's.
        parts: likewise.
        block_rows: rows of its blocks or slices.
        dtype: what is computed in, without the "torch." prefix.

    Raises:
        KernelError: no kernel runs `op` on the weight's format, device and type, or not the named
            one.
    """
    watch(format, parts, block_rows)
    values = parts[-1]
    device = "cuda" if values.is_cuda else "cpu"
    served = (device, op, format, dtype) in _SERVED
    if name == "" and served:
        return
    named = (name, op, format)
    if device == "cpu" and ((*named, None) in _RUN_ON_CPU or (*named, block_rows) in _RUN_ON_CPU):
        return
    if device == "cuda" and _cuda is None:
        raise KernelError(
            explain_mismatch("weight", "a weight on the CPU", values.device, _NOT_BUILT)
        )
    if not served:
        formats = sorted({key[2] for key in _SERVED if (*key[:2], key[3]) == (device, op, dtype)})
        known = f"a format {op} has in {dtype} on {device} ({', '.join(formats)})"
        hint = "pack the weight with format='csr'"
        raise KernelError(explain_mismatch("weight", known, format, hint))
    serving = [
        kernel
        for kernel in kernels(values.get_device() if device == "cuda" else 0)
        if kernel.serves(op, format, block_rows)
        and (kernel.device, kernel.dtype) == (device, dtype)
    ]
    for kernel in serving:
        if kernel.name == name:
            if not kernel.usable:
                raise KernelError(f"kernel {name} cannot run here: {kernel.reason}")
            return
    usable = ", ".join(k.name for k in serving if k.usable)
    raise KernelError(explain_mismatch("kernel", f"one of {usable}", repr(name)))


def conv_shape(
    x: Tensor,
    meta: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int, int, int]:
    """The shape (B, C_out, P, Q) of a convolution's result.

    Args:
        x: (B, C_in, H, W).
        meta: block rows, block columns, then the weight's shape (C_out, C_in / groups, R, S).
        stride: along H and W.
        padding: along H and W, on each side.
        dilation: along H and W.
    """
    height, width = (
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (meta[4 + i] - 1) - 1) // stride[i] + 1
        for i in range(2)
    )
    return x.shape[0], meta[2], height, width


def _fake_spmm(
    x: Tensor,
    parts: list[Tensor],
    meta: list[int],
    bias: Tensor | None,
    residual: Tensor | None,
    lower: float | None,
    upper: float | None,
    kernel: str,
) -> Tensor:
    return x.new_empty((meta[2], x.shape[1]))


def _fake_linear(
    x: Tensor,
    parts: list[Tensor],
    meta: list[int],
    bias: Tensor | None,
    residual: Tensor | None,
    lower: float | None,
    upper: float | None,
    kernel: str,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], meta[2]))


def _fake_conv2d(
    x: Tensor,
    parts: list[Tensor],
    meta: list[int],
    bias: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    lower: float | None,
    upper: float | None,
    kernel: str,
) -> Tensor:
    y = x.new_empty(conv_shape(x, meta, stride, padding, dilation))
    return y.to(memory_format=torch.channels_last) if _FORMATS[kernel] == "bsr_nhwc" else y


def _fake_out(*arguments: object) -> None:
    return None


_FAKES: dict[str, Callable[..., object]] = {
    "spmm": _fake_spmm,
    "linear": _fake_linear,
    "conv2d": _fake_conv2d,
    "spmm_out": _fake_out,
    "conv2d_out": _fake_out,
    "program_linear": _fake_out,
    "program_conv2d": _fake_out,
    "program_dense": _fake_out,
    "program_depthwise": _fake_out,
}
for _name, _fake in _FAKES.items():
    torch.library.register_fake(f"sparselt::{_name}", _fake)
for _name in ("spmm", "linear", "conv2d"):
    # Under autocast inputs arrive in a narrower type; kernels compute in float32 either way.
    torch.library.register_autocast(f"sparselt::{_name}", "cpu", torch.float32)


_library = torch.library.Library("sparselt", "FRAGMENT")  # type: ignore[no-untyped-call]


def _under_cuda_autocast(operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An operator that casts to autocast's type first, as torch's own products do on CUDA."""

    def call(
        x: Tensor,
        parts: list[Tensor],
        meta: list[int],
        bias: Tensor | None,
        residual: Tensor | None,
        *rest: object,
    ) -> Tensor:
        dtype = torch.get_autocast_dtype("cuda")

        def cast(tensor: Tensor | None) -> Tensor | None:
            return tensor.to(dtype) if tensor is not None else None

        values = [*parts[:-1], parts[-1].to(dtype)]
        # A kernel's name stands for one type.
        named = str(rest[-1])
        kernel = named if parts[-1].dtype is dtype else _FORMATS.get(named, named)
        operands = (x.to(dtype), values, meta, cast(bias), cast(residual))
        with torch.autocast("cuda", enabled=False):
            return operator(*operands, *rest[:-1], kernel)

    return call


for _name in ("spmm", "linear", "conv2d"):
    _call = _under_cuda_autocast(getattr(torch.ops.sparselt, _name).default)
    _library.impl(_name, _call, "AutocastCUDA")  # type: ignore[no-untyped-call]
