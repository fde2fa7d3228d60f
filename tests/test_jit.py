# SPDX-License-Identifier: Apache-2.0
"""Generated code: its instructions, its memory, and how long it lives."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import platform
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from cases import ConvCase, SpmmCase, assert_within_bound
from torch import Tensor, nn

import sparselt
from sparselt import ops, reference
from sparselt.extension import code_bytes
from sparselt.formats import SELL
from sparselt.nn import SparseConv2d, SparseLinear

ROOT = Path(__file__).resolve().parent.parent
KERNEL = "sell_code_avx512"
INFO = next(kernel for kernel in ops.kernels() if kernel.name == KERNEL)
X86_64 = platform.machine() in ("x86_64", "AMD64")
BLOCK = (INFO.tile_rows, 16)
needs_kernel = pytest.mark.skipif(not INFO.usable, reason=INFO.reason)


def a_weight(rows: int = 70, cols: int = 90, density: float = 0.3, seed: int = 0) -> SELL:
    weight, mask = SpmmCase(rows, cols, 1, density=density, seed=seed).dense()
    return SELL.from_dense(weight, mask, BLOCK)


def an_x(columns: int = 300, rows: int = 90) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))


def check_product(weight: SELL, x: Tensor) -> Tensor:
    y = ops.spmm(weight, x, kernel=KERNEL)
    assert_within_bound((KERNEL, tuple(x.shape)), y, reference.spmm, weight, x)
    return y


def in_a_process(script: str) -> str:
    """Runs a script in a new process and returns what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ---- instructions ----


@pytest.mark.skipif(not X86_64, reason="the disassembler of this machine reads other code")
def test_a_disassembler_reads_what_the_emitter_was_told(tmp_path: Path) -> None:
    compiler, objdump = os.environ.get("CXX", "c++"), shutil.which("objdump")
    if objdump is None or shutil.which(compiler) is None:
        pytest.skip("no objdump (binutils) or no C++ compiler")
    program, code = tmp_path / "listing", tmp_path / "code"
    sources = [ROOT / "tests/jit/listing.cpp", ROOT / "csrc/jit/emitter.cpp"]
    flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}"]
    subprocess.run([compiler, *flags, *map(str, sources), "-o", str(program)], check=True)
    listing = subprocess.run([program, code], capture_output=True, text=True, check=True).stdout
    command = [objdump, "-D", "-b", "binary", "-m", "i386:x86-64", "--no-show-raw-insn", str(code)]
    read = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = re.findall(r"^\s*[0-9a-f]+:\s+(.*?)\s*$", read, re.MULTILINE)
    found = [re.sub(r"\s+", " ", line).replace("retq", "ret") for line in lines]
    assert len(found) > 2500
    assert found == listing.splitlines()


# ---- results ----


@needs_kernel
@pytest.mark.parametrize("cols", [16, 300, 700])
def test_code_and_the_loops_that_stand_in_for_it_agree(cols: int) -> None:
    """A system that refuses executable memory (here: this process forbids it to itself)."""
    script = f"""
import ctypes, sys, torch
sys.path.insert(0, {str(ROOT / "tests")!r})
from cases import SpmmCase
from sparselt import ops
from sparselt.extension import code_bytes
from sparselt.formats import SELL

case = SpmmCase(100, 700, 290, density=0.2)
dense, mask = case.dense()
results = []
for refused in (False, True):
    if refused and ctypes.CDLL(None).prctl(65, 1, 0, 0, 0):  # PR_SET_MDWE, refuse exec gain
        print("unsupported")
        break
    weight = SELL.from_dense(dense, mask, ({INFO.tile_rows}, {cols}))
    results.append(ops.spmm(weight, case.x(), case.bias(), kernel={KERNEL!r}))
    assert (code_bytes(weight.parts()) == 0) == refused
else:
    print(torch.equal(*results))
"""
    answer = in_a_process(script).strip()
    if answer == "unsupported":
        pytest.skip("this kernel cannot refuse memory to a process (Linux 6.3 can)")
    assert answer == "True"


@needs_kernel
def test_values_changed_in_place_count_at_once() -> None:
    weight, x = a_weight(), an_x()
    first = check_product(weight, x)
    weight.values.mul_(2.0)
    assert torch.equal(check_product(weight, x), 2.0 * first)
    weight.values.numpy()[:] = 0.0
    assert not check_product(weight, x).any()


@needs_kernel
@pytest.mark.parametrize("rows", [300, 700])
def test_rows_and_columns_beyond_the_short_offsets_are_reached(rows: int) -> None:
    case = SpmmCase(rows, 600, 17, density=0.05)
    dense, mask = case.dense()
    for block_cols in (256, 600):
        weight = SELL.from_dense(dense, mask, (INFO.tile_rows, block_cols))
        check_product(weight, case.x())


# ---- memory ----


def anonymous_code() -> set[tuple[str, str]]:
    """Places and permissions of executable memory that belongs to no file."""
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    return {(line[0], line[1]) for line in maps if "x" in line[1] and len(line) < 6}


