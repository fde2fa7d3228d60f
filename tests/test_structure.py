# SPDX-License-Identifier: Apache-2.0
"""The house rules that a machine can check: layout, layers, budgets, names, cost of import."""

from __future__ import annotations

import ast
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "sparselt"
CSRC = ROOT / "csrc"

REQUIRED = {
    ".ci",
    ".clang-format",
    ".pre-commit-config.yaml",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "csrc",
    "pyproject.toml",
    "setup.py",
    "sparselt",
    "tests",
}
ALLOWED = REQUIRED | {
    ".gitattributes",
    ".gitignore",
    "MANIFEST.in",
    "bench",
    "constraints.txt",
    "docs",
    "examples",
}

BASE = {"errors"}
DATA = BASE | {"formats", "tickets", "plan"}
LAYER = DATA | {"cuda_rules", "packed", "ops", "facts", "moving", "nn", "semi_structured"}
GRAPH = (
    {"cuda_graph", "cuda_timer", "candidate_calls", "fuse", "layers", "pooling", "lowering"}
    | {"builder", "few_channels", "emit", "emit_views", "native", "planned", "prepacked"}
    | {"images", "samples", "shape_rules", "shapes", "capture", "dynamo", "shelf", "family"}
    | {"packed_rows", "profiling", "portable", "cpu", "image_rules", "rules", "tune_cache", "tune"}
)
WHOLE_MODEL = LAYER | GRAPH | {"conversion", "explanation", "program"}
EVERYTHING = WHOLE_MODEL | {"lottery", "measure", "reference", "sparselt"}
# What each unit (a module or a package right under sparselt) may import, itself aside. A unit that
# is missing here fails the test: its author decides where it belongs.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "formats": BASE,
    "tickets": BASE,
    "registry": BASE,
    "rules": {"registry"},
    "cuda_rules": {"registry"},
    "image_rules": {"plan"},
    "plan": BASE | {"formats", "registry", "rules", "cuda_rules"},
    "reference": BASE | {"formats"},
    "lottery": BASE | {"tickets"},
    "packed": BASE | {"formats", "extension"},
    "extension": BASE | {"registry", "_C", "_C_cuda"},
    "ops": DATA | {"extension"},
    "neighbours": BASE | {"extension"},
    "facts": DATA | {"cuda_rules", "packed", "ops"},
    "moving": DATA | {"cuda_rules", "packed", "ops", "facts"},
    "nn": DATA | {"packed", "ops", "facts", "moving"},
    "semi_structured": {"plan", "facts"},
    **{unit: set[str]() for unit in ("cpu", "cpu_timer", "cuda_timer", "fuse", "graph_text")},
    "tune_cache": {"tickets"},
    "packed_rows": {"shapes"},
    "candidate_calls": LAYER | {"cpu_timer", "neighbours", "packed_rows"},
    "tune": LAYER
    | {"candidate_calls", "cpu_timer", "cuda_timer", "extension", "image_rules", "neighbours"}
    | {"cpu", "packed_rows", "tune_cache"},
    "conversion": LAYER | {"shapes", "tune"},
    "explanation": LAYER | {"conversion"},
    "layers": {"fuse", "shelf"},
    "builder": {"extension"},
    "few_channels": LAYER | {"rules", "neighbours"},
    "emit": LAYER | {"builder", "emit_views", "extension", "few_channels", "fuse", "neighbours"},
    **{unit: {"builder", "fuse"} for unit in ("affine", "emit_views")},
    "native": {"builder", "emit", "emit_views", "extension", "fuse"},
    "prepacked": {"builder", "fuse", "shapes"},
    "samples": {"native", "shapes"},
    "shape_rules": {"builder"},
    "shapes": {"shape_rules"},
    "images": {"samples"},
    "lowering": LAYER
    | {"packed_rows", "shelf", "tune"}
    | {"affine", "conversion", "explanation", "builder", "fuse", "layers", "pooling", "shapes"},
    "pooling": BASE | {"fuse"},
    "shelf": {"shapes", "tickets"},
    "profiling": BASE | {"builder", "explanation", "native", "tickets"},
    "portable": LAYER | {"capture", "family", "graph_text", "images", "shelf", "tune"},
    **dict.fromkeys(("capture", "cuda_graph"), BASE),
    "planned": {"builder", "cuda_graph", "lowering", "native", "plan", "samples"},
    "family": {
        "builder",
        "capture",
        "cpu",
        "cuda_graph",
        "explanation",
        "images",
        "lowering",
        "native",
    }
    | {"plan", "planned", "prepacked", "samples", "shapes", "shelf", "tune"},
    "dynamo": BASE | {"cuda_graph", "tune", "explanation", "lowering", "native"},
    "program": WHOLE_MODEL - {"program"},
    "measure": WHOLE_MODEL | {"cpu_timer", "extension", "reference", "sparselt"},
    "quickstart": EVERYTHING,
    "frontier": EVERYTHING,
    "cli": EVERYTHING | {"frontier", "quickstart"},
    "__main__": {"cli"},
}

