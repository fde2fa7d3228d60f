// SPDX-License-Identifier: Apache-2.0
//
// What the NEON panel kernels share: the copy of x into the scratch, and what is done with sums
// from block to block and at the end. NEON has no masked loads and stores: where a piece does not
// fill a quad of lanes, it goes lane by lane. NEON is part of every aarch64 CPU, so no target
// region is needed.
#pragma once

#include <arm_neon.h>

#include "cpu/target.h"
#include "kernels.h"

namespace sparselt::cpu {
namespace {

constexpr int kLanes = 4;        // floats a register
constexpr int kPieceLanes = 16;  // floats a vector of a panel
constexpr int kMaxVectors = 3;   // of a panel
constexpr int kQuads = kPieceLanes / kLanes;
constexpr unsigned kAllLanes = 0xf;

// The lanes of a quad of a piece, a bit each.
inline unsigned quad_bits(const Piece& piece, int quad) {
  return piece.mask >> (quad * kLanes) & kAllLanes;
}

// Lanes without a bit are zero and not read.
inline float32x4_t load_quad(const float* base, const Piece& piece, int quad) {
  const float* at = base + piece.offset + quad * kLanes;
  const unsigned bits = quad_bits(piece, quad);
  if (bits == kAllLanes) return vld1q_f32(at);
  float32x4_t data = vdupq_n_f32(0.0f);
  if (bits & 1) data = vld1q_lane_f32(at, data, 0);
  if (bits & 2) data = vld1q_lane_f32(at + 1, data, 1);
  if (bits & 4) data = vld1q_lane_f32(at + 2, data, 2);
  if (bits & 8) data = vld1q_lane_f32(at + 3, data, 3);
  return data;
}

inline void store_quad(float* base, const Piece& piece, int quad, float32x4_t data) {
  float* at = base + piece.offset + quad * kLanes;
  const unsigned bits = quad_bits(piece, quad);
  if (bits == kAllLanes) return vst1q_f32(at, data);
  if (bits & 1) vst1q_lane_f32(at, data, 0);
  if (bits & 2) vst1q_lane_f32(at + 1, data, 1);
  if (bits & 4) vst1q_lane_f32(at + 2, data, 2);
  if (bits & 8) vst1q_lane_f32(at + 3, data, 3);
}

// A block of x: row c of vector v is the 16 floats at vectors[v] + c * kPieceLanes.
struct XBlock {
  const float* vectors[kMaxVectors];
};

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
    for (int i = 0; i < kQuads * NV; ++i) {
      vst1q_f32(to + i / kQuads * stride + i % kQuads * kLanes,
                load_quad(base, pieces[i / kQuads], i % kQuads));
    }
    for (int32_t e = panel.tap_extra[tap]; e < panel.tap_extra[tap + 1]; ++e) {
      const Piece& piece = panel.extra_loads[e];
      for (int quad = 0; quad < kQuads; ++quad) {
        float* at = to + piece.vector * stride + quad * kLanes;
        // Pieces of a vector share no lane, and their other lanes are zero.
        const uint32x4_t before = vreinterpretq_u32_f32(vld1q_f32(at));
        const uint32x4_t more = vreinterpretq_u32_f32(load_quad(base, piece, quad));
        vst1q_f32(at, vreinterpretq_f32_u32(vorrq_u32(before, more)));
      }
    }
    if (++tap == panel.taps) {
      tap = 0;
      base += panel.channel_stride;
    }
  }
  for (int i = 0; i < kQuads * NV; ++i) {
    float* filler = call.x_block + (i / kQuads + 1) * stride - kPieceLanes;
    vst1q_f32(filler + i % kQuads * kLanes, vdupq_n_f32(0.0f));
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

// Residual, clamp and store of a finished row.
template <int NV>
void store_row(const PanelCall& call, int64_t m) {
  const Panel& panel = call.panel;
  const Epilogue& e = call.epilogue;
  float* sums = call.sums + m * (NV * kPieceLanes);
  for (int i = 0; e.residual && i < kQuads * panel.residual_rows.num_pieces; ++i) {
    const Piece& piece = panel.residual_rows.pieces[i / kQuads];
    const float* residual = e.residual + place_of_row(panel.residual_rows, m);
    float* at = sums + piece.vector * kPieceLanes + i % kQuads * kLanes;
    // Lanes of other pieces get a zero, which may turn a -0 into a 0 but no sum into another.
    vst1q_f32(at, vaddq_f32(vld1q_f32(at), load_quad(residual, piece, i % kQuads)));
  }
  float* y = panel.y + place_of_row(panel.y_rows, m);
  for (int i = 0; i < kQuads * panel.y_rows.num_pieces; ++i) {
    const Piece& piece = panel.y_rows.pieces[i / kQuads];
    const float* at = sums + piece.vector * kPieceLanes + i % kQuads * kLanes;
    // A NaN stays a NaN: FMAX and FMIN pass it on from either operand.
    const float32x4_t sum = vmaxq_f32(vdupq_n_f32(e.lower), vld1q_f32(at));
    store_quad(y, piece, i % kQuads, vminq_f32(vdupq_n_f32(e.upper), sum));
  }
}

// Adds a block's sums of row m, registers [first, first + N) of the panel, to those of the blocks
// before; the first block adds the bias.
template <int NV, int N>
void add_to_row(const PanelCall& call, int64_t m, int first, const float32x4_t (&sum)[N],
                bool is_first) {
  float* sums = call.sums + m * (NV * kPieceLanes) + first * kLanes;
  const float32x4_t bias = vdupq_n_f32(call.epilogue.bias ? call.epilogue.bias[m] : 0.0f);
  SPARSELT_UNROLL
  for (int i = 0; i < N; ++i) {
    const float32x4_t before = is_first ? bias : vld1q_f32(sums + i * kLanes);
    vst1q_f32(sums + i * kLanes, vaddq_f32(before, sum[i]));
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
