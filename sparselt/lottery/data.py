# SPDX-License-Identifier: Apache-2.0
"""Images and labels as whole tensors, split into training, validation and test.

To add a data set, write a function ``(folder) -> Data`` and add one line to ``DATASETS``.
"""

from __future__ import annotations

import gzip
import math
import os
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparselt.errors import DataError, MissingDependencyError, OptionError, explain_mismatch

__all__ = ["DATASETS", "Data", "gather", "load_data"]

_SPLIT_SEED = 20180309
_MAX_BYTES = 2**31


@dataclass(frozen=True)
class Data:
    """Three splits of examples, each a pair of inputs (n, ...) float32 and labels (n,) int64.

    Attributes:
        train: What weights are trained on.
        validation: What early stopping and every choice look at.
        test: What is reported, and nothing else.
        classes: Number of classes.

    Raises:
        DataError: Inputs and labels of a split differ in number, or a label is out of range.

    Example:
        >>> x, y = torch.zeros(6, 4), torch.arange(6) % 2
        >>> Data((x, y), (x, y), (x, y), classes=2).shape
        (4,)
    """

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: int

    def __post_init__(self) -> None:
        for name in ("train", "validation", "test"):
            inputs, labels = getattr(self, name)
            if len(inputs) != len(labels) or labels.dim() != 1 or not len(labels):
                raise DataError(
                    explain_mismatch(
                        f"{name} split",
                        "as many labels as inputs, at least one",
                        f"inputs {tuple(inputs.shape)} and labels {tuple(labels.shape)}",
                    )
                )
            if labels.dtype is not torch.int64 or labels.min() < 0 or labels.max() >= self.classes:
                raise DataError(
                    explain_mismatch(
                        f"{name} labels",
                        f"int64 from 0 to {self.classes - 1}",
                        f"{labels.dtype} from {labels.min()} to {labels.max()}",
                    )
                )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return tuple(self.train[0].shape[1:])

    def to(self, device: torch.device | str) -> Data:
        """The same data on another device."""

        def moved(split: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return split[0].to(device), split[1].to(device)

        return Data(moved(self.train), moved(self.validation), moved(self.test), self.classes)


def load_data(name: str, folder: str | Path | None = None) -> Data:
    """Loads a data set of ``DATASETS`` by name.

    Args:
        name: ``digits`` (bundled with scikit-learn), ``mnist``, ``fashion_mnist`` or ``cifar10``.
        folder: Where the standard files lie; by default the environment variable SPARSELT_DATA,
            else ``data``.

    Raises:
        OptionError: There is no such data set.
        DataError: Its files are absent or damaged; the message names the expected path.
    """
    if name not in DATASETS:
        raise OptionError(explain_mismatch("data", f"one of {', '.join(DATASETS)}", name))
    return DATASETS[name](Path(folder or os.environ.get("SPARSELT_DATA") or "data"))


def gather(batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """One split from a data loader: all its batches in one tensor of inputs and one of labels.

    Args:
        batches: Yields (inputs, labels), for example a ``torch.utils.data.DataLoader`` that does
            not shuffle.
    """
    inputs, labels = zip(*batches, strict=True)
    return torch.cat(inputs), torch.cat(labels)


def digits(folder: Path) -> Data:
    """The 1,797 handwritten digits of 8x8 pixels that come with scikit-learn: 1,100 + 247 + 450."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingDependencyError(
            "the digits come with scikit-learn, which is not installed: pip install "
            "'sparselt[demo]'"
        ) from error
    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 16
    x, y = _normalise(images, (0.3053,), (0.3761,)), torch.from_numpy(labels).long()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    train, validation, test = order[:1100], order[1100:1347], order[1347:]
    return Data((x[train], y[train]), (x[validation], y[validation]), (x[test], y[test]), 10)


def mnist(folder: Path) -> Data:
    """MNIST from its four IDX files, gzip or plain, in ``folder/mnist``."""
    return _idx_data(folder / "mnist", 0.1307, 0.3081)


def fashion_mnist(folder: Path) -> Data:
    """Fashion-MNIST from its four IDX files (gzip or plain) in ``folder/fashion_mnist``."""
    return _idx_data(folder / "fashion_mnist", 0.2860, 0.3530)


def cifar10(folder: Path) -> Data:
    """CIFAR-10 from its binary batches in ``folder/cifar-10-batches-bin``."""
    place = folder / "cifar-10-batches-bin"
    train = [_cifar_batch(place / f"data_batch_{index}.bin") for index in range(1, 6)]
    inputs, labels = gather(train)
    mean, deviation = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    test_inputs, test_labels = _cifar_batch(place / "test_batch.bin")
    return _hold_out(
        _normalise(inputs, mean, deviation),
        labels,
        (_normalise(test_inputs, mean, deviation), test_labels),
    )


DATASETS: dict[str, Callable[[Path], Data]] = {
    "digits": digits,
    "mnist": mnist,
    "fashion_mnist": fashion_mnist,
    "cifar10": cifar10,
}


def _idx_data(folder: Path, mean: float, deviation: float) -> Data:
    def read(part: str) -> tuple[Tensor, Tensor]:
        images = _read_idx(folder / f"{part}-images-idx3-ubyte", 3)
        labels = _read_idx(folder / f"{part}-labels-idx1-ubyte", 1)
        scaled = images.unsqueeze(1).float() / 255
        return _normalise(scaled, (mean,), (deviation,)), labels.long()

    inputs, labels = read("train")
    return _hold_out(inputs, labels, read("t10k"))


def _hold_out(inputs: Tensor, labels: Tensor, test: tuple[Tensor, Tensor]) -> Data:
    """Splits 5,000 random training examples off for validation, as the lottery papers do; the same
    in every run.
    """
    held = min(5000, len(labels) // 10)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    kept, out = order[held:], order[:held]
    return Data((inputs[kept], labels[kept]), (inputs[out], labels[out]), test, 10)


def _normalise(images: Tensor, mean: tuple[float, ...], deviation: tuple[float, ...]) -> Tensor:
    shape = (1, len(mean), 1, 1)
    return (images - torch.tensor(mean).reshape(shape)) / torch.tensor(deviation).reshape(shape)


def _read_idx(path: Path, dimensions: int) -> Tensor:
    """An IDX file of unsigned bytes: magic, sizes as big-endian int32, then the bytes."""
    data = _read_plain_or_gzip(path)
    head = 4 + 4 * dimensions
    expected = bytes([0, 0, 8, dimensions])
    if len(data) < head or data[:4] != expected:
        raise DataError(
            explain_mismatch(f"{path}: IDX header", expected.hex(), data[:4].hex(), "get it again")
        )
    shape = struct.unpack(f">{dimensions}i", data[4:head])
    if min(shape) < 0 or len(data) - head != math.prod(shape):
        raise DataError(
            explain_mismatch(
                f"{path}: bytes", f"{shape} after the header", len(data) - head, "get it again"
            )
        )
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=head).reshape(shape).copy())


def _read_plain_or_gzip(path: Path) -> bytes:
    packed = path.with_name(path.name + ".gz")
    if path.is_file():
        return path.read_bytes()
    if not packed.is_file():
        raise DataError(
            f"expected the data file {packed} (or the same without .gz), which does not exist; "
            "put the standard file there, set SPARSELT_DATA to the folder that holds "
            f"{path.parent.name}, or fetch it with sparselt.lottery.download_data"
        )
    try:
        with gzip.open(packed) as file:
            return file.read(_MAX_BYTES)
    except (OSError, EOFError) as error:
        raise DataError(
            f"{packed}: expected a whole gzip file, got {error}; get it again"
        ) from error


def _cifar_batch(path: Path) -> tuple[Tensor, Tensor]:
    """Records of 3,073 bytes: the label, then the red, green and blue planes."""
    if not path.is_file():
        raise DataError(
            f"expected the data file {path}, which does not exist; unpack cifar-10-binary.tar.gz "
            f"there, set SPARSELT_DATA to the folder that holds {path.parent.name}, or fetch it "
            "with sparselt.lottery.download_data"
        )
    raw = np.fromfile(path, np.uint8)
    if not raw.size or raw.size % 3073:
        raise DataError(
            explain_mismatch(f"{path}: bytes", "a multiple of 3073", raw.size, "get it again")
        )
    records = torch.from_numpy(raw).reshape(-1, 3073)
    images = records[:, 1:].reshape(-1, 3, 32, 32).float() / 255
    return images, records[:, 0].long()
