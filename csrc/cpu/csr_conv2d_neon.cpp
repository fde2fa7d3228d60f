// SPDX-License-Identifier: Apache-2.0
//
// y[m, p, q] = clamp(sum_k W[m, k] * plane_k[p, q] + bias[m] + residual[m, p, q]) for W in CSR:
// direct convolution.
//
// kernels.h says how column k of W becomes a shifted plane of x, whatever the stride, padding and
// dilation. A call owns rows [rows.begin, rows.end) and flat pixels [pixels.begin, pixels.end); a
// tile of up to 64 of them is computed as in csr_spmm_neon, with no test for borders. Where the
// planes carry a halo (pitch > out_width) the tile goes through a small buffer and only its real
// pixels are written; the pixels thrown away, (pitch - out_width) / pitch of the work, are the
// price of loads without gathers. Slow on very narrow maps.
#if defined(__aarch64__)
#include "cpu/tile_neon.h"

namespace sparselt::cpu {
namespace {

constexpr int kTileVectors = 16;  // 64 pixels: 16 of 32 registers
constexpr int kTilePixels = kTileVectors * kLanes;

// A stretch of a tile that lies in one output row.
struct Segment {
  int64_t target;  // floats from the start of an output plane
  int source;      // floats from the start of the tile
  int count;
};

// The segments of flat pixels [begin, end), at most one an output row; returns how many.
int make_segments(const Conv2dCall& call, int64_t begin, int64_t end,
                  Segment (&segments)[kTilePixels + 1]) {
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

// Vector operations for every lane, the last few too: scalar ones could differ in the sign of a
// zero, and which lanes are last depends on the split.
void store_segment(const float* tile, const Segment& segment, const Epilogue& e,
                   const float* residual, float* y) {
  for (int j = 0; j < segment.count; j += kLanes) {
    const int rest = segment.count - j;
    const int lanes = rest < kLanes ? rest : kLanes;
    float32x4_t out = load_some(tile + segment.source + j, lanes);
    if (residual) out = vaddq_f32(out, load_some(residual + segment.target + j, lanes));
    store_some(y + segment.target + j, clamp(out, e), lanes);
  }
}

template <int NV, bool kNarrow>
void convolve_tile(const Conv2dCall& call, Range rows, int64_t begin, LastVector last) {
  const Epilogue& e = call.epilogue;
  const PlaneOffsets offset{call.column_offsets};
  const bool contiguous = call.pitch == call.out_width;
  Segment segments[kTilePixels + 1];
  const int num_segments =
      contiguous ? 0 : make_segments(call, begin, begin + last.at + last.lanes, segments);
  for (int64_t m = rows.begin; m < rows.end; ++m) {
    float32x4_t sum[NV];
    accumulate<NV, kNarrow>(sum, e.bias ? e.bias[m] : 0.0f, call.weight,
                            call.weight.crow_indices[m], call.weight.crow_indices[m + 1], offset,
                            call.x + begin, last);
    const int64_t plane = m * call.y_stride;
    const float* residual = e.residual ? e.residual + plane : nullptr;
    if (contiguous) {
      store_tile<NV, kNarrow>(sum, e, residual ? residual + begin : nullptr, call.y + plane + begin,
                              last);
      continue;
    }
    float tile[NV * kLanes];
    for (int v = 0; v < NV; ++v) store_vector<NV, kNarrow>(tile, v, last, sum[v]);
    for (int s = 0; s < num_segments; ++s)
      store_segment(tile, segments[s], e, residual, call.y + plane);
  }
}

// The instance for `vectors`, NV of them or fewer.
template <int NV>
void convolve_pixels(const Conv2dCall& call, Range rows, int64_t begin, int64_t vectors,
                     LastVector last) {
  if (vectors == NV) return convolve_tile<NV, false>(call, rows, begin, last);
  if constexpr (NV > 1) convolve_pixels<NV - 1>(call, rows, begin, vectors, last);
}

}  // namespace

void csr_conv2d_neon(const Conv2dCall& call, Range rows, Range pixels) {
  const Tiling tiling = make_tiling<kTileVectors>(pixels);
  for (int64_t t = 0; t < tiling.tiles; ++t) {
    const LastVector last = tiling.last(t);
    if (last.lanes < kLanes) {
      convolve_tile<1, true>(call, rows, tiling.begin(t), last);
    } else {
      convolve_pixels<kTileVectors>(call, rows, tiling.begin(t), tiling.width(t), last);
    }
  }
}

}  // namespace sparselt::cpu

#endif  // __aarch64__