@needs_kernel
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc/self/maps")
def test_no_memory_is_writable_and_executable() -> None:
    weight = a_weight()
    before = anonymous_code()  # torch's own generated code may be both
    check_product(weight, an_x())
    assert code_bytes(weight.parts()) > 0
    new = anonymous_code() - before
    assert new, "no code was found"
    assert {permissions for _, permissions in new} == {"r-xp"}


# ---- lifetime ----


@needs_kernel
def test_code_dies_with_the_last_tensor_of_its_weight() -> None:
    weight = a_weight()
    parts, check = weight.parts(), sparselt._C.code_bytes
    address = parts[1].data_ptr()
    assert check(address) == 0
    check_product(weight, an_x())
    assert check(address) > 0
    del weight
    gc.collect()
    assert check(address) > 0
    del parts
    gc.collect()
    assert check(address) == 0


@needs_kernel
def test_weights_that_come_and_go_never_meet_each_others_code() -> None:
    x = an_x()
    for seed in range(8):
        check_product(a_weight(seed=seed, density=0.1), x)
    # Without Python's help: parts that nobody watches.
    for seed in range(8):
        weight = a_weight(seed=seed, density=0.1)
        parts = [part.clone() for part in weight.parts()]
        y = torch.ops.sparselt.spmm(x, parts, weight.meta(), None, None, None, None, KERNEL)
        assert_within_bound((KERNEL, seed), y, reference.spmm, weight, x)
        sparselt._C.release_code(parts[1].data_ptr())


def a_layer() -> tuple[SparseLinear, Tensor]:
    dense = nn.Linear(90, 70)
    dense.weight.data[torch.rand(70, 90, generator=torch.Generator().manual_seed(2)) < 0.8] = 0.0
    return SparseLinear.from_dense(dense, kernel=KERNEL), an_x(90, 300)


@needs_kernel
def test_copies_of_a_layer_have_code_of_their_own() -> None:
    layer, x = a_layer()
    with torch.inference_mode():
        y = layer(x)
        for make_copy in (copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))):
            copied = make_copy(layer)
            parts = copied.weight.parts()
            address = parts[1].data_ptr()
            assert code_bytes(parts) == 0
            assert torch.equal(copied(x), y)
            assert code_bytes(parts) > 0
            stored = sum(part.numel() * part.element_size() for part in parts)
            assert copied.weight.nbytes == stored + code_bytes(parts)
            del copied, parts
            gc.collect()
            assert sparselt._C.code_bytes(address) == 0


@needs_kernel
def test_torch_compile_runs_the_same_code() -> None:
    layer, x = a_layer()
    with torch.inference_mode():
        assert torch.equal(torch.compile(layer, backend="eager")(x), layer(x))


@needs_kernel
def test_a_convolution_layer_runs_code() -> None:
    dense = nn.Conv2d(8, 40, 3, padding=1, stride=(1, 2))
    dense.weight.data[torch.rand(40, 8, 3, 3) < 0.8] = 0.0
    x = torch.randn(3, 8, 20, 21)
    layer = SparseConv2d.from_dense(dense, kernel=KERNEL)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), dense(x))
    assert code_bytes(layer.weight.parts()) > 0


@needs_kernel
def test_threads_that_meet_a_new_weight_at_once_agree() -> None:
    case = ConvCase(2, 6, 50, (30, 30), (3, 3), padding=(1, 1), density=0.2)
    weight, x = case.weight("sell", BLOCK), case.x()
    results: list[Tensor] = []
    barrier = threading.Barrier(4)

    def work() -> None:
        barrier.wait()
        results.append(ops.conv2d(x, weight, padding=1, kernel=KERNEL))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_within_bound(str(case), results[0], reference.conv2d, x, weight, **case.options())
    assert all(torch.equal(result, results[0]) for result in results)


@needs_kernel
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_runs_its_parents_code() -> None:
    script = f"""
import os, sys, torch
sys.path.insert(0, {str(ROOT / "tests")!r})
from test_jit import a_weight, an_x, check_product

torch.set_num_threads(1)
weight, other, x = a_weight(), a_weight(seed=3), an_x()
y = check_product(weight, x)
if os.fork() == 0:
    same = torch.equal(check_product(weight, x), y)
    check_product(other, x)
    os._exit(0 if same else 1)
assert os.wait()[1] == 0
"""
    in_a_process(script)


@needs_kernel
def test_a_compiled_program_runs_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSELT_KERNEL", KERNEL)
    dense = nn.Sequential(nn.Conv2d(3, 40, 3, padding=1), nn.ReLU(), nn.Conv2d(40, 35, 1)).eval()
    generator = torch.Generator().manual_seed(4)
    for layer in (dense[0], dense[2]):
        layer.weight.data[torch.rand(layer.weight.shape, generator=generator) < 0.7] = 0.0
    x = torch.randn(3, 3, 20, 20, generator=generator)
    with torch.inference_mode():
        expected = dense(x)
        program = sparselt.compile(dense, (x,))
        assert {row.kernel for row in sparselt.explain(program)} == {KERNEL}
        for threads in (1, 3):
            torch.set_num_threads(threads)
            torch.testing.assert_close(program(x), expected)
        torch.testing.assert_close(
            program(x[:1].repeat(5, 1, 1, 1)), dense(x[:1]).repeat(5, 1, 1, 1)
        )
