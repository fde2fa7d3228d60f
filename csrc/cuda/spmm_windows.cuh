// SPDX-License-Identifier: Apache-2.0
//
// The kernel that applies window_product.cuh to matrices, for CSR and for blocks of one column.
#pragma once

#include "cuda/matrix_window.cuh"

namespace sparselt::cuda {

constexpr int kNarrowColumns = 32;  // of x, up to which a lane keeps a single column
constexpr int kWideLane = 4;        // columns that a lane keeps otherwise

template <class T, int kBlockRows, int kColumns, bool kBatchMajor>
__global__ void __launch_bounds__(kWindowThreads, 2)
    multiply_matrix_windows(const __grid_constant__ SpmmCall call) {
  using Window = MatrixWindow<T, kColumns, kBatchMajor>;
  const int64_t row_tiles = ceil_div(call.weight.rows, kTileRows);
  const int64_t column_tiles = ceil_div(call.columns, Window::kTileColumns);
  const int64_t tile = blockIdx.x;
  const int64_t first_row = tile % row_tiles * kTileRows;
  const int64_t first_column = tile / row_tiles % column_tiles * Window::kTileColumns;
  const int64_t batch = tile / row_tiles / column_tiles;

  unsigned char* shared = shared_memory();
  auto* staging = reinterpret_cast<Staged<kBlockRows>*>(shared + 2 * Window::kWindowBytes);
  const Window window(call, first_column, batch, shared);
  const CompressedRows<kBlockRows, T> weight(call.weight);
  const int end_slice = static_cast<int>(ceil_div(call.weight.rows, kBlockRows));
  const int slice = deal_slices(weight, static_cast<int>(first_row / kBlockRows), end_slice,
                                reinterpret_cast<int*>(staging));
  float sums[kWarpRows][kColumns] = {};
  multiply_windows(weight, slice, end_slice, window, staging, sums);
  if constexpr (kBatchMajor) __syncthreads();  // nobody reads the windows any more
  store_tile<kBlockRows, T, kBatchMajor>(call, first_row, first_column, batch, slice, shared, sums);
}

template <class T, int kBlockRows, int kColumns, bool kBatchMajor>
cudaError_t launch_matrix_windows(const SpmmCall& call, cudaStream_t stream) {
  using Window = MatrixWindow<T, kColumns, kBatchMajor>;
  const int64_t tiles =
      ceil_div(call.weight.rows, kTileRows) * ceil_div(call.columns, Window::kTileColumns);
  constexpr size_t kWindows = 2 * Window::kWindowBytes + kWarps * sizeof(Staged<kBlockRows>);
  constexpr size_t kSums = kSumMemory<kBatchMajor, kColumns>;
  constexpr size_t shared = kWindows > kSums ? kWindows : kSums;
  return launch(multiply_matrix_windows<T, kBlockRows, kColumns, kBatchMajor>, tiles * call.batch,
                kWindowThreads, shared, stream, call);
}

// kBlockRows divides the rows of a block, and blocks have one column.
template <class T, int kBlockRows>
cudaError_t spmm_windows(const SpmmCall& call, cudaStream_t stream) {
  const bool batch_major = call.x_column != 1 || call.y_column != 1;
  if (call.columns <= kNarrowColumns) {
    return batch_major ? launch_matrix_windows<T, kBlockRows, 1, true>(call, stream)
                       : launch_matrix_windows<T, kBlockRows, 1, false>(call, stream);
  }
  return batch_major ? launch_matrix_windows<T, kBlockRows, kWideLane, true>(call, stream)
                     : launch_matrix_windows<T, kBlockRows, kWideLane, false>(call, stream);
}

}  // namespace sparselt::cuda
