// SPDX-License-Identifier: Apache-2.0
//
// y = clamp(W x + bias + residual) with few columns for W of one magnitude a row: the teaching
// version, for slices of any height, and the fallback. As sell_spmv_scalar.cpp, but that the row's
// magnitude is multiplied once, with the sum of what the columns find: x, or its negative.
#include "cpu/spmv_scalar.h"

namespace sparselt::cpu {
namespace {

void multiply_row(const SpmvCall& call, const float* x, int64_t slice, int64_t lane,
                  float (&sum)[kMaxSpmvColumns]) {
  const SellView& w = call.weight;
  float found[kMaxSpmvColumns] = {};
  for (int64_t step = w.slice_steps[slice]; step < w.slice_steps[slice + 1]; ++step) {
    const int64_t column = w.columns[step * w.slice_height + lane];
    if (column == w.block_cols) break;
    for (int64_t n = 0; n < call.columns; ++n) found[n] += x[column * call.lanes + n];
  }
  const float magnitude = w.values[w.slice_rows[slice * w.slice_height + lane]];
  for (int64_t n = 0; n < call.columns; ++n) sum[n] += magnitude * found[n];
}

}  // namespace

void sign_spmv_scalar(const SpmvCall& call, Range sections) {
  multiply_sections<multiply_row>(call, sections);
}

}  // namespace sparselt::cpu
