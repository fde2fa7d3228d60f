// SPDX-License-Identifier: Apache-2.0
//
// y = clamp(W x + bias + residual) with up to 4 columns for W of bits and values. kernels.h says
// how the weight and x are laid out, bits_rows_x86.h how rows are walked.
//
// A table turns 8 bits of a mask into the permutation that brings the stored values to their lanes;
// its signs mark the lanes that get none. Bound: as bits_spmv_avx512, but that a step takes twice
// as long, so that steps bind from two stored values in five down.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/target.h"
#include "kernels.h"

namespace sparselt::cpu {
namespace {

// Eight bytes a mask: which value a lane gets, or -128 for none.
struct Permutations {
  int8_t lanes[256][8];
  constexpr Permutations() : lanes() {
    for (int mask = 0; mask < 256; ++mask) {
      int next = 0;
      for (int lane = 0; lane < 8; ++lane) {
        lanes[mask][lane] = static_cast<int8_t>(mask >> lane & 1 ? next++ : -128);
      }
    }
  }
};
constexpr Permutations kPermutations;

}  // namespace
}  // namespace sparselt::cpu

SPARSELT_TARGET_BEGIN("avx2,fma,popcnt")

namespace sparselt::cpu {
namespace {

constexpr int64_t kMostSums = 8;

struct Sums {
  __m256 lanes;
};
struct Half {
  __m256i absent;  // the sign of a lane
  __m256 values;
};
struct Chunk {
  Half low, high;
};

inline Half expand_half(unsigned mask, const float* values) {
  const __m128i bytes =
      _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kPermutations.lanes[mask]));
  const __m256i from = _mm256_cvtepi8_epi32(bytes);
  const __m256i absent = _mm256_srai_epi32(from, 31);
  const __m256 found = _mm256_permutevar8x32_ps(_mm256_loadu_ps(values), from);
  return {absent, _mm256_andnot_ps(_mm256_castsi256_ps(absent), found)};
}

inline Chunk expand(unsigned mask, const float* values) {
  const unsigned low = mask & 0xff;
  return {expand_half(low, values), expand_half(mask >> 8, values + _mm_popcnt_u32(low))};
}

// An infinity of x that no stored value meets must not meet a 0.0 either.
inline __m256 add_half(const Half& half, const float* x, __m256 sum) {
  const __m256 met = _mm256_andnot_ps(_mm256_castsi256_ps(half.absent), _mm256_load_ps(x));
  return _mm256_fmadd_ps(half.values, met, sum);
}

inline Sums add_chunk(const Chunk& chunk, const float* x, Sums sums) {
  return {add_half(chunk.high, x + 8, add_half(chunk.low, x, sums.lanes))};
}

inline float add_up(Sums sums) {
  alignas(32) float lanes[8];
  _mm256_store_ps(lanes, sums.lanes);
  for (int half = 4; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

}  // namespace
}  // namespace sparselt::cpu

#include "cpu/bits_rows_x86.h"

namespace sparselt::cpu {

void bits_spmv_avx2(const SpmvCall& call, Range rows) { multiply_bits(call, rows); }

}  // namespace sparselt::cpu
SPARSELT_TARGET_END

#endif  // __x86_64__
