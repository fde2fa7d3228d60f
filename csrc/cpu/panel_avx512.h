// SPDX-License-Identifier: Apache-2.0
//
// What the AVX-512 panel kernels share: the copy of x into the scratch, and what is done with sums
// from block to block and at the end. Include inside the target region, after <immintrin.h>,
// cpu/target.h and kernels.h.
#pragma once

namespace sparselt::cpu {
namespace {

constexpr int kLanes = 16;
constexpr int kMaxVectors = 16;  // of a panel
constexpr __mmask16 kAllLanes = 0xffff;

// A block of x: row c of vector v is the 16 floats at vectors[v] + c * kLanes.
struct XBlock {
  const float* vectors[kMaxVectors];
};

// Rows [first, last) of x for this panel into the scratch, each vector with a row of zeros at the
// end: what a filled-up row multiplies its zeros with, since any other x could be infinite.
inline void copy_block(const PanelCall& call, int vectors, int64_t first, int64_t last) {
  const Panel& panel = call.panel;
  const int64_t stride = (call.weight.block_cols + 1) * kLanes;
  int64_t tap = first % panel.taps;
  const float* base = panel.x + first / panel.taps * panel.channel_stride;
  float* to = call.x_block;
  for (int64_t k = first; k < last; ++k, to += kLanes) {
    const Piece* pieces = panel.loads + tap * vectors;
    for (int v = 0; v < vectors; ++v) {
      _mm512_store_ps(to + v * stride,
                      _mm512_maskz_loadu_ps(pieces[v].mask, base + pieces[v].offset));
    }
    for (int32_t e = panel.tap_extra[tap]; e < panel.tap_extra[tap + 1]; ++e) {
      const Piece& piece = panel.extra_loads[e];
      float* at = to + piece.vector * stride;
      _mm512_store_ps(at,
                      _mm512_mask_loadu_ps(_mm512_load_ps(at), piece.mask, base + piece.offset));
    }
    if (++tap == panel.taps) {
      tap = 0;
      base += panel.channel_stride;
    }
  }
  for (int v = 0; v < vectors; ++v) {
    _mm512_store_ps(call.x_block + (v + 1) * stride - kLanes, _mm512_setzero_ps());
  }
}

// Block `block` of this panel's x: where it lies, or copied.
inline XBlock x_of_block(const PanelCall& call, int vectors, int64_t block) {
  const SellView& w = call.weight;
  const Panel& panel = call.panel;
  XBlock x{};
  if (!panel.loads) {
    const float* at = panel.x + block * panel.x_block_stride;
    for (int v = 0; v < vectors; ++v) x.vectors[v] = at + panel.x_places[v];
    return x;
  }
  const int64_t first = block * w.block_cols;
  const int64_t last = first + w.block_cols < w.cols ? first + w.block_cols : w.cols;
  copy_block(call, vectors, first, last);
  for (int v = 0; v < vectors; ++v) x.vectors[v] = call.x_block + v * (w.block_cols + 1) * kLanes;
  return x;
}

inline int64_t place_of_row(const PanelRows& rows, int64_t m) {
  return (m + static_cast<uint32_t>(m) / rows.period) * rows.stride;
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
  float* sums = call.sums + m * (NV * kLanes);
  if (call.epilogue.residual) {
    const float* residual = call.epilogue.residual + place_of_row(panel.residual_rows, m);
    for (int i = 0; i < panel.residual_rows.num_pieces; ++i) {
      const Piece& piece = panel.residual_rows.pieces[i];
      const __m512 sum = _mm512_load_ps(sums + piece.vector * kLanes);
      const __m512 more = _mm512_maskz_loadu_ps(piece.mask, residual + piece.offset);
      _mm512_store_ps(sums + piece.vector * kLanes, _mm512_mask_add_ps(sum, piece.mask, sum, more));
    }
  }
  float* y = panel.y + place_of_row(panel.y_rows, m);
  for (int i = 0; i < panel.y_rows.num_pieces; ++i) {
    const Piece& piece = panel.y_rows.pieces[i];
    const __m512 out = _mm512_load_ps(sums + piece.vector * kLanes);
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

// Whether each vector of the panel is one piece of y, and of the residual.
template <int NV>
bool is_whole(const PanelCall& call) {
  const Panel& panel = call.panel;
  return panel.y_rows.num_pieces == NV &&
         (!call.epilogue.residual || panel.residual_rows.num_pieces == NV);
}

// Ends row m with the sums of the last block, those of a whole panel from their registers.
template <int NV>
void finish_row(const PanelCall& call, int64_t m, const __m512 (&sum)[NV], bool is_first) {
  const Panel& panel = call.panel;
  if (!is_whole<NV>(call)) {
    add_to_row<NV>(call, m, sum, is_first);
    store_row<NV>(call, m);
    return;
  }
  const __m512 lower = _mm512_set1_ps(call.epilogue.lower);
  const __m512 upper = _mm512_set1_ps(call.epilogue.upper);
  const __m512 bias = _mm512_set1_ps(call.epilogue.bias ? call.epilogue.bias[m] : 0.0f);
  const float* sums = call.sums + m * (NV * kLanes);
  float* y = panel.y + place_of_row(panel.y_rows, m);
  const float* residual = call.epilogue.residual;
  if (residual) residual += place_of_row(panel.residual_rows, m);
  SPARSELT_UNROLL
  for (int v = 0; v < NV; ++v) {
    __m512 out = _mm512_add_ps(is_first ? bias : _mm512_load_ps(sums + v * kLanes), sum[v]);
    if (residual) {
      const Piece& piece = panel.residual_rows.pieces[v];
      out = _mm512_add_ps(out, _mm512_maskz_loadu_ps(piece.mask, residual + piece.offset));
    }
    const Piece& piece = panel.y_rows.pieces[v];
    _mm512_mask_storeu_ps(y + piece.offset, piece.mask, clamp(out, lower, upper));
  }
}

// Rows of a slice are far apart, which no hardware foresees: fetches row m of y and of the residual
// before the slice is multiplied. (Inlined: GCC 12 takes a function that only prefetches for one
// without effect and drops its calls.)
template <int NV>
[[gnu::always_inline]] inline void prefetch_row(const PanelCall& call, int64_t m) {
  if (!is_whole<NV>(call)) return;
  const Panel& panel = call.panel;
  const float* y = panel.y + place_of_row(panel.y_rows, m);
  SPARSELT_UNROLL
  for (int v = 0; v < NV; ++v) __builtin_prefetch(y + panel.y_rows.pieces[v].offset, 1);
  if (!call.epilogue.residual) return;
  const float* residual = call.epilogue.residual + place_of_row(panel.residual_rows, m);
  SPARSELT_UNROLL
  for (int v = 0; v < NV; ++v) __builtin_prefetch(residual + panel.residual_rows.pieces[v].offset);
}

using BlockFunction = void (*)(const PanelCall& call, const XBlock& x, int64_t first_slice,
                               int64_t last_slice, bool is_first, bool is_last);

// The panel, block by block of columns; `kMultiply` does the slices of one block of one section.
template <int NV, BlockFunction kMultiply>
void multiply_panel(const PanelCall& call, Range sections) {
  const SellView& w = call.weight;
  for (int64_t block = 0; block < w.num_blocks; ++block) {
    const XBlock x = x_of_block(call, NV, block);
    for (int64_t section = sections.begin; section < sections.end; ++section) {
      const int32_t* slices = w.block_slices + section * w.num_blocks + block;
      kMultiply(call, x, slices[0], slices[1], block == 0, block + 1 == w.num_blocks);
    }
  }
}

}  // namespace
}  // namespace sparselt::cpu
