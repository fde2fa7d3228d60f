# SPDX-License-Identifier: Apache-2.0
"""Whole networks: sparselt.compile, and the backend of torch.compile."""

from __future__ import annotations

import copy
import json
import pickle
import threading
import time
import warnings
from importlib import metadata

import pytest
import torch
from networks import NETWORKS, Branching, Encoder, Residual, input_for, make, prune_randomly
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import sparselt
from sparselt import dynamo
from sparselt.errors import KernelError, OptionError
from sparselt.plan import DENSE
from sparselt.program import Program

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")


@pytest.fixture(autouse=True)
def one_thread(fixed_threads):
    # Layers this small are timed for their plans, not for speed.
    torch.set_num_threads(1)
    torch._dynamo.reset()


@pytest.fixture
def always_sparse(monkeypatch):
    """Plans as if sparse always won, so that lowering is tested whatever the machine measures."""
    monkeypatch.setattr("sparselt.tune.measure", lambda calls, **_: time_sparse_first(calls))


def time_sparse_first(calls):
    return {name: 100.0 if name == DENSE else float(i) for i, name in enumerate(calls, 1)}


def assert_same(got: object, want: object) -> None:
    got, want = pytree.tree_leaves(got), pytree.tree_leaves(want)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_program_computes_what_the_model_does_at_any_size(name, always_sparse):
    model = make(name)
    program = sparselt.compile(model, input_for(name, 2))
    with torch.no_grad():
        for batch in (2, 1, 5, 17):
            x = input_for(name, batch)
            assert_same(program(x.clone()), model(x.clone()))
        other = NETWORKS[name][2]
        for batch in (3, 1) if other else ():
            x = input_for(name, batch, other)
            assert_same(program(x.clone()), model(x.clone()))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_dynamo_backend_computes_what_the_model_does(name, always_sparse):
    model = make(name)
    fast = torch.compile(model, backend=dynamo.backend)
    with torch.no_grad():
        for batch in (2, 1, 5):
            x = input_for(name, batch)
            assert_same(fast(x.clone()), model(x.clone()))


def test_measured_plans_compute_the_same_and_are_explained():
    model = make("residual")
    program = sparselt.compile(model, (input_for("residual", 2),))
    x = input_for("residual", 4)
    assert_same(program(x), model(x).detach())
    rows = list(sparselt.explain(program))
    assert [row.layer for row in rows] == [
        "0",
        "3.conv1",
        "3.conv2",
        "4.down",
        "4.conv1",
        "4.conv2",
        "5.conv1",
        "5.conv2",
        "8",
    ]
    assert all(row.dense_us > 0 and row.sparse_us > 0 for row in rows)
    assert "layers run sparse" in repr(program)


def test_batch_norm_residual_and_relu_are_fused(always_sparse):
    program = sparselt.compile(make("residual"), input_for("residual", 2))
    explanation = sparselt.explain(program)
    reasons = [row.reason.partition("; with ")[2] for row in explanation]
    plain, added = "batch norm, clamp", "batch norm, residual, clamp"
    assert reasons == [plain, plain, added, "", plain, added, plain, added, ""]
    assert explanation.notes == ("the rest runs natively: adaptive_avg_pool2d (1), flatten (1)",)
    assert json.loads(json.dumps(explanation.to_dict()))["layers"][0]["kernel"] != DENSE


def test_a_dense_layer_of_a_program_is_fused_too():
    torch.manual_seed(0)
    model = Residual().eval()
    program = sparselt.compile(model, input_for("residual", 2))
    reasons = {row.reason for row in sparselt.explain(program)}
    assert "stays dense: no zeros; with batch norm, residual, clamp" in reasons
    x = input_for("residual", 3)
    assert_same(program(x), model(x).detach())


def test_one_capture_serves_all_batches_and_a_second_all_sizes(always_sparse):
    program = sparselt.compile(make("residual"), input_for("residual", 1))
    for batch in (1, 2, 3, 8):
        program(input_for("residual", batch))
    assert len(program._families) == 1
    for size in (20, 22, 30):
        program(torch.randn(2, 3, size, size))
    assert len(program._families) == 2


def test_keywords_defaults_and_constants_are_told_apart(always_sparse):
    model = make("encoder")
    ids = input_for("encoder", 2)
    program = sparselt.compile(model, ids)
    with torch.no_grad():
        assert_same(program(ids=ids), model(ids))
        assert_same(program(ids, 2.0), model(ids, 2.0))
        assert_same(program(ids, 3.0, best=False), model(ids, 3.0, best=False))
        assert_same(program(ids, best=False), model(ids, best=False))
    by_keyword = sparselt.compile(model, {"ids": ids, "best": False})
    assert_same(by_keyword(ids=ids, best=False), model(ids, best=False).detach())


