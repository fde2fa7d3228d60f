# SPDX-License-Identifier: Apache-2.0
"""Sparse layers: torch's results, attributes, state dict habits, copies, export and compilation."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import sparselt
from sparselt.errors import (
    DtypeError,
    FormatError,
    GradientError,
    KernelError,
    OptionError,
    ShapeError,
)
from sparselt.nn import SPARSE_LAYERS, PackedWeight, SparseConv2d, SparseLayer, SparseLinear
from sparselt.packed import accept_packed_keys, zero_block

# Constructor and the input's shape.
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(33, 17), (5, 33)),
    "linear without bias": (lambda: nn.Linear(33, 17, bias=False), (5, 33)),
    "linear 1-D": (lambda: nn.Linear(33, 17), (33,)),
    "linear 4-D": (lambda: nn.Linear(33, 17), (2, 3, 4, 33)),
    "linear of nothing": (lambda: nn.Linear(33, 17), (0, 33)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 5, 2, 3, 2), (2, 4, 40)),
    "conv1d unbatched": (lambda: nn.Conv1d(4, 6, 5, padding=2), (4, 40)),
    "conv1d same, even": (lambda: nn.Conv1d(4, 6, 4, padding="same"), (2, 4, 40)),
    "conv1d circular": (lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 40)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, (2, 1), (1, 2), 1), (2, 4, 15, 17)),
    "conv2d without bias": (lambda: nn.Conv2d(4, 6, 3, bias=False), (2, 4, 15, 17)),
    "conv2d unbatched": (lambda: nn.Conv2d(4, 6, 3), (4, 15, 17)),
    "conv2d groups": (lambda: nn.Conv2d(4, 6, (3, 5), groups=2, dilation=2), (2, 4, 15, 17)),
    "conv2d depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), (2, 4, 15, 17)),
    "conv2d valid": (lambda: nn.Conv2d(4, 6, 3, padding="valid"), (2, 4, 15, 17)),
    "conv2d same": (lambda: nn.Conv2d(4, 6, 3, padding="same"), (2, 4, 15, 17)),
    "conv2d same, even": (lambda: nn.Conv2d(4, 6, (4, 3), padding="same"), (2, 4, 15, 17)),
    "conv2d reflect": (lambda: nn.Conv2d(4, 6, 3, 2, 1, padding_mode="reflect"), (2, 4, 15, 17)),
    "conv2d replicate same": (
        lambda: nn.Conv2d(4, 6, (2, 3), padding="same", padding_mode="replicate"),
        (2, 4, 15, 17),
    ),
}
EVERY_KIND = ("linear", "conv1d", "conv2d same, even")
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")


def pruned(name: str, density: float = 0.3) -> tuple[nn.Module, SparseLayer, Tensor, Tensor]:
    """The dense layer, its sparse twin, an input and the dense layer's result."""
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    dense = make().requires_grad_(False)
    dense.weight.mul_(torch.rand_like(dense.weight) < density)
    x = torch.randn(shape)
    return dense, SPARSE_LAYERS[type(dense)].from_dense(dense), x, dense(x)


