// SPDX-License-Identifier: Apache-2.0
//
// The register tile that the AVX2 CSR kernels share: one stored row times 8 * NV neighbouring
// columns (or pixels).
//
// A stored value costs one broadcast, NV fused multiply-adds with x as memory operand, and one
// address. With two loads and two multiply-adds a cycle the bound is NV / (NV + 2) of peak for NV
// accumulators that hide the multiply-add's latency (8 or more). Include inside the target region,
// after <immintrin.h> and kernels.h.
#pragma once

namespace sparselt::cpu {
namespace {

constexpr int kLanes = 8;  // floats a vector
constexpr int kTileVectors =
    8;  // accumulators: 8 of 16 registers, enough to hide 4 cycles of latency twice over
constexpr int kTileColumns = kLanes * kTileVectors;

// Lanes [0, count) set, for the last vector of a tile.
inline __m256i tail_mask(int64_t count) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane);
}

// How a stretch of columns is cut into tiles: as few as possible, of equal width to a vector, so
// that no narrow (slow) tile is left at the end.
struct Tiling {
  int64_t vectors;
  int64_t tiles;
  // The number of vectors of tile `t`.
  int64_t width(int64_t t) const { return (t + 1) * vectors / tiles - t * vectors / tiles; }
};

inline Tiling make_tiling(int64_t columns, int64_t tile_vectors = kTileVectors) {
  const int64_t vectors = (columns + kLanes - 1) / kLanes;
  return {vectors, (vectors + tile_vectors - 1) / tile_vectors};
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

// A row's products are added up in chains of this many, and the chains' sums after that: one chain
// of hundreds rounds away two to three times as much.
constexpr int64_t kChain = 64;

// sum[v] += sum_i values[i] * x[offset(i) + 8 v ...] over stored values [begin, end). With kMasked
// the last vector reads only the lanes of `mask`.
template <int NV, bool kMasked, class Offsets>
inline void accumulate_chain(__m256 (&sum)[NV], const SparseView& w, int64_t begin, int64_t end,
                             Offsets offset, const float* x, __m256i mask) {
  for (int64_t i = begin; i < end; ++i) {
    const __m256 value = _mm256_broadcast_ss(w.values + i);
    const float* column = x + offset(w.col_indices[i]);
    for (int v = 0; v < NV; ++v) {
      const float* at = column + v * kLanes;
      const __m256 data =
          kMasked && v == NV - 1 ? _mm256_maskload_ps(at, mask) : _mm256_loadu_ps(at);
      sum[v] = _mm256_fmadd_ps(value, data, sum[v]);
    }
  }
}

// sum[v] = start + sum_i values[i] * x[offset(i) + 8 v ...] over stored values [begin, end).
template <int NV, bool kMasked, class Offsets>
inline void accumulate(__m256 (&sum)[NV], float start, const SparseView& w, int64_t begin,
                       int64_t end, Offsets offset, const float* x, __m256i mask) {
  for (int v = 0; v < NV; ++v) sum[v] = _mm256_set1_ps(start);
  if (end - begin <= kChain) {
    return accumulate_chain<NV, kMasked>(sum, w, begin, end, offset, x, mask);
  }
  // In memory: there are not registers enough for both.
  alignas(32) float total[NV * kLanes];
  for (int v = 0; v < NV; ++v) _mm256_store_ps(total + v * kLanes, sum[v]);
  for (; begin < end; begin += kChain) {
    for (int v = 0; v < NV; ++v) sum[v] = _mm256_setzero_ps();
    accumulate_chain<NV, kMasked>(sum, w, begin, begin + kChain < end ? begin + kChain : end,
                                  offset, x, mask);
    for (int v = 0; v < NV; ++v) {
      sum[v] = _mm256_add_ps(sum[v], _mm256_load_ps(total + v * kLanes));
      _mm256_store_ps(total + v * kLanes, sum[v]);
    }
  }
}

// The second operand of max and min is the one that survives a NaN.
inline __m256 clamp(__m256 sum, __m256 lower, __m256 upper) {
  return _mm256_min_ps(upper, _mm256_max_ps(lower, sum));
}

// Adds the residual (null: none), clamps, and writes a tile to 8 * NV neighbouring floats (fewer
// with kMasked).
template <int NV, bool kMasked>
inline void store_tile(const __m256 (&sum)[NV], const Epilogue& e, const float* residual, float* y,
                       __m256i mask) {
  const __m256 lower = _mm256_set1_ps(e.lower);
  const __m256 upper = _mm256_set1_ps(e.upper);
  for (int v = 0; v < NV; ++v) {
    const bool partial = kMasked && v == NV - 1;
    const int at = v * kLanes;
    __m256 out = sum[v];
    if (residual) {
      out = _mm256_add_ps(
          out, partial ? _mm256_maskload_ps(residual + at, mask) : _mm256_loadu_ps(residual + at));
    }
    out = clamp(out, lower, upper);
    if (partial) {
      _mm256_maskstore_ps(y + at, mask, out);
    } else {
      _mm256_storeu_ps(y + at, out);
    }
  }
}

}  // namespace
}  // namespace sparselt::cpu
