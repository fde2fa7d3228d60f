// SPDX-License-Identifier: Apache-2.0
//
// y (M, N) = clamp(W (M, K) x (K, N) + bias + residual) for W in blocks, in both layouts of x and
// y.
//
// Blocks of one column and a multiple of 4 rows: window_product.cuh, where 4 or 8 rows share each
// read of x. By counting (float32, 128 columns): with 4 rows a block 4 cycles of multiply-adds for
// 5.3 + 6 / n of shared memory, up to three times what CSR can reach.
//
// All others: a block of threads owns up to 64 rows of a block row by 128 columns and multiplies
// the dense tiles of block_tile.cuh.
//   float32    on the FP32 units, exactly: a warp keeps a quarter of the rows by all columns. Of 64
//              rows, 16 cycles of multiply-adds a column of W' for 8 of shared memory.
//   16 bits    on the tensor cores (mma.sync m16n8k16, float32 sums): a warp keeps all rows by 32
//              columns, 32 mma for 12 ldmatrix a step of 32. mma.sync is said to reach some 60 % of
//              what Hopper's wgmma does; that, with bulk copies of x, is the next step.
// A block row's column list is its own, so x is read from L2 once a block row: with blocks of 64
// rows, 2 * 64 operations for the bytes of one element. Taller blocks would need clusters to share
// it. Few columns leave most of the tile idle, and M / 64 blocks of threads may be fewer than there
// are multiprocessors: small batches are bound by latency here.
//
// Source: block rows through dense tiles, as in stanford-futuredata/stk.
#pragma once

#include "cuda/block_tile.cuh"
#include "cuda/spmm_windows.cuh"

namespace sparselt::cuda {

// Where a block of threads works.
struct BlockPlace {
  int64_t block_row, first_column, batch;
  int first_row;  // in the block row
  __device__ BlockPlace(const SpmmCall& call, int rows) {
    const int64_t slices = ceil_div(call.weight.block_rows, rows);
    const int64_t block_rows = ceil_div(call.weight.rows, call.weight.block_rows);
    const int64_t column_tiles = ceil_div(call.columns, kBlockColumns);
    first_row = static_cast<int>(blockIdx.x % slices) * rows;
    block_row = blockIdx.x / slices % block_rows;
    first_column = blockIdx.x / slices / block_rows % column_tiles * kBlockColumns;
    batch = blockIdx.x / slices / block_rows / column_tiles;
  }
  __device__ int64_t row(const SpmmCall& call) const {
    return block_row * call.weight.block_rows + first_row;
  }
  // The first row that this block of threads does not own.
  __device__ int64_t end_row(const SpmmCall& call) const {
    return min(call.weight.rows, (block_row + 1) * call.weight.block_rows);
  }
};

template <int kRows, bool kBatchMajor>
__global__ void __launch_bounds__(kBlockThreads)
    multiply_blocks_exactly(const __grid_constant__ SpmmCall call) {
  using Tile = BlockTile<float, kRows, true, kBatchMajor>;
  using Stage = typename Tile::Stage;
  constexpr int kWarpTileRows = kRows * kWarpSize / kBlockThreads;
  constexpr int kLane = kBlockColumns / kWarpSize;
  const BlockPlace place(call, kRows);
  const Tile tile(call, place.block_row, place.first_row, place.first_column, place.batch,
                  shared_memory());
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp_row = static_cast<int>(threadIdx.x) / kWarpSize * kWarpTileRows;
  float sums[kWarpTileRows][kLane] = {};
  for_each_step(tile, [&](int step) {
    const float* weights = tile.weight_stage(step) + warp_row * Stage::kWeightPitch;
    const float* inputs = tile.input_stage(step) + lane * kLane;
#pragma unroll 1
    for (int t = 0; t < Stage::kStep; t += 4) {
      float x[4][kLane];
#pragma unroll
      for (int i = 0; i < 4; ++i) load_vector(x[i], inputs + (t + i) * Stage::kInputPitch);
#pragma unroll
      for (int r = 0; r < kWarpTileRows; ++r) {
        float weight[4];
        load_vector(weight, weights + r * Stage::kWeightPitch + t);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int c = 0; c < kLane; ++c) sums[r][c] = fmaf(weight[i], x[i][c], sums[r][c]);
        }
      }
    }
  });
  store_sums<float, kBatchMajor>(call, place.row(call) + warp_row,
                                 min(place.end_row(call), place.row(call) + kRows),
                                 place.first_column + lane * kLane, place.batch, sums);
}

