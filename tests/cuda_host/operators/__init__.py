# SPDX-License-Identifier: Apache-2.0
"""Runs the CUDA operators of csrc/cuda on this CPU: their registration, checks and allocations.

`operators()` builds csrc/cuda's C++ units once a version of them, with machine.cpp in place of
torch's CUDA half, and loads the module. From then on `torch.ops.sparselt` has its CUDA operators,
which `Operators.call` reaches through the dispatcher with tensors of the CPU that it declares to be
on devices. A launch comes back to Python, where the kernel's source can be run (`cuda_host.Host`).
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils import cpp_extension
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from cuda_host import MAX_PARTS, ROOT, built, compile_program, dtype_of, registered

__all__ = ["CPU", "STREAM", "Launch", "Operators", "operators"]

# The place of a tensor that is on no device.
CPU = -1
# Of the address that stands for torch's current stream on a device, all but the device's index.
STREAM = 0x1000
# What the module says it was built for: machine code, code for one capability alone, and PTX.
CODE = "sm_80 sm_90a compute_100"
_FAILED = 999
_REPLACED = (
    "aoti_torch_get_device_type",
    "aoti_torch_get_device_index",
    "aoti_torch_create_device_guard",
    "aoti_torch_delete_device_guard",
    "aoti_torch_get_current_cuda_stream",
    "torch_c10_cuda_check_msg",
    "torch_c10_cuda_free_error_msg",
)


class _Launch(ctypes.Structure):
    _fields_ = (
        ("kernel", ctypes.c_char_p),
        ("device", ctypes.c_int64),
        ("stream", ctypes.c_void_p),
        ("integers", ctypes.POINTER(ctypes.c_int64)),
        ("count", ctypes.c_int64),
        ("arrays", ctypes.c_void_p * (MAX_PARTS + 4)),
        ("workspace", ctypes.c_void_p),
        ("lower", ctypes.c_float),
        ("upper", ctypes.c_float),
    )


@dataclass
class Launch:
    """One call of a launcher.

    Attributes:
        kernel: its name.
        device: the current one.
        stream: what it was handed; `STREAM` and the device's index for torch's current one.
        integers: of the call, as `Host` sends them.
        arrays: weight parts, x, y, bias and residual, as flat tensors that share the operator's
            memory; None for those that are not there.
        limits: of the clamp.
        workspace: whether the kernel was given one.
    """

    kernel: str
    device: int
    stream: int
    integers: list[int]
    arrays: list[Tensor | None]
    limits: tuple[float, float]
    workspace: bool

    @property
    def y(self) -> Tensor:
        """What the kernel is to write."""
        y = self.arrays[MAX_PARTS + 1]
        assert y is not None
        return y


class Torch(TorchDispatchMode):
    """Notes what an operator asks of torch, and gives it memory of the CPU for all devices."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        self.asked.append(func.__name__.split(".")[0])
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        result = func(*args, **kwargs)
        if self.asked[-1] in ("new_empty", "empty") and result.is_floating_point():
            result.fill_(torch.nan)
        return result


@dataclass
class Operators:
    """The loaded module.

    Attributes:
        module: what sparselt sees as `sparselt._C_cuda`.
        machine: what machine.cpp exports.
        asked: names of the operators of torch that the last call used.
    """

    module: ModuleType
    machine: ctypes.CDLL
    asked: list[str] = field(default_factory=list)

    def set_devices(self, *capabilities: int) -> None:
        """Makes one device for each capability: 80 is 8.0."""
        self.machine.cuda_host_set_devices(
            (ctypes.c_int * len(capabilities))(*capabilities), len(capabilities)
        )

    def call(
        self,
        name: str,
        *args: Any,
        device: int = 0,
        elsewhere: Sequence[tuple[Tensor, int]] = (),
        on_launch: Callable[[Launch], int | None] = lambda launch: None,
    ) -> Any:
        """Calls torch.ops.sparselt.<name> as the dispatcher does for CUDA tensors.

        Args:
            name: of the operator.
            args: its own; tensors of the CPU.
            device: where they all are.
            elsewhere: tensors that are on another device, and which (or `CPU`).
            on_launch: writes `Launch.y`, and says what the launch returns; 0 or None for success.
        """
        self.machine.cuda_host_forget_places(device)
        for tensor, place in elsewhere:
            self.machine.cuda_host_place(ctypes.c_void_p(tensor.data_ptr()), place)
        failure: list[BaseException] = []

        def launched(raw: Any) -> int:
            try:
                with _disable_current_modes():
                    return on_launch(_launch(raw.contents, args)) or 0
            except BaseException as error:
                failure.append(error)
                return _FAILED

        callback = _CALLBACK(launched)
        self.machine.cuda_host_on_launch(callback)
        operator = getattr(torch.ops.sparselt, name).default
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
        with Torch() as asked:
            try:
                return operator.redispatch(keys, *args)
            except RuntimeError:
                if failure:
                    raise failure[0] from None
                raise
            finally:
                self.asked = asked.asked


