// SPDX-License-Identifier: Apache-2.0
//
// y[m, p, q] = clamp(sum_k W[m, k] * plane_k[p, q] + bias[m] + residual[m, p, q]) for W in CSR:
// direct convolution.
//
// kernels.h says how column k of W becomes a shifted plane of x, whatever the stride, padding and
// dilation: a tile of up to 64 flat pixels is then computed as in csr_spmm_avx2, with unaligned
// loads and no test for borders. Where the planes carry a halo (pitch > out_width) the tile goes
// through a small buffer and only its real pixels are written, without masks where an output row
// holds a vector; the pixels thrown away, (pitch -
// out_width) / pitch of the work, are the price of loads without gathers. Slow on very narrow maps.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/target.h"
#include "kernels.h"

SPARSELT_TARGET_BEGIN("avx2,fma")
#include "cpu/tile_avx2.h"

namespace sparselt::cpu {
namespace {

// A stretch of a tile that lies in one output row.
struct Segment {
  int64_t target;  // floats from the start of an output plane
  int source;      // floats from the start of the tile
  int count;
};

// The segments of flat pixels [begin, end), at most one an output row; returns how many.
int make_segments(const Conv2dCall& call, int64_t begin, int64_t end,
                  Segment (&segments)[kTileColumns + 1]) {
  int count = 0;
  for (int64_t p = begin / call.pitch; p * call.pitch < end; ++p) {
    const int64_t row = p * call.pitch;
    const int64_t first = row > begin ? row : begin;
    const int64_t last = row + call.out_width < end ? row + call.out_width : end;
    if (first >= last) continue;
    segments[count++] = {p * call.out_width + first - row, static_cast<int>(first - begin),
                         static_cast<int>(last - first)};
  }
  return count;
}

// The first of a segment's floats, as many as a vector holds or fewer, through its tile.
inline void store_few(const float* tile, int count, const Epilogue& e, const float* residual,
                      float* y) {
  for (int i = 0; i < count; ++i) {
    float out = residual ? tile[i] + residual[i] : tile[i];
    out = out < e.lower ? e.lower : out;  // written so that a NaN stays a NaN
    y[i] = out > e.upper ? e.upper : out;
  }
}

void store_segment(const float* tile, const Segment& segment, const Epilogue& e,
                   const float* residual, float* y) {
  tile += segment.source;
  y += segment.target;
  if (residual) residual += segment.target;
  if (segment.count < kLanes) return store_few(tile, segment.count, e, residual, y);
  const __m256 lower = _mm256_set1_ps(e.lower);
  const __m256 upper = _mm256_set1_ps(e.upper);
  for (int j = 0; j < segment.count; j += kLanes) {
    const int at = j + kLanes <= segment.count ? j : segment.count - kLanes;
    __m256 out = _mm256_loadu_ps(tile + at);
    if (residual) out = _mm256_add_ps(out, _mm256_loadu_ps(residual + at));
    _mm256_storeu_ps(y + at, clamp(out, lower, upper));
  }
}

// Flat pixels [begin, end).
struct Tile {
  int64_t begin;
  int64_t end;
  LastVector last;
  const float* next;  // where the tile to come lies in a plane of x, or null
};

template <int NV, End kEnd>
void convolve_tile(const Conv2dCall& call, Range rows, const Tile& tile) {
  const Epilogue& e = call.epilogue;
  const PlaneOffsets offset{call.column_offsets};
  const bool contiguous = call.pitch == call.out_width;
  Segment segments[kTileColumns + 1];
  const int num_segments = contiguous ? 0 : make_segments(call, tile.begin, tile.end, segments);
  const int64_t place = num_segments > 0 ? segments[0].target : tile.begin;
  // Taps of a channel meet nearly the same x, which is not to be fetched for each.
  Fetcher<PlaneOffsets> fetcher(call.weight, rows, offset, contiguous ? tile.next : nullptr, NV);
  // A last vector that was moved back can begin before the tile.
  alignas(32) float lanes[(NV + 1) * kLanes];
  for (int64_t m = rows.begin; m < rows.end; ++m) {
    const int64_t plane = m * call.y_stride;
    fetcher.fetch(m, call.y + plane + place, call.y_stride);
    __m256 sum[NV];
    accumulate<NV, kEnd>(sum, e.bias ? e.bias[m] : 0.0f, call.weight, call.weight.crow_indices[m],
                         call.weight.crow_indices[m + 1], offset, call.x + tile.begin, tile.last);
    const float* residual = e.residual ? e.residual + plane : nullptr;
    if (contiguous) {
      store_tile<NV, kEnd>(sum, e, residual ? residual + tile.begin : nullptr,
                           call.y + plane + tile.begin, tile.last);
      continue;
    }
    for (int v = 0; v < NV; ++v) store_vector<NV, kEnd>(sum[v], lanes + kLanes, v, tile.last);
    for (int s = 0; s < num_segments; ++s)
      store_segment(lanes + kLanes, segments[s], e, residual, call.y + plane);
  }
}

template <End kEnd>
void convolve_pixels(const Conv2dCall& call, Range rows, const Tile& tile, int64_t vectors) {
  switch (vectors) {
    case 1:
      return convolve_tile<1, kEnd>(call, rows, tile);
    case 2:
      return convolve_tile<2, kEnd>(call, rows, tile);
    case 3:
      return convolve_tile<3, kEnd>(call, rows, tile);
    case 4:
      return convolve_tile<4, kEnd>(call, rows, tile);
    case 5:
      return convolve_tile<5, kEnd>(call, rows, tile);
    case 6:
      return convolve_tile<6, kEnd>(call, rows, tile);
    case 7:
      return convolve_tile<7, kEnd>(call, rows, tile);
    default:
      return convolve_tile<8, kEnd>(call, rows, tile);
  }
}

}  // namespace

void csr_conv2d_avx2(const Conv2dCall& call, Range rows, Range pixels) {
  const int64_t count = pixels.end - pixels.begin;
  const Tiling tiling = make_tiling(count);
  int64_t begin = pixels.begin;
  for (int64_t t = 0; t < tiling.tiles; ++t) {
    const int64_t vectors = tiling.width(t);
    const int64_t left = pixels.end - begin;
    const int64_t end = begin + (vectors * kLanes < left ? vectors * kLanes : left);
    const float* next = t + 1 < tiling.tiles ? call.x + end : nullptr;
    const Tile tile{begin, end, last_vector(vectors, left, count), next};
    switch (tile.last.end) {
      case End::kWhole:
        convolve_pixels<End::kWhole>(call, rows, tile, vectors);
        break;
      case End::kMovedBack:
        convolve_pixels<End::kMovedBack>(call, rows, tile, vectors);
        break;
      case End::kMasked:
        convolve_tile<1, End::kMasked>(call, rows, tile);
        break;
    }
    begin = end;
  }
}

}  // namespace sparselt::cpu
SPARSELT_TARGET_END

#endif  // __x86_64__
