# SPDX-License-Identifier: Apache-2.0
"""Layer shapes to time kernels on: real networks' shapes, drawn at random or read from DLMC.

The Deep Learning Matrix Collection (Gale et al., arXiv 1902.09574 and 2006.10901) has the weight
patterns of magnitude-pruned networks, without values; they are used where they are at hand.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sparselt.errors import OptionError
from sparselt.tickets import load_ticket

__all__ = ["DLMC", "SUITES", "Layer", "random_mask", "real_mask", "suite"]


@dataclass(frozen=True)
class Layer:
    """One layer to time: a matrix product, or a convolution if `kernel` is not 0.

    Attributes:
        name: where it comes from, such as "resnet50.layer3.conv2".
        rows: output features or channels M.
        cols: input features K, or input channels of a convolution.
        columns: columns N of a matrix product at batch 1.
        kernel: R = S of a convolution, 0 for a matrix product.
        size: H = W of a convolution's input.
        stride: of a convolution; padding is kernel // 2.

    Example:
        >>> Layer("fc", 512, 512, columns=784).case
        'fc 512x512 N=784'
    """

    name: str
    rows: int
    cols: int
    columns: int = 1
    kernel: int = 0
    size: int = 0
    stride: int = 1

    @property
    def case(self) -> str:
        """The name with the shape, as it stands in tables."""
        if self.kernel:
            shape = f"{self.rows}x{self.cols}x{self.kernel}x{self.kernel} {self.size}x{self.size}"
            return f"{self.name} {shape}" + (f" stride {self.stride}" if self.stride > 1 else "")
        return f"{self.name} {self.rows}x{self.cols} N={self.columns}"


def _resnet50() -> tuple[Layer, ...]:
    layers: list[Layer] = []
    for group, (width, size) in enumerate(((64, 56), (128, 28), (256, 14), (512, 7)), start=1):
        layers += [
            Layer(f"resnet50.layer{group}.conv1", width, 4 * width, kernel=1, size=size),
            Layer(f"resnet50.layer{group}.conv2", width, width, kernel=3, size=size),
            Layer(f"resnet50.layer{group}.conv3", 4 * width, width, kernel=1, size=size),
        ]
    return (*layers, Layer("resnet50.fc", 1000, 2048))


def _dlmc() -> tuple[Layer, ...]:
    """Each shape once: 1x1 as a product of pixels, 3x3 of im2col's too, and as convolutions."""
    products, convolutions = [], []
    for layer in _resnet50()[:-1]:
        pixels = layer.size * layer.size
        cols = layer.cols * layer.kernel * layer.kernel
        products.append(Layer(layer.name, layer.rows, cols, columns=pixels))
        convolutions.append(layer)
    tokens = 128
    transformer = [
        Layer("transformer.query", 512, 512, columns=tokens),
        Layer("transformer.value", 512, 512, columns=tokens),
        Layer("transformer.ffn1", 2048, 512, columns=tokens),
        Layer("transformer.ffn2", 512, 2048, columns=tokens),
    ]
    return (*products, *transformer, *convolutions)


SUITES: dict[str, tuple[Layer, ...]] = {
    "matrix": (Layer("matrix", 512, 512, columns=784),),
    "lenet": (
        Layer("lenet.fc1", 300, 784),
        Layer("lenet.fc2", 100, 300),
        Layer("lenet.fc3", 10, 100),
    ),
    "mlp": (
        Layer("mlp.fc1", 4096, 1024),
        Layer("mlp.fc2", 4096, 4096),
        Layer("mlp.fc3", 1024, 4096),
    ),
    "resnet20": (
        Layer("resnet20.layer1", 16, 16, kernel=3, size=32),
        Layer("resnet20.layer2", 32, 32, kernel=3, size=16),
        Layer("resnet20.layer3", 64, 64, kernel=3, size=8),
    ),
    "vgg19": (
        Layer("vgg19.conv2", 64, 64, kernel=3, size=32),
        Layer("vgg19.conv4", 128, 128, kernel=3, size=16),
        Layer("vgg19.conv6", 256, 256, kernel=3, size=8),
        Layer("vgg19.conv12", 512, 512, kernel=3, size=4),
        Layer("vgg19.conv16", 512, 512, kernel=3, size=2),
    ),
    "resnet50": _resnet50(),
}
DLMC = _dlmc()

