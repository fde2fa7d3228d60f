# SPDX-License-Identifier: Apache-2.0
"""The CUDA operators from their sources, on the CPU: results, memory, streams, devices, refusals.

They are csrc/cuda's own C++ units, called through torch's dispatcher (`cuda_host.operators`); the
kernels that they launch run from their sources too. That nothing in them can allocate or wait
behind torch's back is test_cuda_compiles.py's claim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from cases import ConvCase, SpmmCase
from cuda_host import Host, host, registered
from cuda_host.operators import CPU, STREAM, Launch, Operators, operators
from test_cuda_kernels import assert_close, kernels, packed, rounded
from torch import Tensor

from sparselt import reference
from sparselt.formats import CSR, FORMATS

MATRIX = SpmmCase(40, 2100, 5, density=0.2)
FILTERS = ConvCase(2, 16, 20, (6, 7), (3, 3), stride=(2, 1), padding=(1, 0))
# What an operator may ask of torch: memory, and an operand made contiguous.
ALLOCATIONS = ("new_empty", "empty")
COPIES = ("contiguous", "clone")
DEVICES = (80, 90, 75, 99, 103)  # compute capabilities

Run = Callable[[Launch], None]


class Stack:
    """Operators on kernels, and what was launched."""

    def __init__(self, machine: Host) -> None:
        self.ops: Operators = operators()
        self.ops.set_devices(*DEVICES)
        self.machine = machine
        self.launches: list[Launch] = []

    def __call__(self, name: str, *args: Any, **where: Any) -> Any:
        return self.ops.call(name, *args, on_launch=self.run, **where)

    def run(self, launch: Launch) -> None:
        self.launches.append(launch)
        launch.y.copy_(
            self.machine.launch(
                launch.kernel, launch.integers, launch.arrays, launch.limits, launch.workspace
            )
        )


@pytest.fixture
def stack() -> Stack:
    return Stack(host())


def operands(kernel: str, case: SpmmCase | ConvCase) -> tuple[Any, Tensor, list[Any], list[Any]]:
    """(weight, x, arguments before a geometry, arguments after it), all in the kernel's type."""
    weight, dtype = packed(kernel, case), rounded
    x, bias, residual = (dtype(t, kernel) for t in (case.x(), case.bias(), case.residual()))
    narrow = [t.to(values_of(kernel)) for t in (x, bias, residual)]
    parts = [p.to(values_of(kernel)) if p.is_floating_point() else p for p in weight.parts()]
    return weight, narrow[0], [parts, weight.meta(), *narrow[1:]], [-0.5, 2.0, kernel]


def values_of(kernel: str) -> torch.dtype:
    return getattr(torch, registered()[kernel][2])


def geometry(case: ConvCase) -> list[Any]:
    return [list(case.stride), list(case.padding), list(case.dilation), case.groups]


@pytest.mark.parametrize("kernel", kernels("spmm"))
def test_products_match_reference_in_memory_of_torch_alone(stack: Stack, kernel: str) -> None:
    weight, x, inner, end = operands(kernel, MATRIX)
    y = stack("spmm", x, *inner, *end)
    wide = [t.float() for t in (x, *inner[2:])]
    want = (reference.spmm, weight, *wide, *end[:2])
    assert_close(kernel, y, *want)
    workspace = int(stack.launches[-1].workspace)
    asked = [name for name in stack.ops.asked if name in ALLOCATIONS + COPIES]
    assert asked == ["new_empty"] * (1 + workspace)

    out = torch.full_like(y, torch.nan)
    assert stack("spmm_out", x, out, *inner, *end) is None
    assert torch.equal(out, y)
    asked = [name for name in stack.ops.asked if name in ALLOCATIONS + COPIES]
    assert asked == ["new_empty"] * workspace

    turned = [*inner[:3], inner[3].mT.contiguous()]
    y = stack("linear", x.mT.contiguous().view(1, 5, -1), *turned[:3], turned[3][None], *end)
    assert y.shape == (1, 5, 40)
    assert_close(kernel, y[0].mT, *want)


