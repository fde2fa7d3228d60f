// SPDX-License-Identifier: Apache-2.0
//
// What the spmv kernels of x86 for bits share: the walk over rows. Include inside the target
// region, after <immintrin.h>, cpu/target.h and kernels.h. The unit brings
//
//   Sums        a row's sums of one column of x, over the columns of the weight that a lane meets
//   Chunk       the stored values of 16 columns, each in its lane
//   expand      makes a Chunk of a mask and the values from the first of them on
//   add_chunk   adds a Chunk's products with 16 floats of x to Sums; what is not stored meets none
//   add_up      the sum of Sums
//   kMostSums   that registers hold
#pragma once

#include "cpu/bits_row.h"

namespace sparselt::cpu {
namespace {

// Rows at once, that lie a quarter of all apart: each is a stream that the memory fetches ahead,
// and a load of x serves all four.
constexpr int64_t kMostRows = 4;
constexpr int64_t kPrefetchValues = 512;  // stored values ahead

template <int kRows, int kColumns>
void multiply_rows(const SpmvCall& call, int64_t first, int64_t apart) {
  const BitsView& w = call.bits;
  const int64_t chunks = (w.cols + kMaskBits - 1) / kMaskBits;
  const float* values[kRows];
  const uint16_t* masks[kRows];
  Sums sums[kRows][kColumns] = {};
  SPARSELT_UNROLL
  for (int r = 0; r < kRows; ++r) {
    values[r] = w.values + w.crow_indices[first + r * apart];
    masks[r] = w.masks + (first + r * apart) * chunks;
  }
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const float* x = call.x + chunk * kMaskBits;
    SPARSELT_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const unsigned mask = masks[r][chunk];
      const Chunk kept = expand(mask, values[r]);
      _mm_prefetch(reinterpret_cast<const char*>(values[r] + kPrefetchValues), _MM_HINT_T0);
      values[r] += _mm_popcnt_u32(mask);
      SPARSELT_UNROLL
      for (int n = 0; n < kColumns; ++n) {
        sums[r][n] = add_chunk(kept, x + n * call.block_stride, sums[r][n]);
      }
    }
  }
  SPARSELT_UNROLL
  for (int r = 0; r < kRows; ++r) {
    SPARSELT_UNROLL
    for (int n = 0; n < kColumns; ++n) store_sum(call, first + r * apart, n, add_up(sums[r][n]));
  }
}

template <int kColumns>
void multiply_range(const SpmvCall& call, Range rows) {
  constexpr int64_t kFit = kMostSums / kColumns;
  constexpr int64_t kRows = kFit < kMostRows ? kFit : kMostRows;
  const int64_t apart = (rows.end - rows.begin) / kRows;
  for (int64_t i = 0; i < apart; ++i) {
    multiply_rows<kRows, kColumns>(call, rows.begin + i, apart);
  }
  for (int64_t m = rows.begin + kRows * apart; m < rows.end; ++m) {
    multiply_rows<1, kColumns>(call, m, 0);
  }
}

inline void multiply_bits(const SpmvCall& call, Range rows) {
  if (call.columns == 1) return multiply_range<1>(call, rows);
  if (call.columns == 2) return multiply_range<2>(call, rows);
  if (call.columns == 3) return multiply_range<3>(call, rows);
  multiply_range<4>(call, rows);
}

}  // namespace
}  // namespace sparselt::cpu
