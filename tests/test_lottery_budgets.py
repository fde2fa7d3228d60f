# SPDX-License-Identifier: Apache-2.0
"""Budgets by layer add up to the total, hold their caps, and follow their formulas."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparselt.lottery.budgets import budget_groups, share_out
from sparselt.lottery.structures import Blocks

SHAPES = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=3),
    st.one_of(
        st.tuples(st.integers(1, 40), st.integers(1, 40)),
        st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 3), st.integers(1, 3)),
    ),
    min_size=1,
    max_size=6,
)


class TestBudgets:
    @settings(max_examples=150, deadline=None)
    @given(SHAPES, st.floats(0, 1), st.sampled_from(["uniform", "erk"]))
    def test_sums_are_exact_and_caps_hold(
        self, shapes: dict[str, tuple[int, ...]], density: float, budget: str
    ) -> None:
        groups = budget_groups(budget, shapes, density)

        sizes = [math.prod(shape) for shape in shapes.values()]
        kept = [group.keep for group in groups]
        assert [group.names for group in groups] == [(name,) for name in shapes]
        assert sum(kept) == round(density * sum(sizes))
        assert all(0 <= count <= size for count, size in zip(kept, sizes, strict=True))
        assert sum(kept) < len(sizes) or all(kept)

    @settings(max_examples=100, deadline=None)
    @given(SHAPES, st.floats(0.05, 1))
    def test_uniform_keeps_the_same_share_of_every_layer(
        self, shapes: dict[str, tuple[int, ...]], density: float
    ) -> None:
        sizes = [math.prod(shape) for shape in shapes.values()]
        share = round(density * sum(sizes)) / sum(sizes)

        for group, size in zip(budget_groups("uniform", shapes, density), sizes, strict=True):
            # One for rounding; small layers may give one to a layer that would have none.
            assert abs(group.keep - share * size) <= 1 + len(sizes)

    def test_erk_follows_its_formula_where_no_cap_binds(self) -> None:
        shapes = {"a": (64, 64, 3, 3), "b": (128, 64, 3, 3), "c": (128, 128, 3, 3)}

        groups = budget_groups("erk", shapes, 0.05)

        parts = [group.keep / (sum(shapes[group.names[0]])) for group in groups]
        assert parts == pytest.approx([parts[0]] * 3, rel=1e-2)

    def test_erk_leaves_a_small_layer_dense_and_shares_out_the_rest(self) -> None:
        shapes = {"big": (300, 784), "middle": (100, 300), "last": (10, 100)}

        kept = [group.keep for group in budget_groups("erk", shapes, 0.3)]

        assert kept[2] == 1000
        assert sum(kept) == round(0.3 * 266_200)
        assert (
            kept[0] / kept[1] == pytest.approx((300 + 784) / (100 + 300), rel=1e-3)
            or kept[1] == 30_000
        )

    def test_counts_blocks_where_blocks_are_pruned(self) -> None:
        shapes = {"a": (16, 8), "b": (18, 8)}

        groups = budget_groups("uniform", shapes, 0.5, Blocks(4, 1))

        assert [group.keep for group in groups] == [16, 20]

    @settings(max_examples=150, deadline=None)
    @given(
        st.lists(st.tuples(st.floats(0, 1e6), st.integers(0, 50)), min_size=1, max_size=8),
        st.floats(0, 1),
    )
    def test_share_out_meets_any_sum(self, pairs: list[tuple[float, int]], part: float) -> None:
        wants, caps = [want for want, _ in pairs], [cap for _, cap in pairs]
        keep = round(part * sum(caps))

        shares = share_out(wants, caps, keep)

        assert sum(shares) == keep
        assert all(0 <= share <= cap for share, cap in zip(shares, caps, strict=True))
