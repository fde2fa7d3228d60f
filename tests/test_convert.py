# SPDX-License-Identifier: Apache-2.0
"""Conversion layer by layer: what is swapped, what is not, and that the reasons are told."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from networks import NETWORKS, Encoder, Residual, input_for, make, prune_randomly
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils import _pytree as pytree

import sparselt
from sparselt import ops
from sparselt.conversion import PLAN_ATTRIBUTE, densify
from sparselt.errors import KernelError, OptionError
from sparselt.nn import SparseConv2d, SparseLayer, SparseLinear
from sparselt.plan import DENSE, Plan
from sparselt.tune import Tuner

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")


@pytest.fixture(autouse=True)
def no_gradients(fixed_threads):
    # One thread: layers this small are timed for their plans, not for speed.
    torch.set_num_threads(1)
    with torch.no_grad():
        yield


def assert_same(got: object, want: object) -> None:
    for a, b in zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def sparse_layers(model: nn.Module) -> list[SparseLayer]:
    return [module for module in model.modules() if isinstance(module, SparseLayer)]


@pytest.mark.parametrize("format", ["auto", "csr", "bsr", "dense"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_converted_network_computes_the_same(name, format):
    model = make(name)
    before = copy.deepcopy(model.state_dict())
    sparse = sparselt.convert(model, input_for(name, 2), format)
    for batch in (1, 2, 5):
        x = input_for(name, batch)
        assert_same(sparse(x.clone()), model(x.clone()))
    assert_same(model.state_dict(), before)
    assert not sparse_layers(model)
    assert not any(parameter.requires_grad for parameter in sparse.parameters())


def test_a_format_asked_for_is_used_for_every_plain_layer_with_zeros():
    sparse = sparselt.convert(make("residual"), format="csr")
    assert len(sparse_layers(sparse)) == 9
    assert {layer.weight.format for layer in sparse_layers(sparse)} == {"csr"}
    assert all("format='csr'" in layer.plan.reason for layer in sparse_layers(sparse))


def test_without_zeros_nothing_is_swapped_and_explain_says_so():
    torch.manual_seed(0)
    for example in (None, torch.randn(1, 3, 8, 8)):
        sparse = sparselt.convert(Residual(), example)
        assert not sparse_layers(sparse)
        explanation = sparselt.explain(sparse)
        assert {row.reason for row in explanation} == {"stays dense: no zeros"}
        assert "0 of 9 layers run sparse" in str(explanation)


def test_the_model_itself_may_be_a_layer():
    torch.manual_seed(0)
    dense = prune_randomly(nn.Linear(64, 64))
    sparse = sparselt.convert(dense, format="csr")
    assert isinstance(sparse, SparseLinear)
    assert_same(sparse(torch.ones(3, 64)), dense(torch.ones(3, 64)))
    assert sparselt.explain(sparse)[0].layer == ""
    assert "(model)" in str(sparselt.explain(sparse))


def test_containers_of_all_kinds_are_walked():
    model = nn.ModuleDict({"list": nn.ModuleList([nn.Sequential(nn.Linear(8, 8)), nn.ReLU()])})
    sparse = sparselt.convert(prune_randomly(model), format="csr")
    assert isinstance(sparse["list"][0][0], SparseLinear)


def test_a_module_that_stands_in_two_places_is_swapped_once_for_both():
    layer = prune_randomly(nn.Linear(8, 8))
    sparse = sparselt.convert(nn.Sequential(layer, nn.ReLU(), layer), format="csr")
    assert sparse[0] is sparse[2]
    assert isinstance(sparse[0], SparseLinear)


def test_layers_tied_to_one_weight_stay_tied():
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    sparse = sparselt.convert(prune_randomly(nn.Sequential(first, second)), format="csr")
    assert sparse[0] is not sparse[1]
    assert sparse[0].weight is sparse[1].weight


def test_a_subclass_that_may_use_its_weight_otherwise_is_left_alone():
    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * self.weight.sum()

    model = prune_randomly(nn.Sequential(Scaled(8, 8), nn.MultiheadAttention(8, 2)))
    sparse = sparselt.convert(model, format="csr")
    assert type(sparse[0]) is Scaled
    assert type(sparse[1].out_proj) is type(model[1].out_proj)
    reasons = [row.reason for row in sparselt.explain(sparse)]
    assert reasons[0] == "stays dense: Scaled may use its weight in a way of its own"


def test_a_transformer_runs_its_sparse_layers_not_its_fast_path():
    model = make("encoder")
    sparse = sparselt.convert(model, format="csr")
    assert isinstance(sparse.encoder.layers[0].linear1, SparseLinear)
    ids = input_for("encoder", 2)
    assert_same(sparse(ids), model(ids))
    assert torch.equal(sparse.embed.weight, model.embed.weight)


def test_pruning_masks_are_baked_and_decide_what_is_stored():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 8))
    model[0].weight.data[:, 0] = 0.0
    prune.random_unstructured(model[0], "weight", 0.5)
    prune.l1_unstructured(model[2], "weight", 0.8)
    prune.l1_unstructured(model[2], "bias", 0.5)
    prune.l1_unstructured(model[2], "weight", 0.5)
    x = torch.randn(2, 3, 3, 3)
    with torch.enable_grad():
        # Leaves weights that are no leaves, which deepcopy refuses.
        want = model(x).detach()
    sparse = sparselt.convert(model, format="csr")
    assert isinstance(sparse[0], SparseConv2d)
    assert sparse[0].weight.nnz == 108
    assert_same(sparse(x), want)
    assert not list(sparse[2].named_buffers(recurse=False))
    assert prune.is_pruned(model)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda layer: prune.custom_from_mask(layer, "weight", torch.eye(8)),
        lambda layer: parametrize.register_parametrization(layer, "weight", Masked()),
        parametrizations.weight_norm,
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
    ],
)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_computed_weights_become_plain_ones(wrap):
    torch.manual_seed(0)
    layer = nn.Linear(8, 8)
    layer.weight.data.mul_(torch.eye(8))
    with torch.enable_grad():
        wrap(layer)
    x = torch.randn(3, 8)
    model = nn.Sequential(layer).eval()
    want = model(x)
    sparse = sparselt.convert(model, format="csr")
    assert isinstance(sparse[0], SparseLinear)
    assert sparse[0].weight.nnz == 8
    assert_same(sparse(x), want)
    # The original still computes its weight, from what may have changed since.
    assert_same(model(x), want)
    for parameter in model.parameters():
        parameter.mul_(2)
    assert not torch.allclose(model(x), want)


class Masked(nn.Module):
    def forward(self, weight):
        return weight * torch.eye(8)


def test_a_weight_that_an_unknown_hook_computes_stays_dense():
    layer = nn.Linear(8, 8)
    weight = layer.weight
    del layer.weight
    layer.base = weight
    layer.weight = weight.data * torch.eye(8)
    sparse = sparselt.convert(nn.Sequential(layer), format="csr")
    assert type(sparse[0]) is nn.Linear
    assert "computed anew by a hook" in sparselt.explain(sparse)[0].reason


def test_hooks_go_with_the_layer():
    seen = []
    layer = prune_randomly(nn.Linear(8, 8))
    layer.register_forward_hook(lambda module, args, out: seen.append(type(module)) or out + 1)
    sparse = sparselt.convert(nn.Sequential(layer), format="csr")
    x = torch.randn(2, 8)
    assert_same(sparse(x), layer(x))
    assert seen == [SparseLinear, nn.Linear]


def test_training_mode_of_the_original_is_kept_and_the_copy_is_in_eval_mode():
    model = make("residual").train()
    sparse = sparselt.convert(model, format="csr")
    assert model.training
    assert not any(module.training for module in sparse.modules())


def test_copies_and_state_dicts_of_a_converted_network_work():
    model = make("residual")
    x = input_for("residual", 3)
    want = model(x)
    sparse = sparselt.convert(model, format="csr")
    for twin in (copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse))):
        assert_same(twin(x), want)
    some = sparselt.convert(make("residual"), x)
    for source in (sparse, some, model):
        for target in (sparselt.convert(Residual(), format=DENSE), sparse, some):
            target.load_state_dict(source.state_dict())
            assert_same(target(x), want)


def test_a_converted_network_compiles_and_exports_whole():
    model = make("residual")
    x = input_for("residual", 3)
    sparse = sparselt.convert(model, format="csr")
    torch._dynamo.reset()
    assert_same(torch.compile(sparse, fullgraph=True, backend="aot_eager")(x), model(x))
    assert_same(torch.export.export(sparse, (x,)).module()(x), model(x))


def test_examples_lead_to_measured_choices():
    sparse = sparselt.convert(make("residual"), input_for("residual", 2))
    rows = list(sparselt.explain(sparse))
    assert len(rows) == 9
    for row in rows:
        assert row.dense_us > 0
        assert row.sparse_us > 0
        assert (row.kernel != DENSE) == (row.sparse_us <= 0.95 * row.dense_us)


def test_without_examples_linear_layers_are_timed_at_batch_1_and_convolutions_are_not():
    rows = {row.layer: row for row in sparselt.explain(sparselt.convert(make("residual")))}
    assert rows["8"].dense_us > 0
    assert "no example inputs: timed at batch 1" in rows["8"].reason
    assert rows["3.conv1"].dense_us is None
    assert "not measured, density 0.1" in rows["3.conv1"].reason
    assert "no example inputs" in rows["3.conv1"].reason


def test_a_layer_that_the_examples_do_not_reach_is_told():
    rows = sparselt.explain(sparselt.convert(make("branching"), torch.ones(1, 32)))
    assert "do not reach it" in rows[1].reason


@pytest.mark.parametrize("example", [{"ids": torch.zeros(1, 4, dtype=torch.int64)}, None])
def test_examples_may_be_keywords(example):
    model = sparselt.convert(make("encoder"), example)
    assert model(torch.zeros(1, 4, dtype=torch.int64))[0].shape == (1, 4, 50)


def test_other_types_stay_dense_and_say_why():
    model = nn.Sequential(prune_randomly(nn.Linear(8, 8))).double()
    sparse = sparselt.convert(model, torch.ones(1, 8, dtype=torch.float64))
    assert "computes float32, the weight is float64" in sparselt.explain(sparse)[0].reason


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sparselt.convert("model"), OptionError, "torch.nn.Module, got str"),
        (
            lambda: sparselt.convert(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))),
            OptionError,
            "that TorchScript was made from, got TopLevelTracedModule",
        ),
        (lambda: sparselt.convert(nn.Linear(2, 2), format="coo"), OptionError, "coo"),
        (lambda: sparselt.convert(nn.Linear(2, 2), torch.ones(3)), OptionError, "fails on them"),
        (lambda: sparselt.explain(3), OptionError, "a compiled program, got int"),
    ],
)
def test_mistakes_are_told(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_forced_kernel_runs_in_every_layer_of_its_operation(monkeypatch):
    monkeypatch.setenv("SPARSELT_KERNEL", "csr_conv2d_scalar")
    model = make("residual")
    x = input_for("residual", 2)
    sparse = sparselt.convert(model, x)
    kernels = {layer.kernel for layer in sparse_layers(sparse) if isinstance(layer, SparseConv2d)}
    assert kernels == {"csr_conv2d_scalar"}
    assert_same(sparse(x), model(x))
    monkeypatch.setenv("SPARSELT_KERNEL", "nothing")
    with pytest.raises(KernelError, match="nothing"):
        sparselt.convert(model)


def test_explanations_are_tables_and_json():
    explanation = sparselt.explain(sparselt.convert(make("residual"), input_for("residual", 2)))
    lines = str(explanation).splitlines()
    assert lines[0].split()[:4] == ["layer", "shape", "density", "format"]
    assert lines[3].startswith("3.conv1")
    assert len(lines) == 2 + 9 + 1
    data = json.loads(json.dumps(explanation.to_dict()))
    assert data["layers"][1]["layer"] == "3.conv1"
    assert data["layers"][1]["candidates"][-1]["kernel"] == DENSE
    assert data["summary"] in str(explanation)


def test_an_unconverted_model_is_explained_as_dense():
    assert sparselt.explain(Residual())[0].reason == "dense: not converted"
    assert "no linear or convolution layers" in str(sparselt.explain(nn.ReLU()))
    assert len(sparselt.explain(Encoder())) == 7


def test_a_layer_that_stays_dense_keeps_its_plan_through_copies():
    dense = sparselt.convert(nn.Sequential(nn.Linear(4, 4)))
    for twin in (dense, copy.deepcopy(dense), pickle.loads(pickle.dumps(dense))):
        assert isinstance(getattr(twin[0], PLAN_ATTRIBUTE), Plan)


def test_layers_of_a_large_network_are_timed_with_cold_weights():
    assert not Tuner(weight_bytes=1000).cold
    tuner = Tuner(weight_bytes=1 << 40)
    assert tuner.cold
    plan = tuner.plan(prune_randomly(nn.Linear(64, 64)), inputs=[torch.randn(4, 64)])
    assert plan.dense_us > 0


def test_every_fast_spmv_kernel_is_timed_for_a_small_batch():
    plan = Tuner().plan(prune_randomly(nn.Linear(64, 48)), inputs=[torch.randn(8, 64)])
    timed = {c.kernel for c in plan.candidates if c.us is not None}
    usable = [k for k in ops.kernels() if k.op == "spmv" and k.format == "sell" and k.usable]
    assert {k.name for k in usable if k.features or len(usable) == 1} <= timed


def test_a_layer_planned_for_one_row_serves_any_batch(monkeypatch):
    monkeypatch.setenv("SPARSELT_KERNEL", "sell_spmv_scalar")
    dense = prune_randomly(nn.Linear(70, 30))
    layer = sparselt.convert(dense, torch.randn(1, 70))
    assert layer.kernel == "sell_spmv_scalar"
    for shape in ((70,), (0, 70), (1, 70), (2, 5, 70), (33, 70)):
        x = torch.randn(shape)
        torch.testing.assert_close(layer(x), dense(x))


def test_layers_of_one_kind_are_timed_once():
    tuner = Tuner()
    layer, x = prune_randomly(nn.Conv2d(3, 8, 3)), torch.randn(1, 3, 9, 9)
    first, second = (tuner.plan(layer, inputs=[x]) for _ in range(2))
    assert first == second
    assert len(tuner._times) == 1
    tuner.plan(layer, inputs=[torch.randn(2, 3, 9, 9)])
    assert len(tuner._times) == 2


@pytest.mark.parametrize("name", ["residual", "signal", "perceptron"])
def test_densify_undoes_a_conversion(name):
    model = make(name)
    back = densify(sparselt.convert(model, format="csr"))
    assert not sparse_layers(back)
    assert_same(back.state_dict(), model.state_dict())
    x = input_for(name, 2)
    assert_same(back(x), model(x))
    layer = densify(sparselt.convert(nn.Linear(3, 3), format=DENSE))
    assert type(layer) is nn.Linear
