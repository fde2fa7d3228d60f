// SPDX-License-Identifier: Apache-2.0
//
// The register tile that the AVX2 CSR and BSR kernels share, for CSR: one stored row times 8 * NV
// neighbouring columns (or pixels).
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

// Lanes [0, count) set.
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

// How the last vector of a tile ends. AMD's masked stores are microcode, so a vector that would
// stick out is moved back instead, and computes some columns twice, to the same bits; lanes are
// left out only where all columns are fewer than a vector.
enum class End { kWhole, kMovedBack, kMasked };

struct LastVector {
  End end;
  int64_t at;    // floats from the start of the tile; what kWhole knows without
  int count;     // lanes, of kMasked
  __m256i mask;  // the same as maskload wants it
};

// The last vector of a tile of `vectors` that begins `left` columns before the end of a stretch of
// `columns` of them.
inline LastVector last_vector(int64_t vectors, int64_t left, int64_t columns) {
  const int64_t at = (vectors - 1) * kLanes;
  if (columns < kLanes) {
    return {End::kMasked, at, static_cast<int>(columns), tail_mask(columns)};
  }
  if (left >= at + kLanes) return {End::kWhole, at, kLanes, __m256i{}};
  return {End::kMovedBack, left - kLanes, kLanes, __m256i{}};
}

// Vector v of a tile of NV vectors, from the tile's place in x, y or the residual on.
template <int NV, End kEnd>
inline __m256 load_vector(const float* tile, int v, const LastVector& last) {
  if (kEnd == End::kMasked) return _mm256_maskload_ps(tile, last.mask);
  return _mm256_loadu_ps(tile + (kEnd == End::kMovedBack && v == NV - 1 ? last.at : v * kLanes));
}

template <int NV, End kEnd>
inline void store_vector(__m256 vector, float* tile, int v, const LastVector& last) {
  if (kEnd == End::kMasked) {
    alignas(32) float lanes[kLanes];
    _mm256_store_ps(lanes, vector);
    for (int i = 0; i < last.count; ++i) tile[i] = lanes[i];
    return;
  }
  _mm256_storeu_ps(tile + (kEnd == End::kMovedBack && v == NV - 1 ? last.at : v * kLanes), vector);
}

// A row's products are added up in chains of this many, and the chains' sums after that: one chain
// of hundreds rounds away two to three times as much.
constexpr int64_t kChain = 64;

// sum[v] += sum_i values[i] * x[offset(i) + 8 v ...] over stored values [begin, end).
template <int NV, End kEnd, class Offsets>
inline void accumulate_chain(__m256 (&sum)[NV], const SparseView& w, int64_t begin, int64_t end,
                             Offsets offset, const float* x, const LastVector& last) {
  for (int64_t i = begin; i < end; ++i) {
    const __m256 value = _mm256_broadcast_ss(w.values + i);
    const float* column = x + offset(w.col_indices[i]);
    for (int v = 0; v < NV; ++v) {
      sum[v] = _mm256_fmadd_ps(value, load_vector<NV, kEnd>(column, v, last), sum[v]);
    }
  }
}

// sum[v] = start + sum_i values[i] * x[offset(i) + 8 v ...] over stored values [begin, end).
template <int NV, End kEnd, class Offsets>
inline void accumulate(__m256 (&sum)[NV], float start, const SparseView& w, int64_t begin,
                       int64_t end, Offsets offset, const float* x, const LastVector& last) {
  for (int v = 0; v < NV; ++v) sum[v] = _mm256_set1_ps(start);
  if (end - begin <= kChain) {
    return accumulate_chain<NV, kEnd>(sum, w, begin, end, offset, x, last);
  }
  // In memory: there are not registers enough for both.
  alignas(32) float total[NV * kLanes];
  for (int v = 0; v < NV; ++v) _mm256_store_ps(total + v * kLanes, sum[v]);
  for (; begin < end; begin += kChain) {
    for (int v = 0; v < NV; ++v) sum[v] = _mm256_setzero_ps();
    accumulate_chain<NV, kEnd>(sum, w, begin, begin + kChain < end ? begin + kChain : end, offset,
                               x, last);
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

// Adds the residual (null: none), clamps, and writes a tile.
template <int NV, End kEnd>
inline void store_tile(const __m256 (&sum)[NV], const Epilogue& e, const float* residual, float* y,
                       const LastVector& last) {
  const __m256 lower = _mm256_set1_ps(e.lower);
  const __m256 upper = _mm256_set1_ps(e.upper);
  for (int v = 0; v < NV; ++v) {
    __m256 out = sum[v];
    if (residual) out = _mm256_add_ps(out, load_vector<NV, kEnd>(residual, v, last));
    store_vector<NV, kEnd>(clamp(out, lower, upper), y, v, last);
  }
}

// Fetches what the rows of a tile will meet: the tile of y a few rows on, which the next stores
// would otherwise wait for one by one, and bit by bit all columns' x of the tile to come. Rows of a
// tile lie far apart, so that no hardware fetches them ahead.
template <class Offsets>
class Fetcher {
 public:
  // `next` is where the tile to come lies in column 0 of the weight; null for none.
  Fetcher(const SparseView& w, Range rows, Offsets offset, const float* next, int64_t vectors)
      : offset_(offset), next_(next), cols_(w.cols), rows_(rows), vectors_(vectors) {}

  // Before row m, whose tile of y begins at y.
  void fetch(int64_t m, const float* y, int64_t y_stride) {
    if (m + kRowsAhead < rows_.end) {
      const float* at = y + kRowsAhead * y_stride;
      for (int64_t v = 0; v < vectors_; v += 2) __builtin_prefetch(at + v * kLanes, 1, 3);
    }
    if (!next_) return;
    const int64_t until = (m + 1 - rows_.begin) * cols_ / (rows_.end - rows_.begin);
    for (; column_ < until; ++column_) {
      const float* at = next_ + offset_(static_cast<int32_t>(column_));
      for (int64_t v = 0; v < vectors_; v += 2) {
        _mm_prefetch(reinterpret_cast<const char*>(at + v * kLanes), _MM_HINT_T1);
      }
    }
  }

 private:
  static constexpr int64_t kRowsAhead = 4;
  Offsets offset_;
  const float* next_;
  int64_t cols_;
  Range rows_;
  int64_t vectors_;
  int64_t column_ = 0;
};

}  // namespace
}  // namespace sparselt::cpu
