// SPDX-License-Identifier: Apache-2.0
//
// What the spmv kernels for slices of 16 rows share: a step with one column, where a lane is a
// row, and the type of 16 lanes that slice_rows_avx2.h asks for. Include inside the target region,
// after <immintrin.h>, cpu/target.h and kernels.h.
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

// 16 lanes.
struct Wide {
  __m512 all;
};
inline Wide load_lanes(const float* x, Wide) { return {_mm512_load_ps(x)}; }
inline Wide broadcast(float value, Wide) { return {_mm512_set1_ps(value)}; }
inline Wide multiply_add(Wide a, Wide b, Wide c) { return {_mm512_fmadd_ps(a.all, b.all, c.all)}; }
inline Wide add(Wide a, Wide b) { return {_mm512_add_ps(a.all, b.all)}; }
inline Wide clamp(Wide sum, Wide lower, Wide upper) {
  // The masks are full: the plain forms make GCC 12 warn of a register it leaves undefined on
  // purpose.
  const __m512 raised = _mm512_maskz_max_ps(kAllRows, lower.all, sum.all);
  return {_mm512_maskz_min_ps(kAllRows, upper.all, raised)};
}
inline void store_lanes(float* y, Wide value) { _mm512_store_ps(y, value.all); }

// One value of each row of a slice.
template <class Columns>
inline Wide add_step(const SellView& w, const float* x, int64_t step, const uint16_t* columns,
                     Wide chain) {
  const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(columns));
  const __m512i at = _mm512_maskz_cvtepu16_epi32(kAllRows, narrow);
  const __m512 found = gather(kAllRows, at, x);
  if constexpr (Columns::kSigns) {
    return {_mm512_add_ps(found, chain.all)};
  } else {
    const float* values = w.values + step * kSliceRows;
    return {_mm512_fmadd_ps(_mm512_loadu_ps(values), found, chain.all)};
  }
}

template <class Columns>
void finish_slice(const SpmvCall& call, const BlockPlace& block, int64_t slice, Wide sum) {
  const SellView& w = call.weight;
  const Epilogue& e = call.epilogue;
  const int32_t* rows = w.slice_rows + slice * kSliceRows;
  const __m512i at = _mm512_loadu_si512(rows);
  const __mmask16 held = _mm512_cmpge_epi32_mask(at, _mm512_setzero_si512());
  if constexpr (Columns::kSigns) sum.all = _mm512_mul_ps(sum.all, gather(held, at, w.values));
  const float* before = block.is_first ? e.bias : call.y;
  if (before) sum = add(sum, {gather(held, at, before)});
  if (block.is_last && e.residual) sum = add(sum, {gather(held, at, e.residual)});
  if (block.is_last) sum = clamp(sum, broadcast(e.lower, Wide{}), broadcast(e.upper, Wide{}));
  alignas(64) float sums[kSliceRows];
  store_lanes(sums, sum);
  for (int r = 0; r < kSliceRows && rows[r] >= 0; ++r) call.y[rows[r]] = sums[r];
}

template <class Columns>
void multiply_slices(const SpmvCall& call, Range sections) {
  if (call.lanes == 1) {
    return multiply_one_column<Columns, Wide, add_step<Columns>, finish_slice<Columns>>(call,
                                                                                        sections);
  }
  multiply_few_columns<Columns, kSliceRows,
                       multiply_columns<Columns, kSliceRows, kSliceRows, Wide>>(call, sections);
}

}  // namespace
}  // namespace sparselt::cpu
