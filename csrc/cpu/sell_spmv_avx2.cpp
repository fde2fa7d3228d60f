// SPDX-License-Identifier: Apache-2.0
//
// y = clamp(W x + bias + residual) with few columns for W in sliced ELL. kernels.h says how x is
// laid out, slice_rows_avx2.h how several columns are multiplied.
//
// With one column a lane is a row: a step of a slice loads 8 values and 8 columns of 16 bits, and
// puts 8 floats of x together one by one. No gather instruction: on AMD's Zen 3 it is slower than
// these single loads. Fillers read a zero that lies behind x. Bound: 7 shuffles a step, one a
// cycle, in the cache; else the memory's rate, since a stored value is 6 bytes that are read once.
// Measured on one thread of a busy Intel machine, 4096 x 4096 with 80, 90 and 95 % zeros, weights
// cold, the least of many interleaved runs: 13 to 15 GB/s of encoded bytes, 0.7 to 1 of the rate at
// which torch sums a buffer of that size, and 4.6, 5.9 and 12 times torch's dense linear.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/target.h"
#include "kernels.h"

SPARSELT_TARGET_BEGIN("avx2,fma")
#include "cpu/slice_rows_avx2.h"

namespace sparselt::cpu {
namespace {

constexpr int kSliceRows = 8;

// The x of four stored values.
inline __m128 load_four(const float* x, const uint16_t* columns) {
  const uint64_t four = load_four_columns(columns);
  __m128 found = _mm_load_ss(x + (four & 0xffff));
  found = _mm_insert_ps(found, _mm_load_ss(x + (four >> 16 & 0xffff)), 0x10);
  found = _mm_insert_ps(found, _mm_load_ss(x + (four >> 32 & 0xffff)), 0x20);
  return _mm_insert_ps(found, _mm_load_ss(x + (four >> 48)), 0x30);
}

// The elements `rows` of an array, zeros where there is no row.
inline __m256 load_rows(const int32_t* rows, const float* from) {
  alignas(32) float found[kSliceRows];
  for (int r = 0; r < kSliceRows; ++r) found[r] = rows[r] >= 0 ? from[rows[r]] : 0.0f;
  return _mm256_load_ps(found);
}

void multiply_column(const SpmvCall& call, const BlockPlace& block, int64_t slice) {
  const SellView& w = call.weight;
  const Epilogue& e = call.epilogue;
  __m256 sum = _mm256_setzero_ps();
  const int64_t end = w.slice_steps[slice + 1];
  for (int64_t step = w.slice_steps[slice]; step < end;) {
    __m256 chain = _mm256_setzero_ps();
    for (const int64_t stop = chain_end(step, end); step < stop; ++step) {
      const uint16_t* columns = w.columns + step * kSliceRows;
      const float* values = w.values + step * kSliceRows;
      prefetch(values, columns);
      const __m128 low = load_four(block.x, columns);
      const __m128 high = load_four(block.x, columns + 4);
      chain = _mm256_fmadd_ps(_mm256_loadu_ps(values), _mm256_set_m128(high, low), chain);
    }
    sum = _mm256_add_ps(sum, chain);
  }
  const int32_t* rows = w.slice_rows + slice * kSliceRows;
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

}  // namespace

void sell_spmv_avx2(const SpmvCall& call, Range sections) {
  // Four rows' sums take half of the 16 registers; a slice is read twice, from the cache.
  multiply_sections<kSliceRows, multiply_column, multiply_columns<kSliceRows, 4, Pair>>(call,
                                                                                        sections);
}

}  // namespace sparselt::cpu
SPARSELT_TARGET_END

#endif  // __x86_64__
