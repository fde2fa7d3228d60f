# SPDX-License-Identifier: Apache-2.0
"""Sparse formats and the one function that chooses among them by name."""

from __future__ import annotations

from torch import Tensor

from sparselt.errors import FormatError, explain_mismatch
from sparselt.formats.base import SparseWeight
from sparselt.formats.bitmask import Bitmask
from sparselt.formats.bits import Bits
from sparselt.formats.bsell import BSELL
from sparselt.formats.bsr import BSR
from sparselt.formats.bsr_nhwc import ChannelsLastBSR
from sparselt.formats.csr import CSR
from sparselt.formats.delta import Delta
from sparselt.formats.patch8 import Patch8
from sparselt.formats.sell import SELL
from sparselt.formats.sign import Sign
from sparselt.formats.tile8 import Tile8
from sparselt.formats.window import Window

__all__ = [
    "BSELL",
    "BSR",
    "CSR",
    "FORMATS",
    "SELL",
    "Bitmask",
    "Bits",
    "ChannelsLastBSR",
    "Patch8",
    "Sign",
    "SparseWeight",
    "Tile8",
    "Window",
    "pack",
]

FORMATS: dict[str, type[SparseWeight]] = {
    "csr": CSR,
    "bsr": BSR,
    "sell": SELL,
    "bsell": BSELL,
    "delta": Delta,
    "sign": Sign,
    "bits": Bits,
    "window": Window,
    "tile8": Tile8,
    "bitmask": Bitmask,
    "patch8": Patch8,
    "bsr_nhwc": ChannelsLastBSR,
}


def pack(
    weight: Tensor,
    mask: Tensor | None = None,
    format: str = "csr",
    block: tuple[int, int] | None = None,
    groups: int = 1,
) -> SparseWeight:
    """Pack a pruned dense weight into a sparse format.

    On the CPU float32 is stored, into which float16 and bfloat16 weights convert exactly; on CUDA
    the weight's own type is. float64 is refused, because rounding is the caller's decision.

    Args:
        weight: (M, K) of a linear layer, (C_out, C_in/groups, S) or (C_out, C_in/groups, R, S) of a
            convolution; float32, float16 or bfloat16, any strides.
        mask: the same shape, bool or 0/1 valued: what to keep. A kept 0.0 stays stored. None keeps
            every weight that is not 0.
        format: a key of `FORMATS`. "sell", "bsell", "delta", "sign", "bits" and "window" are for
            the CPU, "sign" for weights of one magnitude a row, "delta" and "bits" for few columns,
            "window" for one; "tile8", "bitmask" and "patch8" are for few columns on CUDA,
            "bsr_nhwc" for convolutions over channels-last maps there.
        block: (rows, cols) of a block, for "sell", "bsell", "delta" and "sign" of a slice and a
            block of columns; None means the format's own, which is (4, 1) for "bsr".
        groups: of the convolution that the weight is for. "sell" and "bsell" keep the rows of each
            group apart; other formats do not care.

    Returns:
        The packed weight on the weight's device; nothing of `weight` is shared or changed.

    Raises:
        FormatError: unknown format, a bad block or one for a format without, groups that do not
            divide the rows, a mask that is not 0/1, too many stored values for int32,
            weights of several magnitudes for "sign".
        ShapeError: another rank, or a mask of another shape.
        DtypeError: weight or mask is not a tensor, or the weight's type is another.
        DeviceError: weight and mask are on different devices, or "sell" is asked for on CUDA.

    Example:
        >>> import torch, sparselt
        >>> weight = torch.tensor([[0.0, 2.0], [3.0, 0.0]])
        >>> sparselt.pack(weight)
        CSR(shape=(2, 2), nnz=2, density=0.5, device=cpu)
    """
    if not isinstance(format, str) or format not in FORMATS:
        known = ", ".join(repr(name) for name in FORMATS)
        raise FormatError(explain_mismatch("format", f"one of {known}", repr(format)))
    packed = FORMATS[format].from_dense(weight, mask, block, groups)
    return packed.to(dtype=weight.dtype) if packed.device.type == "cuda" else packed
