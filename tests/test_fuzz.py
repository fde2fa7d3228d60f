# SPDX-License-Identifier: Apache-2.0
"""The fuzzers of `make fuzz`: they run all kernels, find what is wrong, and name the problem."""

from __future__ import annotations

import fuzz
import fuzz_networks
import pytest
import torch

from sparselt import ops


def test_the_fuzzer_runs_every_usable_kernel(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz, "PROGRESS_SECONDS", 0.0)
    assert fuzz.main(["--problems", "40", "--seed", "3"]) == 0
    summary = capsys.readouterr().out
    assert summary.startswith("40 problems right")
    for kernel in ops.kernels():
        if kernel.usable and kernel.device == "cpu":
            assert kernel.name in summary


def test_the_fuzzer_stops_at_a_wrong_result_and_says_how_to_see_it_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = ops.conv2d

    def wrong(x: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        y = right(x, *args, **options)
        y.view(-1)[-1] += 0.01
        return y

    monkeypatch.setattr(ops, "conv2d", wrong)
    assert fuzz.main(["--problems", "100", "--seed", "5"]) == 1
    told = capsys.readouterr().err
    assert "failed: AssertionError: ('" in told
    again = told.split("tests/fuzz.py ")[1].split()
    assert fuzz.main(again) == 1
    monkeypatch.undo()
    assert fuzz.main(again) == 0


def test_a_problem_depends_on_its_number_and_not_on_those_before() -> None:
    assert fuzz.run_problem(1, 17) == fuzz.run_problem(1, 17)


@pytest.mark.parametrize("number", range(6))
def test_a_random_network_computes_what_torch_does(number: int) -> None:
    fuzz_networks.run_problem(number)


def test_the_fuzzer_of_networks_stops_at_a_wrong_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        fuzz_networks, "made_fast", lambda how, model, *_: (how, lambda x: model(x) * 1.001)
    )
    assert fuzz_networks.main(["--problems", "1", "--first", "3"]) == 1
    told = capsys.readouterr().err
    assert "network 3 failed: AssertionError" in told
    assert "again: python tests/fuzz_networks.py --first 3 --problems 1" in told
