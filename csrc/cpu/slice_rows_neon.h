// SPDX-License-Identifier: Apache-2.0
//
// The product of a slice of 8 rows, each with columns of its own, for the NEON spmv kernels of SELL
// and sign. With `kSigns` the weight is of the sign format: a value is what its column finds, and
// the row's magnitude comes last.
//
// With one column a lane is a row: 8 floats of x are put together one by one. With 2 to 16 columns
// the lanes are a row's columns, so that a stored value costs one load of x and one multiply-add
// for four columns at once.
#pragma once

#include "cpu/spmv_neon.h"

namespace sparselt::cpu {
namespace {

constexpr int kSliceRows = 8;

// Where the chain ends that begins at `step`.
inline int64_t chain_end(int64_t step, int64_t end) {
  return end - step > kChain ? step + kChain : end;
}

// The x of four stored values.
inline float32x4_t load_four(const float* x, const uint16_t* columns) {
  float32x4_t found = vld1q_dup_f32(x + columns[0]);
  found = vld1q_lane_f32(x + columns[1], found, 1);
  found = vld1q_lane_f32(x + columns[2], found, 2);
  return vld1q_lane_f32(x + columns[3], found, 3);
}

template <bool kSigns>
void multiply_column(const SpmvCall& call, const BlockPlace& block, int64_t slice) {
  const SellView& w = call.weight;
  const int32_t* rows = w.slice_rows + slice * kSliceRows;
  Lanes<2> sum = no_lanes<2>();
  const int64_t end = w.slice_steps[slice + 1];
  for (int64_t step = w.slice_steps[slice]; step < end;) {
    Lanes<2> chain = no_lanes<2>();
    for (const int64_t stop = chain_end(step, end); step < stop; ++step) {
      const uint16_t* columns = w.columns + step * kSliceRows;
      const Lanes<2> found{{load_four(block.x, columns), load_four(block.x, columns + kLanes)}};
      if constexpr (kSigns) {
        chain = add(chain, found);
      } else {
        chain = multiply_add(chain, found, load_lanes<2>(w.values + step * kSliceRows));
      }
    }
    sum = add(sum, chain);
  }
  if constexpr (kSigns) {
    float magnitudes[kSliceRows];
    for (int r = 0; r < kSliceRows; ++r) magnitudes[r] = rows[r] >= 0 ? w.values[rows[r]] : 0.0f;
    sum = multiply_add(no_lanes<2>(), sum, load_lanes<2>(magnitudes));
  }
  finish_rows(call, block, rows, sum);
}

// Up to Q * kLanes columns, R rows of the slice at a time.
template <bool kSigns, int R, int Q>
void multiply_columns(const SpmvCall& call, const BlockPlace& block, int64_t slice) {
  const SellView& w = call.weight;
  for (int first = 0; first < kSliceRows; first += R) {
    float sums[R][Q * kLanes] = {};
    const int64_t end = w.slice_steps[slice + 1];
    for (int64_t step = w.slice_steps[slice]; step < end;) {
      Lanes<Q> chain[R];
      SPARSELT_UNROLL
      for (int r = 0; r < R; ++r) chain[r] = no_lanes<Q>();
      for (const int64_t stop = chain_end(step, end); step < stop; ++step) {
        const int64_t at = step * kSliceRows + first;
        SPARSELT_UNROLL
        for (int r = 0; r < R; ++r) {
          const float* x = block.x + int64_t{w.columns[at + r]} * (Q * kLanes);
          if constexpr (kSigns) {
            chain[r] = add(chain[r], load_lanes<Q>(x));
          } else {
            chain[r] = multiply_add(chain[r], load_lanes<Q>(x), w.values[at + r]);
          }
        }
      }
      SPARSELT_UNROLL
      for (int r = 0; r < R; ++r) {
        const Lanes<Q> sum = add(load_lanes<Q>(sums[r]), chain[r]);
        for (int i = 0; i < Q; ++i) vst1q_f32(sums[r] + i * kLanes, sum.quad[i]);
      }
    }
    const int32_t* rows = w.slice_rows + slice * kSliceRows + first;
    for (int r = 0; r < R && rows[r] >= 0; ++r) {
      Lanes<Q> sum = load_lanes<Q>(sums[r]);
      if constexpr (kSigns) sum = multiply_add(no_lanes<Q>(), sum, w.values[rows[r]]);
      finish_columns(call, block, rows[r], sum);
    }
  }
}

template <bool kSigns>
void multiply_slice(const SpmvCall& call, const BlockPlace& block, int64_t slice) {
  switch (call.lanes) {
    case 1:
      return multiply_column<kSigns>(call, block, slice);
    case 4:
      return multiply_columns<kSigns, 8, 1>(call, block, slice);
    case 8:
      return multiply_columns<kSigns, 8, 2>(call, block, slice);
    default:
      return multiply_columns<kSigns, 4, 4>(call, block, slice);
  }
}

}  // namespace
}  // namespace sparselt::cpu
