// SPDX-License-Identifier: Apache-2.0
//
// y = clamp(W x + bias + residual) for W in blocks of block_rows x block_cols: the teaching version
// and the fallback.
//
// A call owns block rows [rows.begin, rows.end) and columns [columns.begin, columns.end) of y. Rows
// and columns of a block that stick out of the matrix are skipped: they have no x and no y.
#include "kernels.h"

namespace sparselt::cpu {

void bsr_spmm_scalar(const SpmmCall& call, Range rows, Range columns) {
  const SparseView& w = call.weight;
  const Epilogue& e = call.epilogue;
  for (int64_t block_row = rows.begin; block_row < rows.end; ++block_row) {
    for (int64_t r = 0; r < w.block_rows; ++r) {
      const int64_t m = block_row * w.block_rows + r;
      if (m >= w.rows) break;
      float* y = call.y + m * call.y_stride;
      const float* residual = e.residual ? e.residual + m * call.y_stride : nullptr;
      for (int64_t n = columns.begin; n < columns.end; ++n) y[n] = e.bias ? e.bias[m] : 0.0f;
      for (int64_t i = w.crow_indices[block_row]; i < w.crow_indices[block_row + 1]; ++i) {
        const float* values = w.values + (i * w.block_rows + r) * w.block_cols;
        const int64_t first = int64_t{w.col_indices[i]} * w.block_cols;
        for (int64_t c = 0; c < w.block_cols && first + c < w.cols; ++c) {
          const float* x = call.x + (first + c) * call.x_stride;
          for (int64_t n = columns.begin; n < columns.end; ++n) y[n] += values[c] * x[n];
        }
      }
      for (int64_t n = columns.begin; n < columns.end; ++n) {
        float sum = residual ? y[n] + residual[n] : y[n];
        sum = sum < e.lower ? e.lower : sum;  // written so that a NaN stays a NaN
        y[n] = sum > e.upper ? e.upper : sum;
      }
    }
  }
}

}  // namespace sparselt::cpu
