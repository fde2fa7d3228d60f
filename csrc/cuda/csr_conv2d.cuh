// SPDX-License-Identifier: Apache-2.0
//
// y (B, C_out, P, Q) = clamp(conv2d(x (B, C_in, H, W), W) + bias + residual) for filters in CSR,
// NCHW.
//
// A block owns 96 output channels of a group by 128 output pixels and walks the input channels in
// windows (patch_window.cuh, window_product.cuh): each stored weight meets 128 pixels of a patch in
// shared memory, which all 96 output channels read. Small maps share a tile between images. A 1x1
// convolution of stride 1 over a large map is a product of matrices and goes to csr_spmm_cuda,
// whose reads are wider.
//
// Bounds, by counting, of a multiprocessor for a stored weight and 128 pixels in float32, with n
// stored weights of a filter in a window (n = 36 for 3x3, 40 channels a window, density 0.1):
//   arithmetic      128 multiply-adds                                     1.0 cycles
//   issue           4 FMA, 4.5 LDS, 1 address, 1.5 loop, 30 / n: 12 slots 3.0 cycles
//   shared memory   512 bytes of x, 8 of the entry, 7 / n cycles          4.7 cycles  <- decides
// at most 21 % of the FP32 peak at stride 1. At stride 2 two lanes of a warp share a bank and x
// costs twice as much. Filters with few input channels (depthwise, a first layer) leave most rows
// of a block idle: such layers are better dense.
//
// Source: direct sparse convolution with weight offsets stretched to the input's layout, Chen,
// "Escort", arXiv 1802.10280; here the layout is that of a patch in shared memory.
#pragma once

#include "cuda/patch_window.cuh"

namespace sparselt::cuda {

constexpr size_t kPatchBytes = 32 * 1024;  // a window at most, unless one channel needs more
constexpr size_t kPatchSharedLimit =
    160 * 1024;  // a block at most, within reach of compute capability 8.0
constexpr int kWindowColumns =
    1024;  // columns of the weight a window at most, unless one channel has more

template <class T>
__global__ void __launch_bounds__(kWindowThreads, 2)
    csr_conv2d_patches(const __grid_constant__ PatchCall call) {
  const Conv2dCall& conv = call.conv;
  const PatchTiling& tiling = call.tiling;
  const int64_t group_rows = conv.weight.rows / conv.groups;
  const int64_t row_tiles = ceil_div(group_rows, kTileRows);
  const int64_t tiles_across = ceil_div(conv.out_width, tiling.columns);
  const int64_t tiles_down = ceil_div(conv.out_height, tiling.rows);
  const int64_t group = blockIdx.x / row_tiles % conv.groups;
  const int64_t tile = blockIdx.x / row_tiles / conv.groups;
  const int first_row = static_cast<int>(group * group_rows + blockIdx.x % row_tiles * kTileRows);
  const int end_row = static_cast<int>((group + 1) * group_rows);

  unsigned char* shared = shared_memory();
  auto* staging = reinterpret_cast<Staged<1>*>(shared + PatchMemory<T>(call).bytes());
  PatchWindow<T> window(call, group, shared);
  window.fill_tables(tile / tiles_across / tiles_down * tiling.images,
                     tile / tiles_across % tiles_down * tiling.rows,
                     tile % tiles_across * tiling.columns);
  const CompressedRows<1, T> weight(conv.weight);
  const int row = deal_slices(weight, first_row, end_row, reinterpret_cast<int*>(staging));
  float sums[kWarpRows][kLanePixels] = {};
  multiply_windows(weight, row, end_row, window, staging, sums);

  int64_t rows[kWarpRows];
#pragma unroll
  for (int r = 0; r < kWarpRows; ++r) rows[r] = __shfl_sync(kFullWarp, row, r);
#pragma unroll
  for (int i = 0; i < kLanePixels; ++i) {
    const OutputPixel pixel(tiling, tile, tiles_across, tiles_down, i);
    if (pixel.column >= conv.out_width || pixel.row >= conv.out_height || pixel.image >= conv.batch)
      continue;
    const int64_t plane = conv.out_height * conv.out_width;
    const int64_t place =
        pixel.image * conv.weight.rows * plane + pixel.row * conv.out_width + pixel.column;
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      if (rows[r] >= end_row) continue;
      const int64_t index = place + rows[r] * plane;
      static_cast<T*>(conv.y)[index] =
          from_float<T>(finish<T>(conv.epilogue, sums[r][i], rows[r], index));
    }
  }
}

