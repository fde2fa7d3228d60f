// SPDX-License-Identifier: Apache-2.0
//
// y = clamp(W x + bias + residual) with one column for W in windows. kernels.h says how the weight
// and x are laid out.
//
// A lane is a row. A step loads 16 values, 16 columns of 8 bits and the two vectors of x that its
// window spans, in which a permutation finds what a gather would fetch in three times as long; a
// lane that waits is masked and gets a zero. Loops run over all steps of a slice, so there is no
// branch to miss. Bound: 5 loads a step, of which 3 are of 64 bytes. 7 to 8 bytes a stored value
// make it a kernel for weights that stay in the cache: from memory, sell_spmv_avx512 is 1.3 times
// as fast, and fetching ahead in software cost 3 % in the cache and changed nothing there.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/target.h"
#include "kernels.h"

SPARSELT_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")

namespace sparselt::cpu {
namespace {

constexpr int kLanes = kWindowLanes;
constexpr __mmask16 kAllLanes = 0xffff;

// Chains side by side, which hide the latency of a multiply-add, and the steps after which they are
// added up: one chain of hundreds rounds away two to three times as much.
constexpr int kChains = 4;
constexpr int64_t kChain = 32 * kChains;

inline __m512 add_step(const WindowView& w, const float* x, int64_t step, __m512 sum) {
  const auto* narrow = reinterpret_cast<const __m128i*>(w.columns + step * kLanes);
  const __m128i columns = _mm_loadu_si128(narrow);
  const __mmask16 kept = _mm_movepi8_mask(columns);  // the highest bits
  const __m512i at = _mm512_maskz_cvtepu8_epi32(kAllLanes, columns);
  const float* window = x + int64_t{w.windows[step]} * kLanes;
  const __m512 found = _mm512_maskz_permutex2var_ps(kept, _mm512_load_ps(window), at,
                                                    _mm512_load_ps(window + kLanes));
  const float* values = w.values + step * kLanes;
  return _mm512_fmadd_ps(_mm512_loadu_ps(values), found, sum);
}

inline __m512 add_slice(const WindowView& w, const float* x, int64_t step, int64_t end) {
  __m512 sum = _mm512_setzero_ps();
  while (step < end) {
    const int64_t stop = end - step > kChain ? step + kChain : end;
    __m512 chains[kChains];
    SPARSELT_UNROLL
    for (int i = 0; i < kChains; ++i) chains[i] = _mm512_setzero_ps();
    for (; step + kChains <= stop; step += kChains) {
      SPARSELT_UNROLL
      for (int i = 0; i < kChains; ++i) chains[i] = add_step(w, x, step + i, chains[i]);
    }
    for (; step < stop; ++step) chains[0] = add_step(w, x, step, chains[0]);
    const __m512 half = _mm512_add_ps(chains[0], chains[1]);
    sum = _mm512_add_ps(sum, _mm512_add_ps(half, _mm512_add_ps(chains[2], chains[3])));
  }
  return sum;
}

}  // namespace

void window_spmv_avx512(const SpmvCall& call, Range slices) {
  const WindowView& w = call.window;
  const Epilogue& e = call.epilogue;
  const __m512 lower = _mm512_set1_ps(e.lower);
  const __m512 upper = _mm512_set1_ps(e.upper);
  for (int64_t slice = slices.begin; slice < slices.end; ++slice) {
    const int32_t* rows = w.slice_rows + slice * kLanes;
    const __m512i at = _mm512_loadu_si512(rows);
    const __mmask16 held = _mm512_cmpge_epi32_mask(at, _mm512_setzero_si512());
    const int lanes = __builtin_popcount(held);
    __m512 sum = add_slice(w, call.x, w.slice_steps[slice], w.slice_steps[slice + 1]);
    if (e.bias) {
      const __m512 zero = _mm512_setzero_ps();
      sum = _mm512_add_ps(sum, _mm512_mask_i32gather_ps(zero, held, at, e.bias, sizeof(float)));
    }
    alignas(64) float out[kLanes] = {};
    if (e.residual) {
      for (int i = 0; i < lanes; ++i) out[i] = e.residual[rows[i] * call.y_row_stride];
      sum = _mm512_add_ps(sum, _mm512_load_ps(out));
    }
    // The second operand of max and min is the one that survives a NaN. (The masks are full: the
    // plain forms make GCC 12 warn of a register it leaves undefined on purpose.)
    sum = _mm512_maskz_max_ps(kAllLanes, lower, sum);
    _mm512_store_ps(out, _mm512_maskz_min_ps(kAllLanes, upper, sum));
    for (int i = 0; i < lanes; ++i) call.y[rows[i] * call.y_row_stride] = out[i];
  }
}

}  // namespace sparselt::cpu
SPARSELT_TARGET_END

#endif  // __x86_64__
