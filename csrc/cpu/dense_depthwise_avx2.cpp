// SPDX-License-Identifier: Apache-2.0
//
// A depthwise convolution, 8 output columns at a time; dense_depthwise_avx512.cpp says how.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/target.h"
#include "kernels.h"

SPARSELT_TARGET_BEGIN("avx2,fma")

namespace sparselt::cpu {
namespace {

constexpr int64_t kLanes = 8;
constexpr int kRows = 4;  // of y at once, for one load of a tap's weight and masks

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

template <int STRIDE>  // 0: any
inline __m256 load_tap(const float* row, const Tap& tap, __m256i steps) {
  const float* from = row + tap.column;
  if constexpr (STRIDE == 1) return _mm256_maskload_ps(from, tap.low);
  if constexpr (STRIDE == 2) {
    const __m256 even = _mm256_shuffle_ps(_mm256_maskload_ps(from, tap.low),
                                          _mm256_maskload_ps(from + kLanes, tap.high), 0x88);
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(even), 0xd8));
  }
  return _mm256_mask_i32gather_ps(_mm256_setzero_ps(), from, steps, _mm256_castsi256_ps(tap.low),
                                  sizeof(float));
}

template <int STRIDE>
void make_taps(const WindowAxis& w, int64_t q, Tap* taps) {
  for (int64_t s = 0; s < w.kernel; ++s) {
    Tap& tap = taps[s];
    tap.column = q * w.stride + s * w.dilation - w.padding;
    tap.low = lanes_inside(tap.column, STRIDE == 0 ? w.stride : 1, w.size);
    tap.high = lanes_inside(tap.column + kLanes, 1, w.size);
  }
}

// The rows of the window that lie inside x for row p of y. (Windows are small: steps are cheaper
// than divisions.)
Range window_rows(const WindowAxis& h, int64_t p) {
  const int64_t first = p * h.stride - h.padding;
  Range rows{0, h.kernel};
  while (rows.begin < rows.end && first + rows.begin * h.dilation < 0) ++rows.begin;
  while (rows.begin < rows.end && first + (rows.end - 1) * h.dilation >= h.size) --rows.end;
  return rows;
}

// Whether all of the window lies inside x for rows [p, p + kRows) of y.
bool are_inner_rows(const WindowAxis& h, int64_t p) {
  const int64_t first = p * h.stride - h.padding;
  const int64_t last = first + (kRows - 1) * h.stride + (h.kernel - 1) * h.dilation;
  return first >= 0 && last < h.size && p + kRows <= h.out;
}

// What a plane's strips have in common.
struct Plane {
  const float* x;
  const float* weight;
  __m256 bias;
  __m256i steps;  // from lane 0's column to each lane's
};

// Rows [p, p + ROWS) of a strip of y, which starts at y + at. The `window_rows` of the window must
// lie inside x for all of them.
template <int STRIDE, int ROWS>
inline void run_rows(const DepthwiseCall& call, const Plane& plane, const Tap* taps, int64_t p,
                     Range window_rows, int64_t at, __m256i outputs) {
  const int64_t window = call.w.kernel;
  const int64_t row_step = call.h.stride * call.w.size;
  __m256 sums[ROWS];
  for (int i = 0; i < ROWS; ++i) sums[i] = plane.bias;
  for (int64_t r = window_rows.begin; r < window_rows.end; ++r) {
    const int64_t row = p * call.h.stride + r * call.h.dilation - call.h.padding;
    const float* x = plane.x + row * call.w.size;
    const float* weight = plane.weight + r * window;
    for (int64_t s = 0; s < window; ++s) {
      const Tap tap = taps[s];
      const __m256 value = _mm256_set1_ps(weight[s]);
      for (int i = 0; i < ROWS; ++i) {
        sums[i] =
            _mm256_fmadd_ps(value, load_tap<STRIDE>(x + i * row_step, tap, plane.steps), sums[i]);
      }
    }
  }
  const Epilogue& epilogue = call.epilogue;
  const __m256 lower = _mm256_set1_ps(epilogue.lower);
  const __m256 upper = _mm256_set1_ps(epilogue.upper);
  for (int i = 0; i < ROWS; ++i, at += call.w.out) {
    __m256 sum = sums[i];
    if (epilogue.residual) {
      sum = _mm256_add_ps(sum, _mm256_maskload_ps(epilogue.residual + at, outputs));
    }
    // The second operand of max and min is the one that survives a NaN.
    sum = _mm256_min_ps(upper, _mm256_max_ps(lower, sum));
    _mm256_maskstore_ps(call.y + at, outputs, sum);
  }
}

// `taps` holds those of the strip at *made_for, so that planes of one strip share them.
template <int STRIDE>
void run_plane(const DepthwiseCall& call, int64_t index, Tap* taps, int64_t* made_for) {
  const WindowAxis& h = call.h;
  const WindowAxis& w = call.w;
  const int64_t filter = index % call.filters;
  const __m256i steps = _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7),
                                           _mm256_set1_epi32(static_cast<int>(w.stride)));
  const float* bias = call.epilogue.bias;
  const Plane plane{call.x + index / call.multiplier * h.size * w.size,
                    call.weight + filter * h.kernel * w.kernel,
                    _mm256_set1_ps(bias ? bias[filter] : 0.0f), steps};
  for (int64_t q = 0; q < w.out; q += kLanes) {
    if (*made_for != q) make_taps<STRIDE>(w, q, taps);
    *made_for = q;
    const __m256i outputs = lanes_inside(q, 1, w.out);
    for (int64_t p = 0; p < h.out;) {
      const int64_t at = (index * h.out + p) * w.out + q;
      if (are_inner_rows(h, p)) {
        run_rows<STRIDE, kRows>(call, plane, taps, p, {0, h.kernel}, at, outputs);
        p += kRows;
      } else {
        run_rows<STRIDE, 1>(call, plane, taps, p, window_rows(h, p), at, outputs);
        ++p;
      }
    }
  }
}

}  // namespace

void dense_depthwise_avx2(const DepthwiseCall& call, Range planes) {
  const auto run = call.w.stride == 1   ? run_plane<1>
                   : call.w.stride == 2 ? run_plane<2>
                                        : run_plane<0>;
  Tap taps[kMaxDepthwiseTaps];
  int64_t made_for = -1;
  for (int64_t plane = planes.begin; plane < planes.end; ++plane) run(call, plane, taps, &made_for);
}

}  // namespace sparselt::cpu
SPARSELT_TARGET_END

#endif  // __x86_64__