def assert_same(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_a_sparse_layer_computes_what_the_dense_one_does(name):
    _, sparse, x, want = pruned(name)
    assert_same(sparse(x), want)


@pytest.mark.parametrize("name", EVERY_KIND)
@pytest.mark.parametrize("density", [0.0, 1.0])
def test_the_extreme_densities_work(name, density):
    dense, sparse, x, want = pruned(name, density)
    assert sparse.weight.nnz == density * dense.weight.numel()
    assert_same(sparse(x), want)


@pytest.mark.parametrize("name", LAYERS)
def test_a_sparse_layer_has_the_attributes_of_the_dense_one(name):
    dense, sparse, _, _ = pruned(name)
    for attribute in sparse.attributes:
        assert getattr(sparse, attribute) == getattr(dense, attribute), attribute
    assert sparse.weight.shape == tuple(dense.weight.shape)
    assert sparse.training == dense.training
    assert not any(parameter.requires_grad for parameter in sparse.parameters())


def test_the_repr_tells_sizes_density_format_and_kernel():
    dense = nn.Linear(8, 4)
    dense.weight.data.copy_(torch.eye(4, 8))
    text = repr(SparseLinear.from_dense(dense))
    assert "in_features=8, out_features=4, bias=True, density=0.125, format=csr" in text
    assert "kernel=csr_spmm_" in text
    text = repr(SparseConv2d.from_dense(nn.Conv2d(1, 4, 3, stride=2)))
    assert "in_channels=1, out_channels=4, kernel_size=(3, 3), stride=(2, 2), bias=True" in text


@pytest.mark.parametrize("name", EVERY_KIND)
def test_copies_are_equal_and_independent(name):
    _, sparse, x, want = pruned(name)
    for twin in (copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse))):
        assert_same(twin(x), want)
        assert twin.plan == sparse.plan
        twin.weight.parts()[-1].zero_()
        twin.bias.zero_()
        assert not twin(x).any()
    assert_same(sparse(x), want)


@pytest.mark.parametrize("name", EVERY_KIND)
def test_state_dicts_hold_plain_tensors_and_load_safely(name):
    dense, sparse, x, want = pruned(name)
    keys = {"weight.crow_indices", "weight.col_indices", "weight.values", "bias"}
    assert set(sparse.state_dict()) == keys
    file = io.BytesIO()
    torch.save(sparse.state_dict(), file)
    file.seek(0)
    other = type(sparse).from_dense(type(dense)(**arguments_of(dense)))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_same(other(x), want)
    assert other.weight.nnz == sparse.weight.nnz


def arguments_of(module: nn.Module) -> dict[str, object]:
    names = ("in_features", "out_features")
    if not isinstance(module, nn.Linear):
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
    return {name: getattr(module, name) for name in names}


@pytest.mark.parametrize("name", EVERY_KIND)
def test_packed_and_dense_layers_load_each_other(name):
    dense, sparse, x, want = pruned(name)
    blank = copy.deepcopy(sparse)
    blank.weight.parts()[-1].zero_()
    blank.load_state_dict(dense.state_dict())
    assert_same(blank(x), want)
    fresh = type(dense)(**arguments_of(dense)).requires_grad_(False)
    accept_packed_keys(fresh)
    accept_packed_keys(fresh)
    for layer in (fresh, copy.deepcopy(fresh), pickle.loads(pickle.dumps(fresh))):
        layer.weight.zero_()
        layer.load_state_dict(sparse.state_dict())
        assert torch.equal(layer.weight, dense.weight)
        assert_same(layer(x), want)


def test_loading_shares_no_memory_with_the_state_dict():
    _, sparse, x, want = pruned("linear")
    other = copy.deepcopy(sparse)
    other.load_state_dict(sparse.state_dict())
    sparse.weight.parts()[-1].zero_()
    assert_same(other(x), want)


def test_a_block_layer_loads_a_csr_state_dict_and_keeps_its_format():
    dense, sparse, x, want = pruned("linear")
    blocks = SparseLinear.from_dense(nn.Linear(33, 17), format="bsr")
    blocks.load_state_dict(sparse.state_dict())
    assert blocks.weight.format == "bsr"
    assert_same(blocks(x), want)
    sparse.load_state_dict(SparseLinear.from_dense(dense, format="bsr").state_dict())
    assert sparse.weight.format == "csr"
    assert_same(sparse(x), want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight.col_indices": torch.tensor([99], dtype=torch.int32)}, "weight"),
        ({"weight.values": torch.ones(3, 3)}, "values"),
        ({"weight.crow_indices": torch.zeros(3, dtype=torch.int32)}, "crow_indices"),
        ({"weight.values": "no tensor"}, "values"),
        ({"weight": torch.ones(3, 3)}, r"expected \(17, 33\), got \(3, 3\)"),
    ],
)
def test_a_malformed_state_dict_is_refused_and_changes_nothing(change, message):
    _, sparse, x, want = pruned("linear")
    state = {**sparse.state_dict(), **change}
    with pytest.raises(RuntimeError, match=message):
        sparse.load_state_dict(state)
    assert_same(sparse(x), want)