def test_another_type_is_computed_in_it():
    model = nn.Sequential(prune_randomly(nn.Linear(16, 16)))
    program = sparselt.compile(model, torch.randn(2, 16))
    with pytest.raises(RuntimeError):
        program(torch.randn(2, 16, dtype=torch.float64))
    x = torch.randn(2, 16)
    assert_same(program(x), model(x).detach())
    double = sparselt.compile(copy.deepcopy(model).double(), x.double())
    assert double(x.double()).dtype is torch.float64
    assert "float64" in sparselt.explain(double)[0].reason


def test_channels_last_inputs_are_taken(always_sparse):
    model = make("residual")
    x = input_for("residual", 4).contiguous(memory_format=torch.channels_last)
    program = sparselt.compile(model, x)
    assert_same(program(x), model(x).detach())
    assert_same(program(x.contiguous()), model(x).detach())


def test_what_cannot_be_captured_runs_layer_by_layer_and_says_why(capfd):
    model = make("branching", density=0.05)
    program = sparselt.compile(model, torch.ones(2, 32))
    for x in (torch.ones(3, 32), -torch.ones(3, 32)):
        assert_same(program(x), model(x).detach())
    (note,) = sparselt.explain(program).notes
    assert note.startswith("runs layer by layer, not as one graph: torch.export: ")
    assert len(sparselt.explain(program)) == 2
    assert capfd.readouterr().err == ""


def test_inputs_that_the_model_refuses_are_refused_in_its_own_words_and_no_others(capfd, caplog):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5)).eval()
    program = sparselt.compile(model, torch.ones(2, 3, 8, 8))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        program(torch.ones(2, 3, 9, 9))
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    assert capfd.readouterr().err == ""


def test_a_graph_that_computes_something_else_is_not_used(monkeypatch):
    class Noise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            return self.layer(x) + torch.rand(8)

    program = sparselt.compile(Noise(), torch.ones(2, 8))
    assert "differs from the model's" in sparselt.explain(program).notes[0]


def test_the_model_and_its_mode_are_left_alone_and_later_changes_do_not_matter():
    model = make("residual").train()
    before = copy.deepcopy(model.state_dict())
    program = sparselt.compile(model, input_for("residual", 2))
    assert model.training
    assert_same(model.state_dict(), before)
    x = input_for("residual", 2)
    want = program(x)
    model[8].bias.data.add_(1.0)
    assert_same(program(x), want)


def test_inputs_made_under_inference_mode_and_those_with_gradients_are_taken(always_sparse):
    model = make("perceptron")
    program = sparselt.compile(model, input_for("perceptron", 2))
    with torch.inference_mode():
        x = input_for("perceptron", 6)
        assert_same(program(x), model(x))
    x = input_for("perceptron", 7).requires_grad_()
    assert_same(program(x), model(x).detach())


def test_a_converted_model_is_compiled_as_the_dense_one_was(always_sparse):
    model, x = make("residual"), input_for("residual", 2)
    program = sparselt.compile(sparselt.convert(model, format="csr"), x)
    assert len(sparselt.explain(program)) == 9
    assert_same(program(x), model(x).detach())


