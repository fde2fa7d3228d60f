// SPDX-License-Identifier: Apache-2.0
#include "ops/run_task.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>

#include "ops/check.h"

namespace sparselt {
namespace {

// Below this many multiply-adds a second thread costs more (about 10 us to wake and join) than it
// saves.
constexpr int64_t kSerialWork = 1 << 18;

// The scratch of a small layer fits here, which saves it an allocation.
constexpr int64_t kStackFloats = 4096;

}  // namespace

Team torch_team() { return {int64_t{torch::stable::get_num_threads()}, kSerialWork}; }

void run_task(const Task& task, const float* x, const float* residual, float* y) {
  STD_TORCH_CHECK(
      !residual || residual != y || task.may_overwrite_residual(),
      "out: expected memory of its own, got that of the residual, which this kernel may "
      "read again; pass another tensor");
  const int64_t stages = task.stages();
  const int64_t shared = whole_lines(task.shared_floats());
  const int64_t own = whole_lines(task.own_floats());
  int64_t most_parts = 1;
  for (int64_t stage = 0; stage < stages; ++stage) {
    most_parts = std::max(most_parts, task.parts(stage));
  }
  const int64_t floats = shared + own * most_parts;
  alignas(64) float on_stack[kStackFloats];
  std::optional<Tensor> held;
  if (floats > kStackFloats) held = new_output({floats});
  float* scratch = held ? float_data(*held) : on_stack;
  for (int64_t stage = 0; stage < stages; ++stage) {
    const auto run = [&](int64_t begin, int64_t end) {
      const Operands operands{x, residual, y, scratch, scratch + shared + own * begin};
      for (int64_t part = begin; part < end; ++part) task.run(stage, part, operands);
    };
    const int64_t parts = task.parts(stage);
    if (parts == 1) {
      run(0, 1);
    } else {
      torch::stable::parallel_for(0, parts, 1, run);
    }
  }
}

}  // namespace sparselt
