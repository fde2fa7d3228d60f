// SPDX-License-Identifier: Apache-2.0
//
// y = clamp(W x + bias + residual) with up to 4 columns for W of bits and values. kernels.h says
// how the weight and x are laid out, bits_rows_x86.h how rows are walked.
//
// A step takes 16 columns of a row: one load and one expansion bring the stored values to their
// lanes, a count of bits finds the next ones, and each column of x costs one multiply-add. No
// column is looked up, so nothing waits for a gather. Bound: 4 bytes a stored value and 2 for 16
// weights, read once; below about one stored value in eight the steps over zeros bind.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/target.h"
#include "kernels.h"

SPARSELT_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,popcnt")

namespace sparselt::cpu {
namespace {

constexpr int64_t kMostSums = 16;

struct Sums {
  __m512 lanes;
};
struct Chunk {
  __mmask16 kept;
  __m512 values;
};

inline Chunk expand(unsigned mask, const float* values) {
  const __mmask16 kept = static_cast<__mmask16>(mask);
  return {kept, _mm512_maskz_expand_ps(kept, _mm512_loadu_ps(values))};
}

inline Sums add_chunk(const Chunk& chunk, const float* x, Sums sums) {
  return {_mm512_mask3_fmadd_ps(chunk.values, _mm512_load_ps(x), sums.lanes, chunk.kept)};
}

inline float add_up(Sums sums) {
  alignas(64) float lanes[16];
  _mm512_store_ps(lanes, sums.lanes);
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

}  // namespace
}  // namespace sparselt::cpu

#include "cpu/bits_rows_x86.h"

namespace sparselt::cpu {

void bits_spmv_avx512(const SpmvCall& call, Range rows) { multiply_bits(call, rows); }

}  // namespace sparselt::cpu
SPARSELT_TARGET_END

#endif  // __x86_64__
