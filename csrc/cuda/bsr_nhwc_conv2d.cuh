// SPDX-License-Identifier: Apache-2.0
//
// y = clamp(conv2d(x, W) + bias + residual) for filters in blocks, with channels last in memory:
// x (B, H, W, C_in), y (B, P, Q, C_out). An implicit matrix product: the rows of W are output
// channels, its columns channels under a tap of the filter, those of y pixels; only the kept
// blocks, each of one tap (r, s), are walked. block_product.cuh multiplies, block_input.cuh finds
// the pixels of a tap: whatever the stride, padding and dilation, a block's channels of a pixel lie
// together.
//
// A tile is up to 128 output channels by 128 or 256 pixels, counted through all images, so that
// small maps fill it as well. Layers with few tiles share out their blocks (block_plan.h).
//
// Groups must be whole block rows. Filters of up to 15 x 15.
#pragma once

#include "cuda/block_plan.h"
#include "cuda/block_product.cuh"

namespace sparselt::cuda {

template <class T, int kRows, int kColumns, bool kWide>
cudaError_t launch_pixels(const BlockCall& call, cudaStream_t stream) {
  using Input = PixelInput<T, kColumns, kTileThreads<kRows, kColumns>, sizeof(T) == 4, kWide>;
  return launch_blocks<T, kRows, kColumns, Input, true>(call, stream);
}

inline PixelGeometry pixel_geometry(const Conv2dCall& conv) {
  const auto number = [](int64_t value) { return static_cast<int>(value); };
  PixelGeometry g{};
  g.channels = number(conv.channels);
  g.group_channels = number(conv.channels / conv.groups);
  g.height = number(conv.height), g.width = number(conv.width);
  g.out_height = number(conv.out_height), g.out_width = number(conv.out_width);
  g.kernel_h = number(conv.kernel_h), g.kernel_w = number(conv.kernel_w);
  g.stride_h = number(conv.stride_h), g.stride_w = number(conv.stride_w);
  g.padding_h = number(conv.padding_h), g.padding_w = number(conv.padding_w);
  g.dilation_h = number(conv.dilation_h), g.dilation_w = number(conv.dilation_w);
  g.by_width = Divisor(conv.out_width);
  g.by_height = Divisor(conv.out_height);
  g.by_group = Divisor(ceil_div(conv.weight.rows / conv.groups, conv.weight.block_rows));
  return g;
}

// Offsets within the images of a tile are counted in 32 bits, and so are sizes.
inline bool fits_32_bits(const Conv2dCall& conv) {
  const int64_t most = INT32_MAX;
  const int64_t reach_h = conv.padding_h + conv.dilation_h * conv.kernel_h;
  const int64_t reach_w = conv.padding_w + conv.dilation_w * conv.kernel_w;
  if (conv.batch * conv.out_height * conv.out_width > most || conv.height + reach_h > most ||
      conv.width + reach_w > most || conv.stride_h > most || conv.stride_w > most)
    return false;
  const int64_t images = ceil_div(256, conv.out_height * conv.out_width) + 1;
  const double image = static_cast<double>(conv.height + reach_h) *
                       static_cast<double>(conv.width + reach_w) *
                       static_cast<double>(conv.channels);
  return static_cast<double>(images) * image < static_cast<double>(most);
}

template <class T>
cudaError_t bsr_nhwc_conv2d(const Conv2dCall& conv, cudaStream_t stream) {
  const Weight& w = conv.weight;
  const int64_t pixels = conv.batch * conv.out_height * conv.out_width;
  if (w.rows * pixels == 0) return cudaSuccess;
  if (conv.kernel_h > kMostTaps || conv.kernel_w > kMostTaps || !fits_32_bits(conv) ||
      (conv.groups > 1 && w.rows / conv.groups % w.block_rows != 0)) {
    return cudaErrorNotSupported;
  }
  const BlockPlan plan = plan_blocks(w, pixels, 1, sizeof(T), true);
  BlockCall call{};
  call.weight = w;
  call.x = conv.x;
  call.y = conv.y;
  call.splits = conv.workspace == nullptr ? 1 : plan.splits;
  call.partial = call.splits > 1 ? conv.workspace : nullptr;
  call.columns = pixels;
  call.batch = 1;
  call.pixels = pixel_geometry(conv);
  call.epilogue = conv.epilogue;
  // Of float32 only W is copied in pieces.
  const bool wide = w.block_cols % kPiece<T> == 0 && is_aligned<T>(w.parts[2], 0, 16) &&
                    (sizeof(T) == 4 || (is_aligned<T>(conv.x, conv.channels, 16) &&
                                        call.pixels.group_channels % kPiece<T> == 0));
  if (!wide) {
    return plan.rows == 16 ? launch_pixels<T, 16, 128, false>(call, stream)
                           : launch_pixels<T, 64, 128, false>(call, stream);
  }
  if (plan.rows == 16) return launch_pixels<T, 16, 128, true>(call, stream);
  if (plan.rows == 32) return launch_pixels<T, 32, 128, true>(call, stream);
  if constexpr (sizeof(T) == 2) {
    if (plan.columns == 256) {
      const cudaError_t result = plan.rows == 128 ? launch_pixels<T, 128, 256, true>(call, stream)
                                                  : launch_pixels<T, 64, 256, true>(call, stream);
      // Devices of 8.6 and 8.9 have too little shared memory for it.
      if (result != cudaErrorNotSupported) return result;
    }
    if (plan.rows == 128) return launch_pixels<T, 128, 128, true>(call, stream);
  }
  return launch_pixels<T, 64, 128, true>(call, stream);
}

}  // namespace sparselt::cuda
