// SPDX-License-Identifier: Apache-2.0
//
// Windows of a convolution's input for window_product.cuh. A tile of the output is 128 pixels of
// one or several images; a window is a few channels of the patch of input under it, kept in shared
// memory with its padding written out as zeros. A column (c, r, s) of the weight then is one
// distance from a pixel's own place in the patch, the same for all pixels, whatever the stride,
// padding and dilation:
//
//   place(b, p, q) = (b * patch_h + p * stride_h) * patch_w + q * stride_w
//   x(c, r, s)     = patch[c * pixels + r * dilation_h * patch_w + s * dilation_w + place]
//
// Both are looked up: a table says where in x each pixel of the patch comes from, another the
// distance of each column of a window.
#pragma once

#include "cuda/window_product.cuh"

namespace sparselt::cuda {

constexpr int kTilePixels = 128;  // of the output
constexpr int kLanePixels = kTilePixels / kWarpSize;

// How a launch cuts its problem; computed on the CPU, the same for all blocks.
struct PatchTiling {
  int images, rows, columns;  // of the output a tile; powers of two, product kTilePixels
  int patch_h, patch_w;       // of the input under it
  int channels;               // a window, at least 1
  __host__ __device__ int pixels() const { return images * patch_h * patch_w; }
};

struct PatchCall {
  Conv2dCall conv;
  PatchTiling tiling;
};

// Shared memory of a block: two windows, the two tables, and what follows them.
template <class T>
struct PatchMemory {
  int window_bytes;
  int pixels;
  int columns;  // of the weight a window
  __host__ __device__ explicit PatchMemory(const PatchCall& call)
      : window_bytes(static_cast<int>(
            (call.tiling.channels * call.tiling.pixels() * sizeof(T) + 15) / 16 * 16)),
        pixels(call.tiling.pixels()),
        columns(call.tiling.channels * static_cast<int>(call.conv.kernel_h * call.conv.kernel_w)) {}
  __host__ __device__ int tables() const { return 2 * window_bytes; }
  __host__ __device__ int bytes() const {
    return (tables() + (pixels + columns) * static_cast<int>(sizeof(int)) + 15) / 16 * 16;
  }
};

// The pixel of the output that a lane keeps as its i-th.
struct OutputPixel {
  int64_t image, row, column;
  __device__ OutputPixel(const PatchTiling& tiling, int64_t tile, int64_t tiles_across,
                         int64_t tiles_down, int i) {
    const int pixel = i * kWarpSize + static_cast<int>(threadIdx.x) % kWarpSize;
    column = tile % tiles_across * tiling.columns + pixel % tiling.columns;
    row = tile / tiles_across % tiles_down * tiling.rows + pixel / tiling.columns % tiling.rows;
    image = tile / tiles_across / tiles_down * tiling.images + pixel / tiling.columns / tiling.rows;
  }
};

template <class T>
struct PatchWindow {
  const PatchCall& call;  // in constant memory: what is read once a window costs no register
  unsigned char* buffer;
  const T* x;               // the first channel of the group in the tile's first image
  int places[kLanePixels];  // of this lane's pixels in the patch, in bytes

  __device__ PatchWindow(const PatchCall& patch_call, int64_t group, unsigned char* shared)
      : call(patch_call), buffer(shared) {
    const PatchTiling& t = call.tiling;
    x = static_cast<const T*>(call.conv.x) +
        group * group_channels() * call.conv.height * call.conv.width;
#pragma unroll
    for (int i = 0; i < kLanePixels; ++i) {
      const int pixel = i * kWarpSize + static_cast<int>(threadIdx.x) % kWarpSize;
      const int column = pixel % t.columns;
      const int row = pixel / t.columns % t.rows;
      const int image = pixel / t.columns / t.rows;
      places[i] = ((image * t.patch_h + row * stride_h()) * t.patch_w + column * stride_w()) *
                  static_cast<int>(sizeof(T));
    }
  }

