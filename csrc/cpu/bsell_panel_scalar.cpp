// SPDX-License-Identifier: Apache-2.0
//
// A panel of y = clamp(W x + bias + residual) for W in rows of blocks, cut into blocks of columns:
// the teaching version, and the fallback.
//
// As sell_panel_scalar.cpp, but that the rows of a slice share the column of each step.
#include "cpu/panel_scalar.h"

namespace sparselt::cpu {
namespace {

void multiply_slice(const PanelCall& call, int64_t slice, int64_t width) {
  const SellView& w = call.weight;
  const int64_t height = w.slice_height;
  for (int64_t step = w.slice_steps[slice]; step < w.slice_steps[slice + 1]; ++step) {
    const float* x = call.x_block + w.columns[step] * width;
    for (int64_t r = 0; r < height; ++r) {
      const int32_t m = w.slice_rows[slice * height + r];
      if (m < 0) continue;
      const float value = w.values[step * height + r];
      for (int64_t lane = 0; lane < width; ++lane) call.sums[m * width + lane] += value * x[lane];
    }
  }
}

}  // namespace

void bsell_panel_scalar(const PanelCall& call, Range sections) {
  multiply_panel<multiply_slice>(call, sections);
}

}  // namespace sparselt::cpu
