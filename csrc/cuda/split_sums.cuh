// SPDX-License-Identifier: Apache-2.0
//
// Products whose K is cut into pieces (split_plan.h): each piece is summed by its own blocks of
// threads into the workspace; a second kernel adds the pieces of an output up, always in the same
// order, and finishes it.
#pragma once

#include "cuda/split_plan.h"
#include "cuda/window_product.cuh"

namespace sparselt::cuda {

// What a block of threads computes: one tile of y, over the panels of one piece.
struct SplitPlace {
  int64_t row_tile, first_column, batch;
  int64_t piece;

  // kernels whose tiles have fewer columns than the cut say so
  __device__ SplitPlace(const SpmmCall& call, const Cut& cut, int tile_columns) {
    pieces = call.workspace == nullptr ? 1 : pieces_of(call, cut);
    const int64_t row_tiles = ceil_div(call.weight.rows, cut.rows);
    const int64_t column_tiles = ceil_div(call.columns, tile_columns);
    row_tile = blockIdx.x % row_tiles;
    first_column = blockIdx.x / row_tiles % column_tiles * tile_columns;
    piece = blockIdx.x / row_tiles / column_tiles % pieces;
    batch = blockIdx.x / row_tiles / column_tiles / pieces;
  }
  __device__ int first_panel(int panels) const { return static_cast<int>(panels * piece / pieces); }
  __device__ int end_panel(int panels) const {
    return static_cast<int>(panels * (piece + 1) / pieces);
  }

  // Puts a sum where it belongs: finished into y, or among the partial sums.
  template <class T>
  __device__ __forceinline__ void store(const SpmmCall& call, int64_t row, int64_t column,
                                        float sum) const {
    if (pieces > 1) {
      const int64_t tile = piece * call.batch + batch;
      call.workspace[(tile * call.weight.rows + row) * call.columns + column] = sum;
      return;
    }
    const int64_t index = batch * call.y_batch + row * call.y_row + column * call.y_column;
    static_cast<T*>(call.y)[index] = from_float<T>(finish<T>(call.epilogue, sum, row, index));
  }

 private:
  int64_t pieces;
};

constexpr int kAddThreads = 256;

// A call and the number of its pieces, for the kernel that adds them up.
struct PiecesCall {
  SpmmCall spmm;
  int64_t pieces;
};

template <class T>
__global__ void __launch_bounds__(kAddThreads) add_pieces(const __grid_constant__ PiecesCall both) {
  const SpmmCall& call = both.spmm;
  const int64_t outputs = call.weight.rows * call.columns;  // of a product
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kAddThreads + threadIdx.x;
  if (i >= call.batch * outputs) return;
  float sum = 0.0f;
#pragma unroll 4
  for (int64_t piece = 0; piece < both.pieces; ++piece)
    sum += call.workspace[piece * call.batch * outputs + i];
  const int64_t row = i % outputs / call.columns;
  const int64_t index =
      i / outputs * call.y_batch + row * call.y_row + i % call.columns * call.y_column;
  static_cast<T*>(call.y)[index] = from_float<T>(finish<T>(call.epilogue, sum, row, index));
}

// Launches a kernel whose blocks work at SplitPlace(call, cut, tile_columns), and the one that adds
// its pieces up.
template <class T>
cudaError_t launch_split(void (*kernel)(SpmmCall), const SpmmCall& call, const Cut& cut,
                         int tile_columns, int threads, size_t shared_bytes, cudaStream_t stream) {
  const int64_t pieces = call.workspace == nullptr ? 1 : pieces_of(call, cut);
  const int64_t tiles =
      ceil_div(call.weight.rows, cut.rows) * ceil_div(call.columns, tile_columns) * call.batch;
  const cudaError_t launched = launch(kernel, tiles * pieces, threads, shared_bytes, stream, call);
  if (launched != cudaSuccess || pieces == 1) return launched;
  const int64_t outputs = call.weight.rows * call.columns * call.batch;
  return launch(add_pieces<T>, ceil_div(outputs, kAddThreads), kAddThreads, 0, stream,
                PiecesCall{call, pieces});
}

}  // namespace sparselt::cuda
