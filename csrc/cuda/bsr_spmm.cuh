// SPDX-License-Identifier: Apache-2.0
//
// y (M, N) = clamp(W (M, K) x (K, N) + bias + residual) for W in blocks, in both layouts of x and
// y. Three ways:
//
//   blocks of one column and a multiple of 4 rows   window_product.cuh, where 4 or 8 rows share
//   each
//       read of x. By counting (float32, 128 columns): with 4 rows a block 4 cycles of
//       multiply-adds for 5.3 + 6 / n of shared memory, up to three times what CSR can reach.
//   an x (N, K) of few columns                      block_strips.cuh, where the bytes of W decide
//   all others                                      block_product.cuh, tiles of rows by columns
//
// An x (N, K) is a map of N images of one pixel with channels last, and is multiplied by the
// convolution's kernel, whose filter has one tap (bsr_nhwc_conv2d.cuh).
#pragma once

#include "cuda/block_plan.h"
#include "cuda/block_product.cuh"
#include "cuda/block_strips.cuh"
#include "cuda/spmm_windows.cuh"

namespace sparselt::cuda {

inline BlockCall block_call(const SpmmCall& call, int splits) {
  BlockCall blocks{};
  blocks.weight = call.weight;
  blocks.x = call.x;
  blocks.y = call.y;
  blocks.partial = splits > 1 ? call.workspace : nullptr;
  blocks.splits = splits;
  blocks.columns = call.columns;
  blocks.batch = call.batch;
  blocks.x_row = call.x_row;
  blocks.x_batch = call.x_batch;
  blocks.epilogue = call.epilogue;
  return blocks;
}

template <class T>
bool fits_strips(const SpmmCall& call) {
  const Weight& w = call.weight;
  return call.columns * call.batch <= strip_columns(sizeof(T)) && w.block_cols % kPiece<T> == 0 &&
         is_aligned<T>(w.parts[2], 0, 16) && is_aligned<T>(call.x, w.cols, 16);
}

// An x (N, K) as a map; `convolution` is the launcher of bsr_nhwc_conv2d in the same type.
inline cudaError_t multiply_pixels(const SpmmCall& call, Conv2dLauncher convolution,
                                   cudaStream_t stream) {
  Conv2dCall conv{};
  conv.weight = call.weight;
  conv.x = call.x;
  conv.y = call.y;
  conv.batch = call.batch * call.columns;
  conv.channels = call.weight.cols;
  conv.height = conv.width = conv.out_height = conv.out_width = 1;
  conv.kernel_h = conv.kernel_w = conv.stride_h = conv.stride_w = 1;
  conv.dilation_h = conv.dilation_w = conv.groups = 1;
  conv.epilogue = call.epilogue;
  conv.workspace = call.workspace;
  return convolution(conv, stream);
}

template <class T, int kRows, bool kWide>
cudaError_t launch_rows(const BlockCall& call, cudaStream_t stream) {
  using Input = MatrixInput<T, 128, kTileThreads<kRows, 128>, kWide>;
  return launch_blocks<T, kRows, 128, Input, false>(call, stream);
}

template <class T>
cudaError_t multiply_matrix(const SpmmCall& call, cudaStream_t stream) {
  const Weight& w = call.weight;
  const BlockPlan plan = plan_blocks(w, call.columns, call.batch, sizeof(T), false);
  const BlockCall blocks = block_call(call, call.workspace == nullptr ? 1 : plan.splits);
  const bool wide = w.block_cols % kPiece<T> == 0 && is_aligned<T>(w.parts[2], 0, 16) &&
                    is_aligned<T>(call.x, call.x_row, 16) && call.columns % kPiece<T> == 0 &&
                    call.x_batch % kPiece<T> == 0;
  if (!wide) {
    return plan.rows == 16 ? launch_rows<T, 16, false>(blocks, stream)
                           : launch_rows<T, 64, false>(blocks, stream);
  }
  if (plan.rows == 16) return launch_rows<T, 16, true>(blocks, stream);
  if (plan.rows == 32) return launch_rows<T, 32, true>(blocks, stream);
  if constexpr (sizeof(T) == 2) {
    if (plan.rows == 128) return launch_rows<T, 128, true>(blocks, stream);
  }
  return launch_rows<T, 64, true>(blocks, stream);
}

// `csr` and `convolution` are launchers in the same type: blocks of a single weight are laid out as
// CSR's parts.
template <class T>
cudaError_t bsr_spmm(const SpmmCall& call, SpmmLauncher csr, Conv2dLauncher convolution,
                     cudaStream_t stream) {
  const Weight& w = call.weight;
  if (w.block_cols == 1) {
    if (w.block_rows == 1) return csr(call, stream);
    if (w.block_rows % 8 == 0) return spmm_windows<T, 8>(call, stream);
    if (w.block_rows % 4 == 0) return spmm_windows<T, 4>(call, stream);
  }
  if (!is_channels_last(call)) return multiply_matrix<T>(call, stream);
  if (!fits_strips<T>(call)) return multiply_pixels(call, convolution, stream);
  BlockCall blocks = block_call(call, 1);
  blocks.columns *= blocks.batch;
  blocks.batch = 1;
  return launch_strips_of<T>(blocks, stream);
}

}  // namespace sparselt::cuda
