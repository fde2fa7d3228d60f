// SPDX-License-Identifier: Apache-2.0
//
// A panel of y = clamp(W x + bias + residual) for W in sliced ELL with column blocks: matrix
// product or convolution alike. kernels.h says what a panel is; sell_panel_avx512.cpp tells the
// method.
//
// Rows of a slice meet different columns, so every multiply-add needs an x of its own and loads
// bind; what a wide tile saves is the value and the column of each stored value. Slices of 2 rows
// by up to 12 registers (48 columns) take 24 sums of 32 registers: 12 loads of x for 2 others, 12 /
// 14 of the loads' rate, against 6 / 8 of slices of 4 rows by 24 columns; and 128 columns of x are
// 24 KB, well inside the 64 KB of L1 that most such CPUs have. One panel vector still gives 8 sums,
// enough for 2 multiply-add pipes of latency 4. Slow for few rows (the copy of x dominates) and few
// columns (lanes lie idle); NEON has no masked loads, so the copy of a border goes lane by lane.
#if defined(__aarch64__)
#include "cpu/panel_neon.h"

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
    float32x4_t sum[kSliceRows][kQuads * NV];
    for (int r = 0; r < kSliceRows; ++r) {
      for (int i = 0; i < kQuads * NV; ++i) sum[r][i] = vdupq_n_f32(0.0f);
    }
    for (int64_t step = w.slice_steps[slice]; step < w.slice_steps[slice + 1]; ++step) {
      const uint16_t* columns = w.columns + step * kSliceRows;
      const float* values = w.values + step * kSliceRows;
      for (int r = 0; r < kSliceRows; ++r) {
        const float value = values[r];
        const int64_t at = int64_t{columns[r]} * kPieceLanes;
        for (int i = 0; i < kQuads * NV; ++i) {
          const float* data = x.vectors[i / kQuads] + i % kQuads * kLanes;
          sum[r][i] = vfmaq_n_f32(sum[r][i], vld1q_f32(data + at), value);
        }
      }
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

void sell_panel_neon(const PanelCall& call, Range sections) {
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
