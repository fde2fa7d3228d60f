# SPDX-License-Identifier: Apache-2.0
"""The functional operators: registration, compilation, layouts, epilogues and gradients."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from cases import ConvCase, SpmmCase, assert_within_bound, cpu_formats
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn import functional

from sparselt import ops, reference
from sparselt.errors import GradientError
from sparselt.formats import SparseWeight, pack

MATRIX = SpmmCase(12, 17, 9, density=0.4)
FILTERS = ConvCase(2, 4, 6, (9, 11), (3, 3), padding=(1, 1), groups=2)

# Every operator with the arguments of a full call: name -> (operation of ops, arguments, options).
Call = tuple[Callable[..., Tensor], tuple[object, ...], dict[str, object]]


def calls(format: str = "csr") -> dict[str, Call]:
    weight = MATRIX.weight(format)
    found: dict[str, Call] = {
        "spmm": (ops.spmm, (weight, MATRIX.x(), MATRIX.bias()), {"residual": MATRIX.residual()}),
        "linear": (
            ops.linear,
            (MATRIX.x().T.contiguous(), weight, MATRIX.bias()),
            {"residual": MATRIX.residual().T.contiguous()},
        ),
    }
    if format == "csr":
        filters = FILTERS.weight()
        flat = pack(filters.to_dense().flatten(2))
        found |= {
            "conv2d": (
                ops.conv2d,
                (FILTERS.x(), filters, FILTERS.bias()),
                {**FILTERS.options(), "residual": FILTERS.residual()},
            ),
            "conv1d": (
                ops.conv1d,
                (FILTERS.x().flatten(2), flat, FILTERS.bias()),
                {"stride": 2, "padding": 4, "dilation": 3, "groups": 2},
            ),
        }
    return found


ALL_CALLS = [
    pytest.param(format, name, id=f"{format}-{name}")
    for format in cpu_formats()
    for name in calls(format)
]


@pytest.mark.parametrize(("format", "name"), ALL_CALLS)
def test_every_operation_matches_the_reference(format: str, name: str) -> None:
    operation, arguments, options = calls(format)[name]
    for limits in ({}, {"lower": 0.0}, {"upper": 0.5}, {"lower": -0.5, "upper": 6}):
        y = operation(*arguments, **options, **limits)
        assert y.is_contiguous()
        expected = getattr(reference, name)
        assert_within_bound((name, limits), y, expected, *arguments, **options, **limits)


# ---- registration ----


def schema_arguments(name: str) -> tuple[object, ...]:
    weight, filters = MATRIX.weight(), FILTERS.weight()
    clamp = (0.0, None, "csr")
    matrix = (weight.parts(), weight.meta(), MATRIX.bias(), MATRIX.residual(), *clamp)
    geometry = (FILTERS.stride, FILTERS.padding, FILTERS.dilation, FILTERS.groups)
    image = (filters.parts(), filters.meta(), FILTERS.bias(), FILTERS.residual(), *geometry, *clamp)
    transposed = (weight.parts(), weight.meta(), None, MATRIX.residual().T.contiguous(), *clamp)
    return {
        "spmm": (MATRIX.x(), *matrix),
        "spmm_out": (MATRIX.x(), torch.empty(12, 9), *matrix),
        "linear": (MATRIX.x().T.contiguous(), *transposed),
        "conv2d": (FILTERS.x(), *image),
        "conv2d_out": (FILTERS.x(), torch.empty_like(FILTERS.residual()), *image),
    }[name]


@pytest.mark.parametrize("name", ["spmm", "linear", "conv2d"])
def test_operators_pass_every_check_of_torch(name: str) -> None:
    operator = getattr(torch.ops.sparselt, name).default
    results = torch.library.opcheck(operator, schema_arguments(name))
    assert set(results.values()) == {"SUCCESS"}
    assert len(results) == 4, results


@pytest.mark.parametrize("name", ["spmm_out", "conv2d_out"])
def test_out_variants_keep_to_their_schema(name: str) -> None:
    operator = getattr(torch.ops.sparselt, name).default
    utilities = ("test_schema", "test_faketensor")
    results = torch.library.opcheck(operator, schema_arguments(name), test_utils=utilities)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", ["spmm", "linear", "conv2d"])
@pytest.mark.parametrize("batch", [0, 1, 2])
def test_operators_pass_the_checks_for_small_batches(name: str, batch: int) -> None:
    arguments = list(schema_arguments(name))
    x = arguments[0]
    assert isinstance(x, Tensor)
    arguments[0] = x[:, :batch].contiguous() if name == "spmm" else x[:batch].contiguous()
    arguments[4] = None  # a residual would have to be cut as well
    torch.library.opcheck(getattr(torch.ops.sparselt, name).default, tuple(arguments))


@pytest.mark.parametrize(("format", "name"), ALL_CALLS)
def test_fake_results_have_the_real_shapes(format: str, name: str) -> None:
    operation, arguments, options = calls(format)[name]
    real = operation(*arguments, **options)
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:

        def fake(value: object) -> object:
            return mode.from_tensor(value) if isinstance(value, Tensor) else value

        def fake_weight(weight: SparseWeight) -> SparseWeight:
            parts = tuple(mode.from_tensor(part) for part in weight.parts())
            return type(weight)._trusted(parts, weight.shape, weight.block)

        arguments = tuple(
            fake_weight(a) if isinstance(a, SparseWeight) else fake(a) for a in arguments
        )
        result = operation(*arguments, **{key: fake(value) for key, value in options.items()})
    assert result.shape == real.shape
    assert result.stride() == real.stride()
    assert result.dtype == real.dtype


# ---- torch.compile ----


@pytest.mark.parametrize(("format", "name"), ALL_CALLS)
def test_compile_breaks_no_graph(format: str, name: str) -> None:
    operation, arguments, options = calls(format)[name]
    tensors = {key: value for key, value in options.items() if isinstance(value, Tensor)}
    numbers = {key: value for key, value in options.items() if key not in tensors}

    def run(*args: object, **more: object) -> Tensor:
        return operation(*args, **more, **numbers, lower=0.0) * 2

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(run, fullgraph=True, backend=counter)
    expected = run(*arguments, **tensors)
    assert torch.equal(compiled(*arguments, **tensors), expected)
    assert counter.frame_count == 1
    explanation = torch._dynamo.explain(run)(*arguments, **tensors)
    assert explanation.graph_break_count == 0, explanation.break_reasons


@pytest.mark.parametrize("name", ["spmm", "linear", "conv2d", "conv1d"])
def test_batch_sizes_recompile_once_at_most(name: str) -> None:
    operation, arguments, options = calls()[name]
    options = {key: value for key, value in options.items() if key != "residual"}
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(
        lambda x, weight: operation(*((weight, x) if name == "spmm" else (x, weight)), **options),
        fullgraph=True,
        backend=counter,
    )
    first = arguments[1] if name == "spmm" else arguments[0]
    weight = arguments[0] if name == "spmm" else arguments[1]
    assert isinstance(first, Tensor)
    for batch in (3, 5, 8, 13):
        shape = list(first.shape)
        shape[1 if name == "spmm" else 0] = batch
        x = torch.randn(shape, generator=torch.Generator().manual_seed(batch))
        args = (weight, x) if name == "spmm" else (x, weight)
        assert torch.equal(compiled(x, weight), operation(*args, **options))
    # One graph for the first size, one with that size symbolic for all others.
    assert counter.frame_count <= 2


def test_inductor_runs_the_operators_inside_a_larger_graph() -> None:
    if not os.environ.get("CXX") and os.system("c++ --version > /dev/null 2>&1"):
        pytest.skip("inductor needs a C++ compiler, and none is on the path")
    weight, filters = MATRIX.weight(), FILTERS.weight()

    def network(image: Tensor, x: Tensor) -> Tensor:
        y = torch.relu(ops.conv2d(image, filters, None, **FILTERS.options()) + 1)
        return y.sum() + torch.tanh(ops.linear(x, weight)).sum()

    torch._dynamo.reset()
    image, x = FILTERS.x(), MATRIX.x().T.contiguous()
    compiled = torch.compile(network, fullgraph=True)
    torch.testing.assert_close(compiled(image, x), network(image, x))


# ---- layouts ----


def test_layouts_of_the_inputs_do_not_matter() -> None:
    for name, (operation, arguments, options) in calls().items():
        expected = operation(*arguments, **options)

        def scattered(value: object) -> object:
            if not isinstance(value, Tensor):
                return value
            wide = torch.randn(*value.shape, 3)
            wide[..., 1] = value
            return wide[..., 1]

        arguments = tuple(scattered(argument) for argument in arguments)
        options = {key: scattered(value) for key, value in options.items()}
        assert any(isinstance(a, Tensor) and not a.is_contiguous() for a in arguments)
        result = operation(*arguments, **options)
        assert torch.equal(result, expected), name
        assert result.is_contiguous()


def test_transposed_expanded_and_channels_last_inputs_work() -> None:
    weight, filters = MATRIX.weight(), FILTERS.weight()
    x = torch.randn(9, 17, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ops.spmm(weight, x.T), ops.spmm(weight, x.T.contiguous()))
    column = MATRIX.x()[:, :1].expand(17, 9)
    assert torch.equal(ops.spmm(weight, column), ops.spmm(weight, column.contiguous()))
    image = FILTERS.x().to(memory_format=torch.channels_last)
    expected = ops.conv2d(FILTERS.x(), filters, **FILTERS.options())
    assert torch.equal(ops.conv2d(image, filters, **FILTERS.options()), expected)


def test_inputs_without_a_batch_give_results_without_one() -> None:
    filters = FILTERS.weight()
    image = FILTERS.x()[0]
    expected = ops.conv2d(image[None], filters, **FILTERS.options())[0]
    assert torch.equal(ops.conv2d(image, filters, **FILTERS.options()), expected)
    flat = pack(filters.to_dense().flatten(2))
    row = image.flatten(1)
    whole = ops.conv1d(row[None], flat, stride=2, groups=2)[0]
    assert torch.equal(ops.conv1d(row, flat, stride=2, groups=2), whole)
    weight, vector = MATRIX.weight(), MATRIX.x()[:, 0].contiguous()
    assert torch.equal(ops.linear(vector, weight), ops.linear(vector[None], weight)[0])


def test_results_own_their_memory() -> None:
    for name, (operation, arguments, options) in calls().items():
        first = operation(*arguments, **options)
        kept = first.clone()
        operation(*arguments, **options).fill_(9.0)
        assert torch.equal(first, kept), name


# ---- empty sizes ----


@pytest.mark.parametrize("format", cpu_formats())
@pytest.mark.parametrize(("rows", "cols", "columns"), [(0, 5, 3), (5, 0, 3), (5, 3, 0), (0, 0, 0)])
def test_empty_matrices_give_bias_and_clamp(
    format: str, rows: int, cols: int, columns: int
) -> None:
    weight, bias = pack(torch.zeros(rows, cols), format=format), torch.arange(float(rows))
    y = ops.spmm(weight, torch.zeros(cols, columns), bias, upper=2.5)
    assert torch.equal(y, bias[:, None].expand(rows, columns).clamp(max=2.5))
    z = ops.linear(torch.zeros(columns, cols), weight, bias, upper=2.5)
    assert torch.equal(z, y.T)


def test_a_batch_of_no_images_gives_no_images() -> None:
    y = ops.conv2d(torch.zeros(0, 4, 9, 11), FILTERS.weight(), **FILTERS.options())
    assert y.shape == (0, 6, 9, 11)


def test_filters_without_input_channels_give_the_bias() -> None:
    weight = pack(torch.zeros(3, 0, 2, 2))
    bias = torch.tensor([1.0, 2.0, 3.0])
    y = ops.conv2d(torch.zeros(1, 0, 4, 4), weight, bias)
    assert torch.equal(y, bias.view(1, 3, 1, 1).expand(1, 3, 3, 3))


# ---- torch's own words for padding ----


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("taps", [(1, 1), (3, 3), (2, 5), (4, 4)])
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("dilation", [1, 2])
def test_padding_by_name_is_torchs(taps: tuple[int, int], padding: str, dilation: int) -> None:
    case = ConvCase(2, 3, 4, (13, 14), taps)
    weight = case.weight()
    y = ops.conv2d(case.x(), weight, padding=padding, dilation=dilation)
    expected = functional.conv2d(case.x(), weight.to_dense(), padding=padding, dilation=dilation)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


# ---- strides far beyond the map ----


@pytest.mark.parametrize("stride", [8, 9, 10, 11, 5000, 2**30])
def test_a_stride_beyond_the_map_meets_the_first_window(stride: int) -> None:
    # Once made stride * stride phases of the map, and divided by zero when that overflowed.
    case = ConvCase(2, 3, 4, (8, 9), (3, 3), padding=(1, 0))
    weight = case.weight()
    y = ops.conv2d(case.x(), weight, stride=stride, padding=(1, 0))
    options = {"stride": stride, "padding": (1, 0)}
    assert_within_bound(stride, y, reference.conv2d, case.x(), weight, **options)


# ---- gradients ----


@pytest.mark.parametrize(("format", "name"), ALL_CALLS)
def test_a_gradient_is_an_error_and_not_silence(format: str, name: str) -> None:
    operation, arguments, options = calls(format)[name]
    for position, argument in enumerate(arguments):
        if not isinstance(argument, Tensor):
            continue
        asking = list(arguments)
        asking[position] = argument.clone().requires_grad_()
        with pytest.raises(GradientError, match=r"requires a gradient.*no_grad"):
            operation(*asking, **options)
        with torch.no_grad():
            assert not operation(*asking, **options).requires_grad
        with torch.inference_mode():
            operation(*asking, **options)


@pytest.mark.parametrize("name", ["spmm", "linear", "conv2d"])
def test_a_gradient_asked_of_the_raw_operator_is_not_silent(name: str) -> None:
    # An autograd kernel that raises would cost every call 10 us; torch's own warning is free.
    arguments = list(schema_arguments(name))
    x = arguments[0]
    assert isinstance(x, Tensor)
    arguments[0] = x.clone().requires_grad_()
    y = getattr(torch.ops.sparselt, name)(*arguments)
    with pytest.warns(UserWarning, match="autograd kernel was not registered"):
        y.sum().backward()


@pytest.mark.parametrize("name", ["spmm", "linear", "conv2d", "conv1d"])
def test_a_gradient_asked_of_compiled_code_is_an_error(name: str) -> None:
    operation, arguments, options = calls()[name]
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *args: operation(*args, **options), fullgraph=True, backend="eager"
    )
    asking = [a.clone().requires_grad_() if isinstance(a, Tensor) else a for a in arguments]
    assert torch.equal(compiled(*arguments), operation(*arguments, **options))
    with pytest.raises(Exception, match=r"GradientError|requires a gradient"):
        compiled(*asking)
