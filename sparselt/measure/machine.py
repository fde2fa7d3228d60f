# SPDX-License-Identifier: Apache-2.0
"""What a figure was measured on: the header that goes with every result."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["Others", "cache_bytes", "command_line", "header", "is_busy", "one_line", "torch_isa"]

_FLAGS = (
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimddp",
    "sve",
)
_PACKAGES = ("torch", "numpy", "scipy", "onnxruntime", "openvino")
_ENVIRONMENT = (
    "SPARSELT_ISA",
    "SPARSELT_KERNEL",
    "SPARSELT_CACHE",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "KMP_AFFINITY",
    "GOMP_CPU_AFFINITY",
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _cpu() -> tuple[str, set[str]]:
    """The processor's name and all its flags, as far as the system tells."""
    name, flags = "", set[str]()
    for line in _read("/proc/cpuinfo").splitlines():
        key, _, value = (part.strip() for part in line.partition(":"))
        if key == "model name" and not name:
            name = value
        elif key in ("flags", "Features"):
            flags.update(value.split())
            break
    if not name and sys.platform == "darwin":
        done = _run("sysctl", "-n", "machdep.cpu.brand_string")
        name = done or ""
    return name or platform.processor() or platform.machine(), flags


def _run(*words: str) -> str | None:
    """Standard output of a short command, or None if it does not exist or fails."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _git() -> dict[str, Any]:
    """Commit and dirty flag if this package is run from its own checkout; else an empty dict."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return {}
    commit = _run("git", "-C", str(root), "rev-parse", "HEAD")
    changes = _run("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return {} if commit is None else {"commit": commit, "dirty": bool(changes)}


def _versions() -> dict[str, str]:
    found = {}
    for package in (*_PACKAGES, "sparselt"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def cache_bytes() -> dict[str, int]:
    """Sizes of the data caches that the first core sees, in bytes, by level: "L1", "L2", "L3".

    Empty where the system does not tell. A virtual machine often shows the host's whole last level.
    """
    found: dict[str, int] = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        if _read(f"{folder}/type") == "Instruction":
            continue
        size = _read(f"{folder}/size")
        if size.endswith("K") and size[:-1].isdigit():
            found["L" + _read(f"{folder}/level")] = 1024 * int(size[:-1])
    return found


def command_line() -> str:
    """The command that runs now, without the folders of this machine."""
    words = list(sys.argv)
    program = Path(words[0]).name if words and words[0] else "python"
    if program in ("__main__.py", "sparselt"):
        program = "sparselt"
    return shlex.join([program, *(_without_folder(word) for word in words[1:])])


def _without_folder(word: str) -> str:
    return Path(word).name if os.path.isabs(word) else word


def torch_isa() -> str:
    """The instruction set torch's own kernels use, such as "AVX2" or "AVX512"."""
    import torch

    return str(torch.backends.cpu.get_cpu_capability())


def _sparselt_isa() -> str:
    try:
        from sparselt import ops

        return str(ops.isa())
    except ImportError as error:
        return f"unknown ({type(error).__name__}: the extension is not built)"


def header(command: str | None = None) -> dict[str, Any]:
    """Describe this machine, this process and this build, for the top of a result file.

    Args:
        command: the command to record; by default the one that runs, with folders cut off.

    Returns:
        A dictionary of plain values: cpu, flags, caches, cores, affinity, threads, isa, versions,
        environment, commit, dirty, date, command, virtual_machine, governor, busy_cores (how many
        cores other work took when the measurement began; from half a core on, distrust it).

    Example:
        >>> header("example")["command"]
        'example'
    """
    import torch

    name, flags = _cpu()
    affinity = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return {
        "cpu": name,
        "architecture": platform.machine(),
        "flags": [flag for flag in _FLAGS if flag in flags],
        "caches_bytes": cache_bytes(),
        "cores": os.cpu_count(),
        "affinity": affinity,
        "threads": torch.get_num_threads(),
        "isa": _sparselt_isa(),
        "torch_isa": torch_isa(),
        "virtual_machine": "hypervisor" in flags,
        "busy_cores": _busy_cores(),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or "unknown",
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": _versions(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        # Of a folder the name alone: a result is shown to others.
        "environment": {
            key: Path(os.environ[key]).name for key in _ENVIRONMENT if key in os.environ
        },
        **_git(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command_line() if command is None else command,
    }


def is_busy(machine: dict[str, Any]) -> bool:
    """Whether other work took so much of the machine that its times are not to be trusted.

    Example:
        >>> is_busy({"busy_cores": 1.4})
        True
    """
    return float(machine.get("busy_cores") or 0.0) >= 0.5


def _busy_cores(seconds: float = 0.25) -> float | None:
    """Cores that other processes use while this one sleeps; None where the system does not tell.

    Not the load average, which a build or a training that has just ended still fills.
    """
    others = Others()
    time.sleep(seconds)
    return others.cores()


class Others:
    """Counts what all but some processes use of the machine, from when it is made.

    Time that the host takes from a virtual machine counts as used by others.

    Args:
        processes: ids of the processes that do not count; their threads do not either.

    Example:
        >>> Others().cores() is None or True
        True
    """

    def __init__(self, processes: Sequence[int] = ()) -> None:
        self._processes = processes
        self._begin = self._ticks()

    def cores(self) -> float | None:
        """Mean number of cores used so far; None where the system does not tell."""
        used, total = (b - a for a, b in zip(self._begin, self._ticks(), strict=True))
        return round(max(used, 0) / total * (os.cpu_count() or 1), 2) if total else None

    def _ticks(self) -> tuple[int, int]:
        """Ticks used by others, and of all cores together, since the machine was started."""
        first = _read("/proc/stat").splitlines()[:1]
        spent = [int(field) for field in first[0].split()[1:9]] if first else []
        if len(spent) < 5:
            return 0, 0
        own = sum(_process_ticks(process) for process in self._processes)
        return sum(spent) - spent[3] - spent[4] - own, sum(spent)  # neither idle nor on a disk


def _process_ticks(process: int) -> int:
    """Ticks that a process has used; 0 if it is gone."""
    fields = _read(f"/proc/{process}/stat").rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12]) if len(fields) > 12 else 0


def one_line(machine: dict[str, Any]) -> str:
    """The part of a header that belongs under every table, in one line.

    Example:
        >>> one_line({"cpu": "C", "threads": 2, "isa": "avx2", "versions": {"torch": "2.13"}})
        'C, 2 threads, sparselt kernels: avx2, torch 2.13'
    """
    threads = machine["threads"]
    parts = [
        str(machine["cpu"]) + (" (virtual machine)" if machine.get("virtual_machine") else ""),
        f"{threads} thread" + ("" if threads == 1 else "s"),
        f"sparselt kernels: {machine['isa']}",
        f"torch {machine['versions'].get('torch', 'unknown')}",
    ]
    if is_busy(machine):
        parts.append(f"BUSY: other work took {machine['busy_cores']:g} cores")
    if "date" in machine:
        parts.append(str(machine["date"])[:10])
    return ", ".join(parts)
