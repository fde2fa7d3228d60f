// SPDX-License-Identifier: Apache-2.0
//
// A depthwise convolution, 8 output columns (a strip) at a time.
//
// Windows of 3x3, which nearly all are, have a tile of their own: up to 4 rows of a strip at once,
// with the window's 9 weights in registers. Each row of x in reach is loaded once and multiplied
// into all rows of y that it reaches. With a stride of 2, loads are split into their even and odd
// columns; both come out in the same order of lanes, so sums are put in order once, at the end.
//
// Other windows go tap by tap, as in dense_depthwise_avx512.cpp.
//
// Masked loads are as fast as others on AMD, masked stores are not: those take a dozen cycles, as
// long as the rest of a strip's row.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/target.h"
#include "kernels.h"

SPARSELT_TARGET_BEGIN("avx2,fma")

namespace sparselt::cpu {
namespace {

constexpr int64_t kLanes = 8;
constexpr int kRows = 4;  // of y at once

int clamp_to_lanes(int64_t lane) {
  return static_cast<int>(lane < 0 ? 0 : lane > kLanes ? kLanes : lane);
}

// All bits set in the lanes j whose first + j * step lies in [0, size).
__m256i lanes_inside(int64_t first, int64_t step, int64_t size) {
  const int begin = first >= 0 ? 0 : clamp_to_lanes((step - 1 - first) / step);
  const int end = first >= size ? 0 : clamp_to_lanes((size - first + step - 1) / step);
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_and_si256(_mm256_cmpgt_epi32(lanes, _mm256_set1_epi32(begin - 1)),
                          _mm256_cmpgt_epi32(_mm256_set1_epi32(end), lanes));
}

// Where a tap meets x in a strip: lane 0's column, and the lanes that lie inside x. With a stride
// of 2 these are the lanes of two neighbouring vectors, else of one.
struct Tap {
  int64_t column;
  __m256i low;
  __m256i high;
};

// A strip of y, columns [q, q + count).
struct Strip {
  int64_t q;
  int count;
  bool is_inner;  // all that its taps load lies inside x
  __m256i outputs;
  Tap taps[kMaxDepthwiseTaps];
};

template <int STRIDE>  // 0: any
Strip* make_strip(const WindowAxis& w, int64_t q, Strip* strip) {
  if (strip->q == q) return strip;
  strip->q = q;
  strip->count = clamp_to_lanes(w.out - q);
  strip->outputs = lanes_inside(0, 1, strip->count);
  for (int64_t s = 0; s < w.kernel; ++s) {
    Tap& tap = strip->taps[s];
    tap.column = q * w.stride + s * w.dilation - w.padding;
    tap.low = lanes_inside(tap.column, STRIDE == 0 ? w.stride : 1, w.size);
    tap.high = lanes_inside(tap.column + kLanes, 1, w.size);
  }
  const int64_t last = strip->taps[w.kernel - 1].column + (STRIDE == 2 ? 2 : 1) * kLanes;
  strip->is_inner = STRIDE != 0 && strip->taps[0].column >= 0 && last <= w.size;
  return strip;
}

// What a plane's strips have in common.
struct Plane {
  const float* x;
  const float* weight;
  __m256 bias;
  __m256i steps;  // from lane 0's column to each lane's
  int64_t first;  // of y
};

template <bool INNER>
inline __m256 load(const float* from, __m256i inside) {
  return INNER ? _mm256_loadu_ps(from) : _mm256_maskload_ps(from, inside);
}

// Every second float of two registers, lanes 2, 3 and 4, 5 exchanged.
template <int FIRST>
inline __m256 every_second(__m256 low, __m256 high) {
  return _mm256_shuffle_ps(low, high, FIRST == 0 ? 0x88 : 0xdd);
}
inline __m256 in_order(__m256 shuffled) {
  return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(shuffled), 0xd8));
}

// A tap's x, with a stride of 2 shuffled.
template <int STRIDE, bool INNER>
inline __m256 load_tap(const float* row, const Tap& tap, __m256i steps) {
  const float* from = row + tap.column;
  if constexpr (STRIDE == 1) return load<INNER>(from, tap.low);
  if constexpr (STRIDE == 2) {
    return every_second<0>(load<INNER>(from, tap.low), load<INNER>(from + kLanes, tap.high));
  }
  return _mm256_mask_i32gather_ps(_mm256_setzero_ps(), from, steps, _mm256_castsi256_ps(tap.low),
                                  sizeof(float));
}

