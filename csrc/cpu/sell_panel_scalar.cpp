// SPDX-License-Identifier: Apache-2.0
//
// A panel of y = clamp(W x + bias + residual) for W in sliced ELL with column blocks: the teaching
// version, for slices of any height, and the fallback. kernels.h says what a panel is.
//
// For each block of columns, the panel's part of x is copied into a scratch, lanes outside every
// piece as zeros; each stored value then adds value * (its row of the scratch) to the sums of its
// row of W. After the last block the sums get their bias, residual and clamp on the way to y.
#include "kernels.h"

namespace sparselt::cpu {
namespace {

constexpr int kPieceLanes = 16;

void load_piece(const Piece& piece, const float* base, float* row) {
  for (int lane = 0; lane < kPieceLanes; ++lane) {
    if (piece.mask >> lane & 1) row[piece.vector * kPieceLanes + lane] = base[piece.offset + lane];
  }
}

void load_block(const Panel& panel, int64_t first, int64_t last, int64_t width, float* block) {
  for (int64_t k = first; k < last; ++k, block += width) {
    const int64_t tap = k % panel.taps;
    const float* base = panel.x + k / panel.taps * panel.channel_stride;
    for (int64_t lane = 0; lane < width; ++lane) block[lane] = 0.0f;
    for (int v = 0; v < panel.vectors; ++v) {
      load_piece(panel.loads[tap * panel.vectors + v], base, block);
    }
    for (int32_t e = panel.tap_extra[tap]; e < panel.tap_extra[tap + 1]; ++e) {
      load_piece(panel.extra_loads[e], base, block);
    }
  }
}

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

void store_row(const PanelCall& call, int64_t m, int64_t width) {
  const Panel& panel = call.panel;
  const Epilogue& e = call.epilogue;
  for (int i = 0; i < panel.num_stores; ++i) {
    const Piece& piece = panel.stores[i];
    for (int lane = 0; lane < kPieceLanes; ++lane) {
      if (!(piece.mask >> lane & 1)) continue;
      const int64_t at = m * panel.y_stride + piece.offset + lane;
      float sum = call.sums[m * width + piece.vector * kPieceLanes + lane];
      if (e.residual) sum += e.residual[at];
      sum = sum < e.lower ? e.lower : sum;  // written so that a NaN stays a NaN
      panel.y[at] = sum > e.upper ? e.upper : sum;
    }
  }
}

}  // namespace

void sell_panel_scalar(const PanelCall& call, Range sections) {
  const SellView& w = call.weight;
  const int64_t width = int64_t{call.panel.vectors} * kPieceLanes;
  for (int64_t block = 0; block < w.num_blocks; ++block) {
    const int64_t first = block * w.block_cols;
    const int64_t last = first + w.block_cols < w.cols ? first + w.block_cols : w.cols;
    load_block(call.panel, first, last, width, call.x_block);
    for (int64_t section = sections.begin; section < sections.end; ++section) {
      const int32_t* slices = w.block_slices + section * w.num_blocks + block;
      for (int64_t i = slices[0] * w.slice_height; i < slices[1] * w.slice_height; ++i) {
        const int32_t m = w.slice_rows[i];
        if (m < 0 || block > 0) continue;
        const float bias = call.epilogue.bias ? call.epilogue.bias[m] : 0.0f;
        for (int64_t lane = 0; lane < width; ++lane) call.sums[m * width + lane] = bias;
      }
      for (int64_t slice = slices[0]; slice < slices[1]; ++slice)
        multiply_slice(call, slice, width);
      for (int64_t i = slices[0] * w.slice_height; i < slices[1] * w.slice_height; ++i) {
        const int32_t m = w.slice_rows[i];
        if (m >= 0 && block + 1 == w.num_blocks) store_row(call, m, width);
      }
    }
  }
}

}  // namespace sparselt::cpu
