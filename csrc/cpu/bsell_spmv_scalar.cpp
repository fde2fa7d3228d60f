// SPDX-License-Identifier: Apache-2.0
//
// y = clamp(W x + bias + residual) with few columns for W in rows of blocks: the teaching version,
// and the fallback. As sell_spmv_scalar.cpp, but that the rows of a slice share their columns.
#include "cpu/spmv_scalar.h"

namespace sparselt::cpu {
namespace {

void multiply_row(const SpmvCall& call, const float* x, int64_t slice, int64_t lane,
                  float (&sum)[kMaxSpmvColumns]) {
  const SellView& w = call.weight;
  for (int64_t step = w.slice_steps[slice]; step < w.slice_steps[slice + 1]; ++step) {
    const float value = w.values[step * w.slice_height + lane];
    const float* x_row = x + w.columns[step] * call.lanes;
    for (int64_t n = 0; n < call.columns; ++n) sum[n] += value * x_row[n];
  }
}

}  // namespace

void bsell_spmv_scalar(const SpmvCall& call, Range sections) {
  multiply_sections<multiply_row>(call, sections);
}

}  // namespace sparselt::cpu
