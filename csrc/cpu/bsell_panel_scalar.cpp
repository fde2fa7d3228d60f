// SPDX-License-Identifier: Apache-2.0
//
// A panel of y = clamp(W x + bias + residual) for W in rows of blocks, cut into blocks of columns:
// the teaching version, and the fallback.
//
// As sell_panel_scalar.cpp, but that the rows of a slice share the column of each step.
#include "cpu/panel_scalar.h"

namespace sparselt::cpu {
namespace {

void multiply_row(const PanelCall& call, const XBlock& x, int64_t slice, int64_t lane,
                  float* products) {
  const SellView& w = call.weight;
  for (int64_t step = w.slice_steps[slice]; step < w.slice_steps[slice + 1]; ++step) {
    add_product(call, x, w.values[step * w.slice_height + lane], w.columns[step], products);
  }
}

}  // namespace

void bsell_panel_scalar(const PanelCall& call, Range sections) {
  multiply_panel<multiply_row>(call, sections);
}

}  // namespace sparselt::cpu
