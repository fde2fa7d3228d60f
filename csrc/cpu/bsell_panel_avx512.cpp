// SPDX-License-Identifier: Apache-2.0
//
// A panel of y = clamp(W x + bias + residual) for W in rows of blocks, cut into blocks of columns:
// matrix product or convolution alike.
//
// As in sell_panel_avx512.cpp each block's rows of x are copied into a scratch. A slice is a row of
// blocks, slice_height x 1 each: its rows share their columns, so a vector of x is loaded once for
// a tile of 4 rows, and a column of the tile costs one 16-bit offset, 4 loads of x and 4 broadcasts
// for 16 multiply-adds: these bind, not loads. Slices of 8 or 16 rows are tiles one below the
// other, for which x has just been used. What is left of the peak goes to the copy and to the sums,
// as there.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/target.h"
#include "kernels.h"

SPARSELT_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
#include "cpu/panel_avx512.h"

namespace sparselt::cpu {
namespace {

// Rows [first, first + R) of a slice.
template <int R, int NV>
void multiply_tile(const PanelCall& call, const XBlock& x, int64_t slice, int64_t first,
                   bool is_first, bool is_last) {
  const SellView& w = call.weight;
  __m512 sum[R][NV];
  SPARSELT_UNROLL
  for (int r = 0; r < R; ++r) {
    SPARSELT_UNROLL
    for (int v = 0; v < NV; ++v) sum[r][v] = _mm512_setzero_ps();
  }
  const float* values = w.values + w.slice_steps[slice] * w.slice_height + first;
  for (int64_t step = w.slice_steps[slice]; step < w.slice_steps[slice + 1]; ++step) {
    const int64_t at = int64_t{w.columns[step]} * kLanes;
    __m512 data[NV];
    SPARSELT_UNROLL
    for (int v = 0; v < NV; ++v) data[v] = _mm512_load_ps(x.vectors[v] + at);
    SPARSELT_UNROLL
    for (int r = 0; r < R; ++r) {
      const __m512 value = _mm512_set1_ps(values[r]);
      SPARSELT_UNROLL
      for (int v = 0; v < NV; ++v) sum[r][v] = _mm512_fmadd_ps(value, data[v], sum[r][v]);
    }
    values += w.slice_height;
  }
  const int32_t* rows = w.slice_rows + slice * w.slice_height + first;
  if (is_last) {
    SPARSELT_UNROLL
    for (int r = 0; r < R; ++r) {
      if (rows[r] >= 0) finish_row<NV>(call, rows[r], sum[r], is_first);
    }
  } else {
    SPARSELT_UNROLL
    for (int r = 0; r < R; ++r) {
      if (rows[r] >= 0) add_to_row<NV>(call, rows[r], sum[r], is_first);
    }
  }
}

template <int NV>
void multiply_block(const PanelCall& call, const XBlock& x, int64_t first_slice, int64_t last_slice,
                    bool is_first, bool is_last) {
  constexpr int kTallTile = NV == 4 ? 4 : 8;  // 8 x 4 sums would leave no register for x
  const int64_t height = call.weight.slice_height;
  for (int64_t slice = first_slice; slice < last_slice; ++slice) {
    int64_t row = 0;
    for (; row + kTallTile <= height; row += kTallTile) {
      multiply_tile<kTallTile, NV>(call, x, slice, row, is_first, is_last);
    }
    if (row < height) multiply_tile<4, NV>(call, x, slice, row, is_first, is_last);
  }
}

}  // namespace

void bsell_panel_avx512(const PanelCall& call, Range sections) {
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
