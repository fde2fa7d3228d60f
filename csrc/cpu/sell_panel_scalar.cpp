// SPDX-License-Identifier: Apache-2.0
//
// A panel of y = clamp(W x + bias + residual) for W in sliced ELL with column blocks: the teaching
// version, for slices of any height, and the fallback. kernels.h says what a panel is.
//
// For each block of columns, the panel's part of x is copied into a scratch, lanes outside every
// piece as zeros; each stored value then adds value * (its row of the scratch) to the block's sums
// of its row of W, and those are added to the sums of all blocks, which begin with the bias. After
// the last block the sums get their residual and clamp on the way to y.
#include "cpu/panel_scalar.h"

namespace sparselt::cpu {
namespace {

void multiply_row(const PanelCall& call, const XBlock& x, int64_t slice, int64_t lane,
                  float* products) {
  const SellView& w = call.weight;
  for (int64_t step = w.slice_steps[slice]; step < w.slice_steps[slice + 1]; ++step) {
    const int64_t at = step * w.slice_height + lane;
    if (w.columns[at] == w.block_cols) break;
    add_product(call, x, w.values[at], w.columns[at], products);
  }
}

}  // namespace

void sell_panel_scalar(const PanelCall& call, Range sections) {
  multiply_panel<multiply_row>(call, sections);
}

}  // namespace sparselt::cpu