_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Launch))


def _launch(raw: _Launch, args: Sequence[Any]) -> Launch:
    """A launch, with arrays as large as its integers say; parts are among the operator's own."""
    kernel = raw.kernel.decode()
    n = raw.integers[: raw.count]
    if registered()[kernel][0] == "spmm":
        x, y = n[1] * n[10] * n[11], n[0] * n[10] * n[11]
    else:
        x, y = n[4] * n[5] * n[6] * n[7], n[4] * n[0] * n[8] * n[9]
    known = {t.data_ptr(): t for t in pytree.tree_leaves(args) if isinstance(t, Tensor)}
    dtype = dtype_of(kernel)
    arrays: list[Tensor | None] = []
    for position, address in enumerate(raw.arrays):
        if position < MAX_PARTS:
            arrays.append(known[address].flatten() if address else None)
            continue
        size, optional = ((x, False), (y, False), (n[0], True), (y, True))[position - MAX_PARTS]
        if address is None or size == 0:
            arrays.append(None if optional and address is None else torch.empty(0, dtype=dtype))
        else:
            memory = (ctypes.c_byte * (size * dtype.itemsize)).from_address(address)
            arrays.append(torch.frombuffer(memory, dtype=dtype))
    limits = (raw.lower, raw.upper)
    return Launch(kernel, raw.device, raw.stream, n, arrays, limits, raw.workspace is not None)


@functools.cache
def operators() -> Operators:
    """The module, built and loaded; skips the test where there is no C++ compiler."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        pytest.skip(f"no C++ compiler ({compiler}) to build the CUDA operators for this CPU with")
    path = _build(compiler)
    loader = ExtensionFileLoader("_C_cuda", str(path))
    spec = spec_from_file_location("_C_cuda", path, loader=loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return Operators(module, ctypes.CDLL(str(path)))


def _build(compiler: str) -> Path:
    from pybind11 import get_include

    csrc, here = ROOT / "csrc", Path(__file__).parent
    units = [*sorted((csrc / "cuda").glob("*.cpp")), here / "machine.cpp"]
    headers = [*(csrc / "cuda").glob("*.h"), here.parent / "cuda_host.h", csrc / "kernels.inc"]
    flags = ["-std=c++20", "-O1", "-fPIC", "-Wall", "-Wextra"]
    flags += ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    flags += [f'-DSPARSELT_CUDA_CODE="{CODE}"', f"-DSPARSELT_TORCH={torch.__version__}"]
    flags += [f"-D{name}=cuda_host_{name.removeprefix('aoti_torch_')}" for name in _REPLACED]
    includes = [*cpp_extension.include_paths(), get_include(), sysconfig.get_path("include")]
    flags += [flag for folder in includes for flag in ("-isystem", folder)]
    libraries = [f"-L{folder}" for folder in cpp_extension.library_paths()]
    libraries += [f"-Wl,-rpath,{folder}" for folder in cpp_extension.library_paths()]
    libraries += ["-lc10", "-ltorch", "-ltorch_cpu"]

    def make(to: Path) -> None:
        compile_program(compiler, flags, units, to, ["-shared", *libraries])

    return built("operators", [compiler, *flags, *libraries], [*units, *headers], make)
