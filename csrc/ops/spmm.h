// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "ops/task.h"
#include "ops/weight.h"

namespace sparselt {

// y (M, N) = clamp(W x (K, N) + bias + residual) for contiguous matrices.
TaskPointer make_spmm_task(const Team& team, const Weight& weight, int64_t columns,
                           const Epilogue& epilogue);

// y (N, M) = clamp(x (N, K) W^T + bias + residual) for contiguous matrices.
TaskPointer make_linear_task(const Team& team, const Weight& weight, int64_t batch,
                             const Epilogue& epilogue);

}  // namespace sparselt
