// SPDX-License-Identifier: Apache-2.0
//
// Where an AVX2 panel kernel reads x: where it lies, or a copy in the scratch. Include inside the
// target region, after <immintrin.h>, cpu/target.h and kernels.h.
#pragma once

namespace sparselt::cpu {
namespace {

constexpr int kLanes = 8;        // floats a register
constexpr int kPieceLanes = 16;  // floats a vector of a panel: two registers
constexpr int kMaxVectors = 4;   // of a panel
constexpr uint16_t kWholeMask = 0xffff;

constexpr unsigned kHalf = (1u << kLanes) - 1;

// Which lanes of one half of a piece are meant; kHalf for all.
inline unsigned half_bits(const Piece& piece, int half) {
  return (piece.mask >> (half * kLanes)) & kHalf;
}

// The same as maskload and maskstore want it.
inline __m256i half_mask(unsigned half_bits) {
  const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i all = _mm256_set1_epi32(static_cast<int>(half_bits));
  return _mm256_cmpeq_epi32(_mm256_and_si256(all, bits), bits);
}

// Lanes `bits` of half a vector, the others zero.
inline __m256 load_lanes(const float* at, unsigned bits) {
  if (bits == kHalf) return _mm256_loadu_ps(at);
  return _mm256_maskload_ps(at, half_mask(bits));
}

// A block of x: row c of vector v is the 16 floats at vectors[v] + c * kPieceLanes.
struct XBlock {
  const float* vectors[kMaxVectors];
};

// Register i of each row.
inline const float* register_of(const XBlock& x, int i) {
  return x.vectors[i / 2] + i % 2 * kLanes;
}

// The rows of x that one tap meets in a block: `count` of them, `from_step` floats from each other,
// to places `to_step` floats from each other.
struct TapRows {
  const float* from;
  int64_t from_step;
  float* to;
  int64_t to_step;
  int64_t count;
};

// Vectors without borders, NV of them, `stride` floats from each other in the scratch.
template <int NV>
void copy_whole(const TapRows& rows, const Piece* pieces, int64_t stride) {
  const float* from[NV];
  for (int v = 0; v < NV; ++v) from[v] = rows.from + pieces[v].offset;
  float* to = rows.to;
  for (int64_t i = 0; i < rows.count; ++i, to += rows.to_step) {
    SPARSELT_UNROLL
    for (int v = 0; v < NV; ++v) {
      _mm256_store_ps(to + v * stride, _mm256_loadu_ps(from[v]));
      _mm256_store_ps(to + v * stride + kLanes, _mm256_loadu_ps(from[v] + kLanes));
      from[v] += rows.from_step;
    }
  }
}

// Lanes `bits` of half a vector, the others zero. Pieces of a vector share no lane, so with `more`
// they join what is there.
inline void copy_half(const TapRows& rows, unsigned bits, bool more) {
  const __m256i mask = half_mask(bits);
  const float* from = rows.from;
  float* to = rows.to;
  if (bits == 0 && more) return;
  if (bits == kHalf) {
    for (int64_t i = 0; i < rows.count; ++i, from += rows.from_step, to += rows.to_step) {
      _mm256_store_ps(to, _mm256_loadu_ps(from));
    }
  } else if (!more) {
    for (int64_t i = 0; i < rows.count; ++i, from += rows.from_step, to += rows.to_step) {
      _mm256_store_ps(to, _mm256_maskload_ps(from, mask));
    }
  } else {
    for (int64_t i = 0; i < rows.count; ++i, from += rows.from_step, to += rows.to_step) {
      _mm256_store_ps(to, _mm256_or_ps(_mm256_load_ps(to), _mm256_maskload_ps(from, mask)));
    }
  }
}

inline void copy_piece(const TapRows& rows, const Piece& piece, int64_t stride, bool more) {
  for (int half = 0; half < 2; ++half) {
    TapRows part = rows;
    part.from += piece.offset + half * kLanes;
    part.to += piece.vector * stride + half * kLanes;
    copy_half(part, half_bits(piece, half), more);
  }
}

// Rows [first, last) of x for this panel into the scratch, each vector with a row of zeros at the
// end: what a filled-up row multiplies its zeros with, since any other x could be infinite. Tap by
// tap, so that borders are looked at once for all channels.
template <int NV>
void copy_block(const PanelCall& call, int64_t first, int64_t last) {
  const Panel& panel = call.panel;
  const int64_t stride = (call.weight.block_cols + 1) * kPieceLanes;
  for (int64_t k = first; k < last && k < first + panel.taps; ++k) {
    const int64_t tap = k % panel.taps;
    const TapRows rows{panel.x + k / panel.taps * panel.channel_stride, panel.channel_stride,
                       call.x_block + (k - first) * kPieceLanes, panel.taps * kPieceLanes,
                       (last - k + panel.taps - 1) / panel.taps};
    const Piece* pieces = panel.loads + tap * NV;
    bool whole = true;
    for (int v = 0; v < NV; ++v) whole = whole && pieces[v].mask == kWholeMask;
    if (whole) {
      copy_whole<NV>(rows, pieces, stride);
      continue;
    }
    for (int v = 0; v < NV; ++v) copy_piece(rows, pieces[v], stride, false);
    for (int32_t e = panel.tap_extra[tap]; e < panel.tap_extra[tap + 1]; ++e) {
      copy_piece(rows, panel.extra_loads[e], stride, true);
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

}  // namespace
}  // namespace sparselt::cpu
