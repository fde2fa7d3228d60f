// SPDX-License-Identifier: Apache-2.0
//
// Some lines of y[m, p, q] = clamp(sum_k W[m, k] * plane_k[p, q] + bias[m] + residual[m, p, q]) for
// W in CSR: direct convolution of a band that was padded once (kernels.h, ops/conv_bands.cpp).
//
// A tile of up to 16 vectors, whole output lines of up to 64 pixels, stays in registers over a row
// of W: a stored value costs its column, the place of the column's plane, one broadcast, and one
// multiply-add a vector with x as memory operand, read where it lies: nine taps of a filter share
// one copy of x. Lines begin at a cache line, so the taps of the middle column are aligned; the
// others cross one, which costs a second access. Bound: (1 + 2 + 2) / 3 accesses a multiply-add,
// and 3 for 16 of them. Slow on lines that fill their last vector badly.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/target.h"
#include "kernels.h"

SPARSELT_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")

namespace sparselt::cpu {
namespace {

constexpr int kLanes = 16;
constexpr __mmask16 kAllLanes = 0xffff;
constexpr int kTileVectors = 16;  // of 32 registers; enough to hide the latency of a multiply-add
constexpr int kLineVectors = 4;   // neighbours of a line in a tile

// A row's products are added up in chains of this many, and the chains' sums after that: one chain
// of hundreds rounds away two to three times as much.
constexpr int64_t kChain = 64;

// Lanes [0, count) set; all of them from 16 on.
inline __mmask16 first_lanes(int64_t count) {
  return count < kLanes ? static_cast<__mmask16>((1u << count) - 1) : kAllLanes;
}

// `kVectors` of each line from `column` on, the last one with the lanes of `last`, all of them if
// not `kMasked`: what a masked store writes cannot be forwarded to a load, so multiply-adds would
// wait until the lines that another core wrote are there. For the same reason a line is so few
// instructions: the more lines are asked for at a time, the better.
template <int kVectors, bool kMasked>
void copy_columns(const LineCopy& copy, int64_t column, __mmask16 last) {
  const __m512 zero = _mm512_setzero_ps();
  const auto store = [&](float* to, int v, __m512 value) {
    if (kMasked && v == kVectors - 1) return _mm512_mask_storeu_ps(to + v * kLanes, last, value);
    _mm512_storeu_ps(to + v * kLanes, value);
  };
  const int64_t above = copy.first < 0 ? -copy.first : 0;
  const int64_t inside = copy.height - copy.first;  // lines before the first one below
  for (int64_t c = 0; c < copy.channels; ++c) {
    const float* from = copy.from + c * copy.from_stride + column + copy.first * copy.width;
    float* to = copy.to + c * copy.to_stride + column;
    for (int64_t i = 0; i < copy.lines; ++i, from += copy.width, to += copy.pitch) {
      SPARSELT_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        if (i < above || i >= inside) {
          store(to, v, zero);
        } else if (kMasked && v == kVectors - 1) {
          store(to, v, _mm512_maskz_loadu_ps(last, from + v * kLanes));
        } else {
          store(to, v, _mm512_loadu_ps(from + v * kLanes));
        }
      }
    }
  }
}

template <int kVectors>
void copy_some(const LineCopy& copy, int64_t column, __mmask16 last) {
  if (last == kAllLanes) return copy_columns<kVectors, false>(copy, column, last);
  copy_columns<kVectors, true>(copy, column, last);
}

void copy_lines(const LineCopy& copy) {
  for (int64_t column = 0; column < copy.width;) {
    const int64_t vectors = (copy.width - column + kLanes - 1) / kLanes;
    const int64_t some = vectors < kLineVectors ? vectors : kLineVectors;
    const __mmask16 last = first_lanes(copy.width - column - (some - 1) * kLanes);
    if (some == 1) copy_some<1>(copy, column, last);
    if (some == 2) copy_some<2>(copy, column, last);
    if (some == 3) copy_some<3>(copy, column, last);
    if (some == 4) copy_some<4>(copy, column, last);
    column += some * kLanes;
  }
}

// Where a tile lies in the band, and the lanes of the last vector of its lines.
struct Tile {
  int64_t line;
  int64_t column;
  __mmask16 last;
};

// With `kMasked` the last vector of a line reads only the lanes of `last`.
template <bool kMasked, int kLines, int kVectors>
inline void add_chain(const Conv2dCall& call, const float* x, int64_t begin, int64_t end,
                      __mmask16 last, __m512 (&sum)[kLines][kVectors]) {
  const SparseView& w = call.weight;
  for (int64_t i = begin; i < end; ++i) {
    const __m512 value = _mm512_set1_ps(w.values[i]);
    const float* line = x + call.column_offsets[w.col_indices[i]];
    SPARSELT_UNROLL
    for (int l = 0; l < kLines; ++l) {
      SPARSELT_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        const float* at = line + v * kLanes;
        const bool partial = kMasked && v == kVectors - 1;
        const __m512 pixels = partial ? _mm512_maskz_loadu_ps(last, at) : _mm512_loadu_ps(at);
        sum[l][v] = _mm512_fmadd_ps(value, pixels, sum[l][v]);
      }
      line += call.pitch;
    }
  }
}