inline void store_lanes(__m256 value, int count, float* to) {
  if (count == kLanes) return _mm256_storeu_ps(to, value);
  __m128 rest = _mm256_castps256_ps128(value);
  if (count & 4) {
    _mm_storeu_ps(to, rest);
    rest = _mm256_extractf128_ps(value, 1);
    to += 4;
  }
  if (count & 2) {
    _mm_storel_pi(reinterpret_cast<__m64*>(to), rest);
    rest = _mm_movehl_ps(rest, rest);
    to += 2;
  }
  if (count & 1) _mm_store_ss(to, rest);
}

// Residual, clamp and store of a strip's row of y.
template <int STRIDE>
inline void finish_row(const DepthwiseCall& call, const Strip& strip, int64_t at, __m256 sum) {
  const Epilogue& epilogue = call.epilogue;
  if constexpr (STRIDE == 2) sum = in_order(sum);
  if (epilogue.residual) {
    sum = _mm256_add_ps(sum, _mm256_maskload_ps(epilogue.residual + at, strip.outputs));
  }
  // The second operand of max and min is the one that survives a NaN.
  sum = _mm256_max_ps(_mm256_set1_ps(epilogue.lower), sum);
  store_lanes(_mm256_min_ps(_mm256_set1_ps(epilogue.upper), sum), strip.count, call.y + at);
}

// Rows [p, p + ROWS) of a strip, by windows of 3x3.
template <int STRIDE, int ROWS, bool INNER>
void run_tile(const DepthwiseCall& call, const Plane& plane, const Strip& strip, int64_t p) {
  constexpr int kReach = (ROWS - 1) * STRIDE + 3;
  const WindowAxis& h = call.h;
  const int64_t first = p * STRIDE - h.padding;
  const float* x = plane.x + first * call.w.size;
  __m256 weight[9];
  SPARSELT_UNROLL
  for (int i = 0; i < 9; ++i) weight[i] = _mm256_broadcast_ss(plane.weight + i);
  __m256 sums[ROWS];
  SPARSELT_UNROLL
  for (int i = 0; i < ROWS; ++i) sums[i] = plane.bias;
  SPARSELT_UNROLL
  for (int row = 0; row < kReach; ++row, x += call.w.size) {
    if (static_cast<uint64_t>(first + row) >= static_cast<uint64_t>(h.size)) continue;
    const Tap* taps = strip.taps;
    const float* from = x + taps[0].column;
    __m256 data[3];
    if constexpr (STRIDE == 1) {
      SPARSELT_UNROLL
      for (int s = 0; s < 3; ++s) data[s] = load<INNER>(from + s, taps[s].low);
    } else {
      const __m256 low = load<INNER>(from, taps[0].low);
      const __m256 high = load<INNER>(from + kLanes, taps[0].high);
      data[0] = every_second<0>(low, high);
      data[1] = every_second<1>(low, high);
      data[2] = every_second<0>(load<INNER>(from + 2, taps[2].low),
                                load<INNER>(from + 2 + kLanes, taps[2].high));
    }
    SPARSELT_UNROLL
    for (int i = 0; i < ROWS; ++i) {
      const int r = row - i * STRIDE;
      if (r < 0 || r > 2) continue;
      SPARSELT_UNROLL
      for (int s = 0; s < 3; ++s) sums[i] = _mm256_fmadd_ps(weight[r * 3 + s], data[s], sums[i]);
    }
  }
  const int64_t at = plane.first + p * call.w.out + strip.q;
  SPARSELT_UNROLL
  for (int i = 0; i < ROWS; ++i) finish_row<STRIDE>(call, strip, at + i * call.w.out, sums[i]);
}

template <int STRIDE, bool INNER>
void run_small_windows(const DepthwiseCall& call, const Plane& plane, const Strip& strip) {
  int64_t p = 0;
  for (; p + kRows <= call.h.out; p += kRows) run_tile<STRIDE, kRows, INNER>(call, plane, strip, p);
  switch (call.h.out - p) {
    case 3:
      return run_tile<STRIDE, 3, INNER>(call, plane, strip, p);
    case 2:
      return run_tile<STRIDE, 2, INNER>(call, plane, strip, p);
    case 1:
      return run_tile<STRIDE, 1, INNER>(call, plane, strip, p);
  }
}

