// SPDX-License-Identifier: Apache-2.0
//
// How K is cut for products with so few rows and columns that their tiles would leave most of a GPU
// idle: computed from sizes alone, so that a sum has the same order on every device.
#pragma once

#include <string_view>

#include "cuda/block_plan.h"

namespace sparselt::cuda {

// The most rows and columns of y that a block of threads makes, and the columns of W, a panel, that
// are never cut.
struct Cut {
  int64_t rows;
  int64_t columns;
  int64_t panel;
  int64_t blocks = kMultiprocessors;  // that are to run at once
};

constexpr int64_t kTile8Columns = 8;

__host__ __device__ inline Cut tile8_cut(const Weight& weight) {
  return {weight.block_rows, kTile8Columns, weight.block_cols};
}

// A block of threads has four slices of 32 rows, and a multiprocessor room for two blocks.
__host__ __device__ inline Cut patch8_cut() { return {128, 64, 256, 2 * kMultiprocessors}; }
__host__ __device__ inline Cut bitmask_cut() { return {128, 16, 256, 2 * kMultiprocessors}; }

// The pieces of whole panels that give most multiprocessors a block of threads; 1 where the tiles
// of y do, or where there is no workspace for partial sums.
__host__ __device__ inline int64_t pieces_of(const SpmmCall& call, const Cut& cut) {
  constexpr int64_t kLeastPanels = 4;  // a piece
  const auto up = [](int64_t value, int64_t unit) { return (value + unit - 1) / unit; };
  const int64_t tiles = up(call.weight.rows, cut.rows) * up(call.columns, cut.columns) * call.batch;
  if (tiles == 0) return 1;
  const int64_t wanted = cut.blocks / tiles;
  const int64_t most = up(call.weight.cols, cut.panel) / kLeastPanels;
  const int64_t pieces = wanted < most ? wanted : most;
  return pieces < 1 ? 1 : pieces;
}

// What a product by a kernel of `format` may use of workspace; `element` is the size of its type.
inline int64_t workspace_floats(std::string_view format, const SpmmCall& call, size_t element) {
  if (format == "bsr") return workspace_floats(call, element);
  if (format != "tile8" && format != "patch8" && format != "bitmask") return 0;
  const Cut cut = format == "tile8"    ? tile8_cut(call.weight)
                  : format == "patch8" ? patch8_cut()
                                       : bitmask_cut();
  const int64_t pieces = pieces_of(call, cut);
  return pieces > 1 ? pieces * call.batch * call.weight.rows * call.columns : 0;
}
inline int64_t workspace_floats(std::string_view format, const Conv2dCall& call, size_t element) {
  return format == "bsr_nhwc" ? workspace_floats(call, element) : 0;
}

}  // namespace sparselt::cuda