  __device__ int stride_h() const { return static_cast<int>(call.conv.stride_h); }
  __device__ int stride_w() const { return static_cast<int>(call.conv.stride_w); }
  __device__ int group_channels() const {
    return static_cast<int>(call.conv.channels / call.conv.groups);
  }
  __device__ int taps() const { return static_cast<int>(call.conv.kernel_h * call.conv.kernel_w); }
  __device__ int* sources() const {
    return reinterpret_cast<int*>(buffer + PatchMemory<T>(call).tables());
  }
  __device__ int* distances() const { return sources() + call.tiling.pixels(); }

  __device__ int count() const {
    return (group_channels() + call.tiling.channels - 1) / call.tiling.channels;
  }
  __device__ int end(int w) const {
    return min((w + 1) * call.tiling.channels, group_channels()) * taps();
  }

  __device__ int offset(int w, int column) const {
    return (w % 2) * PatchMemory<T>(call).window_bytes +
           distances()[column - w * call.tiling.channels * taps()];
  }

  __device__ void read(int offset, float (&to)[kLanePixels]) const {
#pragma unroll
    for (int i = 0; i < kLanePixels; ++i) {
      to[i] = to_float(*reinterpret_cast<const T*>(buffer + offset + places[i]));
    }
  }

  // Fills both tables for a tile whose first output pixel is (image, row, column); a barrier must
  // follow.
  __device__ void fill_tables(int64_t image, int64_t row, int64_t column) {
    const PatchTiling& t = call.tiling;
    const Conv2dCall& conv = call.conv;
    const int image_size = static_cast<int>(conv.channels * conv.height * conv.width);
    for (int i = static_cast<int>(threadIdx.x); i < t.pixels(); i += kWindowThreads) {
      const int64_t h = row * conv.stride_h - conv.padding_h + i / t.patch_w % t.patch_h;
      const int64_t w = column * conv.stride_w - conv.padding_w + i % t.patch_w;
      const int b = i / t.patch_w / t.patch_h;
      const bool inside =
          image + b < conv.batch && h >= 0 && h < conv.height && w >= 0 && w < conv.width;
      sources()[i] = inside ? b * image_size + static_cast<int>(h * conv.width + w) : -1;
    }
    for (int i = static_cast<int>(threadIdx.x); i < t.channels * taps(); i += kWindowThreads) {
      const int s = i % static_cast<int>(conv.kernel_w) * static_cast<int>(conv.dilation_w);
      const int r = i / static_cast<int>(conv.kernel_w) % static_cast<int>(conv.kernel_h) *
                    static_cast<int>(conv.dilation_h);
      distances()[i] = (i / taps() * t.pixels() + r * t.patch_w + s) * static_cast<int>(sizeof(T));
    }
    x += image * image_size;
  }

  __device__ void stage(int w) const {
    const int pixels = call.tiling.pixels();
    const int strips = (pixels + kWarpSize - 1) / kWarpSize;
    const int first_channel = w * call.tiling.channels;
    const int channels = min(call.tiling.channels, group_channels() - first_channel);
    const int64_t plane = call.conv.height * call.conv.width;
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    T* window = reinterpret_cast<T*>(buffer + (w % 2) * PatchMemory<T>(call).window_bytes);
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x) / kWarpSize; i < channels * strips; i += kWarps) {
      const int channel = i / strips;
      const int pixel = i % strips * kWarpSize + lane;
      if (pixel >= pixels) continue;
      const int source = sources()[pixel];
      const T* from = x + (first_channel + channel) * plane + max(source, 0);
      T* to = window + channel * pixels + pixel;
      if constexpr (sizeof(T) == 4) {
        copy_async_4(to, from, source >= 0);
      } else {
        *to = source >= 0 ? *from : from_float<T>(0.0f);  // background copies move at least 4 bytes
      }
    }
  }
};

}  // namespace sparselt::cuda
