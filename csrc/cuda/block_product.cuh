// SPDX-License-Identifier: Apache-2.0
//
// The product of a block row's W' with a tile of x' (block_tile.cuh), and its launch.
//
//   float32    on the FP32 units, exactly: each of 4 warps keeps a quarter of the rows by all 128
//              columns. Of 64 rows and 4 columns of W': 64 * 4 multiply-adds a lane for 4 + 16
//              reads of 16 bytes from shared memory, of which those of weights are the same for all
//              lanes.
//   16 bits    on the tensor cores (mma.sync m16n8k16, float32 sums). A warp keeps all of up to 64
//              rows by a quarter of the columns; of 128 rows, 64 x 64. Matrices of the next 16
//              columns of W' are loaded (ldmatrix) while these are multiplied.
//
// What decides, by counting, for a step of 64 columns of W' in 16 bits and x (N, K): instructions
// that a scheduler issues (counted in the code for 9.0a), the tensor cores if mma.sync runs at 60 %
// of the 4096 operations a cycle that wgmma reaches, and L2 if it delivers 24 bytes a cycle and
// multiprocessor. The last two are assumptions until they are measured.
//
//   tile          mma   issue   tensor cores   L2 bytes   cycles of L2
//   16 x 128       64     266            104       18 K            768
//   32 x 128      128     307            208       20 K            853
//   64 x 128      256     302            416       24 K           1024
//   64 x 256      512     461            832       40 K           1707
//   128 x 128     512     399            832       32 K           1365
//   128 x 256    1024     746           1664       48 K           2048
//
// So the way from L2 decides everywhere, not the tensor cores: wgmma would not be faster as long as
// each block row fetches its own x. Taller blocks and wider tiles are what helps.
//
// Source: block rows through dense tiles, as in stanford-futuredata/stk; the tiles in shared memory
// as in NVIDIA/cutlass (implicit GEMM for convolutions).
#pragma once

#include "cuda/block_input.cuh"
#include "cuda/block_store.cuh"

namespace sparselt::cuda {

// Shared memory of a block: stages or, when they are done, a tile of sums. An input's tables
// follow.
template <int kRows, int kColumns, class Input, bool kRowsInside>
constexpr int kTileMemory =
    kStageMemory<kRows, Input> > SumTile<kRows, kColumns, kRowsInside>::kBytes
        ? kStageMemory<kRows, Input>
        : SumTile<kRows, kColumns, kRowsInside>::kBytes;

template <int kRows, class Input, bool kRowsInside>
__global__ void __launch_bounds__(Input::kThreads)
    multiply_blocks_exactly(const __grid_constant__ BlockCall call) {
  constexpr int kColumns = 128;
  constexpr int kWarpTileRows = kRows * kWarpSize / Input::kThreads;
  constexpr int kLane = kColumns / kWarpSize;
  using Sums = SumTile<kRows, kColumns, kRowsInside>;
  unsigned char* shared = shared_memory();
  const BlockPlace place(call, kRows, kColumns);
  const BlockRow<float> row(call, place, kRows);
  Input input(call, place, shared + kTileMemory<kRows, kColumns, Input, kRowsInside>);
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp_row = static_cast<int>(threadIdx.x) / kWarpSize * kWarpTileRows;
  float sums[kWarpTileRows][kLane] = {};
  for_each_step<float, kRows>(row, input, shared, [&](const float* weights, const float* inputs) {
#pragma unroll 2
    for (int t = 0; t < kStep<float>; t += 4) {
      float x[4][kLane];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        load_vector(x[i], piece_at<const float, kWarpSize>(inputs, t + i, lane));
#pragma unroll
      for (int r = 0; r < kWarpTileRows; ++r) {
        float weight[4];
        load_vector(weight, piece_at<const float, kRowPieces>(weights, warp_row + r, t / 4));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int c = 0; c < kLane; ++c) sums[r][c] = fmaf(weight[i], x[i][c], sums[r][c]);
        }
      }
    }
  });
  const Sums tile{reinterpret_cast<float*>(shared)};
#pragma unroll
  for (int r = 0; r < kWarpTileRows; ++r) {
#pragma unroll
    for (int c = 0; c < kLane; ++c) tile.put(warp_row + r, lane * kLane + c, sums[r][c]);
  }
  __syncthreads();
  store_tile<float>(call, place, tile);
}

// The part of a tile that a warp multiplies, and where it finds its matrices.
template <class T, int kRows, int kColumns, bool kByPixels>
struct WarpTile {
  static constexpr int kDown = kRows > 64 ? 2 : 1;  // warps
  static constexpr int kAcross = kTileThreads<kRows, kColumns> / kWarpSize / kDown;
  static constexpr int kRowTiles = kRows / kDown / 16;
  static constexpr int kPairs = kColumns / kAcross / 16;  // of tiles of 8 columns
  static constexpr int kInputPieces = kByPixels ? kRowPieces : kColumns / kPiece<T>;
  static constexpr int kRowBytes = kRowPieces * 16;
  static constexpr int kLineBytes = kInputPieces * 16;

