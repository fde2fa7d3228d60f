# SPDX-License-Identifier: Apache-2.0
"""Measured times kept on disk, so that the next process need not measure the same layers again.

One small file an entry, written beside and renamed: processes that write at once cannot spoil each
other's, and a file that is damaged, foreign or too old counts as absent. Nothing here raises: a
cache that cannot be used is one that is empty.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import time
from collections.abc import Collection, Mapping
from pathlib import Path

from sparselt.tickets.file import replace_file

__all__ = ["TimesCache", "cache_folder"]

_OFF = ("0", "off")
# Entries, of some 4 KiB on most disks; the oldest go first.
_MOST_ENTRIES = 2048
_KEPT_ENTRIES = 1536
_PUTS_BETWEEN_CHECKS = 256
_LARGEST_FILE = 1 << 16
# A machine's firmware, kernel and neighbours change without a sign that a key could hold.
_OLDEST_SECONDS = 30 * 86400.0
# An entry, or what a writer that was killed left of one.
_OURS = re.compile(r"[0-9a-f]{32}\.json|\.[0-9a-f]{32}\.json\.\w+")


def cache_folder() -> Path | None:
    """Where measured times are kept: what SPARSELT_CACHE says, else below the user's cache folder.

    Returns:
        The folder, which need not exist; None where the cache is switched off or has no place.
    """
    wanted = os.environ.get("SPARSELT_CACHE", "")
    if wanted.lower() in _OFF:
        return None
    if wanted:
        return Path(wanted) / "times"
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):  # the XDG specification has relative ones ignored
        return Path(base) / "sparselt" / "times"
    try:
        return Path.home() / ".cache" / "sparselt" / "times"
    except RuntimeError:
        return None


class TimesCache:
    """Times by what they depend on, in the folder that the environment names at creation.

    Example:
        >>> cache = TimesCache()
        >>> cache.put("example", {"dense": 2.0, "csr_spmm_scalar": 1.5})
        >>> cache.get("example", ["dense"])  # the same, unless the cache is off or not writable
        {'dense': 2.0, 'csr_spmm_scalar': 1.5}
    """

    def __init__(self) -> None:
        self._folder = cache_folder()
        self._puts = 0

    def get(self, key: str, names: Collection[str]) -> dict[str, float] | None:
        """The microseconds kept for a key; None unless all `names` are among them.

        Args:
            key: everything that the times depend on, as text.
            names: of what must have been timed.
        """
        if self._folder is None:
            return None
        path = self._path(self._folder, key)
        try:
            status = path.stat()
            if status.st_size > _LARGEST_FILE or time.time() - status.st_mtime > _OLDEST_SECONDS:
                return None
            found = json.loads(path.read_bytes())
            us = {str(name): float(value) for name, value in found["us"].items()}
            same = found["key"] == key and set(names) <= us.keys()
        except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
            return None
        return us if same and all(0 < v < math.inf for v in us.values()) else None

    def put(self, key: str, us: Mapping[str, float]) -> None:
        """Keeps the microseconds of a key, and now and then drops what is old or too much."""
        if self._folder is None:
            return
        text = json.dumps({"key": key, "us": dict(us)}, indent=1)
        with contextlib.suppress(OSError):
            replace_file(self._path(self._folder, key), text.encode())
            if self._puts % _PUTS_BETWEEN_CHECKS == 0:
                self._trim(self._folder)
            self._puts += 1

    @staticmethod
    def _path(folder: Path, key: str) -> Path:
        return folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"

    @staticmethod
    def _trim(folder: Path) -> None:
        ages = []
        now = time.time()
        for entry in os.scandir(folder):
            if _OURS.fullmatch(entry.name):
                with contextlib.suppress(FileNotFoundError):  # another process was faster
                    ages.append((now - entry.stat().st_mtime, entry.path))
        ages.sort()
        most = _KEPT_ENTRIES if len(ages) > _MOST_ENTRIES else len(ages)
        for i, (age, path) in enumerate(ages):
            if i >= most or age > _OLDEST_SECONDS:
                Path(path).unlink(missing_ok=True)
