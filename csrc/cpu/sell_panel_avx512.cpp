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

namespace sparselt::cpu {
namespace {

constexpr int kLanes = 16;
constexpr int kSliceRows = 4;
constexpr __mmask16 kAllLanes = 0xffff;

// Rows [first, last) of x for this panel into the scratch, one of NV vectors each.
template <int NV>
void load_block(const Panel& panel, int64_t first, int64_t last, float* block) {
  int64_t tap = first % panel.taps;
  const float* base = panel.x + first / panel.taps * panel.channel_stride;
  for (int64_t k = first; k < last; ++k, block += NV * kLanes) {
    const Piece* pieces = panel.loads + tap * NV;
    for (int v = 0; v < NV; ++v) {
      _mm512_store_ps(block + v * kLanes,
                      _mm512_maskz_loadu_ps(pieces[v].mask, base + pieces[v].offset));
    }
    for (int32_t e = panel.tap_extra[tap]; e < panel.tap_extra[tap + 1]; ++e) {
      const Piece& piece = panel.extra_loads[e];
      float* at = block + piece.vector * kLanes;
      _mm512_store_ps(at,
                      _mm512_mask_loadu_ps(_mm512_load_ps(at), piece.mask, base + piece.offset));
    }
    if (++tap == panel.taps) {
      tap = 0;
      base += panel.channel_stride;
    }
  }
}

// The second operand of max and min is the one that survives a NaN. (The masks are full: the plain
// forms make GCC 12 warn of a register it leaves undefined on purpose.)
inline __m512 clamp(__m512 sum, __m512 lower, __m512 upper) {
  return _mm512_maskz_min_ps(kAllLanes, upper, _mm512_maskz_max_ps(kAllLanes, lower, sum));
}

// Residual, clamp and store of a finished row.
template <int NV>
void store_row(const PanelCall& call, int64_t m) {
  const Panel& panel = call.panel;
  const __m512 lower = _mm512_set1_ps(call.epilogue.lower);
  const __m512 upper = _mm512_set1_ps(call.epilogue.upper);
  const float* sums = call.sums + m * (NV * kLanes);
  float* y = panel.y + m * panel.y_stride;
  const float* residual =
      call.epilogue.residual ? call.epilogue.residual + m * panel.y_stride : nullptr;
  for (int i = 0; i < panel.num_stores; ++i) {
    const Piece& piece = panel.stores[i];
    __m512 out = _mm512_load_ps(sums + piece.vector * kLanes);
    if (residual) {
      out = _mm512_add_ps(out, _mm512_maskz_loadu_ps(piece.mask, residual + piece.offset));
    }
    _mm512_mask_storeu_ps(y + piece.offset, piece.mask, clamp(out, lower, upper));
  }
}

// The slices of one block of one section.
template <int NV>
void multiply_block(const PanelCall& call, int64_t first_slice, int64_t last_slice, bool is_first,
                    bool is_last) {
  const SellView& w = call.weight;
  for (int64_t slice = first_slice; slice < last_slice; ++slice) {
    const int32_t* rows = w.slice_rows + slice * kSliceRows;
    __m512 sum[kSliceRows][NV];
    for (int r = 0; r < kSliceRows; ++r) {
      for (int v = 0; v < NV; ++v) sum[r][v] = _mm512_setzero_ps();
    }
    for (int64_t step = w.slice_steps[slice]; step < w.slice_steps[slice + 1]; ++step) {
      const uint16_t* columns = w.columns + step * kSliceRows;
      const float* values = w.values + step * kSliceRows;
      for (int r = 0; r < kSliceRows; ++r) {
        const __m512 value = _mm512_set1_ps(values[r]);
        const float* x = call.x_block + int64_t{columns[r]} * (NV * kLanes);
        for (int v = 0; v < NV; ++v)
          sum[r][v] = _mm512_fmadd_ps(value, _mm512_load_ps(x + v * kLanes), sum[r][v]);
      }
    }
    SPARSELT_UNROLL
    for (int r = 0; r < kSliceRows; ++r) {
      const int64_t m = rows[r];
      if (m < 0) continue;
      float* sums = call.sums + m * (NV * kLanes);
      const __m512 bias = _mm512_set1_ps(call.epilogue.bias ? call.epilogue.bias[m] : 0.0f);
      SPARSELT_UNROLL
      for (int v = 0; v < NV; ++v) {
        const __m512 before = is_first ? bias : _mm512_load_ps(sums + v * kLanes);
        _mm512_store_ps(sums + v * kLanes, _mm512_add_ps(before, sum[r][v]));
      }
    }
    if (!is_last) continue;
    for (int r = 0; r < kSliceRows; ++r) {
      if (rows[r] >= 0) store_row<NV>(call, rows[r]);
    }
  }
}

template <int NV>
void multiply_panel(const PanelCall& call, Range sections) {
  const SellView& w = call.weight;
  // What a filled-up row multiplies its zeros with: any other x could be infinite.
  for (int v = 0; v < NV; ++v)
    _mm512_store_ps(call.x_block + (w.block_cols * NV + v) * kLanes, _mm512_setzero_ps());
  for (int64_t block = 0; block < w.num_blocks; ++block) {
    const int64_t first = block * w.block_cols;
    const int64_t last = first + w.block_cols < w.cols ? first + w.block_cols : w.cols;
    load_block<NV>(call.panel, first, last, call.x_block);
    for (int64_t section = sections.begin; section < sections.end; ++section) {
      const int32_t* slices = w.block_slices + section * w.num_blocks + block;
      multiply_block<NV>(call, slices[0], slices[1], block == 0, block + 1 == w.num_blocks);
    }
  }
}

}  // namespace

void sell_panel_avx512(const PanelCall& call, Range sections) {
  switch (call.panel.vectors) {
    case 1:
      return multiply_panel<1>(call, sections);
    case 2:
      return multiply_panel<2>(call, sections);
    case 3:
      return multiply_panel<3>(call, sections);
    default:
      return multiply_panel<4>(call, sections);
  }
}

}  // namespace sparselt::cpu
SPARSELT_TARGET_END

#endif  // __x86_64__
