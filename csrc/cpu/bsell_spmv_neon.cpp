// SPDX-License-Identifier: Apache-2.0
//
// y = clamp(W x + bias + residual) with few columns for W in rows of blocks. kernels.h says how x
// is laid out. The rows of a slice lie next to each other and share their columns, so nothing is
// gathered:
//
// With one column a lane is a row: a step is a multiply-add of the step's values with one x for
// each 4 rows. With 2 to 8 columns the lanes are a row's columns, and a step loads its row of x
// once for 4 rows. Bound: 4 bytes a stored value and 2 a block, read once. Not timed on hardware
// yet.
#if defined(__aarch64__)
#include "cpu/spmv_neon.h"

namespace sparselt::cpu {
namespace {

constexpr int kTileRows = 4;

// Even and odd steps have sums of their own, which hides the multiply-add's latency; in the same
// order whatever the number of columns, so that a column has the same bits in any company.
constexpr int kSums = 2;

// Where the chains of both end that begin at `step`.
inline int64_t chains_end(int64_t step, int64_t end) {
  return end - step > kSums * kChain ? step + kSums * kChain : end;
}

// A slice of Q * 4 rows with one column.
template <int Q>
void multiply_column(const SpmvCall& call, const BlockPlace& block, int64_t slice) {
  const SellView& w = call.weight;
  const int64_t end = w.slice_steps[slice + 1];
  Lanes<Q> total = no_lanes<Q>();
  for (int64_t step = w.slice_steps[slice]; step < end;) {
    Lanes<Q> sum[kSums] = {no_lanes<Q>(), no_lanes<Q>()};
    const int64_t stop = chains_end(step, end);
    for (; step + kSums <= stop; step += kSums) {
      SPARSELT_UNROLL
      for (int i = 0; i < kSums; ++i) {
        const Lanes<Q> values = load_lanes<Q>(w.values + (step + i) * (Q * kLanes));
        sum[i] = multiply_add(sum[i], values, block.x[w.columns[step + i]]);
      }
    }
    for (; step < stop; ++step) {  // an odd last one
      const Lanes<Q> values = load_lanes<Q>(w.values + step * (Q * kLanes));
      sum[0] = multiply_add(sum[0], values, block.x[w.columns[step]]);
    }
    total = add(total, add(sum[0], sum[1]));
  }
  finish_rows(call, block, w.slice_rows + slice * (Q * kLanes), total);
}

// One step of kTileRows rows with up to Q * 4 columns.
template <int Q>
inline void add_step(const SpmvCall& call, const BlockPlace& block, int64_t step, int64_t first,
                     Lanes<Q> (&sum)[kTileRows]) {
  const SellView& w = call.weight;
  const Lanes<Q> x = load_lanes<Q>(block.x + int64_t{w.columns[step]} * (Q * kLanes));
  const float* values = w.values + step * w.slice_height + first;
  SPARSELT_UNROLL
  for (int r = 0; r < kTileRows; ++r) sum[r] = multiply_add(sum[r], x, values[r]);
}

// Rows [first, first + kTileRows) of a slice with up to Q * 4 columns.
template <int Q>
void multiply_columns(const SpmvCall& call, const BlockPlace& block, int64_t slice, int64_t first) {
  const SellView& w = call.weight;
  const int64_t end = w.slice_steps[slice + 1];
  float totals[kTileRows][Q * kLanes] = {};
  for (int64_t step = w.slice_steps[slice]; step < end;) {
    Lanes<Q> sum[kSums][kTileRows];
    SPARSELT_UNROLL
    for (int r = 0; r < kTileRows; ++r) sum[0][r] = sum[1][r] = no_lanes<Q>();
    const int64_t stop = chains_end(step, end);
    for (; step + kSums <= stop; step += kSums) {
      add_step(call, block, step, first, sum[0]);
      add_step(call, block, step + 1, first, sum[1]);
    }
    for (; step < stop; ++step) add_step(call, block, step, first, sum[0]);  // an odd last one
    SPARSELT_UNROLL
    for (int r = 0; r < kTileRows; ++r) {
      const Lanes<Q> total = add(load_lanes<Q>(totals[r]), add(sum[0][r], sum[1][r]));
      for (int i = 0; i < Q; ++i) vst1q_f32(totals[r] + i * kLanes, total.quad[i]);
    }
  }
  const int32_t* rows = w.slice_rows + slice * w.slice_height + first;
  for (int r = 0; r < kTileRows && rows[r] >= 0; ++r) {
    finish_columns(call, block, rows[r], load_lanes<Q>(totals[r]));
  }
}

void multiply_slice(const SpmvCall& call, const BlockPlace& block, int64_t slice) {
  const int64_t height = call.weight.slice_height;
  if (call.lanes > 1) {
    for (int64_t first = 0; first < height; first += kTileRows) {
      if (call.lanes == 4) {
        multiply_columns<1>(call, block, slice, first);
      } else {
        multiply_columns<2>(call, block, slice, first);
      }
    }
    return;
  }
  if (height == 4) return multiply_column<1>(call, block, slice);
  if (height == 8) return multiply_column<2>(call, block, slice);
  multiply_column<4>(call, block, slice);
}

}  // namespace

void bsell_spmv_neon(const SpmvCall& call, Range sections) {
  multiply_sections<multiply_slice>(call, sections);
}

}  // namespace sparselt::cpu

#endif  // __aarch64__
