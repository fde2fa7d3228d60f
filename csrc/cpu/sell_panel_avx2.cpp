// SPDX-License-Identifier: Apache-2.0
//
// A panel of y = clamp(W x + bias + residual) for W in sliced ELL with column blocks: matrix
// product or convolution alike. kernels.h says what a panel is; sell_panel_avx512.cpp tells the
// method.
//
// Sixteen registers allow 12 sums: slices of 2 rows by up to 6 registers (48 columns), so that a
// stored value costs 6 multiply-adds with x as memory operand; and just 14, of 56 columns. Loads
// bind: Zen 3 does two a cycle, of vectors and of single values alike. So four values and their
// columns come with two loads, are spread by in-lane permutations and cut by shifts, and 6 / 6.5 of
// peak is the bound, less the copy of x and the sums. Slow for few rows, for few columns (4 sums do
// not hide the multiply-add's latency), and for few values a slice: its end takes about as long as
// ten of them.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/target.h"
#include "kernels.h"

SPARSELT_TARGET_BEGIN("avx2,fma")
#include "cpu/panel_avx2.h"

namespace sparselt::cpu {
namespace {

constexpr int kSliceRows = 2;

// Of a row of x. Four vectors are the last of all and at most half full (ops/panels.cpp).
template <int NV>
constexpr int kRegisters = NV == 4 ? 7 : 2 * NV;

// Half a row of x, `at` bytes from the first.
inline __m256 load_at(const float* vector, uint64_t at, int half) {
  const auto* bytes = reinterpret_cast<const char*>(vector) + at;
  return _mm256_load_ps(reinterpret_cast<const float*>(bytes) + half * kLanes);
}

template <int NV>
inline void add_product(const XBlock& x, __m256 value, uint64_t at, __m256 (&sum)[kRegisters<NV>]) {
  SPARSELT_UNROLL
  for (int i = 0; i < kRegisters<NV>; ++i) {
    sum[i] = _mm256_fmadd_ps(value, load_at(x.vectors[i / 2], at, i % 2), sum[i]);
  }
}

// Where column j of four lies, in bytes.
constexpr uint64_t kRowBytes = kPieceLanes * sizeof(float);
inline uint64_t place_of(uint64_t four, int j) { return (four >> (16 * j) & 0xffff) * kRowBytes; }

template <int NV, Ending kEnding>
struct Slices {
  // A function of its own: inlined, GCC 12 runs out of registers and keeps a sum in memory.
  [[gnu::noinline]] static void multiply(const PanelCall& call, const XBlock& x, Range slices,
                                         bool is_first, Ahead& ahead);
};

template <int NV, Ending kEnding>
void Slices<NV, kEnding>::multiply(const PanelCall& call, const XBlock& x, Range slices,
                                   bool is_first, Ahead& ahead) {
  const SellView& w = call.weight;
  const Ends<NV, kEnding> ends(call, is_first);
  Ahead x_ahead = ahead;
  const int32_t* rows = w.slice_rows + slices.begin * kSliceRows;
  const int64_t first_value = int64_t{w.slice_steps[slices.begin]} * kSliceRows;
  const uint16_t* columns = w.columns + first_value;
  const float* values = w.values + first_value;
  for (int64_t slice = slices.begin; slice < slices.end; ++slice, rows += kSliceRows) {
    x_ahead.fetch();
    ends.prefetch(rows, kSliceRows, slices.end - slice);
    __m256 sum[kSliceRows][kRegisters<NV>];
    for (int r = 0; r < kSliceRows; ++r) {
      for (int i = 0; i < kRegisters<NV>; ++i) sum[r][i] = _mm256_setzero_ps();
    }
    const float* const end = w.values + int64_t{w.slice_steps[slice + 1]} * kSliceRows;
    for (; values + kSliceRows < end; values += 2 * kSliceRows, columns += 2 * kSliceRows) {
      uint64_t four;
      __builtin_memcpy(&four, columns, sizeof(four));
      const __m256 all = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(values));
      add_product<NV>(x, _mm256_permute_ps(all, 0x00), place_of(four, 0), sum[0]);
      add_product<NV>(x, _mm256_permute_ps(all, 0x55), place_of(four, 1), sum[1]);
      add_product<NV>(x, _mm256_permute_ps(all, 0xaa), place_of(four, 2), sum[0]);
      add_product<NV>(x, _mm256_permute_ps(all, 0xff), place_of(four, 3), sum[1]);
    }
    if (values < end) {
      add_product<NV>(x, _mm256_broadcast_ss(values), columns[0] * kRowBytes, sum[0]);
      add_product<NV>(x, _mm256_broadcast_ss(values + 1), columns[1] * kRowBytes, sum[1]);
      values += kSliceRows;
      columns += kSliceRows;
    }
    SPARSELT_UNROLL
    for (int r = 0; r < kSliceRows; ++r) {
      if (rows[r] >= 0) ends.end_row(rows[r], 0, sum[r]);
    }
    for (int r = 0; kEnding == Ending::kPieces && r < kSliceRows; ++r) {
      if (rows[r] >= 0) ends.store_row(rows[r]);
    }
  }
  ahead = x_ahead;
}

}  // namespace

void sell_panel_avx2(const PanelCall& call, Range sections) {
  switch (call.panel.vectors) {
    case 1:
      return multiply_panel<Slices, 1>(call, sections);
    case 2:
      return multiply_panel<Slices, 2>(call, sections);
    case 3:
      return multiply_panel<Slices, 3>(call, sections);
    default:
      return multiply_panel<Slices, 4>(call, sections);
  }
}

}  // namespace sparselt::cpu
SPARSELT_TARGET_END

#endif  // __x86_64__