def test_missing_keys_are_reported_unless_asked_not_to():
    _, sparse, _, _ = pruned("linear")
    with pytest.raises(RuntimeError, match="Missing key"):
        sparse.load_state_dict({"bias": torch.zeros(17)})
    missing, _ = sparse.load_state_dict({"bias": torch.zeros(17)}, strict=False)
    assert "weight.values" in missing


@pytest.mark.parametrize("name", EVERY_KIND)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_keep_their_indices_and_compute(name, dtype):
    _, sparse, x, want = pruned(name)
    sparse.to(dtype)
    *indices, values = sparse.weight.parts()
    assert values.dtype is dtype
    assert all(index.dtype is torch.int32 for index in indices)
    got = sparse(x.to(dtype))
    assert got.dtype is dtype
    tolerance = 1e-6 if dtype is torch.float64 else 5e-2
    torch.testing.assert_close(got.float(), want, rtol=tolerance, atol=max(1e-5, tolerance))


def test_a_layer_that_moves_to_another_device_gives_up_its_kernel():
    _, sparse, _, _ = pruned("linear")
    sparse.to("meta")
    assert sparse.kernel == ""
    assert sparse.plan.reason.startswith("moved to meta in float32 after planning")
    assert "kernel=first that fits" in repr(sparse)


def test_float64_is_computed_in_float64():
    dense, sparse, x, _ = pruned("linear")
    want = dense.double()(x.double())
    torch.testing.assert_close(sparse.double()(x.double()), want, rtol=1e-12, atol=1e-12)


def test_a_half_precision_layer_can_be_packed():
    dense, _, x, want = pruned("linear")
    sparse = SparseLinear.from_dense(dense.half())
    assert sparse.weight.dtype is torch.float16
    torch.testing.assert_close(sparse(x.half()).float(), want, rtol=1e-2, atol=1e-2)


