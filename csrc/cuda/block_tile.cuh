// SPDX-License-Identifier: Apache-2.0
//
// Tiles of W and x for products with dense blocks. The stored blocks of a block row are seen as one
// dense matrix of `depth` columns, W' (block_rows, depth), and x is gathered to match, x' (depth,
// N): column t of W' is column t % block_cols of the t / block_cols-th block. A block of threads
// walks t in steps and keeps kStages steps of both in shared memory, copied in the background.
#pragma once

#include "cuda/calls.h"
#include "cuda/device.cuh"

namespace sparselt::cuda {

constexpr int kBlockThreads = 128;
constexpr int kBlockColumns = 128;  // of x a block
constexpr int kStages = 3;

// Rows of a stage in shared memory are 16 bytes longer than their contents, so that eight rows
// begin in different banks.
template <class T, int kRows, bool kColumnsTogether>
struct BlockStage {
  static constexpr int kStep = 64 / static_cast<int>(sizeof(T));  // columns of W' a stage
  static constexpr int kCopy = 16 / static_cast<int>(sizeof(T));  // elements of a 16-byte copy
  static constexpr int kWeightPitch = kStep + kCopy;
  // x' is kept with its columns together, or with a column's elements together.
  static constexpr int kInputRows = kColumnsTogether ? kStep : kBlockColumns;
  static constexpr int kInputPitch = (kColumnsTogether ? kBlockColumns : kStep) + kCopy;
  static constexpr int kWeightElements = kRows * kWeightPitch;
  static constexpr int kElements = kWeightElements + kInputRows * kInputPitch;
};

// Copies between global and shared memory where zeros stand for what does not exist.
template <class T>
__device__ __forceinline__ void copy_or_zero(T* to, const T* from, bool exists) {
  if constexpr (sizeof(T) == 4) {
    copy_async_4(to, from, exists);
  } else {
    *to = exists ? *from : from_float<T>(0.0f);  // background copies move at least 4 bytes
  }
}

template <class T, int kRows, bool kColumnsTogether, bool kBatchMajor>
struct BlockTile {
  using Stage = BlockStage<T, kRows, kColumnsTogether>;

  const SpmmCall& call;  // in constant memory
  T* shared;
  const T* x;              // x[0, first column of the tile]
  const T* weights;        // of the block row's first block, from the tile's first row on
  const int32_t* indices;  // of the block row
  int depth;               // of W'
  int rows;                // of the tile that exist in a block
  int columns;             // of the tile that exist
  int shift;               // log2(block_cols), or -1

  __device__ BlockTile(const SpmmCall& spmm, int64_t block_row, int first_row, int64_t first_column,
                       int64_t batch, unsigned char* memory)
      : call(spmm), shared(reinterpret_cast<T*>(memory)) {
    const Weight& w = call.weight;
    const int32_t* crow = static_cast<const int32_t*>(w.parts[0]) + block_row;
    const int begin = crow[0];
    const int block_cols = static_cast<int>(w.block_cols);
    depth = (crow[1] - begin) * block_cols;
    indices = static_cast<const int32_t*>(w.parts[1]) + begin;
    weights = static_cast<const T*>(w.parts[2]) + begin * w.block_rows * w.block_cols +
              first_row * w.block_cols;
    x = static_cast<const T*>(call.x) + batch * call.x_batch + first_column * call.x_column;
    rows = min(kRows, static_cast<int>(w.block_rows) - first_row);
    columns =
        static_cast<int>(min(call.columns - first_column, static_cast<int64_t>(kBlockColumns)));
    shift = (block_cols & (block_cols - 1)) == 0 ? __ffs(block_cols) - 1 : -1;
  }

  __device__ int block_cols() const { return static_cast<int>(call.weight.block_cols); }
  __device__ int steps() const { return (depth + Stage::kStep - 1) / Stage::kStep; }
  __device__ int block_of(int t) const { return shift >= 0 ? t >> shift : t / block_cols(); }
  __device__ T* weight_stage(int step) const { return shared + step % kStages * Stage::kElements; }
  __device__ T* input_stage(int step) const { return weight_stage(step) + Stage::kWeightElements; }