@pytest.mark.parametrize("kernel", kernels("conv2d"))
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_convolutions_match_reference_from_every_layout(
    stack: Stack, kernel: str, layout: torch.memory_format
) -> None:
    weight, x, inner, end = operands(kernel, FILTERS)
    x, inner[3] = (t.contiguous(memory_format=layout) for t in (x, inner[3]))
    y = stack("conv2d", x, *inner, *geometry(FILTERS), *end)
    own = torch.channels_last if weight.name == "bsr_nhwc" else torch.contiguous_format
    assert y.is_contiguous(memory_format=own)
    copied = sum(name in COPIES for name in stack.ops.asked)
    assert (copied > 0) == (layout != own)
    names = ("bias", "residual", "lower", "upper")
    options = dict(zip(names, [*(t.float() for t in inner[2:]), *end[:2]], strict=True))
    assert_close(kernel, y, reference.conv2d, x.float(), weight, **FILTERS.options(), **options)
    out = torch.full_like(y, torch.nan)
    stack("conv2d_out", x, out, *inner, *geometry(FILTERS), *end)
    assert torch.equal(out, y)


def csr(device: int, stack: Stack, **changes: Any) -> Any:
    """A product by the first kernel for CSR, with some arguments changed."""
    weight = CSR.from_dense(torch.eye(4))
    named = {
        "x": torch.ones(4, 2), "out": torch.empty(4, 2), "parts": list(weight.parts()),
        "meta": weight.meta(), "bias": torch.ones(4), "residual": torch.ones(4, 2),
        "lower": None, "upper": None, "kernel": "csr",
    }  # fmt: skip
    elsewhere = changes.pop("elsewhere", {})
    named |= changes
    places = [(named[name], place) for name, place in elsewhere.items() if name != "values"]
    places += [(named["parts"][-1], elsewhere["values"])] if "values" in elsewhere else []
    return stack("spmm_out", *named.values(), device=device, elsewhere=places)


@pytest.mark.parametrize("device", [0, 1])
def test_launch_is_on_the_current_stream_of_the_device_of_x(stack: Stack, device: int) -> None:
    csr(device, stack)
    (launch,) = stack.launches
    assert (launch.device, launch.stream) == (device, STREAM + device)
    assert stack.ops.machine.cuda_host_current_device() == 0, "the device before it is back"
    assert stack.ops.asked.count("new_empty") == 0


