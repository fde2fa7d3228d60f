# SPDX-License-Identifier: Apache-2.0
"""Dense neighbours of sparse layers: depthwise convolutions, and those of few input channels."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import guarded, kernel_params
from torch import Tensor, nn
from torch.nn import functional as F

import sparselt
from sparselt.candidate_calls import call_us
from sparselt.errors import KernelError, ShapeError
from sparselt.few_channels import few_channels_in_panels
from sparselt.neighbours import depthwise_conv2d, is_depthwise
from sparselt.ops import kernels
from sparselt.plan import DENSE, KernelInfo
from sparselt.tune import Tuner

DEPTHWISE = pytest.mark.parametrize("kernel", kernel_params("depthwise"))

# batch, channels, multiplier, size, window, stride, padding, dilation
GEOMETRIES = (
    (1, 3, 1, (7, 7), (3, 3), (1, 1), (1, 1), (1, 1)),
    (2, 4, 1, (14, 14), (3, 3), (2, 2), (1, 1), (1, 1)),
    (1, 2, 1, (56, 56), (3, 3), (1, 1), (1, 1), (1, 1)),
    (1, 2, 2, (33, 65), (5, 5), (2, 2), (2, 2), (1, 1)),
    (1, 2, 1, (40, 37), (3, 3), (3, 3), (1, 0), (1, 1)),
    (3, 1, 3, (9, 20), (1, 7), (1, 2), (0, 3), (1, 2)),
    (1, 2, 1, (20, 18), (3, 3), (1, 1), (4, 4), (2, 2)),
    (1, 1, 1, (1, 100), (1, 32), (1, 1), (0, 31), (1, 1)),
    (1, 2, 1, (6, 5), (3, 3), (4, 5), (2, 2), (1, 1)),
    (1, 2, 1, (3, 4), (5, 6), (1, 1), (3, 3), (1, 1)),
    (1, 1, 1, (5, 17), (2, 2), (1, 2), (0, 0), (3, 5)),
)


def problem(geometry: Any) -> tuple[Tensor, Tensor, Tensor, tuple[Any, ...]]:
    """x, weight, bias, and what conv2d takes after them."""
    batch, channels, multiplier, size, window, *rest = geometry
    generator = torch.Generator().manual_seed(sum(size) * 7 + channels)
    x = torch.randn(batch, channels, *size, generator=generator)
    weight = torch.randn(channels * multiplier, 1, *window, generator=generator)
    bias = torch.randn(channels * multiplier, generator=generator)
    return x, weight, bias, tuple(rest)


def exact(x: Tensor, weight: Tensor, bias: Tensor | None, rest: tuple[Any, ...]) -> Tensor:
    wide = None if bias is None else bias.double()
    return F.conv2d(x.double(), weight.double(), wide, *rest, groups=x.shape[1])


@DEPTHWISE
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_depthwise_conv2d_matches_torch_in_float64(kernel: KernelInfo, geometry: Any) -> None:
    x, weight, bias, rest = problem(geometry)
    plain = depthwise_conv2d(guarded(x, 3), guarded(weight, 5), None, *rest, kernel=kernel.name)
    torch.testing.assert_close(plain.double(), exact(x, weight, None, rest), atol=2e-5, rtol=0)

    residual = torch.randn(plain.shape, generator=torch.Generator().manual_seed(1))
    fused = depthwise_conv2d(
        x, weight, bias, *rest, residual=residual, lower=-1.0, upper=2.0, kernel=kernel.name
    )
    want = (exact(x, weight, bias, rest) + residual.double()).clamp(-1.0, 2.0)
    torch.testing.assert_close(fused.double(), want, atol=2e-5, rtol=0)


@DEPTHWISE
def test_depthwise_conv2d_is_bitwise_the_same_for_any_thread_count(kernel: KernelInfo) -> None:
    x, weight, bias, rest = problem((2, 64, 1, (56, 56), (3, 3), (1, 1), (1, 1), (1, 1)))
    torch.set_num_threads(1)
    alone = depthwise_conv2d(x, weight, bias, *rest, kernel=kernel.name)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(alone, depthwise_conv2d(x, weight, bias, *rest, kernel=kernel.name))


@DEPTHWISE
def test_nan_and_infinity_stay_where_torch_has_them(kernel: KernelInfo) -> None:
    x, weight, bias, rest = problem(GEOMETRIES[0])
    x[0, 0, 3, 3], x[0, 1, 0, 0], x[0, 2, 6, 6] = math.nan, math.inf, -math.inf
    got = depthwise_conv2d(x, weight, bias, *rest, lower=0.0, kernel=kernel.name)
    want = exact(x, weight, bias, rest).clamp(min=0.0).float()
    torch.testing.assert_close(got, want, atol=2e-5, rtol=0, equal_nan=True)


def test_an_operator_check_finds_nothing() -> None:
    x, weight, bias, (stride, padding, dilation) = problem(GEOMETRIES[1])
    arguments = (x, weight, bias, None, stride, padding, dilation, 0.0, 6.0, "dense")
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.sparselt.depthwise_conv2d.default, arguments, test_utils=tests)


def test_what_does_not_fit_is_refused() -> None:
    x, weight = torch.ones(1, 3, 5, 5), torch.ones(3, 1, 3, 3)
    with pytest.raises(ShapeError, match="divisor of 4"):
        depthwise_conv2d(x, torch.ones(4, 1, 3, 3))
    with pytest.raises(ShapeError, match="multiplier"):
        depthwise_conv2d(x, torch.ones(3, 2, 3, 3))
    with pytest.raises(ShapeError, match="S <= 32"):
        depthwise_conv2d(x, torch.ones(3, 1, 1, 33))
    with pytest.raises(KernelError, match="dense_depthwise_scalar"):
        depthwise_conv2d(x, weight, kernel="csr_spmm_scalar")
    with pytest.raises(RuntimeError, match="smaller than the kernel"):
        depthwise_conv2d(torch.ones(1, 3, 2, 2), weight)


@pytest.mark.parametrize(
    ("module", "fits"),
    [
        (nn.Conv2d(4, 8, 3, groups=4, padding=1), True),
        (nn.Conv2d(1, 8, 3), True),
        (nn.Conv2d(4, 8, 3, groups=2), False),
        (nn.Conv2d(4, 4, 3, groups=4, padding="same"), False),
        (nn.Conv2d(4, 4, 3, groups=4, padding=1, padding_mode="reflect"), False),
        (nn.Conv2d(4, 4, (1, 33), groups=4), False),
        (nn.Conv2d(4, 4, 3, groups=4).half(), False),
        (nn.Linear(4, 4), False),
    ],
    ids=str,
)
def test_only_a_plain_depthwise_convolution_counts_as_one(module: nn.Module, fits: bool) -> None:
    assert is_depthwise(module) == fits


@pytest.mark.parametrize("in_program", [False, True])
def test_a_pruned_layer_is_timed_against_the_dense_kernel_that_would_run(
    monkeypatch: pytest.MonkeyPatch, in_program: bool
) -> None:
    called: list[Tensor] = []

    def note(x: Tensor, *arguments: Any) -> Tensor:
        called.append(x)
        return depthwise_conv2d(x, *arguments)

    monkeypatch.setattr("sparselt.candidate_calls.depthwise_conv2d", note)
    monkeypatch.setenv("SPARSELT_CACHE", "off")
    layer = nn.Conv2d(8, 8, 3, groups=8)
    layer.weight.data.mul_(torch.arange(9).view(3, 3) % 4 == 0)
    plan = Tuner(in_program=in_program).plan(layer, inputs=[torch.randn(1, 8, 9, 9)])
    assert plan.dense_us is not None
    assert bool(called) == in_program


@pytest.mark.skipif(
    not any(known.name == "bsell_panel_avx2" and known.usable for known in kernels()),
    reason="few channels run in panels on AVX2 and AVX-512",
)
@pytest.mark.parametrize(
    ("module", "size"),
    [
        (nn.Conv2d(3, 64, 7, 2, 3, bias=False), (2, 3, 31, 45)),
        (nn.Conv2d(3, 8, 3, (1, 2), 1), (1, 3, 20, 17)),
        (nn.Conv2d(2, 4, 5, 1, 2, 2), (1, 2, 9, 9)),
        (nn.Conv2d(4, 16, 1), (1, 4, 6, 6)),
    ],
    ids=str,
)
def test_a_convolution_of_few_channels_runs_in_panels_and_in_programs(
    module: nn.Conv2d, size: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(5)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    x = torch.randn(size, generator=generator)
    want = module.double()(x.double()).relu().detach()
    module.float()
    panels = few_channels_in_panels(module)
    assert panels is not None
    torch.testing.assert_close(panels(x).relu().double(), want, atol=1e-4, rtol=0)
    program = sparselt.compile(nn.Sequential(module, nn.ReLU()).eval(), x)
    torch.testing.assert_close(program(x).double(), want, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(8, 8, 3),
        nn.Conv2d(1, 8, 3),
        nn.Conv2d(4, 8, 3, groups=2),
        nn.Conv2d(3, 6, 3),
        nn.Conv2d(3, 8, 3).half(),
        nn.Linear(3, 8),
    ],
    ids=str,
)
def test_other_layers_stay_with_torch_or_with_the_depthwise_kernel(module: nn.Module) -> None:
    assert few_channels_in_panels(module) is None


def test_a_small_layer_of_a_program_is_judged_without_the_call_that_it_spares(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def measure(calls: Any, **_: Any) -> dict[str, float]:
        return {name: 4.0 if name == DENSE else 8.0 for name in calls}

    monkeypatch.setattr("sparselt.tune.measure", measure)
    monkeypatch.setattr("sparselt.tune.call_us", lambda: 7.0)
    layer = nn.Linear(64, 48)
    layer.weight.data.mul_(torch.rand(48, 64) < 0.1)
    alone, inside = (
        Tuner(in_program=inside).plan(layer, inputs=[torch.randn(1, 64)])
        for inside in (False, True)
    )
    assert alone.is_dense
    assert not inside.is_dense
    assert inside.sparse_us == 1.0


def test_the_call_of_a_layer_takes_microseconds() -> None:
    assert 0.1 < call_us() < 1e5
