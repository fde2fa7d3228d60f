// SPDX-License-Identifier: Apache-2.0
//
// y (M, N) = clamp(W (M, K) x (K, N) + bias + residual) for W in CSR, in both layouts of x and y
// (matrix_window.cuh).
//
// N > 4: a block owns 96 rows by 128 columns of y (32 columns where N <= 32) and walks K in windows
// of 64 columns of W (window_product.cuh). An element of x that a block needs is read from L2 once
// and from shared memory by each of the 96 rows. Blocks that run together share their columns, so
// that x stays in L2 and W streams.
// N <= 4: a warp owns a row; its lanes share out the stored values and add up at the end.
//
// Bounds, by counting, of a multiprocessor for a stored value and 128 columns in float32 at density
// 0.1, where a row has n = 6.4 values in a window:
//   arithmetic      128 multiply-adds                                       1.0 cycles
//   issue           4 FMA, 1.5 LDS, 1 address, 1.5 loop, 25 / n: 12 slots   3.0 cycles
//   shared memory   512 bytes of x, 8 of the entry, 6 / n cycles            5.4 cycles  <- decides
//   L2              512 * 64 / (96 n) bytes of x and 8 of W at 24 a cycle   2.5 cycles
// That is at most 18 % of the FP32 peak: 12 TFLOP/s of 67, as much as a dense product at 124. It
// will be less: rows differ in their count inside a window, and a block waits for its slowest warp,
// which is why rows are dealt to warps by length. A dense product in TF32 or 16 bits runs at
// several hundred TFLOP/s and stays ahead until the density is far below 0.1. N <= 4 is bound by
// the 8 bytes of a stored value.
//
// Source: windows of x and sums in registers, as in blocked dense products. The 1-D tiles of
// google-research/sputnik (sputnik/spmm) are the nearest relative; they read x through L1 for each
// row instead.
#pragma once

#include "cuda/spmm_windows.cuh"

namespace sparselt::cuda {

constexpr int kFewColumns = 4;  // up to which a warp works on a single row

// Rows a block, one a warp.
constexpr int kDotWarps = 8;

template <class T>
__global__ void __launch_bounds__(kDotWarps* kWarpSize)
    csr_spmm_dots(const __grid_constant__ SpmmCall call) {
  const CompressedRows<1, T> weight(call.weight);
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t row_tiles = ceil_div(call.weight.rows, kDotWarps);
  const int64_t row = blockIdx.x % row_tiles * kDotWarps + threadIdx.x / kWarpSize;
  const int64_t batch = blockIdx.x / row_tiles;
  if (row >= call.weight.rows) return;  // the whole warp

  const T* x = static_cast<const T*>(call.x) + batch * call.x_batch;
  const int columns = static_cast<int>(call.columns);
  float sums[kFewColumns] = {};
#pragma unroll 4
  for (int i = __ldg(weight.crow_indices + row) + lane; i < __ldg(weight.crow_indices + row + 1);
       i += kWarpSize) {
    const float value = to_float(weight.values[i]);
    const T* from = x + __ldg(weight.col_indices + i) * call.x_row;
#pragma unroll
    for (int n = 0; n < kFewColumns; ++n) {
      if (n < columns) sums[n] = fmaf(value, to_float(from[n * call.x_column]), sums[n]);
    }
  }
#pragma unroll
  for (int n = 0; n < kFewColumns; ++n) {
#pragma unroll
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
      sums[n] += __shfl_xor_sync(kFullWarp, sums[n], distance);
    }
    if (lane == n && n < columns) {
      const int64_t index = batch * call.y_batch + row * call.y_row + n * call.y_column;
      static_cast<T*>(call.y)[index] = from_float<T>(finish<T>(call.epilogue, sums[n], row, index));
    }
  }
}

template <class T>
cudaError_t csr_spmm(const SpmmCall& call, cudaStream_t stream) {
  if (call.columns > kFewColumns) return spmm_windows<T, 1>(call, stream);
  const int64_t tiles = call.columns > 0 ? ceil_div(call.weight.rows, kDotWarps) : 0;
  return launch(csr_spmm_dots<T>, tiles * call.batch, kDotWarps * kWarpSize, 0, stream, call);
}

}  // namespace sparselt::cuda
