// SPDX-License-Identifier: Apache-2.0
//
// What a CUDA kernel is given and must do. Launchers know no torch: they get raw device pointers
// that the layer above has checked, put their kernels on the stream they are handed, and return
// what the launch said. They never allocate, never synchronise and never look at device memory, so
// a call can be captured in a CUDA graph.
//
// A launcher's name fixes the type T of weights, x, y, bias and residual: float32, or float16 /
// bfloat16 for names that end in _f16 / _bf16. Sums are float32 in all of them. Every kernel sums
// an output in an order that depends on the weight and the shapes alone: results are bitwise the
// same from run to run.
#pragma once

#if defined(__CUDACC__) || !defined(SPARSELT_CUDA_HOST)
#include <cuda_runtime_api.h>
#else
#include "cuda_host.h"
#endif
#include <stdint.h>

namespace sparselt::cuda {

constexpr int kMaxParts = 4;

#if !defined(SPARSELT_CUDA_HOST)
// Of the largest GPUs meant, H100 and H200: how many blocks of threads a launch should at least
// have is decided for these everywhere, so that results do not depend on the device.
constexpr int kMultiprocessors = 132;
// Multiplied columns of W from which a tile may have a multiprocessor to itself, with nobody to
// hide its first copies and last writes.
constexpr int kDeepProduct = 1024;
#endif

// A weight matrix of rows x cols. `parts` are the arrays of its format, in the order of the
// format's part_names, all in device memory.
//
//   csr: crow_indices int32 (rows + 1), col_indices int32 (nnz), values T (nnz)
//
//   bsr: crow_indices int32 (ceil(rows / block_rows) + 1), col_indices int32 (blocks), values T
//   (blocks * block_rows * block_cols), each block row-major
//
//   bsr_nhwc: as bsr for rows x (taps * ceil(C / block_cols)) blocks, a tap being r * S + s of the
//   filter; col_indices int32 (blocks, 2), a tap and a block of the group's channels
//
//   tile8: chunk_offsets int32 (groups + 1), counts uint8 (groups * block_rows), offsets uint8 and
//   values T (4 a chunk); a group is block_rows rows by block_cols columns, see tile8_spmm.cuh
struct Weight {
  const void* parts[kMaxParts];
  int64_t rows;
  int64_t cols;
  int64_t block_rows;
  int64_t block_cols;
  int64_t stored;      // blocks, of bsr and bsr_nhwc
  int64_t index_size;  // numbers that say a block's place: 2 of bsr_nhwc, else 1
};

// y = clamp(W x + bias + residual, lower, upper). The clamp is always there: plain infinities when
// unused.
struct Epilogue {
  const void* bias;      // T, one a row of W, or null
  const void* residual;  // T, laid out as y, or null
  float lower;
  float upper;
};

// y[b, m, n] for `batch` products with the same weight. Strides count elements. One of x_row,
// x_column is 1, and the same of y_row, y_column: x is (K, N) and y (M, N) where x_column is 1, x
// is (N, K) and y (N, M) where x_row is 1.
struct SpmmCall {
  Weight weight;
  const void* x;
  int64_t x_row;     // from x[k, n] to x[k + 1, n]
  int64_t x_column;  // from x[k, n] to x[k, n + 1]
  int64_t x_batch;
  void* y;
  int64_t y_row;
  int64_t y_column;
  int64_t y_batch;
  int64_t columns;  // N
  int64_t batch;
  Epilogue epilogue;
  float* workspace = nullptr;  // what a launcher may overwrite, workspace_floats() of it or nothing
};

// y (B, C_out, P, Q) from x (B, C_in, H, W), both contiguous, or for bsr_nhwc both with channels
// last in memory: x (B, H, W, C_in), y (B, P, Q, C_out) and a residual as y. Row m of the weight
// belongs to group m / (rows / groups) and column (c * kernel_h + r) * kernel_w + s to channel c of
// that group.
struct Conv2dCall {
  Weight weight;
  const void* x;
  void* y;
  int64_t batch;
  int64_t channels;  // C_in, of all groups
  int64_t height, width;
  int64_t out_height, out_width;
  int64_t kernel_h, kernel_w;
  int64_t stride_h, stride_w;
  int64_t padding_h, padding_w;
  int64_t dilation_h, dilation_w;
  int64_t groups;
  Epilogue epilogue;
  float* workspace = nullptr;
};

using SpmmLauncher = cudaError_t (*)(const SpmmCall& call, cudaStream_t stream);
using Conv2dLauncher = cudaError_t (*)(const Conv2dCall& call, cudaStream_t stream);

#define KERNEL_CALL_spmm SpmmCall
#define KERNEL_CALL_conv2d Conv2dCall
#define KERNEL_DECLARE_cpu(name, op)
#define KERNEL_DECLARE_cuda(name, op) \
  cudaError_t name(const KERNEL_CALL_##op& call, cudaStream_t stream);
#define KERNEL(name, op, format, device, ...) KERNEL_DECLARE_##device(name, op)
#include "kernels.inc"
#undef KERNEL
#undef KERNEL_DECLARE_cuda
#undef KERNEL_DECLARE_cpu
#undef KERNEL_CALL_conv2d
#undef KERNEL_CALL_spmm

}  // namespace sparselt::cuda