// The second operand of max and min is the one that survives a NaN. (The masks are full: the plain
// forms make GCC 12 warn of a register it leaves undefined on purpose.)
inline __m512 clamp(__m512 sum, __m512 lower, __m512 upper) {
  return _mm512_maskz_min_ps(kAllLanes, upper, _mm512_maskz_max_ps(kAllLanes, lower, sum));
}

template <int kLines, int kVectors>
inline void store_tile(const Conv2dCall& call, int64_t m, const Tile& tile,
                       const __m512 (&sum)[kLines][kVectors]) {
  const Epilogue& e = call.epilogue;
  const __m512 lower = _mm512_set1_ps(e.lower);
  const __m512 upper = _mm512_set1_ps(e.upper);
  int64_t at = m * call.y_stride + tile.line * call.out_width + tile.column;
  float* const y = call.y;
  const float* const residual = e.residual;
  const int64_t width = call.out_width;
  SPARSELT_UNROLL
  for (int l = 0; l < kLines; ++l) {
    SPARSELT_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const __mmask16 mask = v == kVectors - 1 ? tile.last : kAllLanes;
      const int64_t place = at + v * kLanes;
      __m512 out = sum[l][v];
      if (residual) out = _mm512_add_ps(out, _mm512_maskz_loadu_ps(mask, residual + place));
      _mm512_mask_storeu_ps(y + place, mask, clamp(out, lower, upper));
    }
    at += width;
  }
}

template <bool kMasked, int kLines, int kVectors>
void multiply_tile(const Conv2dCall& call, Range rows, const Tile& tile) {
  const SparseView& w = call.weight;
  const float* x = call.x + tile.line * call.pitch + tile.column;
  for (int64_t m = rows.begin; m < rows.end; ++m) {
    const __m512 bias = _mm512_set1_ps(call.epilogue.bias ? call.epilogue.bias[m] : 0.0f);
    __m512 sum[kLines][kVectors];
    SPARSELT_UNROLL
    for (int i = 0; i < kLines * kVectors; ++i) sum[i / kVectors][i % kVectors] = bias;
    int64_t begin = w.crow_indices[m];
    const int64_t end = w.crow_indices[m + 1];
    if (end - begin <= kChain) {
      add_chain<kMasked>(call, x, begin, end, tile.last, sum);
      store_tile(call, m, tile, sum);
      continue;
    }
    // In memory: there are not registers enough for both.
    alignas(64) float total[kLines * kVectors * kLanes];
    SPARSELT_UNROLL
    for (int i = 0; i < kLines * kVectors; ++i) _mm512_store_ps(total + i * kLanes, bias);
    for (; begin < end; begin += kChain) {
      SPARSELT_UNROLL
      for (int i = 0; i < kLines * kVectors; ++i) {
        sum[i / kVectors][i % kVectors] = _mm512_setzero_ps();
      }
      add_chain<kMasked>(call, x, begin, begin + kChain < end ? begin + kChain : end, tile.last,
                         sum);
      SPARSELT_UNROLL
      for (int i = 0; i < kLines * kVectors; ++i) {
        __m512& chain = sum[i / kVectors][i % kVectors];
        chain = _mm512_add_ps(chain, _mm512_load_ps(total + i * kLanes));
        _mm512_store_ps(total + i * kLanes, chain);
      }
    }
    store_tile(call, m, tile, sum);
  }
}

// The tile of `lines` lines; at most kLines.
template <bool kMasked, int kLines, int kVectors>
void multiply_lines(const Conv2dCall& call, Range rows, const Tile& tile, int64_t lines) {
  if constexpr (kLines > 1) {
    if (lines < kLines)
      return multiply_lines<kMasked, kLines - 1, kVectors>(call, rows, tile, lines);
  }
  multiply_tile<kMasked, kLines, kVectors>(call, rows, tile);
}

// Lines in tiles of about the same number.
template <int kVectors>
void multiply_columns(const Conv2dCall& call, Range rows, Range lines, int64_t column,
                      __mmask16 last) {
  constexpr int kMost = kTileVectors / kVectors;
  const int64_t count = lines.end - lines.begin;
  const int64_t tiles = (count + kMost - 1) / kMost;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t first = count * t / tiles;
    const auto multiply = last == kAllLanes ? multiply_lines<false, kMost, kVectors>
                                            : multiply_lines<true, kMost, kVectors>;
    multiply(call, rows, {lines.begin + first, column, last}, count * (t + 1) / tiles - first);
  }
}

}  // namespace

void csr_band_avx512(const BandCall& band, Range rows, Range lines) {
  if (band.copy.from) copy_lines(band.copy);
  const Conv2dCall& call = band.product;
  for (int64_t column = 0; column < call.out_width;) {
    const int64_t vectors = (call.out_width - column + kLanes - 1) / kLanes;
    const int64_t some = vectors < kLineVectors ? vectors : kLineVectors;
    const __mmask16 last = first_lanes(call.out_width - column - (some - 1) * kLanes);
    if (some == 1) multiply_columns<1>(call, rows, lines, column, last);
    if (some == 2) multiply_columns<2>(call, rows, lines, column, last);
    if (some == 3) multiply_columns<3>(call, rows, lines, column, last);
    if (some == 4) multiply_columns<4>(call, rows, lines, column, last);
    column += some * kLanes;
  }
}

}  // namespace sparselt::cpu
SPARSELT_TARGET_END

#endif  // __x86_64__
