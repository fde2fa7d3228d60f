// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "ops/check.h"

namespace sparselt {

// y (M, N) = clamp(W x (K, N) + bias + residual) for contiguous matrices, on torch's threads.
void run_spmm(const Weight& weight, const float* x, float* y, int64_t columns,
              const Epilogue& epilogue);

}  // namespace sparselt
