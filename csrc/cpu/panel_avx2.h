// SPDX-License-Identifier: Apache-2.0
//
// What the AVX2 panel kernels share: the copy of x into the scratch, and what is done with sums
// from block to block and at the end. Include inside the target region, after <immintrin.h>,
// cpu/target.h and kernels.h.
#pragma once

namespace sparselt::cpu {
namespace {

constexpr int kLanes = 8;        // floats a register
constexpr int kPieceLanes = 16;  // floats a vector of a panel: two registers
constexpr int kMaxVectors = 3;   // of a panel

// The lanes of one half of a piece, as maskload and maskstore want them.
inline __m256i half_mask(uint16_t mask, int half) {
  const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i all = _mm256_set1_epi32(mask >> (half * kLanes));
  return _mm256_cmpeq_epi32(_mm256_and_si256(all, bits), bits);
}

// Lanes outside the mask are zero.
inline __m256 load_half(const float* base, const Piece& piece, int half) {
  const float* at = base + piece.offset + half * kLanes;
  if (piece.mask == 0xffff) return _mm256_loadu_ps(at);
  return _mm256_maskload_ps(at, half_mask(piece.mask, half));
}

// A block of x: row c of vector v is the 16 floats at vectors[v] + c * kPieceLanes.
struct XBlock {
  const float* vectors[kMaxVectors];
};

// Register i of each row.
inline const float* register_of(const XBlock& x, int i) {
  return x.vectors[i / 2] + i % 2 * kLanes;
}

// Rows [first, last) of x for this panel into the scratch, each vector with a row of zeros at the
// end: what a filled-up row multiplies its zeros with, since any other x could be infinite.
template <int NV>
void copy_block(const PanelCall& call, int64_t first, int64_t last) {
  const Panel& panel = call.panel;
  const int64_t stride = (call.weight.block_cols + 1) * kPieceLanes;
  int64_t tap = first % panel.taps;
  const float* base = panel.x + first / panel.taps * panel.channel_stride;
  float* to = call.x_block;
  for (int64_t k = first; k < last; ++k, to += kPieceLanes) {
    const Piece* pieces = panel.loads + tap * NV;
    for (int i = 0; i < 2 * NV; ++i) {
      _mm256_store_ps(to + i / 2 * stride + i % 2 * kLanes, load_half(base, pieces[i / 2], i % 2));
    }
    for (int32_t e = panel.tap_extra[tap]; e < panel.tap_extra[tap + 1]; ++e) {
      const Piece& piece = panel.extra_loads[e];
      for (int half = 0; half < 2; ++half) {
        float* at = to + piece.vector * stride + half * kLanes;
        // Pieces of a vector share no lane, and their other lanes are zero.
        const __m256 more = load_half(base, piece, half);
        _mm256_store_ps(at, _mm256_or_ps(_mm256_load_ps(at), more));
      }
    }
    if (++tap == panel.taps) {
      tap = 0;
      base += panel.channel_stride;
    }
  }
  for (int i = 0; i < 2 * NV; ++i) {
    float* filler = call.x_block + (i / 2 + 1) * stride - kPieceLanes;
    _mm256_store_ps(filler + i % 2 * kLanes, _mm256_setzero_ps());
  }
}

// Block `block` of this panel's x: where it lies, or copied.
template <int NV>
XBlock x_of_block(const PanelCall& call, int64_t block) {
  const SellView& w = call.weight;
  const Panel& panel = call.panel;
  XBlock x{};
  if (!panel.loads) {
    const float* at = panel.x + block * panel.x_block_stride;
    for (int v = 0; v < NV; ++v) x.vectors[v] = at + panel.x_places[v];
    return x;
  }
  const int64_t first = block * w.block_cols;
  const int64_t last = first + w.block_cols < w.cols ? first + w.block_cols : w.cols;
  copy_block<NV>(call, first, last);
  for (int v = 0; v < NV; ++v) x.vectors[v] = call.x_block + v * (w.block_cols + 1) * kPieceLanes;
  return x;
}

inline int64_t place_of_row(const PanelRows& rows, int64_t m) {
  return (m + static_cast<uint32_t>(m) / rows.period) * rows.stride;
}

// Clamp and store of one half of a piece.
inline void store_half(__m256 sum, const Piece& piece, int half, const Epilogue& e, float* y) {
  // The second operand of max and min is the one that survives a NaN.
  sum = _mm256_max_ps(_mm256_set1_ps(e.lower), sum);
  sum = _mm256_min_ps(_mm256_set1_ps(e.upper), sum);
  float* at = y + piece.offset + half * kLanes;
  if (piece.mask == 0xffff) {
    _mm256_storeu_ps(at, sum);
  } else {
    _mm256_maskstore_ps(at, half_mask(piece.mask, half), sum);
  }
}

// Residual, clamp and store of a finished row.
template <int NV>
void store_row(const PanelCall& call, int64_t m) {
  const Panel& panel = call.panel;
  float* sums = call.sums + m * (NV * kPieceLanes);
  if (call.epilogue.residual) {
    const float* residual = call.epilogue.residual + place_of_row(panel.residual_rows, m);
    for (int i = 0; i < 2 * panel.residual_rows.num_pieces; ++i) {
      const Piece& piece = panel.residual_rows.pieces[i / 2];
      float* at = sums + piece.vector * kPieceLanes + i % 2 * kLanes;
      const __m256 sum = _mm256_load_ps(at);
      const __m256 all = _mm256_add_ps(sum, load_half(residual, piece, i % 2));
      const __m256 lanes = _mm256_castsi256_ps(half_mask(piece.mask, i % 2));
      _mm256_store_ps(at, _mm256_blendv_ps(sum, all, lanes));
    }
  }
  float* y = panel.y + place_of_row(panel.y_rows, m);
  for (int i = 0; i < 2 * panel.y_rows.num_pieces; ++i) {
    const Piece& piece = panel.y_rows.pieces[i / 2];
    const float* at = sums + piece.vector * kPieceLanes + i % 2 * kLanes;
    store_half(_mm256_load_ps(at), piece, i % 2, call.epilogue, y);
  }
}

// Adds a block's sums of row m, registers [first, first + N) of the panel, to those of the blocks
// before; the first block adds the bias.
template <int NV, int N>
void add_to_row(const PanelCall& call, int64_t m, int first, const __m256 (&sum)[N],
                bool is_first) {
  float* sums = call.sums + m * (NV * kPieceLanes) + first * kLanes;
  const __m256 bias = _mm256_set1_ps(call.epilogue.bias ? call.epilogue.bias[m] : 0.0f);
  SPARSELT_UNROLL
  for (int i = 0; i < N; ++i) {
    const __m256 before = is_first ? bias : _mm256_load_ps(sums + i * kLanes);
    _mm256_store_ps(sums + i * kLanes, _mm256_add_ps(before, sum[i]));
  }
}

// Whether each vector of the panel is one piece of y, and of the residual.
template <int NV>
bool is_whole(const PanelCall& call) {
  const Panel& panel = call.panel;
  return panel.y_rows.num_pieces == NV &&
         (!call.epilogue.residual || panel.residual_rows.num_pieces == NV);
}

// Ends row m, registers [first, first + N) of a whole panel, with the sums of the last block, from
// their registers.
template <int NV, int N>
void finish_row(const PanelCall& call, int64_t m, int first, const __m256 (&sum)[N],
                bool is_first) {
  const Panel& panel = call.panel;
  const float* sums = call.sums + m * (NV * kPieceLanes) + first * kLanes;
  const __m256 bias = _mm256_set1_ps(call.epilogue.bias ? call.epilogue.bias[m] : 0.0f);
  float* y = panel.y + place_of_row(panel.y_rows, m);
  const float* residual = call.epilogue.residual;
  if (residual) residual += place_of_row(panel.residual_rows, m);
  SPARSELT_UNROLL
  for (int i = 0; i < N; ++i) {
    const int vector = (first + i) / 2;
    const int half = (first + i) % 2;
    const __m256 before = is_first ? bias : _mm256_load_ps(sums + i * kLanes);
    __m256 out = _mm256_add_ps(before, sum[i]);
    if (residual) {
      out = _mm256_add_ps(out, load_half(residual, panel.residual_rows.pieces[vector], half));
    }
    store_half(out, panel.y_rows.pieces[vector], half, call.epilogue, y);
  }
}

using BlockFunction = void (*)(const PanelCall& call, const XBlock& x, int64_t first_slice,
                               int64_t last_slice, bool is_first, bool is_last);

// The panel, block by block of columns; `kMultiply` does the slices of one block of one section.
template <int NV, BlockFunction kMultiply>
void multiply_panel(const PanelCall& call, Range sections) {
  const SellView& w = call.weight;
  for (int64_t block = 0; block < w.num_blocks; ++block) {
    const XBlock x = x_of_block<NV>(call, block);
    for (int64_t section = sections.begin; section < sections.end; ++section) {
      const int32_t* slices = w.block_slices + section * w.num_blocks + block;
      kMultiply(call, x, slices[0], slices[1], block == 0, block + 1 == w.num_blocks);
    }
  }
}

}  // namespace
}  // namespace sparselt::cpu
