// SPDX-License-Identifier: Apache-2.0
//
// What the spmv kernels for bits and windows share: how a row's sum ends.
#pragma once

#include "kernels.h"

namespace sparselt::cpu {
namespace {

inline void store_sum(const SpmvCall& call, int64_t m, int64_t n, float sum) {
  const Epilogue& e = call.epilogue;
  const int64_t at = m * call.y_row_stride + n * call.y_column_stride;
  if (e.bias) sum += e.bias[m];
  if (e.residual) sum += e.residual[at];
  sum = sum < e.lower ? e.lower : sum;  // written so that a NaN stays a NaN
  call.y[at] = sum > e.upper ? e.upper : sum;
}

}  // namespace
}  // namespace sparselt::cpu
