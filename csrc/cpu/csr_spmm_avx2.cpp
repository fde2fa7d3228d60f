// SPDX-License-Identifier: Apache-2.0
//
// y = clamp(W x + bias + residual) for W in CSR and a row-major x.
//
// A call owns rows [rows.begin, rows.end) and columns [columns.begin, columns.end). Tiles of up to
// 64 columns are outermost: the panel of x that a tile reads (256 bytes a row of x) is then reused
// from cache by every row of W, and a row's tile of y lives in registers from bias to clamp. Fast
// where x has columns to fill the tile; slow where a panel outgrows the caches (many columns of W),
// and at a handful of columns, where too few accumulators hide the latency. With one column the
// product is a dot product a row: four partial sums, chosen by the width of the whole product so
// that the order of summation does not depend on the split.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/target.h"
#include "kernels.h"

SPARSELT_TARGET_BEGIN("avx2,fma")
#include "cpu/tile_avx2.h"

namespace sparselt::cpu {
namespace {

template <int NV, bool kMasked>
void multiply_tile(const SpmmCall& call, Range rows, int64_t column, __m256i mask) {
  const Epilogue& e = call.epilogue;
  const RowOffsets offset{call.x_stride};
  for (int64_t m = rows.begin; m < rows.end; ++m) {
    __m256 sum[NV];
    accumulate<NV, kMasked>(sum, e.bias ? e.bias[m] : 0.0f, call.weight,
                            call.weight.crow_indices[m], call.weight.crow_indices[m + 1], offset,
                            call.x + column, mask);
    const int64_t at = m * call.y_stride + column;
    store_tile<NV, kMasked>(sum, e, e.residual ? e.residual + at : nullptr, call.y + at, mask);
  }
}

template <bool kMasked>
void multiply_columns(const SpmmCall& call, Range rows, int64_t column, int64_t vectors,
                      __m256i mask) {
  switch (vectors) {
    case 1:
      return multiply_tile<1, kMasked>(call, rows, column, mask);
    case 2:
      return multiply_tile<2, kMasked>(call, rows, column, mask);
    case 3:
      return multiply_tile<3, kMasked>(call, rows, column, mask);
    case 4:
      return multiply_tile<4, kMasked>(call, rows, column, mask);
    case 5:
      return multiply_tile<5, kMasked>(call, rows, column, mask);
    case 6:
      return multiply_tile<6, kMasked>(call, rows, column, mask);
    case 7:
      return multiply_tile<7, kMasked>(call, rows, column, mask);
    default:
      return multiply_tile<8, kMasked>(call, rows, column, mask);
  }
}

void multiply_vector(const SpmmCall& call, Range rows) {
  const SparseView& w = call.weight;
  const Epilogue& e = call.epilogue;
  for (int64_t m = rows.begin; m < rows.end; ++m) {
    float sum[4] = {e.bias ? e.bias[m] : 0.0f, 0.0f, 0.0f, 0.0f};
    int64_t i = w.crow_indices[m];
    const int64_t end = w.crow_indices[m + 1];
    for (; i + 4 <= end; i += 4) {
      for (int lane = 0; lane < 4; ++lane) {
        sum[lane] += w.values[i + lane] * call.x[w.col_indices[i + lane] * call.x_stride];
      }
    }
    for (; i < end; ++i) sum[0] += w.values[i] * call.x[w.col_indices[i] * call.x_stride];
    float out = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    if (e.residual) out += e.residual[m * call.y_stride];
    out = out < e.lower ? e.lower : out;  // written so that a NaN stays a NaN
    call.y[m * call.y_stride] = out > e.upper ? e.upper : out;
  }
}

}  // namespace

void csr_spmm_avx2(const SpmmCall& call, Range rows, Range columns) {
  if (call.columns == 1) return multiply_vector(call, rows);
  const Tiling tiling = make_tiling(columns.end - columns.begin);
  int64_t column = columns.begin;
  for (int64_t t = 0; t < tiling.tiles; ++t) {
    const int64_t vectors = tiling.width(t);
    const int64_t end = column + vectors * kLanes;
    if (end <= columns.end) {
      multiply_columns<false>(call, rows, column, vectors, __m256i{});
    } else {
      multiply_columns<true>(call, rows, column, vectors, tail_mask(columns.end - end + kLanes));
    }
    column = end;
  }
}

}  // namespace sparselt::cpu
SPARSELT_TARGET_END

#endif  // __x86_64__
