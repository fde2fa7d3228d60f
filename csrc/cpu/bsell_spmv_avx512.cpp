// SPDX-License-Identifier: Apache-2.0
//
// y = clamp(W x + bias + residual) with few columns for W in rows of blocks. kernels.h says how x
// is laid out, block_rows_avx2.h how slices are multiplied.
//
// A register holds 16 rows. Bound: 4 bytes a stored value and 2 a block, read once, so cold weights
// run at the memory's rate; in the cache one load of values and one broadcast a step bind.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/target.h"
#include "kernels.h"

SPARSELT_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
#include "cpu/slice_rows_avx2.h"

namespace sparselt::cpu {
namespace {

constexpr __mmask16 kAllRows = 0xffff;

// The names of slice_rows_avx2.h for registers of 16 rows. (The masks are full: the plain forms
// make GCC 12 warn of a register it leaves undefined on purpose.)
inline __m512 load_values(const float* at, __m512) { return _mm512_loadu_ps(at); }
inline void store_values(float* at, __m512 value) { _mm512_storeu_ps(at, value); }
inline __m512 broadcast(float value, __m512) { return _mm512_set1_ps(value); }
inline __m512 add(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
inline __m512 multiply_add(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
inline __m512 clamp(__m512 sum, __m512 lower, __m512 upper) {
  return _mm512_maskz_min_ps(kAllRows, upper, _mm512_maskz_max_ps(kAllRows, lower, sum));
}

}  // namespace
}  // namespace sparselt::cpu
#include "cpu/block_rows_avx2.h"

namespace sparselt::cpu {
namespace {

void multiply_slice(const SpmvCall& call, const BlockPlace& block, int64_t slice) {
  const int64_t height = call.weight.slice_height;
  if (call.lanes > 1) {
    if (height == 4) return multiply_block_lanes<4>(call, block, slice);
    return multiply_block_lanes<8>(call, block, slice);
  }
  if (height == 4) return multiply_block_column<__m128>(call, block, slice, 0);
  if (height == 8) return multiply_block_column<__m256>(call, block, slice, 0);
  multiply_block_column<__m512>(call, block, slice, 0);
}

}  // namespace

void bsell_spmv_avx512(const SpmvCall& call, Range sections) {
  multiply_block_sections<multiply_slice>(call, sections);
}

}  // namespace sparselt::cpu
SPARSELT_TARGET_END

#endif  // __x86_64__
