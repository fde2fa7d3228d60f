# SPDX-License-Identifier: Apache-2.0
"""Fetches the standard files of a data set, where there is a network, and checks what came."""

from __future__ import annotations

import hashlib
import io
import tarfile
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sparselt.errors import DataError, OptionError, explain_mismatch
from sparselt.tickets.file import replace_file

__all__ = ["SOURCES", "Source", "download_data"]

_TIMEOUT_SECONDS = 30
_MAX_BYTES = 2**28


@dataclass(frozen=True)
class Source:
    """One file to fetch.

    Attributes:
        address: Where it is published.
        md5: The checksum its publisher gives; it guards against damage, not against malice.
        place: Path below the data folder; for an archive, the folder it unpacks to.
    """

    address: str
    md5: str
    place: str


def _idx(base: str, folder: str, checksums: tuple[str, str, str, str]) -> tuple[Source, ...]:
    parts = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    names = [f"{part}-ubyte.gz" for part in parts]
    return tuple(
        Source(base + name, md5, f"{folder}/{name}")
        for name, md5 in zip(names, checksums, strict=True)
    )


SOURCES: dict[str, tuple[Source, ...]] = {
    "mnist": _idx(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "mnist",
        (
            "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "d53e105ee54ea40749a09fcbcd1e9432",
            "9fb629c4189551a2d022fa330f9573f3",
            "ec29112dd5afa0611ce80d1b7f02629c",
        ),
    ),
    "fashion_mnist": _idx(
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        "fashion_mnist",
        (
            "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "25c81989df183df01b3e8a0aad5dffbe",
            "bef4ecab320f06d8554ea6380940ec79",
            "bb300cfdad3c16e7a12a480ee83cd310",
        ),
    ),
    "cifar10": (
        Source(
            "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
            "c32a1d4ab5d03f1284b67883e8d87530",
            "cifar-10-batches-bin",
        ),
    ),
}


def download_data(
    name: str, folder: str | Path, fetch: Callable[[str], bytes] | None = None
) -> list[Path]:
    """Fetches what ``load_data(name, folder)`` reads; files that are there are left alone.

    Args:
        name: A key of ``SOURCES``.
        folder: The data folder; made if absent.
        fetch: From an address to its bytes; by default over the network.

    Returns:
        The files written.

    Raises:
        OptionError: The data set is not one that can be fetched.
        DataError: It could not be fetched, or is not what its publisher describes.
    """
    if name not in SOURCES:
        raise OptionError(explain_mismatch("data to fetch", f"one of {', '.join(SOURCES)}", name))
    written = []
    for source in SOURCES[name]:
        target = Path(folder) / source.place
        if target.exists():
            continue
        data = (fetch or _fetch)(source.address)
        found = hashlib.md5(data, usedforsecurity=False).hexdigest()
        if found != source.md5:
            raise DataError(
                explain_mismatch(
                    f"checksum of {source.address}", source.md5, found, "try again later"
                )
            )
        if source.address.endswith(".tar.gz"):
            _unpack(data, target)
            written += sorted(target.iterdir())
        else:
            replace_file(target, data)
            written.append(target)
    return written


def _fetch(address: str) -> bytes:
    try:
        with urllib.request.urlopen(address, timeout=_TIMEOUT_SECONDS) as answer:
            data: bytes = answer.read(_MAX_BYTES)
            return data
    except (OSError, urllib.error.URLError) as error:
        raise DataError(
            f"{address} could not be fetched ({error}); fetch it by other means and put it in place"
        ) from error


def _unpack(data: bytes, folder: Path) -> None:
    """Writes the plain files of an archive by their names alone, so that none can land elsewhere.

    They are written beside ``folder``, which appears once it is whole.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as beside:
        whole = Path(beside) / folder.name
        whole.mkdir()
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as archive:
            for member in archive:
                content = archive.extractfile(member) if member.isfile() else None
                if content is not None:
                    (whole / PurePosixPath(member.name).name).write_bytes(content.read())
        whole.rename(folder)