FORBIDDEN_STEMS = {"common", "helpers", "misc", "util", "utils"}
LINES_PER_CXX_FILE = 300
LINES_PER_PYTHON_FILE = 400
LINES_PER_FUNCTION = 60
PUBLIC_NAMES = 40
IMPORT_SECONDS = 0.3
CXX_SUFFIXES = {".cpp", ".h", ".cu", ".cuh", ".inc"}
# Plain C headers: everything else brings inline functions that the linker may keep for CPUs that
# lack the instruction set they were compiled for.
KERNEL_HEADERS = {"arm_neon.h", "immintrin.h", "stddef.h", "stdint.h"}

# Where the kernels of an instruction set are built; those of others are built everywhere.
X86_64 = ("x86_64", "AMD64")
MACHINES = {"avx2": X86_64, "avx512": X86_64, "neon": ("aarch64", "arm64")}


def project_files() -> list[Path]:
    """The files of the project as git sees them; in an unpacked sdist, those of the layout."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listing.returncode == 0 and listing.stdout:
        names = listing.stdout.rstrip("\0").split("\0")
        return [ROOT / name for name in names if (ROOT / name).is_file()]
    folders = [ROOT / name for name in ALLOWED if (ROOT / name).is_dir()]
    top = [path for path in ROOT.iterdir() if path.is_file()]
    return top + [path for folder in folders for path in folder.rglob("*") if path.is_file()]


def python_files() -> list[Path]:
    return [path for path in project_files() if path.suffix == ".py"]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def number_of_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def imported_units(path: Path) -> Iterator[tuple[int, str]]:
    """Yields (line, unit) for each import of a part of sparselt, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            whole = module == "sparselt"
            names = [f"sparselt.{alias.name}" for alias in node.names] if whole else [module]
            assert node.level == 0, f"{relative(path)}:{node.lineno} imports relatively"
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "sparselt":
                yield node.lineno, parts[1] if len(parts) > 1 else "sparselt"


