// SPDX-License-Identifier: Apache-2.0
//
// y = clamp(W x + bias + residual) with few columns for W in sliced ELL. kernels.h says how x is
// laid out, slice_rows_avx2.h how several columns are multiplied.
//
// With one column a lane is a row: a step of a slice loads 16 values, 16 columns of 16 bits, and
// gathers 16 floats of x. Fillers read a zero that lies behind x, so no mask is needed. Bound: a
// stored value is 6 bytes that are read once, so cold weights run at the memory's rate.
// Measured on one thread of a busy Intel machine, 4096 x 4096 with 80, 90 and 95 % zeros, weights
// cold, the least of many interleaved runs: 13 to 15 GB/s of encoded bytes, 0.7 to 1 of the rate at
// which torch sums a buffer of that size, and 4.4, 5.8 and 11 times torch's dense linear. In the
// cache the gather gained 0 to 12 % over sell_spmv_avx2's single loads; where gathers are slow that
// kernel may win, so a plan times both.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/target.h"
#include "kernels.h"

SPARSELT_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
#include "cpu/slice_rows_avx2.h"

namespace sparselt::cpu {
namespace {

constexpr int kSliceRows = 16;
constexpr __mmask16 kAllRows = 0xffff;

// Lanes outside the mask are zero.
inline __m512 gather(__mmask16 mask, __m512i at, const float* from) {
  return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), mask, at, from, sizeof(float));
}

void multiply_column(const SpmvCall& call, const BlockPlace& block, int64_t slice) {
  const SellView& w = call.weight;
  const Epilogue& e = call.epilogue;
  __m512 sum = _mm512_setzero_ps();
  const int64_t end = w.slice_steps[slice + 1];
  for (int64_t step = w.slice_steps[slice]; step < end;) {
    __m512 chain = _mm512_setzero_ps();
    for (const int64_t stop = chain_end(step, end); step < stop; ++step) {
      const uint16_t* columns = w.columns + step * kSliceRows;
      const float* values = w.values + step * kSliceRows;
      prefetch(values, columns);
      const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(columns));
      const __m512i at = _mm512_maskz_cvtepu16_epi32(kAllRows, narrow);
      chain = _mm512_fmadd_ps(_mm512_loadu_ps(values), gather(kAllRows, at, block.x), chain);
    }
    sum = _mm512_add_ps(sum, chain);
  }
  const int32_t* rows = w.slice_rows + slice * kSliceRows;
  const __m512i at = _mm512_loadu_si512(rows);
  const __mmask16 held = _mm512_cmpge_epi32_mask(at, _mm512_setzero_si512());
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

}  // namespace

void sell_spmv_avx512(const SpmvCall& call, Range sections) {
  multiply_sections<kSliceRows, multiply_column, multiply_columns<kSliceRows, kSliceRows, Wide>>(
      call, sections);
}

}  // namespace sparselt::cpu
SPARSELT_TARGET_END

#endif  // __x86_64__
