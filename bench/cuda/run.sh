#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Everything there is to run on a machine with a GPU, without network: builds both modules, runs the
# `cuda` tests, times the table of bench/cuda/cases.py into $OUT/<gpu>-cuda.json, and checks a small
# selection with compute-sanitizer.
#
#   bench/cuda/run.sh [build|test|bench|sanitize]...    all four, in this order, without arguments
#
# A stage that fails or runs out of its time does not keep the next from running, except the build;
# $OUT/run.txt says how each ended, and so does the exit status. The bench stage writes its file anew
# after every row, and goes on where a file in $OUT ends. Where a machine is lent for minutes, these
# fit in ten each; copy the file of the second into $OUT of the third:
#
#   bench/cuda/run.sh build test
#   BENCH_SECONDS=480 bench/cuda/run.sh build bench
#   BENCH_SECONDS=200 bench/cuda/run.sh build bench sanitize
#
# PYTHON names the interpreter that holds a CUDA build of torch, pybind11, ninja and pytest. SUITES
# limits what is timed, for example SUITES="exact decode". OUT is where results go. *_SECONDS limit
# the stages. PROCESSES is how many processes test and, with MAX_JOBS unset, compile.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PYTHON="${PYTHON:-python3}"
OUT="${OUT:-bench/results}"
PROCESSES="${PROCESSES:-$(nproc)}"
BUILD_SECONDS="${BUILD_SECONDS:-400}"
TEST_SECONDS="${TEST_SECONDS:-400}"
BENCH_SECONDS="${BENCH_SECONDS:-3000}"
SANITIZE_SECONDS="${SANITIZE_SECONDS:-300}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1
DEVICE_TESTS=(tests/test_cuda_device.py tests/test_cuda_device_api.py)
GRACE=30  # seconds in which the bench stage may end its last case

build() {
  # Native code for the GPU at hand alone: the default list of setup.py takes several times as long.
  local capability
  capability="$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')"
  if [[ "$capability" == 9.0 ]]; then capability=9.0a; fi
  MAX_JOBS="${MAX_JOBS:-$PROCESSES}" SPARSELT_CUDA=1 \
    TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-$capability}" timeout "$BUILD_SECONDS" \
    "$PYTHON" setup.py --quiet build_ext --inplace > "$OUT/build.txt" 2>&1
  local status=$?
  if [[ $status != 0 ]]; then tail -n 40 "$OUT/build.txt"; fi
  return $status
}

device_tests() {
  local parallel=()
  if "$PYTHON" -c 'import xdist' 2> /dev/null; then parallel=(-n "$((PROCESSES < 8 ? PROCESSES : 8))"); fi
  timeout "$TEST_SECONDS" "$PYTHON" -m pytest -q -p no:cacheprovider -m cuda "${parallel[@]}" \
    "${DEVICE_TESTS[@]}"
}

sanitize() {
  # A few cases of every kernel; each tool finds another kind of mistake.
  local tool failed=0
  for tool in memcheck racecheck synccheck; do
    echo "compute-sanitizer $tool"
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout "$((SANITIZE_SECONDS / 3))" \
      compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$PYTHON" -m pytest -q -p no:cacheprovider -m cuda "${DEVICE_TESTS[@]}" -k sanitizer
    local status=$?
    if [[ $status != 0 ]]; then echo "$tool: exit status $status (124: out of time)"; failed=$status; fi
  done
  return "$failed"
}

bench() {
  # Again while it says so (75): a kernel has broken the device's state, and the next one can go on.
  local end=$((SECONDS + BENCH_SECONDS)) status=75
  while [[ $status == 75 && $SECONDS -lt $end ]]; do
    timeout "$((end - SECONDS + GRACE))" "$PYTHON" -m bench.cuda.bench --out "$OUT" \
      --seconds "$((end - SECONDS))" ${SUITES:+--suite $SUITES}
    status=$?
  done
  return "$status"
}

if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "run.sh: $PYTHON has no torch that sees a GPU; name another interpreter with PYTHON" >&2
  exit 2
fi
mkdir -p "$OUT"
: > "$OUT/run.txt"
failed=0
for stage in ${@:-build test bench sanitize}; do
  case "$stage" in
    build | bench | sanitize) command="$stage" ;;
    test) command=device_tests ;;
    *) echo "run.sh: expected build, test, bench or sanitize, got '$stage'" >&2; exit 2 ;;
  esac
  began=$SECONDS
  "$command"
  status=$?
  case "$status" in
    0) said="passed" ;;
    124) said="out of time"; failed=1 ;;
    *) said="failed with exit status $status"; failed=1 ;;
  esac
  echo "$stage: $said after $((SECONDS - began)) s" | tee -a "$OUT/run.txt"
  if [[ "$stage" == build && $status != 0 ]]; then break; fi
done
exit "$failed"
