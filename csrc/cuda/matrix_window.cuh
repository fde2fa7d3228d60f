// SPDX-License-Identifier: Apache-2.0
//
// Windows of a matrix x for window_product.cuh, and the way its sums go to y. Serves both layouts:
//   kBatchMajor false   x (K, N), y (M, N): columns lie next to each other        torch.sparse's
//   layout kBatchMajor true    x (N, K), y (N, M): features lie next to each other
//   torch.nn.Linear's layout
// A window is kWindowDepth rows of x by 32 * kColumns columns, kept with columns next to each other
// in both cases. Where x is transposed on the way in, column c of row k is kept at c ^ 4 (k % 8),
// so that eight rows written together meet eight different groups of banks; a reader folds the same
// term into its offset, which is why offsets are combined by xor.
#pragma once

#include "cuda/window_product.cuh"

namespace sparselt::cuda {

constexpr int kWindowDepth =
    64;  // rows of x a window; 32 KB of float32 at 128 columns, so two blocks fit a multiprocessor

template <class T, int kColumns, bool kBatchMajor>
struct MatrixWindow {
  static constexpr int kTileColumns = kWarpSize * kColumns;
  static constexpr int kRowBytes = kTileColumns * static_cast<int>(sizeof(T));
  static constexpr int kWindowBytes = kWindowDepth * kRowBytes;
  static constexpr int kCopyElements = 16 / static_cast<int>(sizeof(T));

  const SpmmCall& call;   // in constant memory: what is read once a window costs no register
  unsigned char* buffer;  // 2 * kWindowBytes of shared memory
  const T* x;             // x[0, first column of the tile]
  int columns;            // of the tile that exist, at least 1

  __device__ MatrixWindow(const SpmmCall& spmm, int64_t first_column, int64_t batch,
                          unsigned char* shared)
      : call(spmm),
        buffer(shared),
        x(static_cast<const T*>(spmm.x) + batch * spmm.x_batch + first_column * spmm.x_column),
        columns(static_cast<int>(
            min(spmm.columns - first_column, static_cast<int64_t>(kTileColumns)))) {}

  __device__ int rows() const { return static_cast<int>(call.weight.cols); }
  __device__ int count() const { return (rows() + kWindowDepth - 1) / kWindowDepth; }
  __device__ int end(int w) const { return min((w + 1) * kWindowDepth, rows()); }

  __device__ int offset(int w, int column) const {
    const int k = column - w * kWindowDepth;
    const int swizzle = kBatchMajor ? (k % 8) * 4 * static_cast<int>(sizeof(T)) : 0;
    return (w % 2) * kWindowBytes + k * kRowBytes + swizzle;
  }

  __device__ void read(int offset, float (&to)[kColumns]) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    load_vector(to, reinterpret_cast<const T*>(
                        buffer + (offset ^ (lane * kColumns * static_cast<int>(sizeof(T))))));
  }

  __device__ void stage(int w) const {
    const int k0 = w * kWindowDepth;
    const int depth = end(w) - k0;
    unsigned char* window = buffer + (w % 2) * kWindowBytes;
    if constexpr (kBatchMajor) {
      stage_transposed(window, x + k0, depth);
    } else if (is_aligned<T>(x, call.x_row, 16) && columns % kCopyElements == 0) {
      stage_straight<kCopyElements>(window, x + k0 * call.x_row, depth);
    } else {
      stage_straight<1>(window, x + k0 * call.x_row, depth);
    }
  }

  template <int kStep>
  __device__ void stage_straight(unsigned char* window, const T* from, int depth) const {
    constexpr int kRowCopies = kTileColumns / kStep;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < depth * kRowCopies; i += kWindowThreads) {
      const int k = i / kRowCopies;
      const int column = i % kRowCopies * kStep;
      if (column >= columns) continue;
      T* to = reinterpret_cast<T*>(window + k * kRowBytes) + column;
      if constexpr (kStep > 1) {
        copy_async_16(to, from + k * call.x_row + column);
      } else {
        copy_element(to, from + k * call.x_row + column);
      }
    }
  }

  // A warp copies patches of 8 rows by 4 columns: whole 32-byte sectors of float32 on the way in.
  __device__ void stage_transposed(unsigned char* window, const T* from, int depth) const {
    constexpr int kPatches = (kWindowDepth / 8) * (kTileColumns / 4);
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
#pragma unroll 1
    for (int patch = static_cast<int>(threadIdx.x) / kWarpSize; patch < kPatches; patch += kWarps) {
      const int k = patch % (kWindowDepth / 8) * 8 + lane % 8;
      const int column = patch / (kWindowDepth / 8) * 4 + lane / 8;
      if (k >= depth || column >= columns) continue;
      T* row = reinterpret_cast<T*>(window + k * kRowBytes);
      copy_element(row + (column ^ (k % 8 * 4)), from + column * call.x_column + k);
    }
  }

  static __device__ __forceinline__ void copy_element(T* to, const T* from) {
    if constexpr (sizeof(T) == 4) {
      copy_async_4(to, from);
    } else {
      *to = *from;  // background copies move at least 4 bytes
    }
  }
};

