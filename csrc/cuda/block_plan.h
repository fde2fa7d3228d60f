// SPDX-License-Identifier: Apache-2.0
//
// How a product with blocks is cut: computed on the CPU, from sizes alone, so that a result is the
// same on every device. Whoever makes a call asks how much workspace it may use.
#pragma once

#include <algorithm>

#include "cuda/calls.h"

namespace sparselt::cuda {

struct BlockPlan {
  int rows;        // of a tile of y
  int columns;     // of a tile of y
  int splits;      // parts of a block row's blocks; more than one: sums go through the workspace
  int64_t floats;  // of workspace
};

// Blocks of threads with which block rows stay whole, and which parts are made to reach.
constexpr int64_t kEnoughTiles = kMultiprocessors;
constexpr int64_t kWantedTiles = 2 * kMultiprocessors;
constexpr int64_t kLeastDepth = 256;  // columns of W' a part, below which parts cost more than gain
constexpr int64_t kMostSplits = 32;
constexpr int64_t kManyColumns = 1024;  // from which tiles may be wide

// `columns` of `batch` products or images, with channels last (x (N, K)) or not.
inline BlockPlan plan_blocks(const Weight& weight, int64_t columns, int64_t batch, size_t element,
                             bool channels_last) {
  const auto up = [](int64_t value, int64_t unit) { return (value + unit - 1) / unit; };
  BlockPlan plan{16, 128, 1, 0};
  const int most = element == 4 ? 64 : 128;
  while (plan.rows < most && plan.rows < weight.block_rows) plan.rows *= 2;
  const int64_t block_rows = up(weight.rows, weight.block_rows);
  const int64_t row_tiles = block_rows * up(weight.block_rows, plan.rows);
  const auto tiles = [&] { return row_tiles * up(columns, plan.columns) * batch; };
  const int64_t depth = block_rows == 0 ? 0 : weight.stored * weight.block_cols / block_rows;
  if (element == 2 && channels_last && plan.rows >= 64 && columns >= kManyColumns &&
      depth >= kDeepProduct) {
    plan.columns = 256;
    if (tiles() < kWantedTiles) plan.columns = 128;
  }
  if (tiles() == 0 || tiles() >= kEnoughTiles) return plan;
  const int64_t splits = std::min({up(kWantedTiles, tiles()), depth / kLeastDepth, kMostSplits});
  if (splits < 2) return plan;
  plan.splits = static_cast<int>(splits);
  plan.floats = splits * weight.rows * columns * batch;
  return plan;
}

// Products of up to so many columns with 16-byte pieces of W and x have kernels that need no tiles.
constexpr int64_t strip_columns(size_t element) { return element == 4 ? 8 : 16; }

inline bool is_channels_last(const SpmmCall& call) {
  return call.columns == 1 || call.x_column != 1 || call.y_column != 1;
}

inline int64_t workspace_floats(const SpmmCall& call, size_t element) {
  const Weight& w = call.weight;
  if (w.block_cols == 1 && (w.block_rows == 1 || w.block_rows % 4 == 0)) return 0;
  if (!is_channels_last(call))
    return plan_blocks(w, call.columns, call.batch, element, false).floats;
  if (call.columns * call.batch <= strip_columns(element) &&
      w.block_cols * static_cast<int64_t>(element) % 16 == 0)
    return 0;
  return plan_blocks(w, call.columns * call.batch, 1, element, true).floats;
}

inline int64_t workspace_floats(const Conv2dCall& call, size_t element) {
  return plan_blocks(call.weight, call.batch * call.out_height * call.out_width, 1, element, true)
      .floats;
}

}  // namespace sparselt::cuda
