// SPDX-License-Identifier: Apache-2.0
//
// A panel of y = clamp(W x + bias + residual) for W in rows of blocks, cut into blocks of columns:
// matrix product or convolution alike. bsell_panel_avx512.cpp tells the method.
//
// Sixteen registers allow 12 sums: tiles of 4 rows by 3 registers, two of them beside each other
// where a panel is wider. A column of the tile costs one offset, 3 loads of x and 4 broadcasts for
// 12 multiply-adds, which bind. Slow for panels of 16 columns: their 8 sums just hide the
// multiply-add's latency.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/target.h"
#include "kernels.h"

SPARSELT_TARGET_BEGIN("avx2,fma")
#include "cpu/panel_avx2.h"

namespace sparselt::cpu {
namespace {

constexpr int kTileRows = 4;

// Rows [first_row, first_row + kTileRows) of a slice, N registers from `first` on.
template <int NV, Ending kEnding, int N>
[[gnu::noinline]] void multiply_tile(const SellView& w, const XBlock& x, int64_t slice,
                                     int64_t first_row, int first, const Ends<NV, kEnding>& ends) {
  __m256 sum[kTileRows][N];
  SPARSELT_UNROLL
  for (int r = 0; r < kTileRows; ++r) {
    SPARSELT_UNROLL
    for (int i = 0; i < N; ++i) sum[r][i] = _mm256_setzero_ps();
  }
  const float* from[N];
  SPARSELT_UNROLL
  for (int i = 0; i < N; ++i) from[i] = register_of(x, first + i);
  const int64_t height = w.slice_height;
  const float* values = w.values + w.slice_steps[slice] * height + first_row;
  const auto* end = w.columns + w.slice_steps[slice + 1];
  for (const auto* column = w.columns + w.slice_steps[slice]; column < end; ++column) {
    const int64_t at = int64_t{*column} * kPieceLanes;
    __m256 data[N];
    SPARSELT_UNROLL
    for (int i = 0; i < N; ++i) data[i] = _mm256_load_ps(from[i] + at);
    SPARSELT_UNROLL
    for (int r = 0; r < kTileRows; ++r) {
      const __m256 value = _mm256_broadcast_ss(values + r);
      SPARSELT_UNROLL
      for (int i = 0; i < N; ++i) sum[r][i] = _mm256_fmadd_ps(value, data[i], sum[r][i]);
    }
    values += height;
  }
  const int32_t* rows = w.slice_rows + slice * w.slice_height + first_row;
  SPARSELT_UNROLL
  for (int r = 0; r < kTileRows; ++r) {
    if (rows[r] >= 0) ends.end_row(rows[r], first, sum[r]);
  }
}

template <int NV, Ending kEnding>
struct Slices {
  static void multiply(const PanelCall& call, const XBlock& x, Range slices, bool is_first,
                       Ahead& ahead) {
    constexpr int kTileRegisters = NV == 1 ? 2 : NV;
    const Ends<NV, kEnding> ends(call, is_first);
    const int64_t height = call.weight.slice_height;
    const int32_t* rows = call.weight.slice_rows + slices.begin * height;
    for (int64_t slice = slices.begin; slice < slices.end; ++slice, rows += height) {
      ahead.fetch();
      ends.prefetch(rows, height, slices.end - slice);
      for (int64_t row = 0; row < height; row += kTileRows) {
        for (int first = 0; first < 2 * NV; first += kTileRegisters) {
          multiply_tile<NV, kEnding, kTileRegisters>(call.weight, x, slice, row, first, ends);
        }
      }
      if (kEnding != Ending::kPieces) continue;
      for (int64_t r = 0; r < height; ++r) {
        if (rows[r] >= 0) ends.store_row(rows[r]);
      }
    }
  }
};

}  // namespace

void bsell_panel_avx2(const PanelCall& call, Range sections) {
  switch (call.panel.vectors) {
    case 1:
      return multiply_panel<Slices, 1>(call, sections);
    case 2:
      return multiply_panel<Slices, 2>(call, sections);
    default:
      return multiply_panel<Slices, 3>(call, sections);
  }
}

}  // namespace sparselt::cpu
SPARSELT_TARGET_END

#endif  // __x86_64__
