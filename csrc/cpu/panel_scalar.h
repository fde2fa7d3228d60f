// SPDX-License-Identifier: Apache-2.0
//
// What the scalar panel kernels share: the copy of x into the scratch, the walk over blocks and
// slices, and the way of finished sums to y.
#pragma once

#include "kernels.h"

namespace sparselt::cpu {
namespace {

constexpr int kPieceLanes = 16;
constexpr int kMaxVectors = 4;  // of a panel: the kernels' tile_columns
constexpr int kMaxWidth = kMaxVectors * kPieceLanes;

// A block of x: row c of vector v is the 16 floats at vectors[v] + c * kPieceLanes.
struct XBlock {
  const float* vectors[kMaxVectors];
};

void load_piece(const Piece& piece, const float* base, float* to) {
  for (int lane = 0; lane < kPieceLanes; ++lane) {
    if (piece.mask >> lane & 1) to[lane] = base[piece.offset + lane];
  }
}

// Rows [first, last) of x for this panel into the scratch.
void copy_block(const PanelCall& call, int64_t first, int64_t last) {
  const Panel& panel = call.panel;
  const int64_t stride = (call.weight.block_cols + 1) * kPieceLanes;
  float* to = call.x_block;
  for (int64_t k = first; k < last; ++k, to += kPieceLanes) {
    const int64_t tap = k % panel.taps;
    const float* base = panel.x + k / panel.taps * panel.channel_stride;
    for (int v = 0; v < panel.vectors; ++v) {
      for (int lane = 0; lane < kPieceLanes; ++lane) to[v * stride + lane] = 0.0f;
      load_piece(panel.loads[tap * panel.vectors + v], base, to + v * stride);
    }
    for (int32_t e = panel.tap_extra[tap]; e < panel.tap_extra[tap + 1]; ++e) {
      const Piece& piece = panel.extra_loads[e];
      load_piece(piece, base, to + piece.vector * stride);
    }
  }
}

// Block `block` of this panel's x: where it lies, or copied.
XBlock x_of_block(const PanelCall& call, int64_t block) {
  const SellView& w = call.weight;
  const Panel& panel = call.panel;
  XBlock x{};
  if (!panel.loads) {
    const float* at = panel.x + block * panel.x_block_stride;
    for (int v = 0; v < call.panel.vectors; ++v) x.vectors[v] = at + panel.x_places[v];
    return x;
  }
  const int64_t first = block * w.block_cols;
  const int64_t last = first + w.block_cols < w.cols ? first + w.block_cols : w.cols;
  copy_block(call, first, last);
  for (int v = 0; v < call.panel.vectors; ++v)
    x.vectors[v] = call.x_block + v * (w.block_cols + 1) * kPieceLanes;
  return x;
}

int64_t place_of_row(const PanelRows& rows, int64_t m) {
  return (m + static_cast<uint32_t>(m) / rows.period) * rows.stride;
}

// Adds value * (row `column` of x) to the products of all lanes.
void add_product(const PanelCall& call, const XBlock& x, float value, int64_t column,
                 float* products) {
  for (int v = 0; v < call.panel.vectors; ++v, products += kPieceLanes) {
    const float* data = x.vectors[v] + column * kPieceLanes;
    for (int lane = 0; lane < kPieceLanes; ++lane) products[lane] += value * data[lane];
  }
}

void store_row(const PanelCall& call, int64_t m) {
  const Panel& panel = call.panel;
  const Epilogue& e = call.epilogue;
  float* sums = call.sums + m * panel.vectors * kPieceLanes;
  for (int i = 0; e.residual && i < panel.residual_rows.num_pieces; ++i) {
    const Piece& piece = panel.residual_rows.pieces[i];
    const float* residual = e.residual + place_of_row(panel.residual_rows, m) + piece.offset;
    for (int lane = 0; lane < kPieceLanes; ++lane) {
      if (piece.mask >> lane & 1) sums[piece.vector * kPieceLanes + lane] += residual[lane];
    }
  }
  for (int i = 0; i < panel.y_rows.num_pieces; ++i) {
    const Piece& piece = panel.y_rows.pieces[i];
    float* y = panel.y + place_of_row(panel.y_rows, m) + piece.offset;
    for (int lane = 0; lane < kPieceLanes; ++lane) {
      if (!(piece.mask >> lane & 1)) continue;
      float sum = sums[piece.vector * kPieceLanes + lane];
      sum = sum < e.lower ? e.lower : sum;  // written so that a NaN stays a NaN
      y[lane] = sum > e.upper ? e.upper : sum;
    }
  }
}

// Adds the products of one row of a slice with a block of x.
using RowFunction = void (*)(const PanelCall& call, const XBlock& x, int64_t slice, int64_t lane,
                             float* products);

template <RowFunction kMultiply>
void multiply_panel(const PanelCall& call, Range sections) {
  const SellView& w = call.weight;
  const int64_t width = int64_t{call.panel.vectors} * kPieceLanes;
  for (int64_t block = 0; block < w.num_blocks; ++block) {
    const XBlock x = x_of_block(call, block);
    for (int64_t section = sections.begin; section < sections.end; ++section) {
      const int32_t* slices = w.block_slices + section * w.num_blocks + block;
      for (int64_t i = slices[0] * w.slice_height; i < slices[1] * w.slice_height; ++i) {
        const int64_t m = w.slice_rows[i];
        if (m < 0) continue;
        // A sum of its own for each block: one of all products would round away more.
        float products[kMaxWidth] = {};
        kMultiply(call, x, i / w.slice_height, i % w.slice_height, products);
        const float bias = call.epilogue.bias ? call.epilogue.bias[m] : 0.0f;
        float* sums = call.sums + m * width;
        for (int64_t lane = 0; lane < width; ++lane) {
          sums[lane] = (block > 0 ? sums[lane] : bias) + products[lane];
        }
        if (block + 1 == w.num_blocks) store_row(call, m);
      }
    }
  }
}

}  // namespace
}  // namespace sparselt::cpu