def test_autocast_runs_the_layer():
    _, sparse, x, want = pruned("linear")
    with torch.autocast("cpu", torch.bfloat16):
        got, narrow = sparse(x), sparse(x.bfloat16())
    assert_same(got.float(), want)
    torch.testing.assert_close(narrow.float(), want, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("name", EVERY_KIND)
def test_layers_compile_without_graph_breaks(name):
    _, sparse, x, want = pruned(name)
    torch._dynamo.reset()
    compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager")
    assert_same(compiled(x), want)


@pytest.mark.parametrize("name", EVERY_KIND)
def test_layers_export_and_load_again(name):
    _, sparse, x, want = pruned(name)
    file = io.BytesIO()
    torch.export.save(torch.export.export(sparse, (x,)), file)
    file.seek(0)
    assert_same(torch.export.load(file).module()(x), want)


def test_the_clamp_is_applied_in_every_type():
    _, sparse, x, want = pruned("linear")
    sparse.lower, sparse.upper = 0.0, 0.5
    assert_same(sparse(x), want.clamp(0.0, 0.5))
    assert_same(sparse.double()(x.double()).float(), want.clamp(0.0, 0.5))
    assert "clamp=(0.0, 0.5)" in repr(sparse)


def test_the_mask_decides_what_is_stored():
    dense = nn.Linear(4, 4)
    dense.weight.data[0, 0] = 0.0
    mask = torch.eye(4, dtype=torch.bool)
    sparse = SparseLinear.from_dense(dense, mask)
    assert sparse.weight.nnz == 4
    assert torch.equal(sparse.weight.to_dense(), dense.weight * mask)


@pytest.mark.parametrize("block", [(16, 16), (16, 1), (8, 1), (4, 1)])
def test_zeros_in_whole_blocks_are_packed_as_blocks(block):
    torch.manual_seed(0)
    dense = nn.Linear(64, 64).requires_grad_(False)
    grid = torch.rand(64 // block[0], 64 // block[1]) < 0.3
    kept = grid.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    dense.weight.mul_(kept)
    sparse = SparseLinear.from_dense(dense)
    assert (sparse.weight.format, sparse.weight.block) == ("bsr", block)
    x = torch.randn(5, 64)
    assert_same(sparse(x), dense(x))


@pytest.mark.parametrize("density", [0.0, 0.002, 0.3, 0.97, 1.0])
def test_random_zeros_are_no_blocks(density):
    torch.manual_seed(0)
    assert zero_block(torch.rand(128, 128) < density) == (1, 1)


def test_a_packed_weight_can_be_read_as_a_tensor():
    dense, sparse, x, want = pruned("linear")
    assert_same(nn.functional.linear(x, sparse.weight, sparse.bias), want)
    assert torch.equal(sparse.weight.t(), dense.weight.t())
    assert sparse.weight.device.type == "cpu"
    assert isinstance(sparse.weight, PackedWeight)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = sparse.weight.no_such_name


def test_forcing_a_kernel_by_environment_is_obeyed_or_refused(monkeypatch):
    dense, _, x, want = pruned("linear")
    monkeypatch.setenv("SPARSELT_KERNEL", "csr_spmm_scalar")
    sparse = SparseLinear.from_dense(dense)
    assert sparse.kernel == "csr_spmm_scalar"
    assert_same(sparse(x), want)
    conv, conv_twin, x, want = pruned("conv2d")
    assert SparseConv2d.from_dense(conv).kernel == conv_twin.kernel
    monkeypatch.setenv("SPARSELT_KERNEL", "csr_spmm_abacus")
    with pytest.raises(KernelError, match="csr_spmm_abacus"):
        SparseLinear.from_dense(dense)


def test_a_gradient_is_refused_and_inference_is_not():
    _, sparse, x, want = pruned("linear")
    x.requires_grad_()
    with pytest.raises(GradientError, match="inference_mode"):
        sparse(x)
    with torch.no_grad():
        assert_same(sparse(x), want)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s: s(torch.ones(5, 32)), ShapeError, r"expected \(\.\.\., 33\), got \(5, 32\)"),
        (lambda s: s(torch.tensor(1.0)), ShapeError, "33"),
        (lambda s: s(torch.ones(5, 33, dtype=torch.float64)), DtypeError, "float64"),
        (lambda s: s(torch.ones(5, 33, dtype=torch.int64)), DtypeError, "int64"),
        (lambda s: s(torch.ones(5, 33, dtype=torch.float16)), DtypeError, "float16"),
        (lambda s: s.from_dense(nn.ReLU()), OptionError, "nn.Linear, got ReLU"),
        (lambda s: s.from_dense(nn.Linear(2, 2), format="coo"), OptionError, "coo"),
        (lambda s: s.from_dense(nn.Linear(2, 2), format="dense"), OptionError, "dense"),
        (
            lambda s: s.from_dense(nn.Linear(2, 2), kernel="csr_conv2d_scalar"),
            KernelError,
            "conv2d",
        ),
        (lambda s: s.from_dense(nn.Linear(2, 2), torch.ones(3, 3)), ShapeError, "mask"),
        (lambda s: s.from_dense(nn.Linear(2, 2), torch.full((2, 2), 0.5)), FormatError, "mask"),
        (lambda s: s.from_dense(nn.Linear(2, 2).double()), KernelError, "float64"),
    ],
)
def test_mistakes_are_told(call, error, message):
    _, sparse, _, _ = pruned("linear")
    with pytest.raises(error, match=message):
        call(sparse)


def test_a_convolution_says_which_input_it_wants():
    _, sparse, _, _ = pruned("conv2d")
    with pytest.raises(ShapeError, match=r"\(B, 4, H, W\), got \(2, 3, 9, 9\)"):
        sparse(torch.ones(2, 3, 9, 9))


def test_the_layers_are_public():
    assert sparselt.nn.SparseLinear is SparseLinear