inline int next_power_of_two(int64_t size, int most) {
  int power = 1;
  while (power < size && power < most) power *= 2;
  return power;
}

// Tiles as near to the map as powers of two come: 32 columns first, so that a warp reads x without
// bank conflicts.
template <class T>
PatchTiling make_tiling(const Conv2dCall& conv) {
  PatchTiling tiling;
  tiling.columns = next_power_of_two(conv.out_width, kWarpSize);
  tiling.rows = next_power_of_two(conv.out_height, kTilePixels / tiling.columns);
  tiling.columns = next_power_of_two(conv.out_width, kTilePixels / tiling.rows);
  tiling.images = kTilePixels / tiling.rows / tiling.columns;
  const auto reach = [](int outputs, int64_t stride, int64_t kernel, int64_t dilation) {
    return static_cast<int>((outputs - 1) * stride + (kernel - 1) * dilation + 1);
  };
  tiling.patch_h = reach(tiling.rows, conv.stride_h, conv.kernel_h, conv.dilation_h);
  tiling.patch_w = reach(tiling.columns, conv.stride_w, conv.kernel_w, conv.dilation_w);
  const int64_t pixels = static_cast<int64_t>(tiling.images) * tiling.patch_h * tiling.patch_w;
  const int64_t by_bytes = static_cast<int64_t>(kPatchBytes / sizeof(T)) / pixels;
  const int64_t by_columns = kWindowColumns / (conv.kernel_h * conv.kernel_w);
  const int64_t most = by_bytes < by_columns ? by_bytes : by_columns;
  const int64_t channels = conv.channels / conv.groups;
  tiling.channels = static_cast<int>(most < 1 ? 1 : most < channels ? most : channels);
  if (tiling.channels < 1) tiling.channels = 1;
  return tiling;
}

inline bool is_matrix_product(const Conv2dCall& c) {
  const int64_t pixels = c.out_height * c.out_width;
  const bool pointwise = c.kernel_h == 1 && c.kernel_w == 1 && c.stride_h == 1 && c.stride_w == 1 &&
                         c.padding_h == 0 && c.padding_w == 0 && c.groups == 1;
  return pointwise && 4 * pixels >= 3 * ceil_div(pixels, kTilePixels) * kTilePixels;
}

// `product` is the launcher of the matrix product in the same type.
template <class T>
cudaError_t csr_conv2d(const Conv2dCall& conv, SpmmLauncher product, cudaStream_t stream) {
  const int64_t plane = conv.height * conv.width;
  if (is_matrix_product(conv)) {
    return product({conv.weight, conv.x, plane, 1, conv.channels * plane, conv.y, plane, 1,
                    conv.weight.rows * plane, plane, conv.batch, conv.epilogue},
                   stream);
  }
  const PatchCall call{conv, make_tiling<T>(conv)};
  const PatchTiling& tiling = call.tiling;
  const int64_t pixels = static_cast<int64_t>(tiling.images) * tiling.patch_h * tiling.patch_w;
  const int64_t needed = 2 * tiling.channels * pixels * static_cast<int64_t>(sizeof(T)) +
                         4 * pixels + 4 * tiling.channels * conv.kernel_h * conv.kernel_w +
                         static_cast<int64_t>(kWarps * sizeof(Staged<1>)) + 64;
  if (needed > static_cast<int64_t>(kPatchSharedLimit)) return cudaErrorNotSupported;
  // Places in x within a tile's images are counted in 32 bits.
  if (tiling.images * conv.channels * plane > INT32_MAX) return cudaErrorNotSupported;
  const int64_t blocks = ceil_div(conv.weight.rows / conv.groups, kTileRows) * conv.groups *
                         ceil_div(conv.out_width, tiling.columns) *
                         ceil_div(conv.out_height, tiling.rows) *
                         ceil_div(conv.batch, tiling.images);
  const size_t shared =
      static_cast<size_t>(PatchMemory<T>(call).bytes()) + kWarps * sizeof(Staged<1>);
  return launch(csr_conv2d_patches<T>, blocks, kWindowThreads, shared, stream, call);
}

}  // namespace sparselt::cuda
