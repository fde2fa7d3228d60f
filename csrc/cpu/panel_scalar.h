// SPDX-License-Identifier: Apache-2.0
//
// What the scalar panel kernels share: the copy of x into the scratch, the walk over blocks and
// slices, and the way of finished sums to y.
#pragma once

#include "kernels.h"

namespace sparselt::cpu {
namespace {

constexpr int kPieceLanes = 16;
constexpr int kMaxWidth = 64;  // the kernels' tile_columns

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

// Adds the products of one row of a slice with the block of x, `width` lanes each.
using RowFunction = void (*)(const PanelCall& call, int64_t slice, int64_t lane, int64_t width,
                             float* products);

template <RowFunction kMultiply>
void multiply_panel(const PanelCall& call, Range sections) {
  const SellView& w = call.weight;
  const int64_t width = int64_t{call.panel.vectors} * kPieceLanes;
  for (int64_t block = 0; block < w.num_blocks; ++block) {
    const int64_t first = block * w.block_cols;
    const int64_t last = first + w.block_cols < w.cols ? first + w.block_cols : w.cols;
    load_block(call.panel, first, last, width, call.x_block);
    for (int64_t section = sections.begin; section < sections.end; ++section) {
      const int32_t* slices = w.block_slices + section * w.num_blocks + block;
      for (int64_t i = slices[0] * w.slice_height; i < slices[1] * w.slice_height; ++i) {
        const int64_t m = w.slice_rows[i];
        if (m < 0) continue;
        // A sum of its own for each block: one of all products would round away more.
        float products[kMaxWidth] = {};
        kMultiply(call, i / w.slice_height, i % w.slice_height, width, products);
        const float bias = call.epilogue.bias ? call.epilogue.bias[m] : 0.0f;
        float* sums = call.sums + m * width;
        for (int64_t lane = 0; lane < width; ++lane) {
          sums[lane] = (block > 0 ? sums[lane] : bias) + products[lane];
        }
        if (block + 1 == w.num_blocks) store_row(call, m, width);
      }
    }
  }
}

}  // namespace
}  // namespace sparselt::cpu
