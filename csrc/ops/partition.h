// SPDX-License-Identifier: Apache-2.0
//
// How a product is split over torch's threads. Pure, but for the call of parallel_for: kernels own
// whole elements of the result and sum each in stored order, so any split gives the same bits.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "kernels.h"

namespace sparselt {

// Below this many multiply-adds a second thread costs more (about 10 us to wake and join) than it
// saves.
constexpr int64_t kSerialWork = 1 << 18;

// Columns are split in multiples of a cache line of floats, so that no two threads write the same
// line.
constexpr int64_t kColumnGrain = 16;

inline int64_t stored_rows(const SparseView& weight) {
  return (weight.rows + weight.block_rows - 1) / weight.block_rows;
}

// The `part`-th of `parts` row ranges with about the same number of stored values in each, within
// [rows.begin, rows.end).
inline Range balanced_rows(const SparseView& weight, Range rows, int64_t part, int64_t parts) {
  const int32_t* crow = weight.crow_indices;
  const int64_t first = crow[rows.begin];
  const int64_t count = crow[rows.end] - first;
  const auto bound = [&](int64_t p) -> int64_t {
    if (p == 0) return rows.begin;
    if (p == parts) return rows.end;
    return std::lower_bound(crow + rows.begin, crow + rows.end, first + count * p / parts) - crow;
  };
  return {bound(part), bound(part + 1)};
}

inline Range even_columns(int64_t columns, int64_t part, int64_t parts) {
  const int64_t grains = (columns + kColumnGrain - 1) / kColumnGrain;
  return {std::min(columns, grains * part / parts * kColumnGrain),
          std::min(columns, grains * (part + 1) / parts * kColumnGrain)};
}

// Calls run(item, rows, columns) so that together the calls cover, for each item (an image and
// group, or the one matrix), rows_of(item) x [0, columns). `tile` is the kernel's tile width:
// columns are shared out while each thread keeps two tiles, rows otherwise.
template <class RowsOf, class Run>
void parallel_product(const SparseView& weight, int64_t items, int64_t columns, int64_t tile,
                      const RowsOf& rows_of, const Run& run) {
  const int64_t stored =
      weight.crow_indices[stored_rows(weight)] * weight.block_rows * weight.block_cols;
  const int64_t threads = torch::stable::get_num_threads();
  const bool serial = threads == 1 || stored * columns * items < kSerialWork;
  if (serial || items >= 4 * threads) {
    const auto whole = [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) run(item, rows_of(item), Range{0, columns});
    };
    if (serial) return whole(0, items);
    return torch::stable::parallel_for(0, items, 1, whole);
  }
  const bool by_columns = columns >= 2 * threads * tile;
  torch::stable::parallel_for(0, items * threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t item = i / threads;
      const int64_t part = i % threads;
      const Range all = rows_of(item);
      const Range rows = by_columns ? all : balanced_rows(weight, all, part, threads);
      const Range stretch = by_columns ? even_columns(columns, part, threads) : Range{0, columns};
      if (rows.begin < rows.end && stretch.begin < stretch.end) run(item, rows, stretch);
    }
  });
}

}  // namespace sparselt
