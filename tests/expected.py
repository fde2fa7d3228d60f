# SPDX-License-Identifier: Apache-2.0
"""How a result is judged: by the dot-product bound of the reference, element by element."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from sparselt import reference
from sparselt.formats import SparseWeight

__all__ = ["assert_within_bound"]

# What the reference gave last: all kernels and formats of a case take turns at it.
_EXPECTED: dict[object, tuple[np.ndarray, np.ndarray]] = {}
_MOST_EXPECTED = 256


def assert_within_bound(
    case: object, got: Tensor, operation: Callable[..., np.ndarray], *args: object, **kwargs: object
) -> None:
    """Assert that `got` is within the dot-product bound of the reference, element by element.

    NaN and infinities must be where the reference has them.

    Args:
        case: printed on failure; should be enough to make the case again.
        got: float32 tensor of any device.
        operation: a function of `sparselt.reference`.
        *args: what it is called with.
        **kwargs: the same.
    """
    __tracebackhide__ = True
    with np.errstate(invalid="ignore", over="ignore"):
        expected, bound = _expected(operation, args, kwargs)
        assert got.dtype == torch.float32, f"{case}: dtype {got.dtype}"
        assert tuple(got.shape) == expected.shape, f"{case}: {tuple(got.shape)} {expected.shape}"
        found = got.detach().cpu().double().numpy()
        error = np.abs(found - expected)
        finite = np.isfinite(expected)
        same = (found == expected) | (np.isnan(found) & np.isnan(expected))
        wrong = np.where(finite, ~(error <= bound), ~same)
    if not wrong.any():
        return
    excess = np.where(wrong, np.nan_to_num(error / bound, nan=np.inf, posinf=np.inf), -1.0)
    worst = np.unravel_index(int(np.argmax(excess)), excess.shape)
    index = tuple(int(i) for i in worst)
    raise AssertionError(
        f"{case}: {int(wrong.sum())} of {wrong.size} wrong; worst at {index}: "
        f"got {found[worst]:.9g}, expected {expected[worst]:.9g}, bound {bound[worst]:.3g}"
    )


def _expected(
    operation: Callable[..., np.ndarray], args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[np.ndarray, np.ndarray]:
    """The reference's result and its bound."""
    key = (operation, *map(_content, args), *((k, _content(v)) for k, v in kwargs.items()))
    if key not in _EXPECTED:
        if len(_EXPECTED) >= _MOST_EXPECTED:
            _EXPECTED.clear()
        bound = reference.error_bound(operation, *args, **kwargs)
        _EXPECTED[key] = operation(*args, **kwargs), bound
    return _EXPECTED[key]


def _content(value: object) -> object:
    """What can be compared and hashed in place of an argument."""
    if isinstance(value, SparseWeight):
        return _content(value.to_dense()), _content(value.mask())
    if isinstance(value, Tensor):
        plain = value.detach().cpu().contiguous()
        return plain.shape, plain.dtype, plain.view(-1).view(torch.uint8).numpy().tobytes()
    return value
