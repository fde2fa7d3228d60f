// SPDX-License-Identifier: Apache-2.0
//
// y = clamp(W x + bias + residual) for W in CSR and a row-major x.
//
// A call owns rows [rows.begin, rows.end) and columns [columns.begin, columns.end). Tiles of up to
// 64 columns are outermost: the panel of x that a tile reads (256 bytes a row of x) is then reused
// from cache by every row of W, and a row's tile of y lives in registers from bias to clamp. Rows
// of a tile lie a row of x apart, where no hardware fetches ahead, so the tile of y a few rows on
// and the x of the next tile are fetched meanwhile. Rows are taken in their order: sorted by length
// they are left at places that are predicted, but then W and y are met at random. Fast where x has
// columns to fill the tile; slow where a panel outgrows the caches (many columns of W), and at a
// handful of columns, where too few accumulators hide the latency. With one column the product is a
// dot product a row: four partial sums, chosen by the width of the whole product so that the order
// of summation does not depend on the split.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/target.h"
#include "kernels.h"

SPARSELT_TARGET_BEGIN("avx2,fma")
#include "cpu/tile_avx2.h"

namespace sparselt::cpu {
namespace {

struct Tile {
  int64_t column;
  LastVector last;
  const float* next;  // the x of the tile to come, or null
};

template <int NV, End kEnd>
void multiply_tile(const SpmmCall& call, Range rows, const Tile& tile) {
  const Epilogue& e = call.epilogue;
  const RowOffsets offset{call.x_stride};
  Fetcher<RowOffsets> fetcher(call.weight, rows, offset, tile.next, NV);
  for (int64_t m = rows.begin; m < rows.end; ++m) {
    const int64_t at = m * call.y_stride + tile.column;
    fetcher.fetch(m, call.y + at, call.y_stride);
    __m256 sum[NV];
    accumulate<NV, kEnd>(sum, e.bias ? e.bias[m] : 0.0f, call.weight, call.weight.crow_indices[m],
                         call.weight.crow_indices[m + 1], offset, call.x + tile.column, tile.last);
    store_tile<NV, kEnd>(sum, e, e.residual ? e.residual + at : nullptr, call.y + at, tile.last);
  }
}

template <End kEnd>
void multiply_columns(const SpmmCall& call, Range rows, const Tile& tile, int64_t vectors) {
  switch (vectors) {
    case 1:
      return multiply_tile<1, kEnd>(call, rows, tile);
    case 2:
      return multiply_tile<2, kEnd>(call, rows, tile);
    case 3:
      return multiply_tile<3, kEnd>(call, rows, tile);
    case 4:
      return multiply_tile<4, kEnd>(call, rows, tile);
    case 5:
      return multiply_tile<5, kEnd>(call, rows, tile);
    case 6:
      return multiply_tile<6, kEnd>(call, rows, tile);
    case 7:
      return multiply_tile<7, kEnd>(call, rows, tile);
    default:
      return multiply_tile<8, kEnd>(call, rows, tile);
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
  const int64_t count = columns.end - columns.begin;
  const Tiling tiling = make_tiling(count);
  int64_t column = columns.begin;
  for (int64_t t = 0; t < tiling.tiles; ++t) {
    const int64_t vectors = tiling.width(t);
    const int64_t left = columns.end - column;
    const float* next = t + 1 < tiling.tiles ? call.x + column + vectors * kLanes : nullptr;
    const Tile tile{column, last_vector(vectors, left, count), next};
    switch (tile.last.end) {
      case End::kWhole:
        multiply_columns<End::kWhole>(call, rows, tile, vectors);
        break;
      case End::kMovedBack:
        multiply_columns<End::kMovedBack>(call, rows, tile, vectors);
        break;
      case End::kMasked:
        multiply_tile<1, End::kMasked>(call, rows, tile);
        break;
    }
    column += vectors * kLanes;
  }
}

}  // namespace sparselt::cpu
SPARSELT_TARGET_END

#endif  // __x86_64__
