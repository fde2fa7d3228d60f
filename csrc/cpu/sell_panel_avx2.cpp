// SPDX-License-Identifier: Apache-2.0
//
// A panel of y = clamp(W x + bias + residual) for W in sliced ELL with column blocks: matrix
// product or convolution alike. kernels.h says what a panel is; sell_panel_avx512.cpp tells the
// method.
//
// Sixteen registers allow 12 sums: slices of 2 rows by up to 6 vectors (48 columns), so that a
// stored value costs one broadcast for 6 multiply-adds with x as memory operand. Bound: with 2
// loads and 2 multiply-adds a cycle, 6 / 7 of peak, less the copy of x and the sums. Slow for few
// rows and for few columns (4 sums or fewer do not hide the multiply-add's latency).
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/target.h"
#include "kernels.h"

SPARSELT_TARGET_BEGIN("avx2,fma")
#include "cpu/panel_avx2.h"

namespace sparselt::cpu {
namespace {

constexpr int kSliceRows = 2;

// The slices of one block of one section.
template <int NV>
void multiply_block(const PanelCall& call, const XBlock& x, int64_t first_slice, int64_t last_slice,
                    bool is_first, bool is_last) {
  const SellView& w = call.weight;
  for (int64_t slice = first_slice; slice < last_slice; ++slice) {
    const int32_t* rows = w.slice_rows + slice * kSliceRows;
    __m256 sum[kSliceRows][2 * NV];
    for (int r = 0; r < kSliceRows; ++r) {
      for (int i = 0; i < 2 * NV; ++i) sum[r][i] = _mm256_setzero_ps();
    }
    for (int64_t step = w.slice_steps[slice]; step < w.slice_steps[slice + 1]; ++step) {
      const uint16_t* columns = w.columns + step * kSliceRows;
      const float* values = w.values + step * kSliceRows;
      for (int r = 0; r < kSliceRows; ++r) {
        const __m256 value = _mm256_broadcast_ss(values + r);
        const int64_t at = int64_t{columns[r]} * kPieceLanes;
        for (int i = 0; i < 2 * NV; ++i) {
          const float* data = x.vectors[i / 2] + i % 2 * kLanes;
          sum[r][i] = _mm256_fmadd_ps(value, _mm256_load_ps(data + at), sum[r][i]);
        }
      }
    }
    if (is_last && is_whole<NV>(call)) {
      SPARSELT_UNROLL
      for (int r = 0; r < kSliceRows; ++r) {
        if (rows[r] >= 0) finish_row<NV>(call, rows[r], 0, sum[r], is_first);
      }
      continue;
    }
    SPARSELT_UNROLL
    for (int r = 0; r < kSliceRows; ++r) {
      if (rows[r] >= 0) add_to_row<NV>(call, rows[r], 0, sum[r], is_first);
    }
    if (!is_last) continue;
    for (int r = 0; r < kSliceRows; ++r) {
      if (rows[r] >= 0) store_row<NV>(call, rows[r]);
    }
  }
}

}  // namespace

void sell_panel_avx2(const PanelCall& call, Range sections) {
  switch (call.panel.vectors) {
    case 1:
      return multiply_panel<1, multiply_block<1>>(call, sections);
    case 2:
      return multiply_panel<2, multiply_block<2>>(call, sections);
    default:
      return multiply_panel<3, multiply_block<3>>(call, sections);
  }
}

}  // namespace sparselt::cpu
SPARSELT_TARGET_END

#endif  // __x86_64__
