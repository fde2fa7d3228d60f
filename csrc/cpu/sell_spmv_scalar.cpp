// SPDX-License-Identifier: Apache-2.0
//
// y = clamp(W x + bias + residual) with few columns for W in sliced ELL: the teaching version, for
// slices of any height, and the fallback. kernels.h says how x is laid out.
//
// For each section, its blocks one after the other: a slice's rows begin with their bias or, in a
// later block, with what the earlier blocks left in y; each stored value adds value * (its lanes of
// x). Residual and clamp follow in the last block.
#include "kernels.h"

namespace sparselt::cpu {
namespace {

void multiply_row(const SpmvCall& call, const float* x, int64_t slice, int64_t lane,
                  float (&sum)[kMaxSpmvColumns]) {
  const SellView& w = call.weight;
  for (int64_t step = w.slice_steps[slice]; step < w.slice_steps[slice + 1]; ++step) {
    const int64_t at = step * w.slice_height + lane;
    if (w.columns[at] == w.block_cols) break;
    const float* x_row = x + w.columns[at] * call.lanes;
    for (int64_t n = 0; n < call.columns; ++n) sum[n] += w.values[at] * x_row[n];
  }
}

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

}  // namespace

void sell_spmv_scalar(const SpmvCall& call, Range sections) {
  const SellView& w = call.weight;
  for (int64_t i = sections.begin * w.num_blocks; i < sections.end * w.num_blocks; ++i) {
    const int64_t block = i % w.num_blocks;
    const float* x = call.x + block * (w.block_cols + 1) * call.lanes;
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
      multiply_row(call, x, place / w.slice_height, place % w.slice_height, sum);
      if (block + 1 == w.num_blocks) {
        finish_row(call, sum, m);
        continue;
      }
      for (int64_t n = 0; n < call.columns; ++n) y[n * call.y_column_stride] = sum[n];
    }
  }
}

}  // namespace sparselt::cpu
