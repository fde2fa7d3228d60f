// SPDX-License-Identifier: Apache-2.0
//
// What the NEON spmv kernels share: the walk over slices, sums in several registers, and their way
// to y. Nothing is fetched ahead: no such CPU has been at hand to time it on. NEON is part of every
// aarch64 CPU, so no target region is needed.
#pragma once

#include <arm_neon.h>

#include "cpu/target.h"
#include "kernels.h"

namespace sparselt::cpu {
namespace {

constexpr int kLanes = 4;  // floats a register

// A row's products are added up in chains of this many, and the chains' sums after that: one chain
// of hundreds rounds away two to three times as much.
constexpr int64_t kChain = 32;

// Q registers: the rows of a slice, or the columns of a row.
template <int Q>
struct Lanes {
  float32x4_t quad[Q];
};

template <int Q>
inline Lanes<Q> load_lanes(const float* at) {
  Lanes<Q> lanes;
  SPARSELT_UNROLL
  for (int i = 0; i < Q; ++i) lanes.quad[i] = vld1q_f32(at + i * kLanes);
  return lanes;
}

template <int Q>
inline Lanes<Q> no_lanes() {
  Lanes<Q> lanes;
  SPARSELT_UNROLL
  for (int i = 0; i < Q; ++i) lanes.quad[i] = vdupq_n_f32(0.0f);
  return lanes;
}

template <int Q>
inline Lanes<Q> add(Lanes<Q> sum, Lanes<Q> more) {
  SPARSELT_UNROLL
  for (int i = 0; i < Q; ++i) sum.quad[i] = vaddq_f32(sum.quad[i], more.quad[i]);
  return sum;
}

// sum + lanes * value.
template <int Q>
inline Lanes<Q> multiply_add(Lanes<Q> sum, Lanes<Q> lanes, float value) {
  SPARSELT_UNROLL
  for (int i = 0; i < Q; ++i) sum.quad[i] = vfmaq_n_f32(sum.quad[i], lanes.quad[i], value);
  return sum;
}

template <int Q>
inline Lanes<Q> multiply_add(Lanes<Q> sum, Lanes<Q> lanes, Lanes<Q> values) {
  SPARSELT_UNROLL
  for (int i = 0; i < Q; ++i) {
    sum.quad[i] = vfmaq_f32(sum.quad[i], lanes.quad[i], values.quad[i]);
  }
  return sum;
}

// A block of a section: whether its sums begin or end there, and its part of x.
struct BlockPlace {
  bool is_first;
  bool is_last;
  const float* x;
};

// A block's sum of y[m, n] to what the blocks before left there.
inline void finish(const SpmvCall& call, const BlockPlace& block, int64_t m, int64_t n, float sum) {
  const Epilogue& e = call.epilogue;
  const int64_t at = m * call.y_row_stride + n * call.y_column_stride;
  if (!block.is_first) sum += call.y[at];
  if (block.is_first && e.bias) sum += e.bias[m];
  if (block.is_last) {
    if (e.residual) sum += e.residual[at];
    sum = sum < e.lower ? e.lower : sum;  // written so that a NaN stays a NaN
    sum = sum > e.upper ? e.upper : sum;
  }
  call.y[at] = sum;
}

// The sums of a slice with one column: a lane a row, none where it is -1.
template <int Q>
void finish_rows(const SpmvCall& call, const BlockPlace& block, const int32_t* rows, Lanes<Q> sum) {
  float sums[Q * kLanes];
  for (int i = 0; i < Q; ++i) vst1q_f32(sums + i * kLanes, sum.quad[i]);
  for (int i = 0; i < Q * kLanes && rows[i] >= 0; ++i) finish(call, block, rows[i], 0, sums[i]);
}

// The sums of a row: a lane a column.
template <int Q>
void finish_columns(const SpmvCall& call, const BlockPlace& block, int64_t m, Lanes<Q> sum) {
  float sums[Q * kLanes];
  for (int i = 0; i < Q; ++i) vst1q_f32(sums + i * kLanes, sum.quad[i]);
  for (int64_t n = 0; n < call.columns; ++n) finish(call, block, m, n, sums[n]);
}

using SliceFunction = void (*)(const SpmvCall& call, const BlockPlace& block, int64_t slice);

// `kMultiply` multiplies a slice.
template <SliceFunction kMultiply>
void multiply_sections(const SpmvCall& call, Range sections) {
  const SellView& w = call.weight;
  for (int64_t i = sections.begin * w.num_blocks; i < sections.end * w.num_blocks; ++i) {
    const int64_t b = i % w.num_blocks;
    const BlockPlace block{b == 0, b + 1 == w.num_blocks, call.x + b * call.block_stride};
    for (int64_t slice = w.block_slices[i]; slice < w.block_slices[i + 1]; ++slice) {
      kMultiply(call, block, slice);
    }
  }
}

}  // namespace
}  // namespace sparselt::cpu
