// SPDX-License-Identifier: Apache-2.0
//
// y = clamp(W x + bias + residual) for W in blocks of block_rows x block_cols and a row-major x.
//
// A call owns block rows [rows.begin, rows.end) and columns [columns.begin, columns.end). A tile is
// up to 4 rows of a block by 5 vectors of columns, 20 sums of 32 registers: each vector of x is
// loaded once for the 4 rows, so a block column costs 5 loads and 4 values for 20 multiply-adds,
// and multiply-adds bind, not loads (of 24 sums, GCC 12 keeps two in memory). So blocks along the
// output (4x1, 8x1, 16x1) run nearer to peak than CSR; blocks of 1 or 2 rows gain less. Rows and
// columns of a block that stick out of the matrix are skipped.
#if defined(__aarch64__)
#include "cpu/target.h"
#include "cpu/tile_neon.h"

namespace sparselt::cpu {
namespace {

constexpr int kTileRows = 4;
constexpr int kTileVectors = 5;  // 20 columns

// Rows [first, first + R) of a block row, counted within its blocks.
template <int R, int NV, bool kNarrow>
void multiply_tile(const SpmmCall& call, int64_t block_row, int64_t first, int64_t column,
                   LastVector last) {
  const SparseView& w = call.weight;
  const Epilogue& e = call.epilogue;
  const int64_t m = block_row * w.block_rows + first;
  float32x4_t sum[R][NV];
  SPARSELT_UNROLL
  for (int r = 0; r < R; ++r) {
    SPARSELT_UNROLL
    for (int v = 0; v < NV; ++v) sum[r][v] = vdupq_n_f32(e.bias ? e.bias[m + r] : 0.0f);
  }
  for (int64_t i = w.crow_indices[block_row]; i < w.crow_indices[block_row + 1]; ++i) {
    const float* values = w.values + (i * w.block_rows + first) * w.block_cols;
    const int64_t k = int64_t{w.col_indices[i]} * w.block_cols;
    const int64_t depth = w.cols - k < w.block_cols ? w.cols - k : w.block_cols;
    const float* x = call.x + k * call.x_stride + column;
    for (int64_t c = 0; c < depth; ++c, x += call.x_stride) {
      float32x4_t data[NV];
      for (int v = 0; v < NV; ++v) data[v] = load_vector<NV, kNarrow>(x, v, last);
      SPARSELT_UNROLL
      for (int r = 0; r < R; ++r) {
        const float value = values[r * w.block_cols + c];
        SPARSELT_UNROLL
        for (int v = 0; v < NV; ++v) sum[r][v] = vfmaq_n_f32(sum[r][v], data[v], value);
      }
    }
  }
  SPARSELT_UNROLL
  for (int r = 0; r < R; ++r) {
    const int64_t at = (m + r) * call.y_stride + column;
    store_tile<NV, kNarrow>(sum[r], e, e.residual ? e.residual + at : nullptr, call.y + at, last);
  }
}

template <int NV, bool kNarrow>
void multiply_block_rows(const SpmmCall& call, Range rows, int64_t column, LastVector last) {
  const SparseView& w = call.weight;
  for (int64_t block_row = rows.begin; block_row < rows.end; ++block_row) {
    const int64_t rest = w.rows - block_row * w.block_rows;
    const int64_t height = rest < w.block_rows ? rest : w.block_rows;
    int64_t first = 0;
    for (; first + kTileRows <= height; first += kTileRows) {
      multiply_tile<kTileRows, NV, kNarrow>(call, block_row, first, column, last);
    }
    if (height - first == 3) multiply_tile<3, NV, kNarrow>(call, block_row, first, column, last);
    if (height - first == 2) multiply_tile<2, NV, kNarrow>(call, block_row, first, column, last);
    if (height - first == 1) multiply_tile<1, NV, kNarrow>(call, block_row, first, column, last);
  }
}

// The instance for `vectors`, NV of them or fewer.
template <int NV>
void multiply_columns(const SpmmCall& call, Range rows, int64_t column, int64_t vectors,
                      LastVector last) {
  if (vectors == NV) return multiply_block_rows<NV, false>(call, rows, column, last);
  if constexpr (NV > 1) multiply_columns<NV - 1>(call, rows, column, vectors, last);
}

}  // namespace

void bsr_spmm_neon(const SpmmCall& call, Range rows, Range columns) {
  const Tiling tiling = make_tiling<kTileVectors>(columns);
  for (int64_t t = 0; t < tiling.tiles; ++t) {
    const LastVector last = tiling.last(t);
    if (last.lanes < kLanes) {
      multiply_block_rows<1, true>(call, rows, tiling.begin(t), last);
    } else {
      multiply_columns<kTileVectors>(call, rows, tiling.begin(t), tiling.width(t), last);
    }
  }
}

}  // namespace sparselt::cpu

#endif  // __aarch64__