// Rows [p, p + ROWS) of a strip, whose windows reach the same rows of x inside it.
template <int STRIDE, int ROWS, bool INNER>
void run_rows(const DepthwiseCall& call, const Plane& plane, const Strip& strip, int64_t p) {
  const WindowAxis& h = call.h;
  const int64_t row_step = h.stride * call.w.size;
  __m256 sums[ROWS];
  SPARSELT_UNROLL
  for (int i = 0; i < ROWS; ++i) sums[i] = plane.bias;
  for (int64_t r = 0; r < h.kernel; ++r) {
    const int64_t row = p * h.stride + r * h.dilation - h.padding;
    if (row < 0 || row >= h.size) continue;
    const float* x = plane.x + row * call.w.size;
    for (int64_t s = 0; s < call.w.kernel; ++s) {
      const __m256 value = _mm256_broadcast_ss(plane.weight + r * call.w.kernel + s);
      SPARSELT_UNROLL
      for (int i = 0; i < ROWS; ++i) {
        const __m256 data = load_tap<STRIDE, INNER>(x + i * row_step, strip.taps[s], plane.steps);
        sums[i] = _mm256_fmadd_ps(value, data, sums[i]);
      }
    }
  }
  const int64_t at = plane.first + p * call.w.out + strip.q;
  SPARSELT_UNROLL
  for (int i = 0; i < ROWS; ++i) finish_row<STRIDE>(call, strip, at + i * call.w.out, sums[i]);
}

template <int STRIDE, bool INNER>
void run_strip(const DepthwiseCall& call, const Plane& plane, const Strip& strip) {
  const WindowAxis& h = call.h;
  if constexpr (STRIDE != 0) {
    const bool is_small = h.kernel == 3 && call.w.kernel == 3 && h.stride == STRIDE;
    if (is_small && h.dilation == 1 && call.w.dilation == 1) {
      return run_small_windows<STRIDE, INNER>(call, plane, strip);
    }
  }
  for (int64_t p = 0; p < h.out;) {
    const int64_t first = p * h.stride - h.padding;
    const int64_t last = first + (kRows - 1) * h.stride + (h.kernel - 1) * h.dilation;
    if (first >= 0 && last < h.size && p + kRows <= h.out) {
      run_rows<STRIDE, kRows, INNER>(call, plane, strip, p);
      p += kRows;
    } else {
      run_rows<STRIDE, 1, INNER>(call, plane, strip, p++);
    }
  }
}

// Planes of one strip share what `made` holds of it.
template <int STRIDE>
void run_plane(const DepthwiseCall& call, int64_t index, Strip* made) {
  const WindowAxis& h = call.h;
  const WindowAxis& w = call.w;
  const int64_t filter = index % call.filters;
  const __m256i steps = _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7),
                                           _mm256_set1_epi32(static_cast<int>(w.stride)));
  const float* bias = call.epilogue.bias;
  const Plane plane{call.x + index / call.multiplier * h.size * w.size,
                    call.weight + filter * h.kernel * w.kernel,
                    _mm256_set1_ps(bias ? bias[filter] : 0.0f), steps, index * h.out * w.out};
  for (int64_t q = 0; q < w.out; q += kLanes) {
    const Strip& strip = *make_strip<STRIDE>(w, q, made);
    if (strip.is_inner) {
      run_strip<STRIDE, true>(call, plane, strip);
    } else {
      run_strip<STRIDE, false>(call, plane, strip);
    }
  }
}

}  // namespace

void dense_depthwise_avx2(const DepthwiseCall& call, Range planes) {
  const auto run = call.w.stride == 1   ? run_plane<1>
                   : call.w.stride == 2 ? run_plane<2>
                                        : run_plane<0>;
  Strip made;
  made.q = -1;
  for (int64_t plane = planes.begin; plane < planes.end; ++plane) run(call, plane, &made);
}

}  // namespace sparselt::cpu
SPARSELT_TARGET_END

#endif  // __x86_64__
