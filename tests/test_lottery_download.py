# SPDX-License-Identifier: Apache-2.0
"""Fetching data sets: checked, whole or not at all, and never outside their folder. No network."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from sparselt import errors
from sparselt.lottery import DATASETS, download_data
from sparselt.lottery.download import SOURCES


def archive(names: list[str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as file:
        for name in names:
            entry = tarfile.TarInfo(name)
            entry.size = 4
            file.addfile(entry, io.BytesIO(b"data"))
        link = tarfile.TarInfo("folder/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(link)
    return buffer.getvalue()


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], bytes]:
    """Answers every address with its own name, or a small archive, and adapts the checksums."""

    def answer(address: str) -> bytes:
        if address.endswith(".tar.gz"):
            return archive(["cifar-10-batches-bin/test_batch.bin", "../../escape.bin"])
        return address.encode()

    for name, sources in SOURCES.items():
        changed = tuple(
            replace(source, md5=hashlib.md5(answer(source.address)).hexdigest())
            for source in sources
        )
        monkeypatch.setitem(SOURCES, name, changed)
    return answer


@pytest.mark.parametrize("name", SOURCES)
def test_files_land_where_the_reader_looks_and_are_left_alone_after(
    tmp_path: Path, served: Callable[[str], bytes], name: str
) -> None:
    asked: list[str] = []

    def fetch(address: str) -> bytes:
        asked.append(address)
        return served(address)

    written = download_data(name, tmp_path, fetch)

    assert name in DATASETS
    assert all((tmp_path / source.place).exists() for source in SOURCES[name])
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(written)
    assert len(asked) == len(SOURCES[name])
    assert download_data(name, tmp_path, fetch) == []
    assert len(asked) == len(SOURCES[name])


def test_an_archive_cannot_write_outside_its_folder(
    tmp_path: Path, served: Callable[[str], bytes]
) -> None:
    folder = tmp_path / "a" / "b" / "c"

    download_data("cifar10", folder, served)

    names = sorted(path.name for path in (folder / "cifar-10-batches-bin").iterdir())
    assert names == ["escape.bin", "test_batch.bin"]
    assert not (tmp_path / "a" / "escape.bin").exists()
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))


def test_a_wrong_checksum_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(errors.DataError, match="checksum"):
        download_data("mnist", tmp_path, lambda address: b"something else")

    assert not list(tmp_path.rglob("*.gz"))


def test_an_address_that_does_not_answer_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = replace(SOURCES["mnist"][0], address=(tmp_path / "absent").as_uri())
    monkeypatch.setitem(SOURCES, "mnist", (source,))

    with pytest.raises(errors.DataError, match="could not be fetched"):
        download_data("mnist", tmp_path / "data")


def test_what_cannot_be_fetched_is_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.OptionError, match="cifar10"):
        download_data("digits", tmp_path)
