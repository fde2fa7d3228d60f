# SPDX-License-Identifier: Apache-2.0
"""Data sets from their standard files, and the networks that take them."""

from __future__ import annotations

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from lottery_cases import one_thread  # noqa: F401
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sparselt import errors
from sparselt.lottery import NETWORKS, Data, load_data
from sparselt.lottery.data import gather
from sparselt.lottery.networks import build, factory_of


def idx_bytes(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_mnist(folder: Path, packed: bool = True) -> np.ndarray:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 28, 28))
    files = {
        "train-images-idx3-ubyte": images,
        "train-labels-idx1-ubyte": np.arange(40) % 10,
        "t10k-images-idx3-ubyte": images[:20],
        "t10k-labels-idx1-ubyte": np.arange(20) % 10,
    }
    for name, array in files.items():
        data = idx_bytes(array)
        path = folder / (name + ".gz" if packed else name)
        path.write_bytes(gzip.compress(data) if packed else data)
    return images


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_idx_files_are_read_plain_and_packed(tmp_path: Path, name: str, packed: bool) -> None:
    images = write_mnist(tmp_path / name, packed)

    data = load_data(name, tmp_path)

    assert data.shape == (1, 28, 28)
    assert (len(data.train[1]), len(data.validation[1]), len(data.test[1])) == (36, 4, 20)
    mean, deviation = (0.1307, 0.3081) if name == "mnist" else (0.2860, 0.3530)
    want = (torch.from_numpy(images[:20]).float() / 255 - mean) / deviation
    torch.testing.assert_close(data.test[0][:, 0], want)
    assert data.test[1].tolist() == [i % 10 for i in range(20)]


def test_no_example_is_in_two_splits() -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    data = load_data("digits")
    rows = torch.cat([split[0].flatten(1) for split in (data.train, data.validation, data.test)])

    assert len(rows) == 1797
    assert data.shape == (1, 8, 8)
    assert len(rows.unique(dim=0)) == 1797
    assert abs(float(data.train[0].mean())) < 0.05
    assert torch.equal(load_data("digits").train[0], data.train[0])


def test_cifar_records_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (10, 3072), dtype=np.uint8)
    records = np.concatenate([np.arange(10, dtype=np.uint8)[:, None], pixels], 1)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        (folder / f"{name}.bin").write_bytes(records.tobytes())

    data = load_data("cifar10", tmp_path)

    assert data.shape == (3, 32, 32)
    assert (len(data.train[1]), len(data.validation[1]), len(data.test[1])) == (45, 5, 10)
    assert data.test[1].tolist() == list(range(10))
    red = (pixels[3, 33] / 255 - 0.4914) / 0.2470
    assert float(data.test[0][3, 0, 1, 1]) == pytest.approx(red, abs=1e-5)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10"])
def test_absent_files_are_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(errors.DataError, match=str(tmp_path)):
        load_data(name, tmp_path)


def test_the_environment_variable_says_where_data_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_mnist(tmp_path / "mnist")
    monkeypatch.setenv("SPARSELT_DATA", str(tmp_path))

    assert load_data("mnist").classes == 10


@pytest.mark.parametrize("damage", ["cut", "magic", "sizes", "not gzip"])
def test_damaged_idx_files_are_refused(tmp_path: Path, damage: str) -> None:
    write_mnist(tmp_path / "mnist")
    path = tmp_path / "mnist" / "t10k-labels-idx1-ubyte.gz"
    good = gzip.decompress(path.read_bytes())
    path.write_bytes(
        {
            "cut": path.read_bytes()[:-9],
            "magic": gzip.compress(b"\1\2\3\4" + good[4:]),
            "sizes": gzip.compress(good[:4] + struct.pack(">i", -5) + good[8:]),
            "not gzip": b"hello",
        }[damage]
    )

    with pytest.raises(errors.DataError, match="t10k-labels"):
        load_data("mnist", tmp_path)


