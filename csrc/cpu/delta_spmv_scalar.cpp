// SPDX-License-Identifier: Apache-2.0
//
// y = clamp(W x + bias + residual) with few columns for W in slices of values and deltas: the
// teaching version, for slices of any height, and the fallback. As sell_spmv_scalar.cpp, but that a
// column is the one before and a byte more.
#include "cpu/spmv_scalar.h"

namespace sparselt::cpu {
namespace {

void multiply_row(const SpmvCall& call, const float* x, int64_t slice, int64_t lane,
                  float (&sum)[kMaxSpmvColumns]) {
  const SellView& w = call.weight;
  int64_t column = 0;
  for (int64_t step = w.slice_steps[slice]; step < w.slice_steps[slice + 1]; ++step) {
    const int64_t at = step * w.slice_height + lane;
    column += w.deltas[at];
    if (w.deltas[at] == kJump) continue;
    const float* x_row = x + column * call.lanes;
    for (int64_t n = 0; n < call.columns; ++n) sum[n] += w.values[at] * x_row[n];
  }
}

}  // namespace

void delta_spmv_scalar(const SpmvCall& call, Range sections) {
  multiply_sections<multiply_row>(call, sections);
}

}  // namespace sparselt::cpu
