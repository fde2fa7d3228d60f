// SPDX-License-Identifier: Apache-2.0
//
// y = clamp(W x + bias + residual) for W in blocks of block_rows x block_cols and a row-major x.
//
// A call owns block rows [rows.begin, rows.end) and columns [columns.begin, columns.end). A tile is
// up to 4 rows of a block by 3 vectors of columns, 12 accumulators: each vector of x is loaded once
// for the 4 rows, so a block column costs 3 loads and 4 broadcasts for 12 multiply-adds, and
// multiply-adds bind, not loads. Blocks along the output (4x1, 8x1, 16x1) thus run nearer to peak
// than CSR; blocks of 1 or 2 rows gain less. Rows and columns of a block that stick out of the
// matrix are skipped.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/target.h"
#include "kernels.h"

SPARSELT_TARGET_BEGIN("avx2,fma")
#include "cpu/tile_avx2.h"

namespace sparselt::cpu {
namespace {

constexpr int kBlockTileRows = 4;
constexpr int kBlockTileVectors = 3;

// Rows [first, first + R) of a block row, counted within its blocks.
template <int R, int NV, End kEnd>
void multiply_tile(const SpmmCall& call, int64_t block_row, int64_t first, int64_t column,
                   const LastVector& last) {
  const SparseView& w = call.weight;
  const Epilogue& e = call.epilogue;
  const int64_t m = block_row * w.block_rows + first;
  __m256 sum[R][NV];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < NV; ++v) sum[r][v] = _mm256_set1_ps(e.bias ? e.bias[m + r] : 0.0f);
  }
  for (int64_t i = w.crow_indices[block_row]; i < w.crow_indices[block_row + 1]; ++i) {
    const float* values = w.values + (i * w.block_rows + first) * w.block_cols;
    const int64_t k = int64_t{w.col_indices[i]} * w.block_cols;
    const int64_t depth = w.cols - k < w.block_cols ? w.cols - k : w.block_cols;
    const float* x = call.x + k * call.x_stride + column;
    for (int64_t c = 0; c < depth; ++c, x += call.x_stride) {
      __m256 data[NV];
      for (int v = 0; v < NV; ++v) {
        data[v] = load_vector<NV, kEnd>(x, v, last);
      }
      for (int r = 0; r < R; ++r) {
        const __m256 value = _mm256_broadcast_ss(values + r * w.block_cols + c);
        for (int v = 0; v < NV; ++v) sum[r][v] = _mm256_fmadd_ps(value, data[v], sum[r][v]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    const int64_t at = (m + r) * call.y_stride + column;
    store_tile<NV, kEnd>(sum[r], e, e.residual ? e.residual + at : nullptr, call.y + at, last);
  }
}

template <int NV, End kEnd>
void multiply_block_rows(const SpmmCall& call, Range rows, int64_t column, const LastVector& last) {
  const SparseView& w = call.weight;
  for (int64_t block_row = rows.begin; block_row < rows.end; ++block_row) {
    const int64_t rest = w.rows - block_row * w.block_rows;
    const int64_t height = rest < w.block_rows ? rest : w.block_rows;
    int64_t first = 0;
    for (; first + kBlockTileRows <= height; first += kBlockTileRows) {
      multiply_tile<kBlockTileRows, NV, kEnd>(call, block_row, first, column, last);
    }
    if (height - first == 3) multiply_tile<3, NV, kEnd>(call, block_row, first, column, last);
    if (height - first == 2) multiply_tile<2, NV, kEnd>(call, block_row, first, column, last);
    if (height - first == 1) multiply_tile<1, NV, kEnd>(call, block_row, first, column, last);
  }
}

template <End kEnd>
void multiply_columns(const SpmmCall& call, Range rows, int64_t column, int64_t vectors,
                      const LastVector& last) {
  if (vectors == 1) return multiply_block_rows<1, kEnd>(call, rows, column, last);
  if (vectors == 2) return multiply_block_rows<2, kEnd>(call, rows, column, last);
  return multiply_block_rows<kBlockTileVectors, kEnd>(call, rows, column, last);
}

}  // namespace

void bsr_spmm_avx2(const SpmmCall& call, Range rows, Range columns) {
  const int64_t count = columns.end - columns.begin;
  const Tiling tiling = make_tiling(count, kBlockTileVectors);
  int64_t column = columns.begin;
  for (int64_t t = 0; t < tiling.tiles; ++t) {
    const int64_t vectors = tiling.width(t);
    const LastVector last = last_vector(vectors, columns.end - column, count);
    switch (last.end) {
      case End::kWhole:
        multiply_columns<End::kWhole>(call, rows, column, vectors, last);
        break;
      case End::kMovedBack:
        multiply_columns<End::kMovedBack>(call, rows, column, vectors, last);
        break;
      case End::kMasked:
        multiply_block_rows<1, End::kMasked>(call, rows, column, last);
        break;
    }
    column += vectors * kLanes;
  }
}

}  // namespace sparselt::cpu
SPARSELT_TARGET_END

#endif  // __x86_64__
