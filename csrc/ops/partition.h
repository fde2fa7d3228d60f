// SPDX-License-Identifier: Apache-2.0
//
// How a product is split into parts. Pure: kernels own whole elements of the result and sum each in
// stored order, so any split gives the same bits.
#pragma once

#include <algorithm>

#include "kernels.h"
#include "ops/task.h"

namespace sparselt {

// Columns are split in multiples of a cache line of floats, so that no two threads write the same
// line.
constexpr int64_t kColumnGrain = 16;

inline int64_t stored_rows(const SparseView& weight) {
  return (weight.rows + weight.block_rows - 1) / weight.block_rows;
}

inline int64_t stored_values(const SparseView& weight) {
  return weight.crow_indices[stored_rows(weight)] * weight.block_rows * weight.block_cols;
}

inline int64_t stored_values(const SellView& weight) {
  const int64_t slices = weight.block_slices[weight.num_sections * weight.num_blocks];
  return weight.slice_height * weight.slice_steps[slices];
}

// The `part`-th of `parts` ranges with about the same number of entries in each, of runs within
// [runs.begin, runs.end); run i has the entries from offsets[i] to offsets[i + 1].
inline Range balanced_runs(const int32_t* offsets, Range runs, int64_t part, int64_t parts) {
  const int64_t first = offsets[runs.begin];
  const int64_t count = offsets[runs.end] - first;
  const auto bound = [&](int64_t p) -> int64_t {
    if (p == 0) return runs.begin;
    if (p == parts) return runs.end;
    const int64_t entry = first + count * p / parts;
    return std::lower_bound(offsets + runs.begin, offsets + runs.end, entry) - offsets;
  };
  return {bound(part), bound(part + 1)};
}

inline Range balanced_rows(const SparseView& weight, Range rows, int64_t part, int64_t parts) {
  return balanced_runs(weight.crow_indices, rows, part, parts);
}

inline Range even_columns(int64_t columns, int64_t part, int64_t parts) {
  const int64_t grains = (columns + kColumnGrain - 1) / kColumnGrain;
  return {std::min(columns, grains * part / parts * kColumnGrain),
          std::min(columns, grains * (part + 1) / parts * kColumnGrain)};
}

// The `part`-th of `parts` ranges of about the same length.
inline Range even_range(int64_t count, int64_t part, int64_t parts) {
  return {count * part / parts, count * (part + 1) / parts};
}

// Parts for a stage that copies `items` of `floats` each: a second thread is worth waking for
// 64 KB.
inline int64_t copying_parts(const Team& team, int64_t items, int64_t floats) {
  constexpr int64_t kLeastFloats = 1 << 14;
  return std::clamp<int64_t>(items * floats / kLeastFloats, 1,
                             std::max<int64_t>(1, std::min(items, team.threads)));
}

// Shares a product out: for each item (an image and group, or the one matrix) some stored rows x
// [0, columns). `tile` is the kernel's tile width: columns are shared out while each thread keeps
// two tiles, rows otherwise.
class ProductSplit {
 public:
  ProductSplit(const Team& team, const SparseView& weight, int64_t items, int64_t columns,
               int64_t tile)
      : items_(items), columns_(columns) {
    threads_ = team.threads_for(stored_values(weight) * columns * items);
    if (threads_ == 1) {
      way_ = Way::kSerial;
    } else if (items >= 4 * threads_) {
      way_ = Way::kItems;
    } else {
      way_ = columns >= 2 * threads_ * tile ? Way::kColumns : Way::kRows;
    }
  }

  int64_t parts() const {
    if (way_ == Way::kSerial) return 1;
    return way_ == Way::kItems ? items_ : items_ * threads_;
  }

  // Calls run(item, rows, columns) for all that belongs to a part; rows_of(item) are its rows.
  template <class RowsOf, class Run>
  void visit(const SparseView& weight, int64_t part, const RowsOf& rows_of, const Run& run) const {
    const Range all{0, columns_};
    if (way_ == Way::kSerial) {
      for (int64_t item = 0; item < items_; ++item) run(item, rows_of(item), all);
      return;
    }
    if (way_ == Way::kItems) return run(part, rows_of(part), all);
    const int64_t item = part / threads_;
    const int64_t share = part % threads_;
    const bool by_columns = way_ == Way::kColumns;
    const Range rows =
        by_columns ? rows_of(item) : balanced_rows(weight, rows_of(item), share, threads_);
    const Range stretch = by_columns ? even_columns(columns_, share, threads_) : all;
    if (rows.begin < rows.end && stretch.begin < stretch.end) run(item, rows, stretch);
  }

 private:
  enum class Way { kSerial, kItems, kColumns, kRows };
  int64_t items_;
  int64_t columns_;
  int64_t threads_;
  Way way_;
};

}  // namespace sparselt
