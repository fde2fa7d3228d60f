// SPDX-License-Identifier: Apache-2.0
//
// What the scalar spmv kernels share: for each section, its blocks one after the other. A slice's
// rows begin with their bias or, in a later block, with what the earlier blocks left in y; residual
// and clamp follow in the last block.
#pragma once

#include "kernels.h"

namespace sparselt::cpu {
namespace {

void finish_row(const SpmvCall& call, const float (&sum)[kMaxSpmvColumns], int64_t m) {
  const Epilogue& e = call.epilogue;
  for (int64_t n = 0; n < call.columns; ++n) {
    const int64_t at = m * call.y_row_stride + n * call.y_column_stride;
    float value = sum[n];
    if (e.residual) value += e.residual[at];
    value = value < e.lower ? e.lower : value;  // written so that a NaN stays a NaN
    call.y[at] = value > e.upper ? e.upper : value;
  }
}

// Adds the products of one row of a slice to its sums.
using RowFunction = void (*)(const SpmvCall& call, const float* x, int64_t slice, int64_t lane,
                             float (&sum)[kMaxSpmvColumns]);

template <RowFunction kMultiply>
void multiply_sections(const SpmvCall& call, Range sections) {
  const SellView& w = call.weight;
  for (int64_t i = sections.begin * w.num_blocks; i < sections.end * w.num_blocks; ++i) {
    const int64_t block = i % w.num_blocks;
    const float* x = call.x + block * call.block_stride;
    for (int64_t place = w.block_slices[i] * w.slice_height;
         place < w.block_slices[i + 1] * w.slice_height; ++place) {
      const int64_t m = w.slice_rows[place];
      if (m < 0) continue;
      float* y = call.y + m * call.y_row_stride;
      float sum[kMaxSpmvColumns] = {};
      for (int64_t n = 0; n < call.columns; ++n) {
        if (block > 0)
          sum[n] = y[n * call.y_column_stride];
        else if (call.epilogue.bias)
          sum[n] = call.epilogue.bias[m];
      }
      kMultiply(call, x, place / w.slice_height, place % w.slice_height, sum);
      if (block + 1 == w.num_blocks) {
        finish_row(call, sum, m);
        continue;
      }
      for (int64_t n = 0; n < call.columns; ++n) y[n * call.y_column_stride] = sum[n];
    }
  }
}

}  // namespace
}  // namespace sparselt::cpu
