// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "ops/task.h"

namespace sparselt {

// Torch's threads as they are now, woken for each stage.
Team torch_team();

// Runs a task on torch's threads; scratch comes from torch's allocator, or the stack where little
// is needed.
void run_task(const Task& task, const float* x, const float* residual, float* y);

}  // namespace sparselt
