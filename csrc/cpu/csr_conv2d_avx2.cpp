// SPDX-License-Identifier: Apache-2.0
//
// y[m, p, q] = clamp(sum_k W[m, k] * plane_k[p, q] + bias[m] + residual[m, p, q]) for W in CSR:
// direct convolution.
//
// kernels.h says how column k of W becomes a shifted plane of x, whatever the stride, padding and
// dilation: a tile of up to 64 flat pixels is then computed as in csr_spmm_avx2, with unaligned
// loads and no test for borders. Where the planes carry a halo (pitch > out_width) the tile goes
// through a small buffer and only its real pixels are written; the pixels thrown away, (pitch -
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

void store_segment(const float* tile, const Segment& segment, const Epilogue& e,
                   const float* residual, float* y) {
  const __m256 lower = _mm256_set1_ps(e.lower);
  const __m256 upper = _mm256_set1_ps(e.upper);
  for (int j = 0; j < segment.count; j += kLanes) {
    const __m256i mask = tail_mask(segment.count - j);
    __m256 out = _mm256_maskload_ps(tile + segment.source + j, mask);
    if (residual) out = _mm256_add_ps(out, _mm256_maskload_ps(residual + segment.target + j, mask));
    _mm256_maskstore_ps(y + segment.target + j, mask, clamp(out, lower, upper));
  }
}

template <int NV, bool kMasked>
void convolve_tile(const Conv2dCall& call, Range rows, int64_t begin, int64_t end, __m256i mask) {
  const Epilogue& e = call.epilogue;
  const PlaneOffsets offset{call.column_offsets};
  const bool contiguous = call.pitch == call.out_width;
  Segment segments[kTileColumns + 1];
  const int num_segments = contiguous ? 0 : make_segments(call, begin, end, segments);
  for (int64_t m = rows.begin; m < rows.end; ++m) {
    __m256 sum[NV];
    accumulate<NV, kMasked>(sum, e.bias ? e.bias[m] : 0.0f, call.weight,
                            call.weight.crow_indices[m], call.weight.crow_indices[m + 1], offset,
                            call.x + begin, mask);
    const int64_t plane = m * call.y_stride;
    const float* residual = e.residual ? e.residual + plane : nullptr;
    if (contiguous) {
      store_tile<NV, kMasked>(sum, e, residual ? residual + begin : nullptr, call.y + plane + begin,
                              mask);
      continue;
    }
    alignas(32) float tile[NV * kLanes];
    for (int v = 0; v < NV; ++v) _mm256_store_ps(tile + v * kLanes, sum[v]);
    for (int s = 0; s < num_segments; ++s)
      store_segment(tile, segments[s], e, residual, call.y + plane);
  }
}

template <bool kMasked>
void convolve_pixels(const Conv2dCall& call, Range rows, int64_t begin, int64_t end,
                     int64_t vectors, __m256i mask) {
  switch (vectors) {
    case 1:
      return convolve_tile<1, kMasked>(call, rows, begin, end, mask);
    case 2:
      return convolve_tile<2, kMasked>(call, rows, begin, end, mask);
    case 3:
      return convolve_tile<3, kMasked>(call, rows, begin, end, mask);
    case 4:
      return convolve_tile<4, kMasked>(call, rows, begin, end, mask);
    case 5:
      return convolve_tile<5, kMasked>(call, rows, begin, end, mask);
    case 6:
      return convolve_tile<6, kMasked>(call, rows, begin, end, mask);
    case 7:
      return convolve_tile<7, kMasked>(call, rows, begin, end, mask);
    default:
      return convolve_tile<8, kMasked>(call, rows, begin, end, mask);
  }
}

}  // namespace

void csr_conv2d_avx2(const Conv2dCall& call, Range rows, Range pixels) {
  const Tiling tiling = make_tiling(pixels.end - pixels.begin);
  int64_t begin = pixels.begin;
  for (int64_t t = 0; t < tiling.tiles; ++t) {
    const int64_t vectors = tiling.width(t);
    const int64_t end = begin + vectors * kLanes;
    if (end <= pixels.end) {
      convolve_pixels<false>(call, rows, begin, end, vectors, __m256i{});
    } else {
      convolve_pixels<true>(call, rows, begin, pixels.end, vectors,
                            tail_mask(pixels.end - end + kLanes));
    }
    begin = end;
  }
}

}  // namespace sparselt::cpu
SPARSELT_TARGET_END

#endif  // __x86_64__
