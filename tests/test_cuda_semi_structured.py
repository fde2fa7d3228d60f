# SPDX-License-Identifier: Apache-2.0
"""Layers by torch's own 2:4 product on a simulated CUDA device: the choice, and all around it.

The product itself is torch's, and simulated here; test_cuda_device.py runs it on a GPU.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from simulated_cuda import Gpu, simulated_cuda
from torch import Tensor, nn

import sparselt
from sparselt.plan import SEMI_STRUCTURED, Facts, candidates, choose
from sparselt.semi_structured import SemiStructuredLinear

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")
HALF = torch.float16
FACTS = Facts(
    "linear",
    (4096, 4096),
    4096 * 2048,
    columns=2048,
    device="cuda",
    dtype="float16",
    two_of_four=True,
)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    with simulated_cuda(monkeypatch) as found:
        yield found


def halved(rows: int = 64, cols: int = 128, seed: int = 0) -> nn.Linear:
    """A layer of which two weights of each four are kept."""
    torch.manual_seed(seed)
    layer = nn.Linear(cols, rows).requires_grad_(False)
    kept = torch.rand(rows, cols // 4, 4).argsort(-1) < 2
    layer.weight.mul_(kept.view(rows, cols))
    return layer


def assert_close(got: Tensor, want: Tensor) -> None:
    assert got.dtype is HALF
    torch.testing.assert_close(got.cpu().float(), want, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "applies"),
        ({"op": "conv2d", "shape": (64, 64, 1, 1)}, "is for linear layers"),
        ({"dtype": "float32"}, "computes float16 and bfloat16, the weight is float32"),
        ({"shape": (4096, 4095)}, "needs rows a multiple of 32 and columns of 64"),
        ({"two_of_four": False}, "more than two weights of some four are kept"),
        ({"obstacle": "it is odd"}, "it is odd"),
    ],
)
def test_it_is_a_candidate_where_the_pattern_and_type_fit(changes: dict, verdict: str) -> None:
    *_, found, dense = candidates(replace(FACTS, **changes), ())
    assert (found.kernel, found.verdict, dense.kernel) == (SEMI_STRUCTURED, verdict, "dense")
    assert found.applies == (verdict == "applies")


def test_rule_takes_it_for_large_products_alone() -> None:
    assert choose(FACTS, ()).kernel == SEMI_STRUCTURED
    assert choose(replace(FACTS, columns=64), ()).is_dense
    assert choose(replace(FACTS, shape=(512, 512), nnz=512 * 256), ()).is_dense
    times = {SEMI_STRUCTURED: 20.0, "dense": 30.0}
    assert choose(replace(FACTS, columns=64), (), times).kernel == SEMI_STRUCTURED
    times = {SEMI_STRUCTURED: 30.0, "dense": 30.0}
    assert choose(FACTS, (), times).is_dense


def test_converted_layer_runs_copies_saves_and_moves(gpu: Gpu) -> None:
    dense = halved()
    x = torch.randn(3, 5, 128)
    want = dense(x)
    model = nn.Sequential(dense).to("cuda:0", HALF)
    converted = sparselt.convert(model, x.cuda().half(), format=SEMI_STRUCTURED)
    (layer,) = converted
    assert isinstance(layer, SemiStructuredLinear)
    assert_close(converted(x.cuda().half()), want)
    assert_close(converted(x.mT.contiguous().cuda().half().mT), want)
    (row,) = sparselt.explain(converted)
    assert (row.kernel, row.format, row.density) == (SEMI_STRUCTURED, SEMI_STRUCTURED, 0.5)
    assert torch.equal(converted.state_dict()["0.weight"].cpu(), dense.weight.cpu())
    assert torch.equal(layer.to_dense().weight.cpu(), dense.weight.cpu())
    assert_close(copy.deepcopy(converted)(x.cuda().half()), want)
    converted.cpu().float()
    torch.testing.assert_close(converted(x), want, rtol=1e-2, atol=1e-2)
    assert sparselt.explain(converted)[0].kernel == "dense"
    assert torch.equal(pickle.loads(pickle.dumps(converted))(x), converted(x))
    assert_close(converted.to("cuda:0", HALF)(x.cuda().half()), want)
    assert layer.kernel == SEMI_STRUCTURED


def test_loaded_weight_of_another_pattern_stays_dense(gpu: Gpu) -> None:
    layer = SemiStructuredLinear(halved().to("cuda:0", HALF), sparselt.plan.Plan("", "", ""))
    other = nn.Linear(128, 64).requires_grad_(False)
    layer.load_state_dict({key: value.half().cuda() for key, value in other.state_dict().items()})
    assert layer.kernel == "dense"
    x = torch.randn(4, 128)
    assert_close(layer(x.cuda().half()), other(x))
    layer.load_state_dict({k: v.half().cuda() for k, v in halved(seed=1).state_dict().items()})
    assert layer.kernel == SEMI_STRUCTURED
    assert_close(layer(x.cuda().half()), halved(seed=1)(x))


def test_compiled_program_runs_it_with_what_follows(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparselt import cuda_rules

    monkeypatch.setattr(cuda_rules, "_SEMI_STRUCTURED_PAYS_FROM", (1, 1))
    times = dict.fromkeys(("csr_spmm_cuda_f16", "tile8_spmm_cuda_f16", "dense"), 9.0)
    times |= {SEMI_STRUCTURED: 1.0}
    monkeypatch.setattr(sparselt.tune, "measure_on_cuda", lambda calls, *_: {
        name: times.get(name, 5.0) for name in calls
    })  # fmt: skip
    dense = halved()
    model, x = nn.Sequential(dense, nn.ReLU()).to("cuda:0", HALF), torch.randn(6, 128)
    want = torch.relu(dense.cpu().float()(x))
    program = sparselt.compile(model.to("cuda:0", HALF), x.cuda().half())
    (row,) = sparselt.explain(program)
    assert (row.kernel, row.sparse_us, row.dense_us) == (SEMI_STRUCTURED, 1.0, 9.0)
    for _ in range(3):
        assert_close(program(x.cuda().half()), want)


def test_library_that_refuses_leaves_the_layer_dense(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(weight: Tensor) -> Tensor:
        raise RuntimeError("cuSPARSELt not supported on your machine.")

    monkeypatch.setattr("sparselt.semi_structured.to_sparse_semi_structured", refuse)
    model, x = nn.Sequential(halved()).to("cuda:0", HALF), torch.randn(6, 128).cuda().half()
    converted = sparselt.convert(model, x)
    plan = sparselt.explain(converted)[0].plan
    (found,) = (c for c in plan.candidates if c.kernel == SEMI_STRUCTURED)
    assert (found.applies, found.verdict) == (False, "failed when it was timed")
