// SPDX-License-Identifier: Apache-2.0
//
// A panel of y = clamp(W x + bias + residual) for W in rows of blocks, cut into blocks of columns:
// matrix product or convolution alike. bsell_panel_avx512.cpp tells the method.
//
// A tile is 4 rows by one of the panel's vectors, 16 sums of 32 registers: a column of it costs one
// offset, 4 loads of x and 4 values for 16 multiply-adds, which bind. Of 24 sums, two tiles for a
// panel of 48 columns instead of three, GCC 12 keeps two in memory. Not timed on hardware yet.
#if defined(__aarch64__)
#include "cpu/panel_neon.h"

namespace sparselt::cpu {
namespace {

constexpr int kTileRows = 4;

// Rows [first_row, first_row + kTileRows) of a slice, vector `v` of the panel.
template <int NV>
void multiply_tile(const PanelCall& call, const XBlock& x, int64_t slice, int64_t first_row, int v,
                   bool is_first) {
  const SellView& w = call.weight;
  float32x4_t sum[kTileRows][kQuads];
  SPARSELT_UNROLL
  for (int r = 0; r < kTileRows; ++r) {
    SPARSELT_UNROLL
    for (int i = 0; i < kQuads; ++i) sum[r][i] = vdupq_n_f32(0.0f);
  }
  const float* values = w.values + w.slice_steps[slice] * w.slice_height + first_row;
  const float* vector = x.vectors[v];
  for (int64_t step = w.slice_steps[slice]; step < w.slice_steps[slice + 1]; ++step) {
    const float* at = vector + int64_t{w.columns[step]} * kPieceLanes;
    float32x4_t data[kQuads];
    SPARSELT_UNROLL
    for (int i = 0; i < kQuads; ++i) data[i] = vld1q_f32(at + i * kLanes);
    SPARSELT_UNROLL
    for (int r = 0; r < kTileRows; ++r) {
      const float value = values[r];
      SPARSELT_UNROLL
      for (int i = 0; i < kQuads; ++i) sum[r][i] = vfmaq_n_f32(sum[r][i], data[i], value);
    }
    values += w.slice_height;
  }
  const int32_t* rows = w.slice_rows + slice * w.slice_height + first_row;
  SPARSELT_UNROLL
  for (int r = 0; r < kTileRows; ++r) {
    if (rows[r] >= 0) add_to_row<NV>(call, rows[r], v * kQuads, sum[r], is_first);
  }
}

template <int NV>
void multiply_block(const PanelCall& call, const XBlock& x, int64_t first_slice, int64_t last_slice,
                    bool is_first, bool is_last) {
  const int64_t height = call.weight.slice_height;
  for (int64_t slice = first_slice; slice < last_slice; ++slice) {
    for (int64_t row = 0; row < height; row += kTileRows) {
      for (int v = 0; v < NV; ++v) multiply_tile<NV>(call, x, slice, row, v, is_first);
    }
    if (!is_last) continue;
    const int32_t* rows = call.weight.slice_rows + slice * height;
    for (int64_t r = 0; r < height; ++r) {
      if (rows[r] >= 0) store_row<NV>(call, rows[r]);
    }
  }
}

}  // namespace

void bsell_panel_neon(const PanelCall& call, Range sections) {
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

#endif  // __aarch64__