def test_damaged_cifar_files_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    (folder / "data_batch_1.bin").write_bytes(bytes(3072))

    with pytest.raises(errors.DataError, match="3073"):
        load_data("cifar10", tmp_path)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(errors.OptionError, match="digits"):
        load_data("imagenet")
    with pytest.raises(errors.OptionError, match="lenet_300_100"):
        factory_of("alexnet")


def test_a_data_loader_becomes_a_split() -> None:
    x, y = torch.randn(10, 3), torch.arange(10) % 2

    got = gather(DataLoader(TensorDataset(x, y), batch_size=4))

    assert torch.equal(got[0], x)
    assert torch.equal(got[1], y)


def test_labels_that_do_not_fit_are_refused() -> None:
    x, y = torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64)
    good = (x, y)
    for bad in ((x, y[:3]), (x, y + 2), (x, y - 1), (x, y.int()), (x[:0], y[:0])):
        with pytest.raises(errors.DataError):
            Data(bad, good, good, classes=2)


@pytest.mark.skipif(
    not Path(os.environ.get("SPARSELT_DATA", "/nonexistent"), "mnist").is_dir(),
    reason="SPARSELT_DATA does not hold the real MNIST files",
)
def test_real_mnist_is_the_known_one() -> None:
    data = load_data("mnist")

    assert len(data.train[1]) + len(data.validation[1]) == 60_000
    assert data.test[1][:5].tolist() == [7, 2, 1, 0, 4]
    assert abs(float(data.train[0].mean())) < 0.01


@pytest.mark.parametrize(
    ("name", "shape", "all_weights", "conv_weights"),
    [
        ("lenet_300_100", (1, 28, 28), 266_200, 0),
        ("lenet_5", (1, 28, 28), 61_470, 2_550),
        ("conv_2", (3, 32, 32), 4_300_992, 38_592),
        ("conv_4", (3, 32, 32), 2_425_024, 259_776),
        ("conv_6", (3, 32, 32), 2_261_184, 1_144_512),
    ],
)
def test_networks_have_the_published_numbers_of_weights(
    name: str, shape: tuple[int, ...], all_weights: int, conv_weights: int
) -> None:
    with torch.device("meta"):
        network = NETWORKS[name](shape, 10)
    layers = [m for m in network.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]

    assert sum(m.weight.numel() for m in layers) == all_weights
    assert sum(m.weight.numel() for m in layers if isinstance(m, nn.Conv2d)) == conv_weights


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_takes_images_of_its_shape(name: str) -> None:
    shape = (2, 32, 32)
    network = build(factory_of(name, shape, 7), 0)

    assert network(torch.zeros(3, *shape)).shape == (3, 7)


def test_building_is_seeded_and_leaves_the_global_generator_alone() -> None:
    factory = factory_of("conv_small", (1, 8, 8), 10)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)

    first, same, other = build(factory, 1), build(factory, 1), build(factory, 2)

    assert torch.equal(torch.rand(3), expected)
    weights = [network.get_parameter("0.weight") for network in (first, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_glorot_weights_have_the_published_deviation_and_biases_are_zero() -> None:
    network = build(factory_of("lenet_300_100", (1, 28, 28), 10), 0)
    weight, bias = network.get_parameter("1.weight"), network.get_parameter("1.bias")

    assert float(weight.detach().std()) == pytest.approx((2 / (784 + 300)) ** 0.5, rel=0.01)
    assert not bias.detach().any()


def test_a_module_is_redrawn_by_its_own_layers() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    before = module[0].weight.clone()

    fresh = build(factory_of(module), 0)

    assert torch.equal(module[0].weight, before)
    assert not torch.equal(fresh.get_parameter("0.weight"), before)


def test_a_module_that_cannot_be_redrawn_says_so() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

    with pytest.raises(errors.OptionError, match="Scale"):
        build(factory_of(Scale()), 0)


def test_images_too_small_for_a_network_are_refused() -> None:
    with pytest.raises(errors.DataError, match="12x12"):
        NETWORKS["lenet_5"]((1, 8, 8), 10)
    with pytest.raises(errors.DataError):
        NETWORKS["conv_2"]((784,), 10)