@pytest.mark.parametrize("name", ["x", "out", "bias", "residual", "values"])
@pytest.mark.parametrize("place", [CPU, 0])
def test_operand_of_another_device_is_refused(stack: Stack, name: str, place: int) -> None:
    if name == "x" and place == 0:
        name = "values"  # x says where the others are to be
    expected = "expected a CUDA tensor" if name == "x" else "expected a tensor on device 1"
    with pytest.raises(RuntimeError, match=expected):
        csr(1, stack, elsewhere={name: place})
    assert not stack.launches


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.ones(4, 2).double()}, "x: expected float32, float16 or bfloat16"),
        ({"x": torch.ones(4, 2).half()}, "values: wrong dtype; expected that of x"),
        ({"x": torch.ones(3, 2)}, r"x: expected \(4, N\)"),
        ({"x": torch.ones(4)}, "got rank 1"),
        ({"bias": torch.ones(4).half()}, "bias: expected float32"),
        ({"bias": torch.ones(5)}, "bias: expected 4 elements"),
        ({"residual": torch.ones(2, 4)}, r"residual: expected the result's shape \(4, 2\)"),
        ({"out": torch.ones(4, 2).half()}, "out: expected float32"),
        ({"out": torch.ones(4, 3)}, r"out: expected shape \(4, 2\), got \(4, 3\)"),
        ({"out": torch.ones(2, 4).T}, "out: expected contiguous memory"),
        ({"meta": [1, 1, 4]}, "meta: expected block_rows"),
        ({"meta": [0, 1, 4, 4]}, "blocks must be at least 1 x 1"),
        ({"meta": [1, 1, 5, 4]}, "crow_indices: expected 6 contiguous elements, got 5"),
        ({"lower": 1.0, "upper": 0.0}, "lower: expected at most upper"),
        ({"kernel": "csr_spmm_avx2"}, r"expected a CUDA kernel for spmm in float32.*csr_spmm_"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(stack: Stack, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        csr(0, stack, **changes)
    assert not stack.launches


@pytest.mark.parametrize(
    ("device", "message"),
    [
        (2, "csr_spmm_cuda cannot run here: it needs compute capability 8.0, device 2 has 7.5"),
        (
            3,
            "build has code for sm_80 sm_90a compute_100 alone, device 3 has 9.9; rebuild sparselt",
        ),
        (7, "there is no CUDA device 7"),
    ],
)
def test_device_that_the_build_does_not_serve_is_refused(
    stack: Stack, device: int, message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        csr(device, stack)
    assert not stack.launches


def test_machine_code_serves_its_own_generation_and_ptx_all_later_ones(stack: Stack) -> None:
    usable = {}
    for capability in (80, 86, 89, 90, 100, 103, 120):
        stack.ops.set_devices(capability)
        usable[capability] = stack.ops.module.why_unusable("sm80", 0) == ""
    assert all(usable.values()), usable
    stack.ops.set_devices(91)  # code for 9.0a is for 9.0 alone
    assert stack.ops.module.why_unusable("sm80", 0)


def failing(code: int) -> Callable[[Launch], int]:
    def launched(launch: Launch) -> int:
        return code

    return launched


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (801, "csr_spmm_cuda does not handle this block shape or geometry"),
        (209, "csr_spmm_cuda is not in this build for device 0; rebuild sparselt with .*=8.0"),
        (9, "CUDA error 9"),
    ],
)
def test_launch_that_fails_is_an_error_with_a_reason(stack: Stack, code: int, message: str) -> None:
    weight = CSR.from_dense(torch.eye(4))
    end = (None, None, None, None, "csr")
    with pytest.raises(RuntimeError, match=message):
        stack.ops.call(
            "spmm", torch.ones(4, 2), list(weight.parts()), weight.meta(), *end,
            on_launch=failing(code),
        )  # fmt: skip


@pytest.mark.parametrize("format", ["csr", "bsr", "tile8", "patch8", "bitmask"])
def test_empty_products_allocate_a_result_and_nothing_else(stack: Stack, format: str) -> None:
    dtype = torch.float16
    for rows, cols, columns in ((0, 5, 3), (5, 0, 3), (5, 4, 0)):
        weight = FORMATS[format].from_dense(torch.zeros(rows, cols))
        parts = [p.to(dtype) if p.is_floating_point() else p for p in weight.parts()]
        y = stack(
            "spmm", torch.ones(cols, columns, dtype=dtype), parts, weight.meta(),
            *(None, None, None, None, format),
        )  # fmt: skip
        assert torch.equal(y, torch.zeros(rows, columns, dtype=dtype))


def geometry_changes() -> Sequence[tuple[dict[int, Any], str]]:
    return (
        ({0: [1]}, "expected 2 numbers each"),
        ({0: [0, 1]}, "height: expected stride > 0"),
        ({1: [-1, 0]}, "height: expected stride > 0, dilation > 0 and padding >= 0"),
        ({2: [1, 9]}, "width: the padded input"),
        ({3: 3}, "C_out divisible by groups"),
    )


@pytest.mark.parametrize(("changes", "message"), geometry_changes(), ids=str)
def test_geometry_that_does_not_fit_is_refused(
    stack: Stack, changes: dict[int, Any], message: str
) -> None:
    _, x, inner, end = operands("csr_conv2d_cuda", FILTERS)
    given = [changes.get(i, value) for i, value in enumerate(geometry(FILTERS))]
    with pytest.raises(RuntimeError, match=message):
        stack("conv2d", x, *inner, *given, *end)
    assert not stack.launches


def test_channels_last_result_is_asked_for_where_blocks_of_channels_are_read(stack: Stack) -> None:
    _, x, inner, end = operands("bsr_nhwc_conv2d_cuda", FILTERS)
    out = torch.empty_like(inner[3], memory_format=torch.contiguous_format)
    with pytest.raises(RuntimeError, match="out: expected channels-last memory"):
        stack("conv2d_out", x, out, *inner, *geometry(FILTERS), *end)