template <class T, int kRows, bool kBatchMajor>
__global__ void __launch_bounds__(kBlockThreads)
    multiply_blocks_on_tensor_cores(const __grid_constant__ SpmmCall call) {
  using Tile = BlockTile<T, kRows, !kBatchMajor, kBatchMajor>;
  using Stage = typename Tile::Stage;
  constexpr int kRowTiles = kRows / 16;
  constexpr int kWarpColumns = kBlockColumns * kWarpSize / kBlockThreads;
  constexpr int kColumnTiles = kWarpColumns / 8;
  const BlockPlace place(call, kRows);
  const Tile tile(call, place.block_row, place.first_row, place.first_column, place.batch,
                  shared_memory());
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp_column = static_cast<int>(threadIdx.x) / kWarpSize * kWarpColumns;
  float sums[kRowTiles][kColumnTiles][4] = {};
  for_each_step(tile, [&](int step) {
    const T* weights = tile.weight_stage(step);
    const T* inputs = tile.input_stage(step);
#pragma unroll
    for (int t = 0; t < Stage::kStep; t += 16) {
      uint32_t a[kRowTiles][4];
      uint32_t b[kColumnTiles / 2][4];  // two tiles of 8 columns by 16 each
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        const int row = i * 16 + lane % 16;
        load_matrices<false>(a[i], weights + row * Stage::kWeightPitch + t + lane / 16 * 8);
      }
#pragma unroll
      for (int j = 0; j < kColumnTiles / 2; ++j) {
        const int column = warp_column + j * 16 + lane / 16 * 8;
        const int depth = t + lane / 8 % 2 * 8;
        if constexpr (kBatchMajor) {
          load_matrices<false>(b[j], inputs + (column + lane % 8) * Stage::kInputPitch + depth);
        } else {
          load_matrices<true>(b[j], inputs + (depth + lane % 8) * Stage::kInputPitch + column);
        }
      }
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int j = 0; j < kColumnTiles; ++j) {
          multiply_tile(sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1], T{});
        }
      }
    }
  });
  // With g = lane / 4 and t = lane % 4, a lane has rows g and g + 8 of a tile at columns 2t, 2t
  // + 1.
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float pair[1][2] = {{sums[i][j][2 * half], sums[i][j][2 * half + 1]}};
        const int row = i * 16 + half * 8 + lane / 4;
        store_sums<T, kBatchMajor>(
            call, place.row(call) + row, min(place.end_row(call), place.row(call) + kRows),
            place.first_column + warp_column + j * 8 + lane % 4 * 2, place.batch, pair);
      }
    }
  }
}

template <class T, int kRows, bool kBatchMajor>
cudaError_t launch_blocks(const SpmmCall& call, cudaStream_t stream) {
  constexpr bool kExact = sizeof(T) == 4;
  using Stage = BlockStage<T, kRows, kExact || !kBatchMajor>;
  const int64_t tiles = ceil_div(call.weight.rows, call.weight.block_rows) *
                        ceil_div(call.weight.block_rows, kRows) *
                        ceil_div(call.columns, kBlockColumns);
  constexpr size_t kShared = kStages * Stage::kElements * sizeof(T);
  if constexpr (kExact) {
    return launch(multiply_blocks_exactly<kRows, kBatchMajor>, tiles * call.batch, kBlockThreads,
                  kShared, stream, call);
  } else {
    return launch(multiply_blocks_on_tensor_cores<T, kRows, kBatchMajor>, tiles * call.batch,
                  kBlockThreads, kShared, stream, call);
  }
}

template <class T, int kRows>
cudaError_t launch_blocks_of(const SpmmCall& call, cudaStream_t stream) {
  const bool batch_major = call.x_column != 1 || call.y_column != 1;
  return batch_major ? launch_blocks<T, kRows, true>(call, stream)
                     : launch_blocks<T, kRows, false>(call, stream);
}

// `csr` is the launcher for CSR in the same type: blocks of a single weight are laid out as its
// parts.
template <class T>
cudaError_t bsr_spmm(const SpmmCall& call, SpmmLauncher csr, cudaStream_t stream) {
  const Weight& w = call.weight;
  if (w.block_cols == 1) {
    if (w.block_rows == 1) return csr(call, stream);
    if (w.block_rows % 8 == 0) return spmm_windows<T, 8>(call, stream);
    if (w.block_rows % 4 == 0) return spmm_windows<T, 4>(call, stream);
  }
  if (w.block_rows <= 16) return launch_blocks_of<T, 16>(call, stream);
  if (w.block_rows <= 32) return launch_blocks_of<T, 32>(call, stream);
  return launch_blocks_of<T, 64>(call, stream);
}

}  // namespace sparselt::cuda