  // Column of W, which is the row of x, that column t < depth of W' stands for.
  __device__ int64_t column_of(int t) const {
    const int block = block_of(t);
    return static_cast<int64_t>(__ldg(indices + block)) * block_cols() + t - block * block_cols();
  }

  __device__ void stage(int step) const {
    const int first = step * Stage::kStep;
    const bool wide_blocks = block_cols() % Stage::kCopy == 0;
    if (wide_blocks && is_aligned<T>(weights, 0, 16)) {
      stage_weights<Stage::kCopy>(weight_stage(step), first);
    } else {
      stage_weights<1>(weight_stage(step), first);
    }
    if constexpr (!kBatchMajor) {
      if (is_aligned<T>(x, call.x_row, 16) && columns % Stage::kCopy == 0) {
        stage_rows<Stage::kCopy>(input_stage(step), first);
      } else {
        stage_rows<1>(input_stage(step), first);
      }
    } else if (!kColumnsTogether && wide_blocks && is_aligned<T>(x, call.x_column, 16) &&
               call.weight.cols % Stage::kCopy == 0) {
      stage_columns<Stage::kCopy>(input_stage(step), first);
    } else {
      stage_columns<1>(input_stage(step), first);
    }
  }

  template <int kWidth>
  static __device__ __forceinline__ void copy(T* to, const T* from, bool exists) {
    if constexpr (kWidth > 1) {
      copy_async_16(to, from, exists);
    } else {
      copy_or_zero(to, from, exists);
    }
  }

  template <int kWidth>
  __device__ void stage_weights(T* to, int first) const {
    constexpr int kRowCopies = Stage::kStep / kWidth;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < kRows * kRowCopies; i += kBlockThreads) {
      const int row = i / kRowCopies;
      const int t = i % kRowCopies * kWidth;
      const bool exists = row < rows && first + t < depth;
      const int block = exists ? block_of(first + t) : 0;
      const int64_t place =
          (block * call.weight.block_rows + (exists ? row : 0)) * call.weight.block_cols +
          (exists ? first + t - block * block_cols() : 0);
      copy<kWidth>(to + row * Stage::kWeightPitch + t, weights + place, exists);
    }
  }

  // x' with columns together, from an x (K, N) that has them together.
  template <int kWidth>
  __device__ void stage_rows(T* to, int first) const {
    constexpr int kRowCopies = kBlockColumns / kWidth;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < Stage::kStep * kRowCopies; i += kBlockThreads) {
      const int t = i / kRowCopies;
      const int column = i % kRowCopies * kWidth;
      if (column >= columns) continue;
      const int64_t k = first + t < depth ? column_of(first + t) : call.weight.cols;
      const bool exists = k < call.weight.cols;  // the last block may stick out of W
      copy<kWidth>(to + t * Stage::kInputPitch + column, x + (exists ? k * call.x_row : 0) + column,
                   exists);
    }
  }

  // From an x (N, K), into either order.
  template <int kWidth>
  __device__ void stage_columns(T* to, int first) const {
    constexpr int kColumnCopies = Stage::kStep / kWidth;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < kBlockColumns * kColumnCopies;
         i += kBlockThreads) {
      const int t = i % kColumnCopies * kWidth;
      const int column = i / kColumnCopies;
      if (column >= columns) continue;
      const int64_t k = first + t < depth ? column_of(first + t) : call.weight.cols;
      const bool exists = k < call.weight.cols;
      T* place = kColumnsTogether ? to + t * Stage::kInputPitch + column
                                  : to + column * Stage::kInputPitch + t;
      copy<kWidth>(place, x + column * call.x_column + (exists ? k : 0), exists);
    }
  }
};

// Calls multiply(step) for every step of the tile, with its stage in shared memory.
template <class Tile, class Multiply>
__device__ __forceinline__ void for_each_step(const Tile& tile, const Multiply& multiply) {
  const int steps = tile.steps();
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) tile.stage(step);
    copy_commit();
  }
  for (int step = 0; step < steps; ++step) {
    copy_wait<kStages - 2>();
    __syncthreads();  // this step has arrived for all, and nobody reads the step before any more
    if (step + kStages - 1 < steps) tile.stage(step + kStages - 1);
    copy_commit();
    multiply(step);
  }
}

}  // namespace sparselt::cuda
