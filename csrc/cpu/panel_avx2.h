// SPDX-License-Identifier: Apache-2.0
//
// What the AVX2 panel kernels share: what is done with sums from block to block and at the end.
// Include inside the target region, after <immintrin.h>, cpu/target.h and kernels.h.
#pragma once

#include "cpu/ahead.h"
#include "cpu/panel_copy_avx2.h"

namespace sparselt::cpu {
namespace {

inline int64_t place_of_row(const PanelRows& rows, int64_t m) {
  return (m + static_cast<uint32_t>(m) / rows.period) * rows.stride;
}

// The second operand of max and min is the one that survives a NaN.
inline __m256 clamp(__m256 sum, __m256 lower, __m256 upper) {
  return _mm256_min_ps(upper, _mm256_max_ps(lower, sum));
}

// Masked stores are slow on AMD.
inline void store_half(__m256 sum, const Piece& piece, int half, float* y) {
  float* at = y + piece.offset + half * kLanes;
  const unsigned bits = half_bits(piece, half);
  if (bits == kHalf) {
    _mm256_storeu_ps(at, sum);
  } else if (bits != 0) {
    _mm256_maskstore_ps(at, half_mask(bits), sum);
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
      const __m256 lanes = _mm256_castsi256_ps(half_mask(half_bits(piece, i % 2)));
      _mm256_store_ps(at, _mm256_blendv_ps(sum, all, lanes));
    }
  }
  const __m256 lower = _mm256_set1_ps(call.epilogue.lower);
  const __m256 upper = _mm256_set1_ps(call.epilogue.upper);
  float* y = panel.y + place_of_row(panel.y_rows, m);
  for (int i = 0; i < 2 * panel.y_rows.num_pieces; ++i) {
    const Piece& piece = panel.y_rows.pieces[i / 2];
    const float* at = sums + piece.vector * kPieceLanes + i % 2 * kLanes;
    store_half(clamp(_mm256_load_ps(at), lower, upper), piece, i % 2, y);
  }
}

// A block's sums of row m, registers [first, first + N) of the panel, with those of the blocks
// before; the first block adds the bias. (Inlined like all that follow, or GCC 12 would keep sums
// in memory, and in the loops that make them at that.)
template <int NV, int N>
[[gnu::always_inline]] inline void add_before(const PanelCall& call, int64_t m, int first,
                                              __m256 (&sum)[N], bool is_first) {
  if (is_first) {
    const __m256 bias = _mm256_set1_ps(call.epilogue.bias ? call.epilogue.bias[m] : 0.0f);
    SPARSELT_UNROLL
    for (int i = 0; i < N; ++i) sum[i] = _mm256_add_ps(bias, sum[i]);
  } else {
    const float* sums = call.sums + m * (NV * kPieceLanes) + first * kLanes;
    SPARSELT_UNROLL
    for (int i = 0; i < N; ++i) sum[i] = _mm256_add_ps(_mm256_load_ps(sums + i * kLanes), sum[i]);
  }
}

template <int NV, int N>
[[gnu::always_inline]] inline void keep_row(const PanelCall& call, int64_t m, int first,
                                            const __m256 (&sum)[N]) {
  float* sums = call.sums + m * (NV * kPieceLanes) + first * kLanes;
  SPARSELT_UNROLL
  for (int i = 0; i < N; ++i) _mm256_store_ps(sums + i * kLanes, sum[i]);
}

// What becomes of the sums of a block's row.
enum class Ending {
  kKept,    // there is another block
  kPieces,  // the last block: kept until all of the row is there, then stored piece by piece
  kPartly,  // the last block, and each vector is one piece of y and of the residual
  kWhole,   // so, and every lane of them is meant
};

template <int NV>
Ending ending_of(const PanelCall& call, bool is_last) {
  if (!is_last) return Ending::kKept;
  const bool has_residual = call.epilogue.residual != nullptr;
  const PanelRows& y = call.panel.y_rows;
  const PanelRows& residual = call.panel.residual_rows;
  if (y.num_pieces != NV || (has_residual && residual.num_pieces != NV)) return Ending::kPieces;
  bool whole = true;
  for (int v = 0; v < NV; ++v) {
    whole = whole && y.pieces[v].mask == kWholeMask;
    whole = whole && (!has_residual || residual.pieces[v].mask == kWholeMask);
  }
  return whole ? Ending::kWhole : Ending::kPartly;
}

// Ends row m, registers [first, first + N) of a panel of vectors that are one piece each.
template <int N, bool kWhole>
[[gnu::always_inline]] inline void finish_row(const PanelCall& call, int64_t m, int first,
                                              __m256 (&sum)[N]) {
  const Panel& panel = call.panel;
  const __m256 lower = _mm256_set1_ps(call.epilogue.lower);
  const __m256 upper = _mm256_set1_ps(call.epilogue.upper);
  const Piece* y_pieces = panel.y_rows.pieces;
  float* y = panel.y + place_of_row(panel.y_rows, m);
  if (call.epilogue.residual) {
    const float* residual = call.epilogue.residual + place_of_row(panel.residual_rows, m);
    const Piece* pieces = panel.residual_rows.pieces;
    SPARSELT_UNROLL
    for (int i = 0; i < N; ++i) {
      const Piece& piece = pieces[(first + i) / 2];
      const int half = (first + i) % 2;
      const __m256 more = kWhole ? _mm256_loadu_ps(residual + piece.offset + half * kLanes)
                                 : load_half(residual, piece, half);
      sum[i] = _mm256_add_ps(sum[i], more);
    }
  }
  SPARSELT_UNROLL
  for (int i = 0; i < N; ++i) {
    const Piece& piece = y_pieces[(first + i) / 2];
    const int half = (first + i) % 2;
    const __m256 out = clamp(sum[i], lower, upper);
    if constexpr (kWhole) {
      _mm256_storeu_ps(y + piece.offset + half * kLanes, out);
    } else {
      store_half(out, piece, half, y);
    }
  }
}

// Ends row m of a block, registers [first, first + N), but for storing pieces.
template <int NV, Ending kEnding, int N>
[[gnu::always_inline]] inline void end_row(const PanelCall& call, int64_t m, int first,
                                           __m256 (&sum)[N], bool is_first) {
  add_before<NV>(call, m, first, sum, is_first);
  if constexpr (kEnding == Ending::kWhole || kEnding == Ending::kPartly) {
    finish_row<N, kEnding == Ending::kWhole>(call, m, first, sum);
  } else {
    keep_row<NV>(call, m, first, sum);
  }
}

// Rows of y are far apart and come in the order of their lengths, which no hardware foresees: asks
// for row m, and of the residual, before the slice's turn. (Inlined: GCC 12 takes a function that
// only prefetches for one without effect and drops its calls.)
template <int NV>
[[gnu::always_inline]] inline void prefetch_row(const PanelCall& call, int64_t m) {
  const Panel& panel = call.panel;
  const float* y = panel.y + place_of_row(panel.y_rows, m);
  SPARSELT_UNROLL
  for (int v = 0; v < NV; ++v) __builtin_prefetch(y + panel.y_rows.pieces[v].offset, 1);
  if (!call.epilogue.residual) return;
  const float* residual = call.epilogue.residual + place_of_row(panel.residual_rows, m);
  SPARSELT_UNROLL
  for (int v = 0; v < NV; ++v) __builtin_prefetch(residual + panel.residual_rows.pieces[v].offset);
}

// The rows of a slice some slices on, of the last block.
constexpr int64_t kSlicesAhead = 4;
template <int NV, Ending kEnding>
[[gnu::always_inline]] inline void prefetch_rows(const PanelCall& call, int64_t slice,
                                                 int64_t last_slice, int64_t height) {
  if constexpr (kEnding == Ending::kWhole || kEnding == Ending::kPartly) {
    if (slice + kSlicesAhead >= last_slice) return;
    const int32_t* rows = call.weight.slice_rows + (slice + kSlicesAhead) * height;
    for (int64_t r = 0; r < height; ++r) {
      if (rows[r] >= 0) prefetch_row<NV>(call, rows[r]);
    }
  }
}

// Slices of one block of one section, those of Slices<NV, ending>::multiply.
template <template <int, Ending> class Slices, int NV>
void multiply_block(const PanelCall& call, const XBlock& x, Range slices, bool is_first,
                    bool is_last, Ahead& ahead) {
  switch (ending_of<NV>(call, is_last)) {
    case Ending::kKept:
      return Slices<NV, Ending::kKept>::multiply(call, x, slices, is_first, ahead);
    case Ending::kPieces:
      return Slices<NV, Ending::kPieces>::multiply(call, x, slices, is_first, ahead);
    case Ending::kPartly:
      return Slices<NV, Ending::kPartly>::multiply(call, x, slices, is_first, ahead);
    case Ending::kWhole:
      return Slices<NV, Ending::kWhole>::multiply(call, x, slices, is_first, ahead);
  }
}

// The panel, block by block of columns.
template <template <int, Ending> class Slices, int NV>
void multiply_panel(const PanelCall& call, Range sections) {
  const SellView& w = call.weight;
  const bool in_one_go = !call.panel.loads && call.panel.x_block_stride == 0;
  const int64_t slices =
      w.block_slices[sections.end * w.num_blocks] - w.block_slices[sections.begin * w.num_blocks];
  Ahead ahead(call.panel.next, slices);
  for (int64_t block = 0; block < w.num_blocks; ++block) {
    const XBlock x = x_of_block<NV>(call, block);
    if (!in_one_go) ahead = Ahead(lines_after(call, NV, block), slices / w.num_blocks);
    for (int64_t section = sections.begin; section < sections.end; ++section) {
      const int32_t* of_block = w.block_slices + section * w.num_blocks + block;
      multiply_block<Slices, NV>(call, x, {of_block[0], of_block[1]}, block == 0,
                                 block + 1 == w.num_blocks, ahead);
    }
  }
}

}  // namespace
}  // namespace sparselt::cpu
