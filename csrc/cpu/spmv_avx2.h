// SPDX-License-Identifier: Apache-2.0
//
// What the spmv kernels for slices of 8 rows share: a step with one column, where a lane is a row,
// and the type of 16 lanes that slice_rows_avx2.h asks for. Include inside the target region, after
// <immintrin.h>, cpu/target.h and kernels.h.
#pragma once

#include "cpu/slice_rows_avx2.h"

namespace sparselt::cpu {
namespace {

constexpr int kSliceRows = 8;

// Puts *from into lane I.
template <int I>
inline __m128 insert(__m128 found, const float* from) {
  int bits;
  __builtin_memcpy(&bits, from, sizeof(bits));
  return _mm_castsi128_ps(_mm_insert_epi32(_mm_castps_si128(found), bits, I));
}

// The x of four stored values: a load and an insertion are one instruction, as are a shift and a
// mask.
inline __m128 load_four(const float* x, const uint16_t* columns) {
  const uint64_t four = load_four_columns(columns);
  __m128 found = _mm_load_ss(x + (four & 0xffff));
  found = insert<1>(found, x + _bextr_u64(four, 16, 16));
  found = insert<2>(found, x + _bextr_u64(four, 32, 16));
  return insert<3>(found, x + (four >> 48));
}

// The elements `rows` of an array, zeros where there is no row.
inline __m256 load_rows(const int32_t* rows, const float* from) {
  alignas(32) float found[kSliceRows];
  for (int r = 0; r < kSliceRows; ++r) found[r] = rows[r] >= 0 ? from[rows[r]] : 0.0f;
  return _mm256_load_ps(found);
}

// One value of each row of a slice.
template <class Columns>
inline __m256 add_step(const SellView& w, const float* x, int64_t step, const uint16_t* columns,
                       __m256 chain) {
  const __m128 low = load_four(x, columns);
  const __m128 high = load_four(x, columns + 4);
  const __m256 found = _mm256_set_m128(high, low);
  if constexpr (Columns::kSigns) {
    return _mm256_add_ps(found, chain);
  } else {
    const float* values = w.values + step * kSliceRows;
    return _mm256_fmadd_ps(_mm256_loadu_ps(values), found, chain);
  }
}

template <class Columns>
void finish_slice(const SpmvCall& call, const BlockPlace& block, int64_t slice, __m256 sum) {
  const SellView& w = call.weight;
  const Epilogue& e = call.epilogue;
  const int32_t* rows = w.slice_rows + slice * kSliceRows;
  if constexpr (Columns::kSigns) sum = _mm256_mul_ps(sum, load_rows(rows, w.values));
  const float* before = block.is_first ? e.bias : call.y;
  if (before) sum = _mm256_add_ps(sum, load_rows(rows, before));
  if (block.is_last && e.residual) sum = _mm256_add_ps(sum, load_rows(rows, e.residual));
  if (block.is_last) sum = clamp(sum, _mm256_set1_ps(e.lower), _mm256_set1_ps(e.upper));
  alignas(32) float sums[kSliceRows];
  _mm256_store_ps(sums, sum);
  for (int r = 0; r < kSliceRows && rows[r] >= 0; ++r) call.y[rows[r]] = sums[r];
}

// 16 lanes.
struct Pair {
  __m256 low, high;
};
inline Pair load_lanes(const float* x, Pair) { return {_mm256_load_ps(x), _mm256_load_ps(x + 8)}; }
inline Pair broadcast(float value, Pair) {
  const __m256 all = _mm256_set1_ps(value);
  return {all, all};
}
inline Pair multiply_add(Pair a, Pair b, Pair c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Pair add(Pair a, Pair b) { return {add(a.low, b.low), add(a.high, b.high)}; }
inline Pair clamp(Pair sum, Pair lower, Pair upper) {
  return {clamp(sum.low, lower.low, upper.low), clamp(sum.high, lower.high, upper.high)};
}
inline void store_lanes(float* y, Pair value) {
  _mm256_store_ps(y, value.low);
  _mm256_store_ps(y + 8, value.high);
}

// Fewer values lie in the second-level cache.
constexpr int64_t kCachedValues = 1 << 16;

// Columns<kSliceRows, whether the weight lies in a cache>.
template <template <int, bool> class Columns>
void multiply_slices(const SpmvCall& call, Range sections) {
  const SellView& w = call.weight;
  if (call.lanes == 1) {
    const int64_t slices = w.block_slices[w.num_sections * w.num_blocks];
    if (w.slice_steps[slices] * kSliceRows < kCachedValues) {
      using Cached = Columns<kSliceRows, true>;
      return multiply_one_column<Cached, __m256, add_step<Cached>, finish_slice<Cached>>(call,
                                                                                         sections);
    }
    using Cold = Columns<kSliceRows, false>;
    return multiply_one_column<Cold, __m256, add_step<Cold>, finish_slice<Cold>>(call, sections);
  }
  // Four rows' sums of 16 columns take half of the 16 registers; a slice is read twice, from the
  // cache.
  using Walk = Columns<kSliceRows, false>;
  multiply_few_columns<Walk, kSliceRows, multiply_columns<Walk, kSliceRows, 4, Pair>>(call,
                                                                                      sections);
}

}  // namespace
}  // namespace sparselt::cpu
