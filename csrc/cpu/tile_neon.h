// SPDX-License-Identifier: Apache-2.0
//
// The register tile that the NEON kernels on row-major x share: stored rows times 4 * NV
// neighbouring columns (or pixels).
//
// NEON has no masked loads, and nothing outside a range may be touched. So where columns do not
// fill a tile, its last vector moves left until it ends with them; the lanes that it shares with
// the vector before are computed twice, to the same bits. Only ranges narrower than one vector go
// lane by lane. NEON is part of every aarch64 CPU, so no target region is needed.
#pragma once

#include <arm_neon.h>

#include "kernels.h"

namespace sparselt::cpu {
namespace {

constexpr int kLanes = 4;  // floats a vector

// Where the last vector of a tile begins, in floats from the tile's first. In a narrow tile, of one
// vector, only `lanes` of it exist.
struct LastVector {
  int64_t at;
  int64_t lanes;
};

// How columns are cut into tiles: as few as possible, of equal width to a vector, so that no narrow
// (slow) tile is left at the end.
struct Tiling {
  Range columns;
  int64_t vectors;
  int64_t tiles;

  int64_t first_vector(int64_t t) const { return t * vectors / tiles; }
  int64_t begin(int64_t t) const { return columns.begin + first_vector(t) * kLanes; }
  int64_t width(int64_t t) const { return first_vector(t + 1) - first_vector(t); }
  LastVector last(int64_t t) const {
    const int64_t end = columns.begin + first_vector(t + 1) * kLanes;
    const int64_t floats = (end < columns.end ? end : columns.end) - begin(t);
    return floats < kLanes ? LastVector{0, floats} : LastVector{floats - kLanes, kLanes};
  }
};

template <int kTileVectors>
inline Tiling make_tiling(Range columns) {
  static_assert(kTileVectors >= 3, "a tile that is not filled must have a vector to overlap");
  const int64_t vectors = (columns.end - columns.begin + kLanes - 1) / kLanes;
  return {columns, vectors, (vectors + kTileVectors - 1) / kTileVectors};
}

// Where column k of the weight lies in x: a row of a matrix, or a shifted plane of an image.
struct RowOffsets {
  int64_t stride;
  int64_t operator()(int32_t column) const { return column * stride; }
};
struct PlaneOffsets {
  const int32_t* offsets;
  int64_t operator()(int32_t column) const { return offsets[column]; }
};

// The first `lanes` floats, 1 to 4, the others zero.
inline float32x4_t load_some(const float* at, int64_t lanes) {
  if (lanes == kLanes) return vld1q_f32(at);
  float32x4_t some = vld1q_lane_f32(at, vdupq_n_f32(0.0f), 0);
  if (lanes > 1) some = vld1q_lane_f32(at + 1, some, 1);
  if (lanes > 2) some = vld1q_lane_f32(at + 2, some, 2);
  return some;
}

inline void store_some(float* at, float32x4_t some, int64_t lanes) {
  if (lanes == kLanes) return vst1q_f32(at, some);
  vst1q_lane_f32(at, some, 0);
  if (lanes > 1) vst1q_lane_f32(at + 1, some, 1);
  if (lanes > 2) vst1q_lane_f32(at + 2, some, 2);
}

// Vector `v` of a tile of NV at `tile`.
template <int NV, bool kNarrow>
inline float32x4_t load_vector(const float* tile, int v, LastVector last) {
  if (v < NV - 1) return vld1q_f32(tile + v * kLanes);
  return kNarrow ? load_some(tile, last.lanes) : vld1q_f32(tile + last.at);
}

template <int NV, bool kNarrow>
inline void store_vector(float* tile, int v, LastVector last, float32x4_t data) {
  if (v < NV - 1) return vst1q_f32(tile + v * kLanes, data);
  if (kNarrow) return store_some(tile, data, last.lanes);
  vst1q_f32(tile + last.at, data);
}

// sum[v] = start + sum_i values[i] * x[offset(i) + vector v] over stored values [begin, end).
template <int NV, bool kNarrow, class Offsets>
[[gnu::always_inline]] inline void accumulate(float32x4_t (&sum)[NV], float start,
                                              const SparseView& w, int64_t begin, int64_t end,
                                              Offsets offset, const float* x, LastVector last) {
  for (int v = 0; v < NV; ++v) sum[v] = vdupq_n_f32(start);
  for (int64_t i = begin; i < end; ++i) {
    const float value = w.values[i];
    const float* column = x + offset(w.col_indices[i]);
    for (int v = 0; v < NV; ++v) {
      sum[v] = vfmaq_n_f32(sum[v], load_vector<NV, kNarrow>(column, v, last), value);
    }
  }
}

// A NaN stays a NaN: FMAX and FMIN pass it on from either operand.
inline float32x4_t clamp(float32x4_t sum, const Epilogue& e) {
  return vminq_f32(vdupq_n_f32(e.upper), vmaxq_f32(vdupq_n_f32(e.lower), sum));
}

// Adds the residual (null: none), clamps, and writes a tile. All of the residual is read before any
// of y is written, as if the last two vectors shared no lanes.
template <int NV, bool kNarrow>
[[gnu::always_inline]] inline void store_tile(float32x4_t (&sum)[NV], const Epilogue& e,
                                              const float* residual, float* y, LastVector last) {
  if (residual) {
    for (int v = 0; v < NV; ++v) {
      sum[v] = vaddq_f32(sum[v], load_vector<NV, kNarrow>(residual, v, last));
    }
  }
  for (int v = 0; v < NV; ++v) store_vector<NV, kNarrow>(y, v, last, clamp(sum[v], e));
}

}  // namespace
}  // namespace sparselt::cpu
