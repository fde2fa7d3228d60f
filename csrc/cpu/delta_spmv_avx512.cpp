// SPDX-License-Identifier: Apache-2.0
//
// y = clamp(W x + bias + residual) with few columns for W in slices of values and deltas. kernels.h
// says how the weight and x are laid out, spmv_avx512.h how slices are multiplied.
//
// A step adds 16 bytes to 16 running columns of 16 bits, and a jump finds the zero behind x in
// place of its column; from there on it is a step of sell_spmv_avx512. Bound: a stored value is 5
// bytes that are read once, so cold weights run at the memory's rate. In the cache the additions
// cost 11 %.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/target.h"
#include "kernels.h"

SPARSELT_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
#include "cpu/spmv_avx512.h"

namespace sparselt::cpu {
namespace {

struct DeltaColumns {
  static constexpr bool kSigns = false;
  __m256i last;  // of each row; wraps around only after the row's last value
  alignas(32) uint16_t found[kSliceRows];

  const uint16_t* next(const SellView& w, int64_t step) {
    const uint8_t* deltas = w.deltas + step * kSliceRows;
    prefetch(w.values + step * kSliceRows + kPrefetchValues);
    prefetch(deltas + kPrefetchDeltas);
    const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(deltas));
    const __mmask16 jumps = _mm_cmpeq_epu8_mask(narrow, _mm_set1_epi8(static_cast<char>(kJump)));
    last = _mm256_add_epi16(last, _mm256_cvtepu8_epi16(narrow));
    const __m256i zero = _mm256_set1_epi16(static_cast<int16_t>(w.block_cols));
    _mm256_store_si256(reinterpret_cast<__m256i*>(found),
                       _mm256_mask_blend_epi16(jumps, last, zero));
    return found;
  }
};

}  // namespace

void delta_spmv_avx512(const SpmvCall& call, Range sections) {
  multiply_slices<DeltaColumns>(call, sections);
}

}  // namespace sparselt::cpu
SPARSELT_TARGET_END

#endif  // __x86_64__
