// SPDX-License-Identifier: Apache-2.0
//
// y = clamp(W x + bias + residual) with few columns for W in slices of values and deltas. kernels.h
// says how the weight and x are laid out, spmv_avx2.h how slices are multiplied.
//
// A step adds 8 bytes to 8 running columns of 16 bits, and a jump finds the zero behind x in place
// of its column; from there on it is a step of sell_spmv_avx2. Bound: as delta_spmv_avx512, but
// that on Zen 3 a step takes 9 to 10 cycles where one of SELL takes 5 to 7, so that one thread
// gains nothing.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/target.h"
#include "kernels.h"

SPARSELT_TARGET_BEGIN("avx2,fma,bmi")
#include "cpu/spmv_avx2.h"

namespace sparselt::cpu {
namespace {

template <int kSliceRows, bool kCached = false>
struct DeltaColumns {
  static constexpr bool kSigns = false;
  __m128i last;  // of each row; wraps around only after the row's last value
  alignas(16) uint16_t found[kSliceRows];

  const uint16_t* next(const SellView& w, int64_t step) {
    const uint8_t* deltas = w.deltas + step * kSliceRows;
    if (!kCached) {
      prefetch(w.values + step * kSliceRows + kPrefetchValues);
      prefetch(deltas + kPrefetchDeltas);
    }
    const __m128i wide =
        _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(deltas)));
    const __m128i jumps = _mm_cmpeq_epi16(wide, _mm_set1_epi16(kJump));
    last = _mm_add_epi16(last, wide);
    const __m128i zero = _mm_set1_epi16(static_cast<int16_t>(w.block_cols));
    _mm_store_si128(reinterpret_cast<__m128i*>(found), _mm_blendv_epi8(last, zero, jumps));
    return found;
  }
};

}  // namespace

void delta_spmv_avx2(const SpmvCall& call, Range sections) {
  multiply_slices<DeltaColumns>(call, sections);
}

}  // namespace sparselt::cpu
SPARSELT_TARGET_END

#endif  // __x86_64__
