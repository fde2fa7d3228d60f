# SPDX-License-Identifier: Apache-2.0
"""What setup.py decides, says when it cannot build, and puts into a source distribution."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("csrc", "sparselt", "tests")
# Runs setup.py as a machine without torch would.
WITHOUT_TORCH = (
    "import runpy, sys; sys.modules['torch'] = None; sys.argv = ['setup.py', *sys.argv[1:]]; "
    "runpy.run_path('setup.py', run_name='__main__')"
)


def load_setup() -> ModuleType:
    specification = importlib.util.spec_from_file_location("sparselt_setup", ROOT / "setup.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


SETUP = load_setup()


def run_setup(
    words: list[str], folder: Path, python: list[str] | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs setup.py in `folder`; a variable that is "" is unset for it."""
    environment = {**os.environ, **variables}
    environment = {name: value for name, value in environment.items() if value}
    command = [sys.executable, *(python or ["setup.py"]), *words]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def build_words(folder: Path) -> list[str]:
    return ["build_ext", "--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")]


def assert_one_sentence(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("sparselt: ")
    assert last.endswith(".")
    for word in words:
        assert word in last


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source distribution, made from a copy of the tree on a machine without torch."""
    copy = tmp_path_factory.mktemp("source")
    unwanted = shutil.ignore_patterns("*.so", "__pycache__")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=unwanted)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, copy)
    done = run_setup(["-q", "sdist"], copy, python=["-c", WITHOUT_TORCH])
    assert done.returncode == 0, done.stderr
    (archive,) = (copy / "dist").iterdir()
    return archive


@pytest.mark.parametrize(
    ("wish", "torch_cuda", "nvcc", "build", "reason"),
    [
        ("0", "13.0", "13.0", False, "SPARSELT_CUDA=0"),
        (None, "13.0", "13.0", True, "nvcc is 13.0"),
        ("1", "13.0", "13.2", True, "CUDA 13.0"),
        (None, None, "13.0", False, "CPU build"),
        ("", "13.0", None, False, "no nvcc"),
        (None, "13.0", "12.8", False, "CUDA 12.8"),
    ],
)
def test_cuda_is_decided_from_torch_and_toolkit(
    wish: str | None, torch_cuda: str | None, nvcc: str | None, build: bool, reason: str
) -> None:
    decision = SETUP.decide_cuda(wish, torch_cuda, nvcc)
    assert decision.build is build
    assert reason in decision.reason


@pytest.mark.parametrize(
    ("torch_cuda", "nvcc", "words"),
    [
        (None, "13.0", ["CPU build"]),
        ("13.0", None, ["no nvcc", "CUDA_HOME"]),
        ("13.0", "12.8", ["12.8", "13.0", "CUDA_HOME"]),
    ],
)
def test_cuda_asked_for_in_vain_is_an_error(
    torch_cuda: str | None, nvcc: str | None, words: list[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        SETUP.decide_cuda("1", torch_cuda, nvcc)
    for word in ["SPARSELT_CUDA=1", *words]:
        assert word in str(caught.value)


def test_unknown_wish_for_cuda_is_an_error(tmp_path: Path) -> None:
    done = run_setup(build_words(tmp_path), ROOT, SPARSELT_CUDA="yes")
    assert_one_sentence(done, "expected 0, 1 or nothing", "got 'yes'")


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is a CUDA build here")
def test_cuda_asked_of_a_cpu_torch_ends_with_one_sentence(tmp_path: Path) -> None:
    done = run_setup(build_words(tmp_path), ROOT, SPARSELT_CUDA="1")
    assert_one_sentence(done, "SPARSELT_CUDA=1", "CPU build")


@pytest.mark.parametrize("compiler", ["", "no-such-compiler"])
def test_missing_compiler_ends_with_one_sentence(tmp_path: Path, compiler: str) -> None:
    empty = tmp_path / "bin"
    empty.mkdir()
    done = run_setup(build_words(tmp_path), ROOT, PATH=str(empty), CXX=compiler, SPARSELT_CUDA="0")
    assert_one_sentence(done, repr(compiler or "c++"), "was not found", "set CXX")


def test_missing_python_header_ends_with_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SETUP.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(SystemExit, match=r"Python\.h was not found"):
        SETUP.check_compiler({"PATH": os.environ["PATH"], "CXX": sys.executable})


def test_missing_torch_ends_with_one_sentence(tmp_path: Path) -> None:
    done = run_setup(build_words(tmp_path), ROOT, python=["-c", WITHOUT_TORCH])
    assert_one_sentence(done, "torch >= 2.11", "pip install --no-build-isolation .")


def test_jobs_are_modest() -> None:
    assert 1 <= SETUP.default_jobs() <= min(8, os.cpu_count() or 1)


def test_no_instruction_set_is_fixed_by_flags() -> None:
    assert not [flag for flag in SETUP.cxx_flags() if flag.startswith(("-m", "-fast"))]
    assert "-ffp-contract=off" in SETUP.cxx_flags()


def test_torch_accepts_the_default_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", SETUP.DEFAULT_CUDA_ARCHS)
    flags = " ".join(cpp_extension._get_cuda_arch_flags())
    for target in ("sm_80", "sm_86", "sm_89", "compute_89", "sm_90a"):
        assert f"code={target}" in flags


def test_every_source_belongs_to_one_module() -> None:
    cpu, cuda = set(SETUP.sources(SETUP.CPU_SOURCES)), set(SETUP.sources(SETUP.CUDA_SOURCES))
    everything = {
        path.relative_to(ROOT).as_posix()
        for suffix in ("cpp", "cu")
        for path in (ROOT / "csrc").rglob(f"*.{suffix}")
    }
    assert cpu
    assert not cpu & cuda
    assert cpu | cuda == everything


def test_sdist_holds_all_sources_and_no_product(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {
        path.relative_to(ROOT).as_posix()
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix not in (".so", ".pyc")
    }
    top = {"LICENSE", "MANIFEST.in", "README.md", "constraints.txt", "pyproject.toml", "setup.py"}
    assert not (sources | top) - names
    assert not [name for name in names if name.endswith((".so", ".pyc", ".o"))]


@pytest.mark.slow
def test_sdist_builds_and_runs(sdist: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    install = ["-m", "pip", "install", "--no-build-isolation", "--no-deps", "--target", str(target)]
    subprocess.run([sys.executable, *install, str(sdist)], check=True, cwd=tmp_path)
    code = (
        "import torch, sparselt; w = torch.eye(5); x = torch.randn(5, 3); "
        "assert torch.equal(sparselt.ops.spmm(sparselt.pack(w), x), x); print(sparselt.__file__)"
    )
    environment = {**os.environ, "PYTHONPATH": str(target)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(str(target))


def test_every_entry_point_leads_somewhere() -> None:
    try:
        points = importlib.metadata.distribution("sparselt").entry_points
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("sparselt is not installed, only on the path")
    assert {point.group for point in points} == {"console_scripts", "torch_dynamo_backends"}
    for point in points:
        assert callable(point.load())