@pytest.mark.parametrize("duplicate", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_program_says_that_it_cannot_be_copied(duplicate):
    program = sparselt.compile(nn.Linear(2, 2), torch.ones(1, 2))
    with pytest.raises(OptionError, match="save the model"):
        duplicate(program)


def test_no_images_at_all_are_a_batch_too(always_sparse):
    program = sparselt.compile(make("residual"), input_for("residual", 2))
    assert program(input_for("residual", 0)).shape == (0, 10)


def test_half_precision_models_run_in_their_type():
    model = make("residual").bfloat16()
    x = input_for("residual", 2).bfloat16()
    program = sparselt.compile(model, x)
    assert program(x).dtype is torch.bfloat16
    torch.testing.assert_close(program(x), model(x).detach(), rtol=0.05, atol=0.05)
    assert "the weight is bfloat16" in sparselt.explain(program)[0].reason


def test_several_threads_may_call_one_program(always_sparse):
    model = make("residual")
    program = sparselt.compile(model, input_for("residual", 2))
    inputs = [input_for("residual", batch) for batch in (1, 2, 3, 5, 9, 4)]
    with torch.no_grad():
        wanted = [model(x) for x in inputs]
    failures = []

    def work(offset: int) -> None:
        for i in range(12):
            k = (i + offset) % len(inputs)
            try:
                assert_same(program(inputs[k]), wanted[k])
            except BaseException as error:
                failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sparselt.compile("model", 1), OptionError, "torch.nn.Module"),
        (lambda: sparselt.compile(Branching(), torch.ones(2, 3)), OptionError, "fails on them"),
        (lambda: sparselt.compile(Branching(), ()), OptionError, "fails on them"),
    ],
)
def test_mistakes_are_told(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_an_unknown_forced_kernel_fails_loudly(monkeypatch):
    monkeypatch.setenv("SPARSELT_KERNEL", "csr_spmm_abacus")
    model = make("perceptron")
    with pytest.raises(KernelError, match="csr_spmm_abacus"):
        sparselt.compile(model, input_for("perceptron", 2))
    fast = torch.compile(model, backend=dynamo.backend)
    with torch.no_grad(), pytest.raises(Exception, match="csr_spmm_abacus"):
        fast(input_for("perceptron", 2))


def test_the_backend_notices_changed_weights(always_sparse):
    model = make("residual")
    fast = torch.compile(model, backend=dynamo.backend)
    x = input_for("residual", 2)
    with torch.no_grad():
        fast(x)
        model[8].weight.mul_(0.5)
        assert_same(fast(x), model(x))
        model[1].running_mean.add_(0.5)
        assert_same(fast(x), model(x))
        model[8].weight = nn.Parameter(torch.randn(10, 32))
        assert_same(fast(x), model(x))
        model[0].weight.data = torch.randn(16, 3, 3, 3)
        assert_same(fast(x), model(x))


def test_a_network_compiled_by_torch_is_explained_once_it_has_run(always_sparse):
    model = make("residual")
    fast = torch.compile(model, backend=dynamo.backend)
    assert {row.kernel for row in sparselt.explain(fast)} == {DENSE}
    with torch.no_grad():
        fast(input_for("residual", 2))
    rows = {row.layer: row for row in sparselt.explain(fast)}
    assert len(rows) == 9
    assert rows["3.conv2"].reason.endswith("; with batch norm, residual, clamp")
    assert {row.kernel for row in sparselt.explain(model)} == {DENSE}


def test_the_backend_gives_up_packing_a_weight_that_always_changes(always_sparse):
    model = nn.Sequential(prune_randomly(nn.Linear(8, 8)))
    fast = torch.compile(model, backend=dynamo.backend)
    x = torch.randn(2, 8)
    with torch.no_grad():
        for _ in range(8):
            model[0].weight.mul_(0.9)
            assert_same(fast(x), model(x))


def test_the_backend_runs_dense_with_a_warning_where_gradients_are_wanted():
    model = make("perceptron")
    fast = torch.compile(model, backend=dynamo.backend)
    x = input_for("perceptron", 2)
    with pytest.warns(UserWarning, match="only runs forward"):
        got = fast(x)
    got.sum().backward()
    assert model.first.weight.grad is not None


def test_the_backend_runs_around_graph_breaks():
    model = prune_randomly(nn.Sequential(nn.Linear(8, 8), Printing(), nn.Linear(8, 8)))
    fast = torch.compile(model, backend=dynamo.backend)
    x = torch.randn(3, 8)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(fast(x), model(x))


class Printing(nn.Module):
    def forward(self, x):
        torch._dynamo.graph_break()
        return F.relu(x)


def test_torch_knows_the_backend_by_name():
    assert "sparselt" in torch._dynamo.list_backends()
    model = make("perceptron")
    x = input_for("perceptron", 2)
    with torch.no_grad():
        assert_same(torch.compile(model, backend="sparselt")(x), model(x))


def test_an_installed_package_offers_the_backend_without_being_imported():
    found = metadata.entry_points(group="torch_dynamo_backends", name="sparselt")
    if not found:
        pytest.skip("sparselt is used from its source tree, without metadata")
    assert next(iter(found)).load() is dynamo.backend


def test_compile_is_the_function_whatever_was_imported_before():
    import sparselt.program

    assert isinstance(sparselt.compile(nn.Linear(2, 2), torch.ones(1, 2)), Program)
    assert sparselt.compile is sparselt.program.compile


def test_a_call_costs_little_more_than_its_layers():
    model = nn.Sequential(*(nn.ReLU() for _ in range(1)))
    program = sparselt.compile(model, torch.ones(1, 8))
    x = torch.ones(1, 8)
    best = min(timed(program, x) for _ in range(300))
    assert best < 100e-6, f"{1e6 * best:.0f} us for a call of one ReLU"


def timed(call, x) -> float:
    begin = time.perf_counter()
    call(x)
    return time.perf_counter() - begin


def test_the_encoder_keeps_its_embedding_tied(always_sparse):
    torch.manual_seed(0)
    model = Encoder().eval()
    program = sparselt.compile(model, torch.zeros(1, 4, dtype=torch.int64))
    ids = torch.randint(0, 50, (3, 7))
    with torch.no_grad():
        assert_same(program(ids), model(ids))
