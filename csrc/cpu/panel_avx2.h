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

// Rows [first, last) of x for this panel into the scratch, NV vectors of 16 each.
template <int NV>
void load_block(const Panel& panel, int64_t first, int64_t last, float* block) {
  int64_t tap = first % panel.taps;
  const float* base = panel.x + first / panel.taps * panel.channel_stride;
  for (int64_t k = first; k < last; ++k, block += NV * kPieceLanes) {
    const Piece* pieces = panel.loads + tap * NV;
    for (int i = 0; i < 2 * NV; ++i) {
      _mm256_store_ps(block + i * kLanes, load_half(base, pieces[i / 2], i % 2));
    }
    for (int32_t e = panel.tap_extra[tap]; e < panel.tap_extra[tap + 1]; ++e) {
      const Piece& piece = panel.extra_loads[e];
      for (int half = 0; half < 2; ++half) {
        float* at = block + piece.vector * kPieceLanes + half * kLanes;
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
}

// Residual, clamp and store of one half of a piece.
inline void store_half(__m256 sum, const Piece& piece, int half, const Epilogue& e,
                       const float* residual, float* y) {
  if (residual) sum = _mm256_add_ps(sum, load_half(residual, piece, half));
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

template <int NV>
void store_row(const PanelCall& call, int64_t m) {
  const Panel& panel = call.panel;
  const float* sums = call.sums + m * (NV * kPieceLanes);
  float* y = panel.y + m * panel.y_stride;
  const float* residual =
      call.epilogue.residual ? call.epilogue.residual + m * panel.y_stride : nullptr;
  for (int i = 0; i < panel.num_stores; ++i) {
    const Piece& piece = panel.stores[i];
    for (int half = 0; half < 2; ++half) {
      const __m256 part = _mm256_load_ps(sums + piece.vector * kPieceLanes + half * kLanes);
      store_half(part, piece, half, call.epilogue, residual, y);
    }
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

// Whether each vector of the panel has one place in y.
template <int NV>
bool is_whole(const Panel& panel) {
  return panel.num_stores == NV;
}

// Ends row m, registers [first, first + N) of a whole panel, with the sums of the last block, from
// their registers.
template <int NV, int N>
void finish_row(const PanelCall& call, int64_t m, int first, const __m256 (&sum)[N],
                bool is_first) {
  const Panel& panel = call.panel;
  const float* sums = call.sums + m * (NV * kPieceLanes) + first * kLanes;
  const __m256 bias = _mm256_set1_ps(call.epilogue.bias ? call.epilogue.bias[m] : 0.0f);
  float* y = panel.y + m * panel.y_stride;
  const float* residual =
      call.epilogue.residual ? call.epilogue.residual + m * panel.y_stride : nullptr;
  SPARSELT_UNROLL
  for (int i = 0; i < N; ++i) {
    const __m256 before = is_first ? bias : _mm256_load_ps(sums + i * kLanes);
    store_half(_mm256_add_ps(before, sum[i]), panel.stores[(first + i) / 2], (first + i) % 2,
               call.epilogue, residual, y);
  }
}

using BlockFunction = void (*)(const PanelCall& call, int64_t first_slice, int64_t last_slice,
                               bool is_first, bool is_last);

// The panel, block by block of columns; `kMultiply` does the slices of one block of one section.
template <int NV, BlockFunction kMultiply>
void multiply_panel(const PanelCall& call, Range sections) {
  const SellView& w = call.weight;
  // What a filled-up row multiplies its zeros with: any other x could be infinite.
  float* filler = call.x_block + w.block_cols * NV * kPieceLanes;
  for (int i = 0; i < 2 * NV; ++i) _mm256_store_ps(filler + i * kLanes, _mm256_setzero_ps());
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
