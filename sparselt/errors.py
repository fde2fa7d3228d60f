# SPDX-License-Identifier: Apache-2.0
"""Every exception that sparselt raises on a user's mistake: expected, got, and what to do.

Each class also derives from the built-in exception a Python programmer would catch, so
``except ValueError`` and ``except sparselt.errors.SparseltError`` both work.
"""

from __future__ import annotations

__all__ = [
    "DataError",
    "DeviceError",
    "DtypeError",
    "FormatError",
    "GradientError",
    "KernelError",
    "MissingDependencyError",
    "OptionError",
    "ProgramFileError",
    "ShapeError",
    "SparseltError",
    "TicketFileError",
    "TicketNotFoundError",
    "explain_mismatch",
]


class SparseltError(Exception):
    """The base of every exception below; catch it to catch them all."""


class ShapeError(SparseltError, ValueError):
    """A tensor has the wrong rank or size."""


class DtypeError(SparseltError, TypeError):
    """A tensor has an element type that the operation does not take."""


class DeviceError(SparseltError, ValueError):
    """A tensor lies on the wrong device, or on another device than its partner."""


class FormatError(SparseltError, ValueError):
    """A sparse weight is malformed, or its format, mask or block is not usable."""


class TicketFileError(SparseltError, ValueError):
    """A ticket or checkpoint file is damaged, hostile, or of an unknown kind or version."""


class TicketNotFoundError(SparseltError, FileNotFoundError):
    """No file lies where a ticket was asked for."""


class ProgramFileError(SparseltError, ValueError):
    """The file of a compiled program is missing, damaged, hostile, or of an unknown version."""


class KernelError(SparseltError, ValueError):
    """A kernel is unknown, not built, or does not apply to the layer it was asked for."""


class GradientError(SparseltError, RuntimeError):
    """A gradient was asked of an operation that only runs forward."""


class DataError(SparseltError, ValueError):
    """Training or evaluation data cannot be used as they are."""


class OptionError(SparseltError, ValueError):
    """An argument or command-line option has a value outside its range."""


class MissingDependencyError(SparseltError, ImportError):
    """An optional package is needed for what was asked, and is not installed."""


def explain_mismatch(what: str, expected: object, got: object, hint: str = "") -> str:
    """Builds the one sentence that every mismatch is reported with.

    Args:
        what: the argument or file part at fault, by the name the user knows it by.
        expected: what would have been accepted.
        got: what was handed in.
        hint: what to do about it, without a full stop; empty when there is nothing to add.

    Returns:
        ``"<what>: expected <expected>, got <got>"``, followed by ``"; <hint>"`` if there is one.

    Example:
        >>> explain_mismatch("x", "(64, N)", (5, 3), "transpose it with x.T")
        'x: expected (64, N), got (5, 3); transpose it with x.T'
    """
    sentence = f"{what}: expected {expected}, got {got}"
    return f"{sentence}; {hint}" if hint else sentence
