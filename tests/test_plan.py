# SPDX-License-Identifier: Apache-2.0
"""The choice of a kernel: pure, printable, dense always among the candidates."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest

from sparselt.errors import KernelError, OptionError
from sparselt.formats import FORMATS
from sparselt.plan import (
    DENSE,
    FORMAT_CHOICES,
    SEMI_STRUCTURED,
    Facts,
    KernelInfo,
    Plan,
    candidates,
    choose,
)
from sparselt.rules import block_for


def kernel(name: str, **changes: object) -> KernelInfo:
    """A usable CPU kernel whose name says its format and operation."""
    format_name, op = name.split("_")[:2]
    info = KernelInfo(name, op, format_name, "cpu", (), 1, 64, "float32", True)
    return replace(info, **changes)


KERNELS = (
    kernel("csr_spmm_fast", features=("avx2",)),
    kernel("csr_spmm_scalar"),
    kernel("bsr_spmm_fast"),
    kernel("csr_conv2d_fast"),
)
# 1 % of 256 x 256.
THIN = Facts("linear", (256, 256), nnz=655, columns=64)


def test_dense_is_the_last_candidate_of_every_operation():
    for op in ("linear", "spmm", "conv1d", "conv2d"):
        found = candidates(replace(THIN, op=op), KERNELS)
        assert found[-1].kernel == DENSE
        assert found[-1].applies


def test_candidates_keep_the_order_of_the_registry_and_leave_out_other_operations():
    names = [c.kernel for c in candidates(THIN, KERNELS)]
    assert names == ["csr_spmm_fast", "csr_spmm_scalar", "bsr_spmm_fast", DENSE]
    assert [c.kernel for c in candidates(replace(THIN, op="conv1d"), KERNELS)] == [
        "csr_conv2d_fast",
        DENSE,
    ]


@pytest.mark.parametrize(
    ("columns", "applies"), [(1, True), (24, True), (25, False), (None, False)]
)
def test_a_spmv_kernel_is_offered_for_few_columns(columns, applies):
    facts = replace(THIN, columns=columns)
    (found, _) = candidates(facts, [kernel("sell_spmv_fast", tile_rows=16, tile_columns=16)])
    assert found.applies == applies
    assert applies or found.verdict == "is for at most 24 columns"
    assert not any(
        c.kernel == "sell_spmv_fast"
        for c in candidates(replace(facts, op="conv2d"), [kernel("sell_spmv_fast")])
    )


@pytest.mark.parametrize(("groups", "applies"), [(1, True), (32, True), (64, False)])
def test_panels_are_offered_for_groups_of_enough_rows(groups, applies):
    facts = Facts("conv2d", (256, 8, 3, 3), nnz=900, groups=groups)
    (found, _) = candidates(facts, [kernel("sell_conv2d_fast")])
    assert found.applies == applies
    assert applies or found.verdict == "is for groups of at least 8 rows"


def test_a_spmv_kernel_wants_its_own_slices_and_one_block_of_columns():
    fast, portable = kernel("sell_spmv_fast", tile_rows=16), kernel("sell_spmv_scalar")
    assert [block_for(THIN, k) for k in (fast, portable)] == [(16, 256), (8, 256)]
    assert block_for(replace(THIN, shape=(4, 40000)), fast) == (16, 32767)
    assert block_for(replace(THIN, shape=(4, 0)), fast) == (16, 1)


@pytest.mark.parametrize(("columns", "applies"), [(1, False), (511, False), (512, True), (None, 1)])
def test_generated_code_is_offered_for_many_columns(columns, applies):
    facts = replace(THIN, columns=columns)
    for op in ("linear", "conv2d"):
        found = candidates(replace(facts, op=op), [kernel("sell_code_fast", tile_rows=31)])[0]
        assert (found.kernel, found.applies) == ("sell_code_fast", bool(applies))
        assert applies or found.verdict == "is for at least 512 columns"
        assert found.block == (31, 256)


def test_rows_of_blocks_are_sliced_by_the_height_of_the_blocks():
    panel, few = kernel("bsell_panel_fast", tile_rows=4), kernel("bsell_spmv_fast", tile_rows=4)
    heights = {(4, 1): 4, (8, 1): 8, (12, 1): 4, (16, 16): 16, (64, 32): 16}
    for block, height in heights.items():
        thin, thick = replace(THIN, block=block), replace(THIN, block=block, nnz=30000)
        assert block_for(thin, panel) == (height, 384)
        assert block_for(thick, panel) == (height, 192)
        assert block_for(thick, few) == (height, 256)


def test_who_asks_for_blocks_gets_the_kernels_own_layout_too():
    kernels = [kernel("bsell_panel_fast", tile_rows=4), *KERNELS]
    blocks = replace(THIN, op="conv2d", block=(16, 1))
    assert choose(blocks, kernels, format="bsr").format == "bsell"
    linear = replace(blocks, op="linear")
    times = {"bsell_panel_fast": 3.0, "bsr_spmm_fast": 2.0, "csr_spmm_fast": 1.0, DENSE: 9.0}
    assert choose(linear, kernels, times, format="bsr").kernel == "bsr_spmm_fast"
    assert choose(linear, kernels, times).kernel == "csr_spmm_fast"
    assert choose(linear, kernels, format="bsell").kernel == "bsell_panel_fast"


def test_an_unknown_operation_is_refused():
    with pytest.raises(OptionError, match="conv9d"):
        candidates(replace(THIN, op="conv9d"), KERNELS)


@pytest.mark.parametrize(
    ("changes", "facts", "verdict"),
    [
        ({"device": "cuda"}, {}, "runs on cuda, the layer is on cpu"),
        ({"dtype": "float16"}, {}, "computes float16, the weight is float32"),
        ({"usable": False, "reason": "needs avx512f"}, {}, "needs avx512f"),
        ({"format": "bsr"}, {}, "the zeros do not come in blocks"),
        ({"format": "bsell"}, {}, "the zeros do not come in blocks"),
        ({"format": "bsell"}, {"block": (6, 1)}, "the rows of the blocks are no multiple of 4"),
        (
            {"format": "bsell"},
            {"block": (4, 1), "groups": 128},
            "the rows of the blocks are no multiple of 4",
        ),
        ({"format": "nm"}, {}, "no layer is packed as nm yet"),
        ({}, {"obstacle": "it is odd"}, "it is odd"),
    ],
)
def test_a_candidate_that_does_not_apply_says_why(changes, facts, verdict):
    (found, dense) = candidates(replace(THIN, **facts), [kernel("csr_spmm_x", **changes)])
    assert (found.applies, found.verdict) == (False, verdict)
    assert dense.applies


def test_the_fastest_measured_kernel_wins_and_the_reason_shows_both_times():
    times = {"csr_spmm_fast": 41.2, "csr_spmm_scalar": 90.0, DENSE: 163.4}
    plan = choose(THIN, KERNELS, times)
    assert (plan.kernel, plan.format) == ("csr_spmm_fast", "csr")
    assert plan.reason == "csr_spmm_fast: 41 us against dense 163 us"
    assert (plan.sparse_us, plan.dense_us) == (41.2, 163.4)


def test_a_layer_that_loses_stays_dense_and_says_by_how_much():
    plan = choose(replace(THIN, nnz=24904), KERNELS, {"csr_spmm_fast": 130.0, DENSE: 100.0})
    assert plan.is_dense
    assert plan.reason == ("stays dense: 62 % zeros, csr_spmm_fast measured 1.3x slower than dense")
    assert plan.sparse_us == 130.0


@pytest.mark.parametrize(("us", "wins"), [(94.9, True), (95.0, True), (95.1, False), (100, False)])
def test_sparse_must_gain_the_margin(us, wins):
    plan = choose(THIN, KERNELS, {"csr_spmm_fast": us, DENSE: 100.0}, margin=0.05)
    assert plan.is_dense != wins
    if not wins:
        assert "within 5 % of dense" in plan.reason


def test_a_layer_without_zeros_stays_dense_whatever_was_measured():
    full = replace(THIN, nnz=256 * 256)
    assert choose(full, KERNELS, {"csr_spmm_fast": 1.0, DENSE: 9.0}).reason == (
        "stays dense: no zeros"
    )


def test_an_empty_layer_stays_dense():
    assert choose(Facts("linear", (0, 5), nnz=0), KERNELS).is_dense


def test_without_measurements_density_decides():
    thin, thick = choose(THIN, KERNELS), choose(replace(THIN, nnz=40000), KERNELS)
    assert thin.kernel == "csr_spmm_fast"
    assert "density 0.01 is below" in thin.reason
    assert thick.is_dense
    assert "density 0.61 is not below" in thick.reason
    assert thin.sparse_us is thin.dense_us is None


def test_without_measurements_short_rows_stay_dense():
    depthwise = Facts("conv2d", (64, 1, 3, 3), nnz=50, groups=64)
    assert "rows of 9 weights are too short" in choose(depthwise, KERNELS).reason


def test_without_measurements_blocks_win_where_zeros_come_in_blocks():
    assert choose(replace(THIN, block=(16, 1)), KERNELS).kernel == "bsr_spmm_fast"
    assert choose(replace(THIN, block=(16, 1)), KERNELS).block == (16, 1)


def test_the_portable_kernel_alone_needs_a_far_thinner_weight():
    scalar = [kernel("csr_spmm_scalar")]
    assert choose(replace(THIN, nnz=6553), scalar).is_dense
    assert choose(THIN, scalar).kernel == "csr_spmm_scalar"


def test_a_format_that_was_asked_for_is_used_even_if_slower():
    plan = choose(THIN, KERNELS, {"csr_spmm_fast": 50.0, DENSE: 9.0}, format="csr")
    assert plan.kernel == "csr_spmm_fast"
    assert plan.reason == "csr_spmm_fast: format='csr' was asked for"


def test_a_format_without_a_kernel_stays_dense_and_says_so():
    plan = choose(replace(THIN, op="conv2d"), KERNELS, format="bsr")
    assert plan.reason == "stays dense: no bsr kernel applies"
    assert choose(THIN, KERNELS, format=DENSE).is_dense


def test_no_usable_kernel_means_dense_with_every_refusal_told():
    broken = [kernel("csr_spmm_a", usable=False, reason="needs avx2")]
    assert choose(THIN, broken).reason == (
        "stays dense: no sparse kernel applies (csr_spmm_a: needs avx2)"
    )


def test_a_refusal_that_kernels_share_is_told_once_and_other_devices_are_not():
    kernels = [kernel("csr_spmm_a"), kernel("csr_spmm_b"), kernel("csr_spmm_c", device="cuda")]
    assert choose(replace(THIN, dtype="float16"), kernels).reason == (
        "stays dense: no sparse kernel applies (computes float32, the weight is float16)"
    )


def test_an_obstacle_keeps_a_layer_dense_even_when_a_kernel_is_forced():
    plan = choose(replace(THIN, obstacle="it is odd"), KERNELS, forced="csr_spmm_fast")
    assert plan.reason == "stays dense: it is odd"


def test_a_forced_kernel_is_used_against_all_measurements():
    plan = choose(THIN, KERNELS, {"csr_spmm_fast": 1.0, DENSE: 0.5}, forced="csr_spmm_scalar")
    assert plan.kernel == "csr_spmm_scalar"
    assert "SPARSELT_KERNEL" in plan.reason
    assert choose(THIN, KERNELS, forced=DENSE).is_dense


def test_an_unknown_forced_kernel_fails_and_names_the_known_ones():
    with pytest.raises(KernelError, match=r"csr_spmm_fast, .*dense, got 'csr_spmm_fats'"):
        choose(THIN, KERNELS, forced="csr_spmm_fats")


def test_a_forced_kernel_that_does_not_fit_fails_and_says_why():
    with pytest.raises(KernelError, match="the zeros do not come in blocks"):
        choose(THIN, KERNELS, forced="bsr_spmm_fast")


def test_a_kernel_forced_for_another_operation_leaves_the_choice_alone():
    assert choose(THIN, KERNELS, forced="csr_conv2d_fast") == choose(THIN, KERNELS)


@pytest.mark.parametrize(("name", "value"), [("format", "coo"), ("margin", 1.0), ("margin", -0.1)])
def test_options_out_of_range_are_refused(name, value):
    with pytest.raises(OptionError, match=name):
        choose(THIN, KERNELS, **{name: value})


def test_choosing_twice_gives_the_same_plan_and_plans_pickle():
    times = {"csr_spmm_fast": 41.2, DENSE: 163.4}
    plan = choose(THIN, KERNELS, times)
    assert plan == choose(THIN, KERNELS, dict(times))
    assert pickle.loads(pickle.dumps(plan)) == plan


def test_explain_prints_the_reason_and_every_candidate():
    text = choose(THIN, KERNELS, {"csr_spmm_fast": 41.2, DENSE: 163.4}).explain()
    lines = text.splitlines()
    assert lines[0] == "csr_spmm_fast: 41 us against dense 163 us"
    assert lines[1].split() == ["csr_spmm_fast", "41", "us"]
    assert "bsr_spmm_fast    the zeros do not come in blocks" in text
    assert len(lines) == 5


def test_a_plan_made_by_hand_explains_itself():
    assert Plan(DENSE, DENSE, "because").explain() == "because"


# ---- CUDA ----


def cuda(name: str, **changes: object) -> KernelInfo:
    return kernel(name, **{"device": "cuda", "tile_columns": 8, **changes})


CUDA_KERNELS = (
    cuda("csr_spmm_cuda", tile_columns=128),
    cuda("csr_spmm_cuda_f16", tile_columns=128, dtype="float16"),
    cuda("bsr_spmm_cuda_f16", tile_columns=32, dtype="float16"),
    cuda("tile8_spmm_cuda"),
    cuda("tile8_spmm_cuda_f16", dtype="float16"),
    cuda("csr_conv2d_cuda", tile_columns=128),
    cuda("nhwc_conv2d_cuda", format="bsr_nhwc", tile_columns=128),
)
ON_CUDA = Facts("linear", (4096, 4096), nnz=4096 * 409, columns=1, device="cuda", dtype="float16")


def test_every_format_can_be_asked_for():
    assert set(FORMAT_CHOICES) == {"auto", *FORMATS, SEMI_STRUCTURED, DENSE}


@pytest.mark.parametrize(("columns", "kernel_name"), [
    (1, "tile8_spmm_cuda_f16"),
    (64, "tile8_spmm_cuda_f16"),
    (65, DENSE),
    (None, DENSE),
])  # fmt: skip
def test_few_columns_on_cuda_take_the_format_for_them(columns, kernel_name):
    plan = choose(replace(ON_CUDA, columns=columns), CUDA_KERNELS)
    assert plan.kernel == kernel_name
    assert "not measured" in plan.reason


@pytest.mark.parametrize(
    ("changes", "kernel_name"),
    [
        ({"block": (32, 32)}, "bsr_spmm_cuda_f16"),
        ({"block": (32, 32), "columns": 512}, "bsr_spmm_cuda_f16"),
        ({"block": (4, 1), "columns": 512}, DENSE),
        ({"dtype": "float32", "columns": 512, "nnz": 4096 * 400}, "csr_spmm_cuda"),
        ({"dtype": "float32", "columns": 512, "nnz": 4096 * 450}, DENSE),
        ({"columns": 512, "nnz": 4096 * 80}, "csr_spmm_cuda_f16"),
        (
            {"op": "conv2d", "shape": (64, 64, 3, 3), "nnz": 3000, "dtype": "float32"},
            "csr_conv2d_cuda",
        ),
        (
            {
                "op": "conv2d",
                "shape": (64, 64, 3, 3),
                "nnz": 3000,
                "dtype": "float32",
                "block": (16, 16),
            },
            "nhwc_conv2d_cuda",
        ),
    ],
)
def test_rule_on_cuda_goes_by_format_type_and_density(changes, kernel_name):
    assert choose(replace(ON_CUDA, **changes), CUDA_KERNELS).kernel == kernel_name


def test_times_on_cuda_rule_over_the_rule_and_failures_leave_the_choice():
    times = {"tile8_spmm_cuda_f16": float("inf"), "csr_spmm_cuda_f16": 7.0, DENSE: 9.0}
    plan = choose(ON_CUDA, CUDA_KERNELS, times)
    assert (plan.kernel, plan.dense_us, plan.sparse_us) == ("csr_spmm_cuda_f16", 9.0, 7.0)
    failed = next(c for c in plan.candidates if c.kernel == "tile8_spmm_cuda_f16")
    assert (failed.applies, failed.verdict) == (False, "failed when it was timed")
    assert choose(ON_CUDA, CUDA_KERNELS, {**times, DENSE: 7.2}).is_dense


@pytest.mark.parametrize(
    ("density", "columns", "kernel_name"),
    [
        (0.1, 1, "tile8_spmm"),
        (0.1, 8, "tile8_spmm"),
        (0.1, 9, "patch8_spmm"),
        (0.4, 1, "bitmask_spmm"),
    ],
)
def test_formats_for_few_columns_are_chosen_by_density_and_columns(density, columns, kernel_name):
    names = ("csr_spmm", "tile8_spmm", "bitmask_spmm", "patch8_spmm")
    facts = replace(ON_CUDA, nnz=int(4096 * 4096 * density), columns=columns)
    plan = choose(facts, [cuda(name, dtype="float16") for name in names])
    assert plan.kernel == kernel_name


def test_block_kernels_on_cuda_get_the_blocks_of_the_layer():
    facts = replace(ON_CUDA, block=(64, 64))
    assert block_for(facts, CUDA_KERNELS[2]) == (64, 64)
    assert block_for(facts, CUDA_KERNELS[4]) == (1, 1)