# The files of DLMC's Transformer, one of each kind of layer.
_TRANSFORMER = {
    "transformer.query": "body_decoder_layer_1_self_attention_multihead_attention_q",
    "transformer.value": "body_decoder_layer_4_encdec_attention_multihead_attention_v",
    "transformer.ffn1": "body_encoder_layer_2_ffn_conv1",
    "transformer.ffn2": "body_decoder_layer_2_ffn_conv2",
}


def suite(name: str) -> tuple[Layer, ...]:
    """The layers of a named suite.

    Raises:
        OptionError: for an unknown name.

    Example:
        >>> suite("matrix")[0].rows
        512
    """
    if name not in SUITES:
        raise OptionError(f"suite: expected one of {', '.join(SUITES)}, got {name!r}")
    return SUITES[name]


def random_mask(
    shape: tuple[int, ...], density: float, block: tuple[int, int] = (1, 1), seed: int = 0
) -> Tensor:
    """A seeded mask, bool of `shape`: kept blocks (rows, cols) of the flattened matrix.

    The number of kept blocks is exact: round(density * blocks).

    Raises:
        OptionError: if density is not in 0 to 1.

    Example:
        >>> int(random_mask((4, 5), 0.5).sum())
        10
    """
    if not 0.0 <= density <= 1.0:
        raise OptionError(f"density: expected 0 to 1, got {density}")
    rows = shape[0]
    cols = 1
    for length in shape[1:]:
        cols *= length
    grid = (-(-rows // block[0]), -(-cols // block[1]))
    generator = torch.Generator().manual_seed(seed)
    kept = torch.zeros(grid[0] * grid[1], dtype=torch.bool)
    kept[torch.randperm(kept.numel(), generator=generator)[: round(density * kept.numel())]] = True
    full = kept.view(grid).repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return full[:rows, :cols].reshape(shape).contiguous()


def real_mask(layer: Layer, density: float, folder: str | Path | None = None) -> Tensor | None:
    """The pattern that magnitude pruning gave this layer, where DLMC's files are at hand.

    Args:
        layer: of the suite "resnet50" or of `DLMC`; any other has no real pattern.
        density: 0.2, 0.1 or 0.05: of the whole network, a layer's own differs a little.
        folder: that holds `dlmc`; by default the environment variable SPARSELT_DATA.

    Returns:
        The mask, bool (C_out, C_in, R, S) or (M, K); None if there is no such file.

    Raises:
        TicketFileError: if the file is damaged.
    """
    root = folder or os.environ.get("SPARSELT_DATA", "")
    found = re.fullmatch(r"resnet50\.(?:layer(\d)\.conv(\d)|fc)", layer.name)
    if not root or (found is None and layer.name not in _TRANSFORMER):
        return None
    network, stem = "rn50", "final_dense"
    if found is None:
        network, stem = "transformer", f"{_TRANSFORMER[layer.name]}_fully_connected"
    elif found[1]:
        stem = f"bottleneck_{found[2]}_block_group{found[1]}_1_1"
    sparsity = f"{1 - density:.2f}".rstrip("0")
    file = Path(root) / "dlmc" / network / "magnitude_pruning" / sparsity / f"{stem}.smtx"
    if not file.is_file():
        return None
    shape = (layer.rows, layer.cols) + (layer.kernel, layer.kernel) * bool(layer.kernel)
    (mask,) = load_ticket(file, shape=shape).masks.values()
    return mask
