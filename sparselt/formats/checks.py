# SPDX-License-Identifier: Apache-2.0
"""What every format checks: the dense weight and mask that come in, and every index kept.

Nothing behind these checks looks at an index again, so they are exhaustive, and each message says
what was expected, what was found and what to do about it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparselt.errors import DeviceError, DtypeError, FormatError, ShapeError, explain_mismatch

__all__ = [
    "INT32_MAX",
    "check_compressed_indices",
    "check_compressed_lengths",
    "check_fits_int32",
    "check_on_cpu",
    "check_parts",
    "check_shape",
    "check_shapes",
    "check_values_dtype",
    "kept_weights",
]

INT32_MAX = 2**31 - 1

# float16 and bfloat16 are subsets of float32, so storing them as float32 loses nothing.
_EXACT_IN_FLOAT32 = (torch.float32, torch.float16, torch.bfloat16)


def check_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The logical shape as a tuple of 2 to 4 sizes, each side of the flat matrix within int32.

    Raises:
        ShapeError: another number of sizes, a negative one, or a side beyond int32.
    """
    try:
        sizes = tuple(int(size) for size in shape)
    except (TypeError, ValueError):
        raise ShapeError(explain_mismatch("shape", "2 to 4 whole numbers", repr(shape))) from None
    if not 2 <= len(sizes) <= 4:
        raise ShapeError(
            explain_mismatch(
                "shape",
                "(M, K), (C_out, C_in/groups, S) or (C_out, C_in/groups, R, S)",
                f"{len(sizes)} dimensions, {sizes}",
                "reshape the weight to one of these",
            )
        )
    if min(sizes) < 0:
        raise ShapeError(explain_mismatch("shape", "sizes >= 0", sizes))
    if sizes[0] > INT32_MAX or math.prod(sizes[1:]) > INT32_MAX:
        raise ShapeError(
            explain_mismatch(
                "shape",
                f"at most {INT32_MAX} rows and columns",
                sizes,
                "split the weight; indices are int32",
            )
        )
    return sizes


