// SPDX-License-Identifier: Apache-2.0
//
// y = clamp(W x + bias + residual): the teaching version of every CSR product, and the fallback for
// any CPU.
//
// A call owns rows [rows.begin, rows.end) and columns [columns.begin, columns.end) of y. It walks a
// row's stored values and adds value * (row col of x) to the row of y, so that all inner loops run
// along contiguous memory.
#include "kernels.h"

namespace sparselt::cpu {

void csr_spmm_scalar(const SpmmCall& call, Range rows, Range columns) {
  const SparseView& w = call.weight;
  const Epilogue& e = call.epilogue;
  for (int64_t m = rows.begin; m < rows.end; ++m) {
    float* y = call.y + m * call.y_stride;
    const float* residual = e.residual ? e.residual + m * call.y_stride : nullptr;
    for (int64_t n = columns.begin; n < columns.end; ++n) y[n] = e.bias ? e.bias[m] : 0.0f;
    for (int32_t i = w.crow_indices[m]; i < w.crow_indices[m + 1]; ++i) {
      const float value = w.values[i];
      const float* x = call.x + w.col_indices[i] * call.x_stride;
      for (int64_t n = columns.begin; n < columns.end; ++n) y[n] += value * x[n];
    }
    for (int64_t n = columns.begin; n < columns.end; ++n) {
      float sum = residual ? y[n] + residual[n] : y[n];
      sum = sum < e.lower ? e.lower : sum;  // written so that a NaN stays a NaN
      y[n] = sum > e.upper ? e.upper : sum;
    }
  }
}

}  // namespace sparselt::cpu
