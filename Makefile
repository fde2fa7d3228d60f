# SPDX-License-Identifier: Apache-2.0
# Everything happens in a virtual environment of its own; PYTHON and VENV can be set.
PYTHON ?= python3
VENV ?= .venv
TEST_PROCESSES ?= 2
PYTEST_ARGS ?=
FUZZ_ARGS ?= --problems 100000 --seed 0
FUZZ_NETWORKS_ARGS ?= --problems 300

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
CXX ?= c++
CXX_FILES = $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)
SANITIZED := .sanitized

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-scalar test-sanitized fuzz bench lint format clean

help:  ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.installed  ## Find tickets on real digits, run them sparse, print the comparison, save the picture.
	$(BIN)/sparselt quickstart --out demo

test: $(VENV)/.installed  ## Run the tests that need neither GPU nor network.
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) $(PYTEST_ARGS)

test-scalar: $(VENV)/.installed  ## Run the tests with the portable kernels alone.
	SPARSELT_ISA=scalar $(BIN)/python -m pytest -n $(TEST_PROCESSES) $(PYTEST_ARGS)

# The sanitized module lives in a copy of the sources, so that the ordinary one stays as it is.
test-sanitized: $(VENV)/.installed  ## Run the tests of kernels and programs under Address- and UndefinedBehaviorSanitizer.
	mkdir -p $(SANITIZED)
	rm -rf $(addprefix $(SANITIZED)/,csrc sparselt tests)
	cp -pR setup.py pyproject.toml csrc sparselt tests $(SANITIZED)
	rm -f $(SANITIZED)/sparselt/_C*.so
	cd $(SANITIZED) && SPARSELT_SANITIZE=1 SPARSELT_CUDA=0 $(abspath $(BIN))/python setup.py --quiet build_ext --inplace
	cd $(SANITIZED) && PYTHONPATH=. PYTHONMALLOC=malloc \
	    LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	    $(abspath $(BIN))/python -m pytest -p no:cacheprovider tests/test_kernel*.py tests/test_ops*.py \
	    tests/test_native*.py tests/test_program_*.py $(PYTEST_ARGS)

fuzz: $(VENV)/.installed  ## Run random problems through every kernel, and random networks, against float64.
	$(BIN)/python tests/fuzz.py $(FUZZ_ARGS)
	$(BIN)/python tests/fuzz_networks.py $(FUZZ_NETWORKS_ARGS)

bench: $(VENV)/.installed  ## Time the kernels.
	$(BIN)/python -m pytest bench --benchmark-only $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev  ## Check format, style and types, as continuous integration does.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(VENV)/.installed-dev  ## Rewrite the sources in the project's format.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

clean:  ## Remove what was built; the virtual environment keeps its packages.
	rm -rf build dist *.egg-info $(SANITIZED) demo .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f sparselt/_C*.so $(VENV)/.installed $(VENV)/.installed-dev
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# Torch comes first and alone: the build then uses the torch it will run with, and pip is never
# tempted to fetch a second one into a build environment.
$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "sparselt needs Python >= 3.10; name one: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) "setuptools>=77" wheel ninja "pybind11>=2.13"
	touch $@

$(VENV)/.installed: $(VENV)/.torch setup.py pyproject.toml $(shell find csrc)
	PATH="$(abspath $(BIN)):$$PATH" $(PIP) --no-build-isolation --editable '.[demo,test]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	PATH="$(abspath $(BIN)):$$PATH" $(PIP) --no-build-isolation --editable '.[dev]'
	touch $@