def kept_weights(weight: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Check a dense weight and its mask and flatten both to a matrix.

    Args:
        weight: (M, K), (C_out, C_in/groups, S) or (C_out, C_in/groups, R, S); float32, or float16
            or bfloat16, which float32 holds exactly.
        mask: the same shape, bool or 0/1 valued; None means `weight != 0`.

    Returns:
        Values (M, K) float32 and kept (M, K) bool, both contiguous.

    Raises:
        DtypeError, ShapeError, DeviceError, FormatError: what was given is none of the above.
    """
    if not isinstance(weight, Tensor):
        raise DtypeError(explain_mismatch("weight", "a torch.Tensor", type(weight).__name__))
    if weight.layout != torch.strided:
        raise FormatError(
            explain_mismatch(
                "weight", "a dense (strided) tensor", weight.layout, "call .to_dense() first"
            )
        )
    if weight.device.type == "meta":
        raise DeviceError(explain_mismatch("weight", "a tensor that holds data", "device meta"))
    if weight.dtype not in _EXACT_IN_FLOAT32:
        hint = (
            "round it yourself with .float()"
            if weight.dtype == torch.float64
            else "convert it with .float()"
        )
        raise DtypeError(
            explain_mismatch("weight", "float32, float16 or bfloat16", weight.dtype, hint)
        )
    shape = check_shape(weight.shape)
    rows, cols = shape[0], math.prod(shape[1:])
    values = weight.detach().to(torch.float32).reshape(rows, cols).contiguous()
    if mask is None:
        return values, values != 0
    return values, _check_mask(mask, weight).reshape(rows, cols).contiguous()


def _check_mask(mask: Tensor, weight: Tensor) -> Tensor:
    if not isinstance(mask, Tensor):
        raise DtypeError(explain_mismatch("mask", "a torch.Tensor", type(mask).__name__))
    if mask.shape != weight.shape:
        raise ShapeError(
            explain_mismatch(
                "mask",
                f"the weight's shape {tuple(weight.shape)}",
                tuple(mask.shape),
                "masks do not broadcast",
            )
        )
    if mask.device != weight.device:
        hint = f"move it with mask.to({str(weight.device)!r})"
        raise DeviceError(
            explain_mismatch("mask", f"the weight's device {weight.device}", mask.device, hint)
        )
    if mask.layout != torch.strided:
        raise FormatError(
            explain_mismatch("mask", "a dense (strided) tensor", mask.layout, "call .to_dense()")
        )
    mask = mask.detach()
    if mask.dtype == torch.bool:
        return mask
    wrong = (mask != 0) & (mask != 1)
    if bool(wrong.any()):
        value = mask[wrong][0].item()
        hint = "threshold a score first, for example mask = score > 0.5"
        raise FormatError(
            explain_mismatch("mask", "True/False, or only 0 and 1", f"the value {value}", hint)
        )
    return mask != 0


def check_fits_int32(nnz: int) -> None:
    """Raise FormatError if `nnz` stored values cannot be counted by int32 offsets."""
    if nnz > INT32_MAX:
        raise FormatError(
            explain_mismatch(
                "stored values", f"at most {INT32_MAX} (int32 offsets)", nnz, "split the weight"
            )
        )


def check_parts(
    parts: tuple[Any, ...],
    names: tuple[str, ...],
    format_name: str,
    index_dtypes: Mapping[str, torch.dtype],
) -> None:
    """Count, types, contiguity and device of a weight's parts, of which the last are the values.

    Args:
        parts: to check.
        names: that they should have.
        format_name: for the message.
        index_dtypes: of parts by name, int32 for those that are not there.

    Raises:
        FormatError, DtypeError, DeviceError: a part is not as the format says.
    """
    if len(parts) != len(names):
        raise FormatError(
            explain_mismatch(
                f"{format_name} parts", f"{len(names)}: {', '.join(names)}", f"{len(parts)} parts"
            )
        )
    for part, name in zip(parts, names, strict=True):
        if not isinstance(part, Tensor):
            raise DtypeError(explain_mismatch(name, "a torch.Tensor", type(part).__name__))
        dtype = index_dtypes.get(name, torch.int32)
        if part is parts[-1]:
            check_values_dtype(part)
        elif part.dtype != dtype:
            raise DtypeError(
                explain_mismatch(name, dtype, part.dtype, f"convert it with .to({dtype})")
            )
        if part.layout != torch.strided or not part.is_contiguous():
            raise FormatError(
                explain_mismatch(
                    name, "a contiguous dense tensor", "one that is not", ".contiguous()"
                )
            )
        if part.device != parts[0].device:
            raise DeviceError(
                explain_mismatch(
                    name,
                    f"the device of {names[0]}, {parts[0].device}",
                    part.device,
                    "use .to(device)",
                )
            )


def check_shapes(parts: tuple[Tensor, ...], names: tuple[str, ...], *shapes: Sequence[int]) -> None:
    """Shapes of parts, in their order.

    Raises:
        FormatError: a part has another shape.
    """
    for part, name, shape in zip(parts, names, shapes, strict=True):
        if part.shape != torch.Size(shape):
            raise FormatError(explain_mismatch(name, f"shape {tuple(shape)}", tuple(part.shape)))


def check_values_dtype(values: Tensor) -> None:
    """Kernels of the CPU read float32, those of CUDA float16 and bfloat16 too.

    Raises:
        DtypeError: the values are of another type.
    """
    if values.dtype == torch.float32 or (values.is_cuda and values.dtype in _EXACT_IN_FLOAT32):
        return
    expected = "float32, float16 or bfloat16" if values.is_cuda else torch.float32
    hint = "convert it with .to(torch.float32)"
    raise DtypeError(explain_mismatch("values", expected, values.dtype, hint))


def check_compressed_lengths(crow: Tensor, col: Tensor, rows: int) -> None:
    """Ranks and lengths of the two index parts of a row-compressed format with `rows` (block) rows.

    Raises:
        FormatError: crow_indices is not (rows + 1,) or col_indices is not 1-D.
    """
    if crow.shape != (rows + 1,):
        raise FormatError(
            explain_mismatch(
                "crow_indices", f"shape ({rows + 1},), one more than the rows", tuple(crow.shape)
            )
        )
    if col.dim() != 1:
        raise FormatError(
            explain_mismatch("col_indices", "1 dimension", f"{col.dim()}, {tuple(col.shape)}")
        )


def check_compressed_indices(crow: Tensor, col: Tensor, cols: int) -> None:
    """Every offset and index of a row-compressed format with `cols` (block) columns, in O(nnz).

    Raises:
        FormatError: says which rule is broken, where, and by what.
    """
    first, last, entries = int(crow[0]), int(crow[-1]), col.numel()
    if first != 0:
        raise FormatError(explain_mismatch("crow_indices", "0 at the start", first))
    # Compared, not subtracted: a hostile difference wraps around in int32.
    falls = crow[1:] < crow[:-1]
    if bool(falls.any()):
        row = int(falls.nonzero()[0])
        got = f"{int(crow[row])} then {int(crow[row + 1])} at row {row}"
        raise FormatError(explain_mismatch("crow_indices", "offsets that never decrease", got))
    if last != entries:
        raise FormatError(
            explain_mismatch(
                "crow_indices",
                f"{entries} at the end, the length of col_indices",
                last,
                "the parts do not match",
            )
        )
    if entries == 0:
        return
    lowest, highest = int(col.min()), int(col.max())
    if lowest < 0 or highest >= cols:
        outside = lowest if lowest < 0 else highest
        raise FormatError(explain_mismatch("col_indices", f"columns from 0 to {cols - 1}", outside))
    rises = col[1:] > col[:-1]
    starts = crow[1:-1].long()
    # A column may fall only where a new row begins.
    rises[starts[(starts > 0) & (starts < entries)] - 1] = True
    if not bool(rises.all()):
        at = int((~rises).nonzero()[0])
        row = int(torch.searchsorted(crow, at, right=True)) - 1
        got = f"{int(col[at])} then {int(col[at + 1])} in row {row}"
        hint = "sort each row and add up repeated entries"
        raise FormatError(
            explain_mismatch("col_indices", "columns that rise within a row", got, hint)
        )


def check_on_cpu(part: Tensor, format: str) -> None:
    """Refuses a weight that is not on the CPU, for a format of CPU kernels.

    Raises:
        DeviceError: it is elsewhere.
    """
    if part.is_cuda:
        hint = "CUDA kernels read other formats: pack the weight with format='csr'"
        raise DeviceError(
            explain_mismatch(f"format {format!r}", "a weight on the CPU", part.device, hint)
        )