def registered_kernels() -> list[tuple[str, str, str, str]]:
    """(name, op, format, device) of each line of kernels.inc."""
    pattern = re.compile(r"^KERNEL\((\w+), (\w+), (\w+), (\w+),", re.MULTILINE)
    return pattern.findall((CSRC / "kernels.inc").read_text(encoding="utf-8"))


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the end, docstring not counted: it may be as long as it helps."""
    total = (function.end_lineno or function.lineno) - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function, clean=False) is not None:
        total -= (first.end_lineno or first.lineno) - first.lineno + 1
    return total


def test_top_level_holds_what_the_design_says_and_nothing_else() -> None:
    found = {path.relative_to(ROOT).parts[0] for path in project_files()}
    assert found >= REQUIRED, f"missing: {sorted(REQUIRED - found)}"
    assert found <= ALLOWED, f"not in the layout: {sorted(found - ALLOWED)}"


def test_imports_run_one_way() -> None:
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        unit = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if unit == "__init__":
            continue
        assert unit in MAY_IMPORT, f"{relative(path)}: give its layer a line in MAY_IMPORT"
        allowed = MAY_IMPORT[unit] | {unit}
        wrong += [
            f"{relative(path)}:{line} imports {target}"
            for line, target in imported_units(path)
            if target not in allowed and not target.startswith("__")
        ]
    assert not wrong, "\n".join(wrong)


def test_layer_table_has_no_cycle() -> None:
    order: list[str] = []
    waiting = {unit: set(needs) & MAY_IMPORT.keys() for unit, needs in MAY_IMPORT.items()}
    while waiting:
        ready = [unit for unit, needs in waiting.items() if needs <= set(order)]
        assert ready, f"these import each other: {sorted(waiting)}"
        order += ready
        waiting = {unit: needs for unit, needs in waiting.items() if unit not in ready}


def test_files_and_functions_stay_within_their_budgets() -> None:
    over = []
    for path in project_files():
        limit = LINES_PER_PYTHON_FILE if path.suffix == ".py" else LINES_PER_CXX_FILE
        if path.suffix in CXX_SUFFIXES | {".py"} and number_of_lines(path) > limit:
            over.append(f"{relative(path)}: {number_of_lines(path)} lines, at most {limit}")
    for path in python_files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = code_lines(node)
                if lines > LINES_PER_FUNCTION:
                    where = f"{relative(path)}:{node.lineno} {node.name}"
                    over.append(f"{where}: {lines} lines, at most {LINES_PER_FUNCTION}")
    assert not over, "\n".join(over)


def test_public_names_are_few_and_exist() -> None:
    import sparselt

    assert len(sparselt.__all__) <= PUBLIC_NAMES
    missing = [name for name in sparselt.__all__ if not hasattr(sparselt, name)]
    assert not missing
    assert set(sparselt.__all__) <= set(dir(sparselt))


def test_every_module_lists_its_public_names() -> None:
    silent = []
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assigned = {
            target.id
            for node in tree.body
            if isinstance(node, ast.Assign | ast.AnnAssign)
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
            if isinstance(target, ast.Name)
        }
        if path.name != "__main__.py" and "__all__" not in assigned:
            silent.append(relative(path))
    assert not silent, f"no __all__ in {silent}"


def test_no_file_is_a_drawer() -> None:
    drawers = [
        relative(path)
        for path in project_files()
        if FORBIDDEN_STEMS & {part.split(".")[0] for part in path.relative_to(ROOT).parts}
    ]
    assert not drawers, f"name these by their purpose: {drawers}"


def test_each_registered_kernel_is_one_file_and_each_file_is_registered() -> None:
    lines = registered_kernels()
    names = [name for name, *_ in lines]
    assert len(set(names)) == len(names), "a kernel is registered twice"
    files = {path.stem: "cpu" for path in CSRC.glob("cpu/*.cpp")}
    files |= {path.stem: "cuda" for path in CSRC.glob("cuda/*.cu")}
    assert {name: device for name, _, _, device in lines} == files


def test_each_kernel_has_one_name() -> None:
    for name, op, sparse_format, device in registered_kernels():
        assert name.startswith(f"{sparse_format}_{op}_"), name
        source = CSRC / device / (name + (".cu" if device == "cuda" else ".cpp"))
        text = source.read_text(encoding="utf-8")
        assert re.search(rf"\b{name}\(", text), f"{relative(source)} does not define {name}"


def test_cpu_kernels_include_neither_torch_nor_the_standard_library() -> None:
    wrong = []
    for path in sorted([*CSRC.glob("cpu/*"), CSRC / "kernels.h"]):
        for header in re.findall(r"#include <([^>]+)>", path.read_text(encoding="utf-8")):
            if header not in KERNEL_HEADERS:
                wrong.append(f"{relative(path)} includes <{header}>")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("source", sorted(CSRC.glob("cpu/*.cpp")), ids=lambda path: path.stem)
def test_cpu_kernels_have_no_weak_symbols(source: Path, tmp_path: Path) -> None:
    # A weak symbol of an AVX2 unit may be the copy that the linker keeps for everybody.
    for tool in ("c++", "nm"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    compiled = tmp_path / "kernel.o"
    command = ["c++", "-c", "-O2", "-std=c++20", "-fPIC", f"-I{CSRC}", str(source)]
    subprocess.run([*command, "-o", str(compiled)], check=True)
    listing = subprocess.run(["nm", compiled], capture_output=True, text=True, check=True).stdout
    weak = [line for line in listing.splitlines() if re.search(r" [WwVvu] ", line)]
    defined = [line for line in listing.splitlines() if re.search(rf" T .*{source.stem}", line)]
    assert not weak, "\n".join(weak)
    machines = MACHINES.get(source.stem.rsplit("_", 1)[1])
    built_here = machines is None or platform.machine() in machines
    assert bool(defined) == built_here, f"{source.stem}: defined in its own object: {defined}"


def test_source_files_carry_their_licence() -> None:
    kinds = CXX_SUFFIXES | {".py", ".pyi", ".toml", ".yaml"}
    names = {".clang-format", "Makefile", "run"}
    bare = [
        relative(path)
        for path in project_files()
        if (path.suffix in kinds or path.name in names)
        and "SPDX-License-Identifier: Apache-2.0" not in path.read_text(encoding="utf-8")[:200]
    ]
    assert not bare, f"no SPDX line in {bare}"


def test_no_file_names_a_path_of_one_machine() -> None:
    pattern = re.compile(r"(?<![\w.~<-])/(?:work|root|home|Users|mnt|tmp/w)/\w")
    found = []
    for path in project_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if pattern.search(line):
                found.append(f"{relative(path)}:{number}")
    assert not found, "\n".join(found)


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_import_is_cheap() -> None:
    code = (
        "import time, torch; start = time.process_time(); import sparselt; "
        "print(time.process_time() - start)"
    )
    # Processor time, and one good run of five: the machine may be busy with other tests.
    measured: list[float] = []
    while len(measured) < 5 and min(measured, default=IMPORT_SECONDS) >= IMPORT_SECONDS:
        measured.append(float(run_python(code)))
    assert min(measured) < IMPORT_SECONDS, measured


def test_import_leaves_heavy_packages_alone() -> None:
    heavy = ["matplotlib", "onnxruntime", "rich", "scipy", "sklearn", "torch._dynamo"]
    code = (
        f"import sys, torch; before = set(sys.modules); import sparselt; "
        f"print([name for name in {heavy} if name in sys.modules and name not in before])"
    )
    assert run_python(code) == "[]"


def test_python_files_parse_on_the_oldest_supported_version() -> None:
    for path in python_files():
        ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10))


def test_extension_suits_this_python() -> None:
    from sparselt import _C

    assert _C.__file__.endswith(sysconfig.get_config_var("EXT_SUFFIX"))
