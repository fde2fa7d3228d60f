# SPDX-License-Identifier: Apache-2.0
"""VGG and ResNet have the published sizes, and start and run as published."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparselt.errors import DataError
from sparselt.lottery.counting import count
from sparselt.lottery.deep_networks import DEEP_NETWORKS, PaddedShortcut, vgg
from sparselt.lottery.networks import NETWORKS, build

CIFAR, IMAGENET = (3, 32, 32), (3, 224, 224)
# Parameters of ResNet-18, 34 and 50 are those of torchvision's; CIFAR ResNets those of He et al.'s
# table 6 to its three digits.
SIZES = {
    "vgg_16": (CIFAR, 10, 14_724_042),
    "vgg_19": (CIFAR, 10, 20_035_018),
    "resnet_20": (CIFAR, 10, 269_722),
    "resnet_56": (CIFAR, 10, 853_018),
    "resnet_110": (CIFAR, 10, 1_727_962),
    "resnet_18": (IMAGENET, 1000, 11_689_512),
    "resnet_34": (IMAGENET, 1000, 21_797_672),
    "resnet_50": (IMAGENET, 1000, 25_557_032),
}
MACS = {
    "vgg_16": 313_201_664,
    "resnet_20": 40_551_040,
    "resnet_56": 125_485_696,
    "resnet_110": 252_887_680,
    "resnet_18": 1_814_073_344,
    "resnet_34": 3_663_761_408,
    "resnet_50": 4_089_184_256,
}


def meta(name: str) -> nn.Module:
    shape, classes, _ = SIZES[name]
    with torch.device("meta"):
        return DEEP_NETWORKS[name](shape, classes)


def test_all_are_registered() -> None:
    assert set(SIZES) == set(DEEP_NETWORKS)
    assert DEEP_NETWORKS.items() <= NETWORKS.items()


@pytest.mark.parametrize("name", SIZES)
def test_parameters_are_the_published_number(name: str) -> None:
    assert sum(parameter.numel() for parameter in meta(name).parameters()) == SIZES[name][2]


@pytest.mark.parametrize("name", MACS)
def test_multiply_accumulates_are_the_known_number(name: str) -> None:
    assert count(meta(name), SIZES[name][0]).macs == MACS[name]


@pytest.mark.parametrize("name", SIZES)
def test_output_has_a_row_an_image_and_a_column_a_class(name: str) -> None:
    shape, classes, _ = SIZES[name]
    model = meta(name)
    assert model(torch.empty(2, *shape, device="meta")).shape == (2, classes)


@pytest.mark.parametrize("name", ["resnet_20", "resnet_18"])
def test_signal_neither_vanishes_nor_explodes_at_the_start(name: str) -> None:
    model = build(lambda: DEEP_NETWORKS[name]((1, 32, 32), 10), 0).train()
    x = torch.randn(8, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    assert 0.1 < model(x).std().item() < 10


def test_weights_follow_the_seed() -> None:
    def make() -> nn.Module:
        return DEEP_NETWORKS["resnet_20"](CIFAR, 10)

    first, again, other = build(make, 1), build(make, 1), build(make, 2)
    assert torch.equal(first.conv.weight, again.conv.weight)
    assert not torch.equal(first.conv.weight, other.conv.weight)


def test_convolutions_start_from_kaiming_normal() -> None:
    weight = build(lambda: DEEP_NETWORKS["vgg_16"](CIFAR, 10), 0)[40].weight
    assert weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.01)


def test_padded_shortcut_by_hand() -> None:
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    y = PaddedShortcut(3, 2)(x)
    assert y.shape == (1, 4, 2, 2)
    assert y[0, 1].tolist() == [[0.0, 2.0], [8.0, 10.0]]
    assert y[0, [0, 2, 3]].abs().sum() == 0
    assert str(PaddedShortcut(3, 2)) == "PaddedShortcut(new_channels=3, stride=2)"


def test_hidden_layers_of_vgg_have_batch_norm() -> None:
    with torch.device("meta"):
        model = vgg(16, CIFAR, 10, hidden=(512,))
    kinds = [type(layer).__name__ for layer in list(model)[-4:]]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Linear"]


@pytest.mark.parametrize("shape", [(3, 16, 16), (3, 32), (784,)])
@pytest.mark.parametrize("name", ["vgg_16", "resnet_18"])
def test_images_that_are_too_small_are_refused(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="input shape"):
        DEEP_NETWORKS[name](shape, 10)
