// SPDX-License-Identifier: Apache-2.0
//
// What the spmv kernels of x86 for rows of blocks share, on top of slice_rows_avx2.h. The rows of a
// slice lie next to each other and share their columns, so nothing is gathered:
//
// With one column a lane is a row: a step is one multiply-add of the step's values with a
// broadcast of its x. With 2 to 8 columns a register holds a row's sums, a lane a column, and a
// step loads its row of x once for all its rows. Include inside the target region, after
// <immintrin.h>, cpu/target.h, kernels.h and the operations on wider registers.
#pragma once

#include "cpu/slice_rows_avx2.h"

namespace sparselt::cpu {
namespace {

// Registers of 4 or 8 rows; of 16 where there are such.
inline __m256 load_values(const float* at, __m256) { return _mm256_loadu_ps(at); }
inline __m128 load_values(const float* at, __m128) { return _mm_loadu_ps(at); }
inline void store_values(float* at, __m256 value) { _mm256_storeu_ps(at, value); }
inline void store_values(float* at, __m128 value) { _mm_storeu_ps(at, value); }

// `count` rows of y or of the residual, zeros behind them.
template <class V>
V load_rows(const float* from, int64_t count) {
  constexpr int64_t kRows = sizeof(V) / sizeof(float);
  if (count >= kRows) return load_values(from, V{});
  float rows[kRows] = {};
  for (int64_t r = 0; r < count; ++r) rows[r] = from[r];
  return load_values(rows, V{});
}

// Rows [m, m + lanes of V) of y, up to the last.
template <class V>
void store_rows(const SpmvCall& call, const BlockPlace& block, int64_t m, V sum) {
  constexpr int64_t kRows = sizeof(V) / sizeof(float);
  const Epilogue& e = call.epilogue;
  const int64_t count = call.weight.rows - m;
  const float* before = block.is_first ? e.bias : call.y;
  if (before) sum = add(sum, load_rows<V>(before + m, count));
  if (block.is_last && e.residual) sum = add(sum, load_rows<V>(e.residual + m, count));
  if (block.is_last) sum = clamp(sum, broadcast(e.lower, V{}), broadcast(e.upper, V{}));
  if (count >= kRows) return store_values(call.y + m, sum);
  float rows[kRows];
  store_values(rows, sum);
  for (int64_t r = 0; r < count; ++r) call.y[m + r] = rows[r];
}

// Even and odd steps have sums of their own, which hides the multiply-add's latency; in the same
// order whatever the number of columns, so that a column has the same bits in any company.
constexpr int kSums = 2;

// Where the chains of both end that begin at `step`.
inline int64_t chains_end(int64_t step, int64_t end) {
  return end - step > kSums * kChain ? step + kSums * kChain : end;
}

// Rows [first, first + lanes of V) of a slice with one column.
template <class V>
void multiply_block_column(const SpmvCall& call, const BlockPlace& block, int64_t slice,
                           int64_t first) {
  const SellView& w = call.weight;
  const int64_t last = w.slice_steps[slice + 1];
  V total = broadcast(0.0f, V{});
  int64_t step = w.slice_steps[slice];
  const float* values = w.values + step * w.slice_height + first;
  while (step < last) {
    const int64_t stop = chains_end(step, last);
    V sum[kSums] = {broadcast(0.0f, V{}), broadcast(0.0f, V{})};
    for (; step + kSums <= stop; step += kSums, values += kSums * w.slice_height) {
      prefetch(values, w.columns + step);
      SPARSELT_UNROLL
      for (int i = 0; i < kSums; ++i) {
        const V x = broadcast(block.x[w.columns[step + i]], V{});
        sum[i] = multiply_add(load_values(values + i * w.slice_height, V{}), x, sum[i]);
      }
    }
    for (; step < stop; ++step) {  // an odd last one
      const V x = broadcast(block.x[w.columns[step]], V{});
      sum[0] = multiply_add(load_values(values, V{}), x, sum[0]);
    }
    total = add(total, add(sum[0], sum[1]));
  }
  store_rows(call, block, w.slice_rows[slice * w.slice_height] + first, total);
}

// Rows [first, first + R) of a slice with up to as many columns as V has lanes.
template <int R, class V>
void multiply_block_columns(const SpmvCall& call, const BlockPlace& block, int64_t slice,
                            int64_t first) {
  constexpr int64_t kLanes = sizeof(V) / sizeof(float);
  const SellView& w = call.weight;
  const int64_t last = w.slice_steps[slice + 1];
  alignas(32) float totals[R * kLanes] = {};
  int64_t step = w.slice_steps[slice];
  const float* values = w.values + step * w.slice_height + first;
  while (step < last) {
    const int64_t stop = chains_end(step, last);
    V sum[kSums][R];
    SPARSELT_UNROLL
    for (int i = 0; i < kSums; ++i) {
      SPARSELT_UNROLL
      for (int r = 0; r < R; ++r) sum[i][r] = broadcast(0.0f, V{});
    }
    for (; step + kSums <= stop; step += kSums) {
      prefetch(values, w.columns + step);
      SPARSELT_UNROLL
      for (int i = 0; i < kSums; ++i, values += w.slice_height) {
        const V x_row = load_lanes(block.x + w.columns[step + i] * kLanes, V{});
        SPARSELT_UNROLL
        for (int r = 0; r < R; ++r) {
          sum[i][r] = multiply_add(broadcast(values[r], V{}), x_row, sum[i][r]);
        }
      }
    }
    for (; step < stop; ++step) {  // an odd last one
      const V x_row = load_lanes(block.x + w.columns[step] * kLanes, V{});
      SPARSELT_UNROLL
      for (int r = 0; r < R; ++r) {
        sum[0][r] = multiply_add(broadcast(values[r], V{}), x_row, sum[0][r]);
      }
    }
    SPARSELT_UNROLL
    for (int r = 0; r < R; ++r) {
      float* total = totals + r * kLanes;
      store_lanes(total, add(load_lanes(total, V{}), add(sum[0][r], sum[1][r])));
    }
  }
  const int32_t* rows = w.slice_rows + slice * w.slice_height + first;
  for (int r = 0; r < R && rows[r] >= 0; ++r) {
    store_row(call, block, rows[r], load_lanes(totals + r * kLanes, V{}));
  }
}

// A slice with 2 to 8 columns, R rows at a time.
template <int R>
void multiply_block_lanes(const SpmvCall& call, const BlockPlace& block, int64_t slice) {
  for (int64_t first = 0; first < call.weight.slice_height; first += R) {
    if (call.lanes == 4) {
      multiply_block_columns<R, __m128>(call, block, slice, first);
    } else {
      multiply_block_columns<R, __m256>(call, block, slice, first);
    }
  }
}

// `kMultiply` multiplies a slice.
template <SliceFunction kMultiply>
void multiply_block_sections(const SpmvCall& call, Range sections) {
  const SellView& w = call.weight;
  for (int64_t i = sections.begin * w.num_blocks; i < sections.end * w.num_blocks; ++i) {
    const BlockPlace block = block_place(call, i);
    for (int64_t slice = w.block_slices[i]; slice < w.block_slices[i + 1]; ++slice) {
      kMultiply(call, block, slice);
    }
  }
}

}  // namespace
}  // namespace sparselt::cpu
