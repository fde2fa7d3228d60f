# SPDX-License-Identifier: Apache-2.0
"""What the system tells of the CPU."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

__all__ = ["cache_bytes", "cpu_name"]


@cache
def cache_bytes() -> int:
    """Bytes of one core's second-level cache; 1 MiB where the system does not tell."""
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, size = ((folder / name).read_text().strip() for name in ("level", "size"))
        except OSError:
            continue
        if level == "2" and size.endswith("K") and size[:-1].isdigit():
            return int(size[:-1]) << 10
    return 1 << 20


@cache
def cpu_name() -> str:
    """The CPU's model, or its architecture."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return name
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), name)
