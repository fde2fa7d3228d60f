// SPDX-License-Identifier: Apache-2.0
//
// A panel of y = clamp(W x + bias + residual) for W in sliced ELL with column blocks: the teaching
// version, for slices of any height, and the fallback. kernels.h says what a panel is.
//
// For each block of columns, the panel's part of x is copied into a scratch, lanes outside every
// piece as zeros; each stored value then adds value * (its row of the scratch) to the sums of its
// row of W. After the last block the sums get their bias, residual and clamp on the way to y.
#include "cpu/panel_scalar.h"

namespace sparselt::cpu {
namespace {

void multiply_slice(const PanelCall& call, int64_t slice, int64_t width) {
  const SellView& w = call.weight;
  const int64_t height = w.slice_height;
  for (int64_t step = w.slice_steps[slice]; step < w.slice_steps[slice + 1]; ++step) {
    for (int64_t r = 0; r < height; ++r) {
      const int32_t m = w.slice_rows[slice * height + r];
      const int64_t column = w.columns[step * height + r];
      if (m < 0 || column == w.block_cols) continue;
      const float value = w.values[step * height + r];
      for (int64_t lane = 0; lane < width; ++lane) {
        call.sums[m * width + lane] += value * call.x_block[column * width + lane];
      }
    }
  }
}

}  // namespace

void sell_panel_scalar(const PanelCall& call, Range sections) {
  multiply_panel<multiply_slice>(call, sections);
}

}  // namespace sparselt::cpu
