// SPDX-License-Identifier: Apache-2.0
//
// What the AVX-512 panel kernels share: the copy of x into the scratch, and what is done with sums
// from block to block and at the end. Include inside the target region, after <immintrin.h>,
// cpu/target.h and kernels.h.
#pragma once

namespace sparselt::cpu {
namespace {

constexpr int kLanes = 16;
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

// Adds a block's sums of row m to those of the blocks before; the first block adds the bias.
template <int NV>
void add_to_row(const PanelCall& call, int64_t m, const __m512 (&sum)[NV], bool is_first) {
  float* sums = call.sums + m * (NV * kLanes);
  const __m512 bias = _mm512_set1_ps(call.epilogue.bias ? call.epilogue.bias[m] : 0.0f);
  SPARSELT_UNROLL
  for (int v = 0; v < NV; ++v) {
    const __m512 before = is_first ? bias : _mm512_load_ps(sums + v * kLanes);
    _mm512_store_ps(sums + v * kLanes, _mm512_add_ps(before, sum[v]));
  }
}

// Ends row m with the sums of the last block. Where each vector has one place in y they go there
// from their registers.
template <int NV>
void finish_row(const PanelCall& call, int64_t m, const __m512 (&sum)[NV], bool is_first) {
  const Panel& panel = call.panel;
  if (panel.num_stores != NV) {
    add_to_row<NV>(call, m, sum, is_first);
    store_row<NV>(call, m);
    return;
  }
  const __m512 lower = _mm512_set1_ps(call.epilogue.lower);
  const __m512 upper = _mm512_set1_ps(call.epilogue.upper);
  const __m512 bias = _mm512_set1_ps(call.epilogue.bias ? call.epilogue.bias[m] : 0.0f);
  const float* sums = call.sums + m * (NV * kLanes);
  float* y = panel.y + m * panel.y_stride;
  const float* residual =
      call.epilogue.residual ? call.epilogue.residual + m * panel.y_stride : nullptr;
  SPARSELT_UNROLL
  for (int v = 0; v < NV; ++v) {
    const Piece& piece = panel.stores[v];
    __m512 out = _mm512_add_ps(is_first ? bias : _mm512_load_ps(sums + v * kLanes), sum[v]);
    if (residual) {
      out = _mm512_add_ps(out, _mm512_maskz_loadu_ps(piece.mask, residual + piece.offset));
    }
    _mm512_mask_storeu_ps(y + piece.offset, piece.mask, clamp(out, lower, upper));
  }
}

// Rows of a slice are far apart, which no hardware foresees: fetches row m of y and of the residual
// before the slice is multiplied.
template <int NV>
void prefetch_row(const PanelCall& call, int64_t m) {
  const int64_t at = m * call.panel.y_stride + call.panel.stores[0].offset;
  SPARSELT_UNROLL
  for (int v = 0; v < NV; ++v) __builtin_prefetch(call.panel.y + at + v * kLanes, 1);
  if (!call.epilogue.residual) return;
  SPARSELT_UNROLL
  for (int v = 0; v < NV; ++v) __builtin_prefetch(call.epilogue.residual + at + v * kLanes);
}

using BlockFunction = void (*)(const PanelCall& call, int64_t first_slice, int64_t last_slice,
                               bool is_first, bool is_last);

// The panel, block by block of columns; `kMultiply` does the slices of one block of one section.
template <int NV, BlockFunction kMultiply>
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
      kMultiply(call, slices[0], slices[1], block == 0, block + 1 == w.num_blocks);
    }
  }
}

}  // namespace
}  // namespace sparselt::cpu
