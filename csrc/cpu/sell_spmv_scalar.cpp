// SPDX-License-Identifier: Apache-2.0
//
// y = clamp(W x + bias + residual) with few columns for W in sliced ELL: the teaching version, for
// slices of any height, and the fallback. kernels.h says how x is laid out, spmv_scalar.h how the
// weight is walked: each stored value adds value * (its lanes of x).
#include "cpu/spmv_scalar.h"

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

}  // namespace

void sell_spmv_scalar(const SpmvCall& call, Range sections) {
  multiply_sections<multiply_row>(call, sections);
}

}  // namespace sparselt::cpu
