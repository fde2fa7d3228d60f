#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Everything there is to run on a machine with a GPU, without network: builds both modules, runs the
# `cuda` tests, checks a small selection with compute-sanitizer, times the table of bench/cuda/cases.py
# into bench/results/<gpu>-cuda.json.
#
#   bench/cuda/run.sh [build|test|sanitize|bench]...    all four without arguments
#
# PYTHON names the interpreter that holds a CUDA build of torch, pybind11, ninja and pytest. SUITES
# limits what is timed, for example SUITES="exact decode". OUT is where the results go.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PYTHON="${PYTHON:-python3}"
OUT="${OUT:-bench/results}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1
DEVICE_TESTS=(tests/test_cuda_device.py tests/test_cuda_device_api.py)

build() {
  # Native code for the GPU at hand alone: the default list of setup.py takes several times as long.
  local capability
  capability="$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')"
  if [[ "$capability" == 9.0 ]]; then capability=9.0a; fi
  SPARSELT_CUDA=1 TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-$capability}" \
    "$PYTHON" setup.py --quiet build_ext --inplace
}

device_tests() {
  "$PYTHON" -m pytest -p no:cacheprovider -m cuda "${DEVICE_TESTS[@]}" "$@"
}

sanitize() {
  # A few cases of every kernel; each tool finds another kind of mistake.
  local tool
  for tool in memcheck racecheck synccheck; do
    echo "compute-sanitizer $tool"
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$PYTHON" -m pytest -q -p no:cacheprovider -m cuda "${DEVICE_TESTS[@]}" -k sanitizer
  done
}

for step in "${@:-build test sanitize bench}"; do
  for one in $step; do
    case "$one" in
      build) build ;;
      test) device_tests ;;
      sanitize) sanitize ;;
      bench) "$PYTHON" -m bench.cuda.bench --out "$OUT" ${SUITES:+--suite $SUITES} ;;
      *) echo "run.sh: expected build, test, sanitize or bench, got '$one'" >&2; exit 2 ;;
    esac
  done
done