  int row, column;            // of the block's tile
  int weight_place, x_place;  // of this lane's first rows of matrices, in bytes

  __device__ WarpTile() {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
    row = warp / kAcross * (kRows / kDown);
    column = warp % kAcross * (kColumns / kAcross);
    const int in_eight = lane % 8;
    weight_place = (row + lane % 16) * kRowBytes + ((lane / 16) ^ in_eight) * 16;
    if constexpr (kByPixels) {
      x_place = (column + lane / 16 * 8 + in_eight) * kLineBytes + ((lane / 8 % 2) ^ in_eight) * 16;
    } else {
      x_place =
          (lane / 8 % 2 * 8 + in_eight) * kLineBytes + ((column / 8 + lane / 16) ^ in_eight) * 16;
    }
  }

  // Pieces of a row are permuted by xor (piece_at), so steps along it are xor as well.
  __device__ void load(const T* weights, const T* inputs, int t, uint32_t (&a)[kRowTiles][4],
                       uint32_t (&b)[kPairs][4]) const {
    const auto* w = reinterpret_cast<const unsigned char*>(weights) + (weight_place ^ (t * 2));
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) load_matrices<false>(a[i], w + i * 16 * kRowBytes);
    const auto* x = reinterpret_cast<const unsigned char*>(inputs);
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      if constexpr (kByPixels) {
        load_matrices<false>(b[j], x + (x_place ^ (t * 2)) + j * 16 * kLineBytes);
      } else {
        load_matrices<true>(b[j], x + (x_place ^ (j * 32)) + t * kLineBytes);
      }
    }
  }
};

template <class T, int kRows, int kColumns, class Input, bool kRowsInside>
__global__ void __launch_bounds__(Input::kThreads)
    multiply_blocks_on_tensor_cores(const __grid_constant__ BlockCall call) {
  using Warp = WarpTile<T, kRows, kColumns, Input::kByPixels>;
  using Sums = SumTile<kRows, kColumns, kRowsInside>;
  unsigned char* shared = shared_memory();
  const BlockPlace place(call, kRows, kColumns);
  const BlockRow<T> row(call, place, kRows);
  Input input(call, place, shared + kTileMemory<kRows, kColumns, Input, kRowsInside>);
  const Warp warp;
  float sums[Warp::kRowTiles][2 * Warp::kPairs][4] = {};
  for_each_step<T, kRows>(row, input, shared, [&](const T* weights, const T* inputs) {
    uint32_t a[2][Warp::kRowTiles][4];
    uint32_t b[2][Warp::kPairs][4];
    warp.load(weights, inputs, 0, a[0], b[0]);
#pragma unroll
    for (int t = 0; t < kStep<T>; t += 16) {
      const int now = t / 16 % 2;
      if (t + 16 < kStep<T>) warp.load(weights, inputs, t + 16, a[1 - now], b[1 - now]);
#pragma unroll
      for (int i = 0; i < Warp::kRowTiles; ++i) {
#pragma unroll
        for (int j = 0; j < 2 * Warp::kPairs; ++j) {
          multiply_tile(sums[i][j], a[now][i], b[now][j / 2][j % 2 * 2],
                        b[now][j / 2][j % 2 * 2 + 1], T{});
        }
      }
    }
  });
  // With g = lane / 4 and t = lane % 4, a lane has rows g and g + 8 of a tile at columns 2t, 2t
  // + 1.
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const Sums tile{reinterpret_cast<float*>(shared)};
#pragma unroll
  for (int i = 0; i < Warp::kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < 2 * Warp::kPairs; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        tile.put(warp.row + i * 16 + k / 2 * 8 + lane / 4,
                 warp.column + j * 8 + lane % 4 * 2 + k % 2, sums[i][j][k]);
      }
    }
  }
  __syncthreads();
  store_tile<T>(call, place, tile);
}

// The kernel for a tile of kRows x kColumns, and where block rows are in parts the one that adds
// up.
template <class T, int kRows, int kColumns, class Input, bool kRowsInside>
cudaError_t launch_blocks(const BlockCall& given, cudaStream_t stream) {
  BlockCall call = given;
  const int64_t tiles = fill_grid(call, kRows, kColumns);
  const size_t shared = kTileMemory<kRows, kColumns, Input, kRowsInside> + Input::table_bytes(call);
  cudaError_t result;
  if constexpr (sizeof(T) == 4) {
    result = launch(multiply_blocks_exactly<kRows, Input, kRowsInside>, tiles, Input::kThreads,
                    shared, stream, call);
  } else {
    result = launch(multiply_blocks_on_tensor_cores<T, kRows, kColumns, Input, kRowsInside>, tiles,
                    Input::kThreads, shared, stream, call);
  }
  if (result != cudaSuccess || call.partial == nullptr) return result;
  const int64_t outputs = call.batch * call.weight.rows * call.columns;
  return launch(add_partial_sums<T, kRowsInside>, ceil_div(outputs, kSumThreads), kSumThreads, 0,
                stream, call);
}

}  // namespace sparselt::cuda
