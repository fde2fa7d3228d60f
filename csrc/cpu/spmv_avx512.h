// SPDX-License-Identifier: Apache-2.0
//
// What the spmv kernels for slices of 16 rows share: a slice with one column, where a lane is a
// row, and the type of 16 lanes that slice_rows_avx2.h asks for. With `kSigns` the weight is of the
// sign format: a value is what its column finds, and the row's magnitude comes last. Include inside
// the target region, after <immintrin.h>, cpu/target.h and kernels.h.
#pragma once

#include "cpu/slice_rows_avx2.h"

namespace sparselt::cpu {
namespace {

constexpr int kSliceRows = 16;
constexpr __mmask16 kAllRows = 0xffff;

// Lanes outside the mask are zero.
inline __m512 gather(__mmask16 mask, __m512i at, const float* from) {
  return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), mask, at, from, sizeof(float));
}

// One value of each row of a slice.
template <bool kSigns>
inline __m512 add_step(const SellView& w, const float* x, int64_t step, __m512 chain) {
  const uint16_t* columns = w.columns + step * kSliceRows;
  const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(columns));
  const __m512i at = _mm512_maskz_cvtepu16_epi32(kAllRows, narrow);
  const __m512 found = gather(kAllRows, at, x);
  if constexpr (kSigns) {
    prefetch(columns);
    return _mm512_add_ps(found, chain);
  } else {
    const float* values = w.values + step * kSliceRows;
    prefetch(values, columns);
    return _mm512_fmadd_ps(_mm512_loadu_ps(values), found, chain);
  }
}

template <bool kSigns>
inline __m512 add_steps(const SellView& w, const float* x, int64_t step, int64_t end, __m512 sum) {
  while (step < end) {
    __m512 chain = _mm512_setzero_ps();
    for (const int64_t stop = chain_end(step, end); step < stop; ++step) {
      chain = add_step<kSigns>(w, x, step, chain);
    }
    sum = _mm512_add_ps(sum, chain);
  }
  return sum;
}

template <bool kSigns>
void finish_slice(const SpmvCall& call, const BlockPlace& block, int64_t slice, __m512 sum) {
  const SellView& w = call.weight;
  const Epilogue& e = call.epilogue;
  const int32_t* rows = w.slice_rows + slice * kSliceRows;
  const __m512i at = _mm512_loadu_si512(rows);
  const __mmask16 held = _mm512_cmpge_epi32_mask(at, _mm512_setzero_si512());
  if constexpr (kSigns) sum = _mm512_mul_ps(sum, gather(held, at, w.values));
  const float* before = block.is_first ? e.bias : call.y;
  if (before) sum = _mm512_add_ps(sum, gather(held, at, before));
  if (block.is_last && e.residual) sum = _mm512_add_ps(sum, gather(held, at, e.residual));
  if (block.is_last) {
    // The masks are full: the plain forms make GCC 12 warn of a register it leaves undefined on
    // purpose.
    sum = _mm512_maskz_max_ps(kAllRows, _mm512_set1_ps(e.lower), sum);
    sum = _mm512_maskz_min_ps(kAllRows, _mm512_set1_ps(e.upper), sum);
  }
  alignas(64) float sums[kSliceRows];
  _mm512_store_ps(sums, sum);
  for (int r = 0; r < kSliceRows && rows[r] >= 0; ++r) call.y[rows[r]] = sums[r];
}

template <bool kSigns>
void multiply_column(const SpmvCall& call, const BlockPlace& block, int64_t slice) {
  const SellView& w = call.weight;
  const __m512 sum = add_steps<kSigns>(w, block.x, w.slice_steps[slice], w.slice_steps[slice + 1],
                                       _mm512_setzero_ps());
  finish_slice<kSigns>(call, block, slice, sum);
}

// Two slices that lie apart, chain by chain: each is a stream of its own that the memory fetches
// ahead. The chains of a slice are those that it has alone.
template <bool kSigns>
void multiply_pair(const SpmvCall& call, const BlockPlace& block, int64_t first, int64_t second) {
  const SellView& w = call.weight;
  int64_t a = w.slice_steps[first];
  int64_t b = w.slice_steps[second];
  const int64_t a_end = w.slice_steps[first + 1];
  const int64_t b_end = w.slice_steps[second + 1];
  __m512 a_sum = _mm512_setzero_ps();
  __m512 b_sum = _mm512_setzero_ps();
  while (a_end - a >= kChain && b_end - b >= kChain) {
    __m512 a_chain = _mm512_setzero_ps();
    __m512 b_chain = _mm512_setzero_ps();
    for (int64_t i = 0; i < kChain; ++i, ++a, ++b) {
      a_chain = add_step<kSigns>(w, block.x, a, a_chain);
      b_chain = add_step<kSigns>(w, block.x, b, b_chain);
    }
    a_sum = _mm512_add_ps(a_sum, a_chain);
    b_sum = _mm512_add_ps(b_sum, b_chain);
  }
  finish_slice<kSigns>(call, block, first, add_steps<kSigns>(w, block.x, a, a_end, a_sum));
  finish_slice<kSigns>(call, block, second, add_steps<kSigns>(w, block.x, b, b_end, b_sum));
}

// All slices with one column: those of the first half of each block beside those of the second.
template <bool kSigns>
void multiply_one_column(const SpmvCall& call, Range sections) {
  const SellView& w = call.weight;
  for (int64_t i = sections.begin * w.num_blocks; i < sections.end * w.num_blocks; ++i) {
    const int64_t b = i % w.num_blocks;
    const BlockPlace block{b == 0, b + 1 == w.num_blocks, call.x + b * call.block_stride};
    const int64_t half = (w.block_slices[i + 1] - w.block_slices[i]) / 2;
    const int64_t middle = w.block_slices[i] + half;
    for (int64_t slice = w.block_slices[i]; slice < middle; ++slice) {
      multiply_pair<kSigns>(call, block, slice, slice + half);
    }
    for (int64_t slice = middle + half; slice < w.block_slices[i + 1]; ++slice) {
      multiply_column<kSigns>(call, block, slice);
    }
  }
}

// 16 lanes.
struct Wide {
  __m512 all;
};
inline Wide load_lanes(const float* x, Wide) { return {_mm512_load_ps(x)}; }
inline Wide broadcast(float value, Wide) { return {_mm512_set1_ps(value)}; }
inline Wide multiply_add(Wide a, Wide b, Wide c) { return {_mm512_fmadd_ps(a.all, b.all, c.all)}; }
inline Wide add(Wide a, Wide b) { return {_mm512_add_ps(a.all, b.all)}; }
inline Wide clamp(Wide sum, Wide lower, Wide upper) {
  const __m512 raised = _mm512_maskz_max_ps(kAllRows, lower.all, sum.all);
  return {_mm512_maskz_min_ps(kAllRows, upper.all, raised)};
}
inline void store_lanes(float* y, Wide value) { _mm512_store_ps(y, value.all); }

template <bool kSigns>
void multiply_slices(const SpmvCall& call, Range sections) {
  if (call.lanes == 1) return multiply_one_column<kSigns>(call, sections);
  multiply_sections<kSigns, kSliceRows, multiply_column<kSigns>,
                    multiply_columns<kSigns, kSliceRows, kSliceRows, Wide>>(call, sections);
}

}  // namespace
}  // namespace sparselt::cpu
