// SPDX-License-Identifier: Apache-2.0
//
// A panel of y = clamp(W x + bias + residual) for W in sliced ELL with column blocks: matrix
// product or convolution alike.
//
// For each block of columns, the panel's rows of x are first copied into a scratch that fits the L1
// cache, aligned and contiguous; padding, image borders and tails are masks of that copy, so the
// loop over stored values knows none of them. A slice of 4 rows by up to 4 vectors (64 columns)
// then stays in registers over the block: a stored value costs one broadcast, one 16-bit offset and
// a multiply-add a vector with x as aligned memory operand. Sums of all rows rest in a second
// scratch from block to block. Rows are sorted by length within a block, so loop exits are
// predicted and slices are full. Bound: with 2 loads and 2 multiply-adds a cycle, vectors /
// (vectors + 2) of peak, less the copy (vectors a column, shared by all rows) and the sums (2 a row
// and block). Slow for few rows (the copy dominates) and few columns (lanes lie idle).
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/target.h"
#include "kernels.h"

SPARSELT_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
#include "cpu/panel_avx512.h"

namespace sparselt::cpu {
namespace {

constexpr int kSliceRows = 4;

// The slices of one block of one section.
template <int NV>
void multiply_block(const PanelCall& call, const XBlock& x, int64_t first_slice, int64_t last_slice,
                    bool is_first, bool is_last) {
  const SellView& w = call.weight;
  for (int64_t slice = first_slice; slice < last_slice; ++slice) {
    const int32_t* rows = w.slice_rows + slice * kSliceRows;
    for (int r = 0; is_last && r < kSliceRows; ++r) {
      if (rows[r] >= 0) prefetch_row<NV>(call, rows[r]);
    }
    __m512 sum[kSliceRows][NV];
    for (int r = 0; r < kSliceRows; ++r) {
      for (int v = 0; v < NV; ++v) sum[r][v] = _mm512_setzero_ps();
    }
    for (int64_t step = w.slice_steps[slice]; step < w.slice_steps[slice + 1]; ++step) {
      const uint16_t* columns = w.columns + step * kSliceRows;
      const float* values = w.values + step * kSliceRows;
      for (int r = 0; r < kSliceRows; ++r) {
        const __m512 value = _mm512_set1_ps(values[r]);
        const int64_t at = int64_t{columns[r]} * kLanes;
        for (int v = 0; v < NV; ++v)
          sum[r][v] = _mm512_fmadd_ps(value, _mm512_load_ps(x.vectors[v] + at), sum[r][v]);
      }
    }
    if (is_last) {
      SPARSELT_UNROLL
      for (int r = 0; r < kSliceRows; ++r) {
        if (rows[r] >= 0) finish_row<NV>(call, rows[r], sum[r], is_first);
      }
    } else {
      SPARSELT_UNROLL
      for (int r = 0; r < kSliceRows; ++r) {
        if (rows[r] >= 0) add_to_row<NV>(call, rows[r], sum[r], is_first);
      }
    }
  }
}

}  // namespace

void sell_panel_avx512(const PanelCall& call, Range sections) {
  switch (call.panel.vectors) {
    case 1:
      return multiply_panel<1, multiply_block<1>>(call, sections);
    case 2:
      return multiply_panel<2, multiply_block<2>>(call, sections);
    case 3:
      return multiply_panel<3, multiply_block<3>>(call, sections);
    default:
      return multiply_panel<4, multiply_block<4>>(call, sections);
  }
}

}  // namespace sparselt::cpu
SPARSELT_TARGET_END

#endif  // __x86_64__
