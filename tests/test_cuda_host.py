# SPDX-License-Identifier: Apache-2.0
"""The CPU stand-in for a GPU notices the mistakes it is there for."""

from __future__ import annotations

import re

import pytest
import torch
from cuda_host import Host, KernelFaultError, host
from torch import Tensor

from sparselt.formats import CSR

ROWS = 64

# The fault, and what the program must say when it ends.
STOPPED = [
    ("fault_divergent_barrier", "threads wait for others that do not come"),
    ("fault_divergent_warp", "threads wait for others that do not come"),
    ("fault_shared_overrun", "AddressSanitizer|wrote outside shared memory"),
    ("fault_write_overrun", "AddressSanitizer|wrote outside an array"),
]
ONLY_SANITIZED = [
    ("fault_read_overrun", "AddressSanitizer"),
    ("fault_misaligned", "misaligned address"),
]


@pytest.fixture(scope="module")
def machine() -> Host:
    return host()


def shift(machine: Host, fault: str, schedule: int) -> Tensor:
    weight = CSR.from_dense(torch.zeros(ROWS, ROWS))
    x = torch.arange(float(ROWS)).view(ROWS, 1)
    return machine.spmm(fault, weight, x, schedule=schedule).flatten()


def expected() -> Tensor:
    return torch.arange(float(ROWS)).roll(-1)


@pytest.mark.parametrize("schedule", [0, 1, 7])
def test_kernel_without_fault_gives_the_same_in_every_order(machine: Host, schedule: int) -> None:
    assert torch.equal(shift(machine, "fault_none", schedule), expected())


@pytest.mark.parametrize("fault", ["fault_missing_barrier", "fault_missing_wait"])
@pytest.mark.parametrize("schedule", [0, 1, 7])
def test_value_read_too_early_is_nan(machine: Host, fault: str, schedule: int) -> None:
    assert shift(machine, fault, schedule).isnan().any()


@pytest.mark.parametrize("schedule", [0, 1])
def test_copy_into_values_still_needed_shows(machine: Host, schedule: int) -> None:
    assert not torch.equal(shift(machine, "fault_early_overwrite", schedule), expected())


@pytest.mark.parametrize(("fault", "message"), STOPPED)
def test_broken_rule_stops_the_program(machine: Host, fault: str, message: str) -> None:
    with pytest.raises(KernelFaultError) as caught:
        shift(machine, fault, 0)
    assert re.search(message, str(caught.value))


@pytest.mark.parametrize(("fault", "message"), ONLY_SANITIZED)
def test_bad_address_stops_the_program(machine: Host, fault: str, message: str) -> None:
    if not machine.sanitized:
        pytest.skip("the C++ compiler has no sanitizers")
    with pytest.raises(KernelFaultError) as caught:
        shift(machine, fault, 0)
    assert re.search(message, str(caught.value))


def test_program_goes_on_after_a_fault(machine: Host) -> None:
    with pytest.raises(KernelFaultError):
        shift(machine, "fault_divergent_barrier", 0)
    assert torch.equal(shift(machine, "fault_none", 0), expected())