// Writes the sums of rows row .. row + kRows - 1 (those before end_row) and, in each lane,
// kColumns columns from `column` on (those that exist).
template <class T, bool kBatchMajor, int kRows, int kColumns>
__device__ __forceinline__ void store_sums(const SpmmCall& call, int64_t row, int64_t end_row,
                                           int64_t column, int64_t batch,
                                           const float (&sums)[kRows][kColumns]) {
  T* y = static_cast<T*>(call.y);
  const int64_t start = batch * call.y_batch + row * call.y_row + column * call.y_column;
  const bool whole = row + kRows <= end_row && column + kColumns <= call.columns;
  // Elements that lie next to each other in y and are written together.
  constexpr int kMost = 16 / static_cast<int>(sizeof(T));
  constexpr int kRun = !kBatchMajor ? kColumns : kRows < kMost ? kRows : kMost;
  if (whole &&
      is_aligned<T>(y + start, kBatchMajor ? call.y_column : call.y_row, kRun * sizeof(T))) {
#pragma unroll
    for (int i = 0; i < kRows * kColumns; i += kRun) {
      float run[kRun];
#pragma unroll
      for (int j = 0; j < kRun; ++j) {
        const int r = kBatchMajor ? (i + j) % kRows : (i + j) / kColumns;
        const int c = kBatchMajor ? (i + j) / kRows : (i + j) % kColumns;
        run[j] = finish<T>(call.epilogue, sums[r][c], row + r,
                           start + r * call.y_row + c * call.y_column);
      }
      const int r = kBatchMajor ? i % kRows : i / kColumns;
      const int c = kBatchMajor ? i / kRows : i % kColumns;
      store_vector(y + start + r * call.y_row + c * call.y_column, run);
    }
    return;
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      if (row + r >= end_row || column + c >= call.columns) continue;
      const int64_t index = start + r * call.y_row + c * call.y_column;
      y[index] = from_float<T>(finish<T>(call.epilogue, sums[r][c], row + r, index));
    }
  }
}

// Writes the sums that a warp gets from multiply_windows in a tile of x and W; `slice` as there.
// Rows of a warp do not lie together, so where they are contiguous in y, sums go through shared
// memory: kSumMemory bytes, which nobody may need any more.
template <int kBlockRows, class T, bool kBatchMajor, int kColumns>
__device__ __forceinline__ void store_tile(const SpmmCall& call, int64_t first_row,
                                           int64_t first_column, int64_t batch, int slice,
                                           unsigned char* shared,
                                           const float (&sums)[kWarpRows][kColumns]) {
  constexpr int kPitch = kTileRows + 1;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  float* tile = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int b = 0; b < kWarpSlices<kBlockRows>; ++b) {
    const int64_t row = static_cast<int64_t>(__shfl_sync(kFullWarp, slice, b)) * kBlockRows;
    if constexpr (kBatchMajor) {
      float* place = tile + lane * kColumns * kPitch + (row - first_row);
#pragma unroll
      for (int r = 0; r < kBlockRows; ++r) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) place[c * kPitch + r] = sums[b * kBlockRows + r][c];
      }
    } else {
#pragma unroll
      for (int r = 0; r < kBlockRows; ++r) {
        float line[1][kColumns];
#pragma unroll
        for (int c = 0; c < kColumns; ++c) line[0][c] = sums[b * kBlockRows + r][c];
        store_sums<T, false>(call, row + r, call.weight.rows, first_column + lane * kColumns, batch,
                             line);
      }
    }
  }
  if constexpr (kBatchMajor) {
    __syncthreads();
    const int rows = static_cast<int>(min(call.weight.rows - first_row, int64_t{kTileRows}));
    const int columns =
        static_cast<int>(min(call.columns - first_column, int64_t{kWarpSize * kColumns}));
    const int row = static_cast<int>(threadIdx.x) % kTileRows;
    const int64_t start =
        batch * call.y_batch + (first_row + row) * call.y_row + first_column * call.y_column;
    if (row >= rows) return;
#pragma unroll 4
    for (int n = static_cast<int>(threadIdx.x) / kTileRows; n < columns;
         n += kWindowThreads / kTileRows) {
      const int64_t index = start + n * call.y_column;
      static_cast<T*>(call.y)[index] =
          from_float<T>(finish<T>(call.epilogue, tile[n * kPitch + row], first_row + row, index));
    }
  }
}

template <bool kBatchMajor, int kColumns>
constexpr size_t kSumMemory =
    kBatchMajor ? (kTileRows + 1) * kWarpSize * kColumns * sizeof(float) : 0;

}  // namespace sparselt::cuda
