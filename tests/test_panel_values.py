# SPDX-License-Identifier: Apache-2.0
"""Values that a native program keeps in panels: the same bits as layers one by one."""

from __future__ import annotations

import pytest
import torch
from native_calls import compiled, segments_of
from torch import Tensor, nn

import sparselt
from sparselt.plan import DENSE

KERNELS = [k.name for k in sparselt.ops.kernels() if k.usable and k.op in ("panel", "code")]


class Bottlenecks(nn.Module):
    """Two residual blocks as ResNet-50's, of `rows` channels, and what may follow them."""

    def __init__(self, rows: int = 24) -> None:
        super().__init__()
        self.first = nn.Conv2d(5, rows, 3, padding=1)
        self.narrow = nn.ModuleList(nn.Conv2d(rows, 10, 1) for _ in range(2))
        self.middle = nn.ModuleList(nn.Conv2d(10, 12, 3, padding=1) for _ in range(2))
        self.wide = nn.ModuleList(nn.Conv2d(12, rows, 1) for _ in range(2))
        self.strided = nn.Conv2d(rows, 8, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        for narrow, middle, wide in zip(self.narrow, self.middle, self.wide, strict=True):
            x = (wide(middle(narrow(x).relu()).relu()) + x).relu()
        return self.strided(x)


def sparse(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        shape = weight.shape
        weight.data = torch.randn(shape, generator=generator) * 0.3
        if weight.dim() > 1:
            weight.data *= torch.rand(shape, generator=generator) < 0.3
    return model.eval()


def choose(monkeypatch: pytest.MonkeyPatch, kernel: str, block_cols: int = 8) -> None:
    """Has every layer that can run `kernel`, in blocks of few columns."""
    monkeypatch.setattr("sparselt.rules._BLOCK_COLS", block_cols)
    monkeypatch.setattr("sparselt.rules._CODE_BLOCK_COLS", block_cols)
    monkeypatch.setattr("sparselt.rules._SPARSE_BLOCK_ROW_COLS", block_cols)
    times = {kernel: 1.0, DENSE: 100.0}
    monkeypatch.setattr(
        "sparselt.tune.measure", lambda calls, **_: {call: times.get(call, 50.0) for call in calls}
    )


def in_panels(program) -> int:
    (segment,) = segments_of(program)
    return max(planned.native.num_in_panels for planned in segment.programs.values() if planned)


@pytest.mark.parametrize("shape", [(1, 5, 24, 23), (3, 5, 7, 6)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_values_in_panels_have_the_bits_of_layers_one_by_one(monkeypatch, kernel, shape):
    choose(monkeypatch, kernel)
    model = sparse(Bottlenecks())
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    one_by_one = sparselt.convert(model, x)
    program, in_torch = compiled(model, x)
    for threads in (2, 1):
        torch.set_num_threads(threads)
        torch.testing.assert_close(program(x), one_by_one(x), rtol=0, atol=0)
    assert not in_torch
    if not kernel.startswith("sell_code"):
        assert in_panels(program) >= 4


@pytest.mark.parametrize("kernel", KERNELS)
def test_an_infinite_value_reaches_the_rows_that_use_it_alone(monkeypatch, kernel):
    choose(monkeypatch, kernel)
    model = sparse(Bottlenecks())
    x = torch.randn(1, 5, 24, 24, generator=torch.Generator().manual_seed(1))
    x[0, 2, 3, 4] = torch.inf
    program = sparselt.compile(model, x)
    expected = sparselt.convert(model, x)(x)
    assert expected.isfinite().any()
    assert not expected.isfinite().all()
    torch.testing.assert_close(program(x), expected, rtol=0, atol=0, equal_nan=True)


class Folded(nn.Module):
    """A value whose images are cut in two between its writer and its reader."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(5, 16, 1)
        self.second = nn.Conv2d(16, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).reshape(2, 16, 3, 4))


def test_a_value_that_is_read_as_other_images_lies_as_in_torch(monkeypatch):
    choose(monkeypatch, "sell_panel_scalar")
    model = sparse(Folded())
    x = torch.randn(1, 5, 6, 4, generator=torch.Generator().manual_seed(1))
    program, in_torch = compiled(model, x)
    torch.testing.assert_close(program(x), sparselt.convert(model, x)(x), rtol=0, atol=0)
    assert not in_torch
    assert in_panels(program) == 0


class Rows(nn.Module):
    """Linear layers, of which one adds a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(19, 37)
        self.second = nn.Linear(37, 37)
        self.third = nn.Linear(37, 11)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.third((self.second(x).relu() + x).clamp(-0.5, 0.5)).relu()


@pytest.mark.parametrize("batch", [3, 16, 33])
@pytest.mark.parametrize("kernel", KERNELS)
def test_linear_layers_pass_panels_on(monkeypatch, kernel, batch):
    choose(monkeypatch, kernel)
    model = sparse(Rows())
    x = torch.randn(batch, 19, generator=torch.Generator().manual_seed(1))
    one_by_one = sparselt.convert(model, x)
    program, in_torch = compiled(model, x)
    torch.testing.assert_close(program(x), one_by_one(x), rtol=0, atol=0)
    assert not in_torch


def test_linear_layers_without_residuals_are_transposed_at_the_ends_alone(monkeypatch):
    choose(monkeypatch, "sell_panel_scalar")
    model = sparse(nn.Sequential(nn.Linear(8, 30), nn.ReLU(), nn.Linear(30, 30), nn.Linear(30, 5)))
    x = torch.randn(33, 8, generator=torch.Generator().manual_seed(1))
    program, _ = compiled(model, x)
    torch.testing.assert_close(program(x), sparselt.convert(model, x)(x), rtol=0, atol=0)
    assert in_panels(program) == 2


class Readers(nn.Module):
    """A value with two readers, of which `second` asks for it in another way."""

    def __init__(self, second: nn.Module) -> None:
        super().__init__()
        self.first = nn.Conv2d(5, 16, 1)
        self.reader = nn.Conv2d(16, 8, 1)
        self.second = second

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        value = self.first(x)
        return self.reader(value), self.second(value)


@pytest.mark.parametrize(
    ("second", "kept"),
    [
        (nn.Conv2d(16, 6, 1), 1),
        (nn.Conv2d(16, 6, 3), 0),
        (nn.Conv2d(16, 6, 1, stride=2), 0),
        (nn.Conv2d(16, 6, 1, padding=1), 0),
        (nn.Conv2d(16, 6, 1, groups=2), 0),
        (nn.ReLU(), 0),
        (nn.Flatten(), 0),
    ],
    ids=lambda value: str(value).split("(", 1)[0] if isinstance(value, nn.Module) else "",
)
def test_a_value_is_kept_in_panels_where_all_readers_take_it(monkeypatch, second, kept):
    choose(monkeypatch, "sell_panel_scalar")
    model = sparse(Readers(second))
    x = torch.randn(2, 5, 6, 7, generator=torch.Generator().manual_seed(1))
    program, in_torch = compiled(model, x)
    for got, expected in zip(program(x), sparselt.convert(model, x)(x), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert not in_torch
    assert in_panels(program) == kept
