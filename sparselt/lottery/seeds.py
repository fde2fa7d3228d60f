# SPDX-License-Identifier: Apache-2.0
"""One seed in a recipe, many independent random choices: each is seeded by what it is for."""

from __future__ import annotations

import hashlib

import torch

__all__ = ["derived_seed", "generator"]


def derived_seed(seed: int, *purpose: object) -> int:
    """A seed for one purpose: the same for the same arguments, unrelated for any others.

    Args:
        seed: The recipe's seed.
        *purpose: What it is for, for example ``"order", epoch``.

    Returns:
        An integer from 0 to 2**63 - 1.
    """
    text = "|".join([str(seed), *(str(word) for word in purpose)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, *purpose: object) -> torch.Generator:
    """A CPU generator seeded by :func:`derived_seed`."""
    return torch.Generator().manual_seed(derived_seed(seed, *purpose))
