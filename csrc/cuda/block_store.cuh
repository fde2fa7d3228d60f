// SPDX-License-Identifier: Apache-2.0
//
// How a tile of sums gets from the registers of a block of threads to y. It goes through shared
// memory, so that global memory is read and written in 16-byte pieces along what is contiguous in
// y: columns of an y (M, N), rows of an y (N, M). Where block rows are cut into parts, each part
// writes its plain sums to the caller's workspace and a second kernel adds them up, in order.
#pragma once

#include "cuda/block_tile.cuh"

namespace sparselt::cuda {

// float32 sums in shared memory. Lines are longer than their contents, so that the fragments of a
// tensor-core product meet all the banks: a line is 4 (rows inside) or 8 words from a multiple of
// 16 or 32.
template <int kRows, int kColumns, bool kRowsInside>
struct SumTile {
  static constexpr int kInner = kRowsInside ? kRows : kColumns;
  static constexpr int kLines = kRowsInside ? kColumns : kRows;
  static constexpr int kPitch = kInner + (kRowsInside ? 4 : 8);
  static constexpr int kBytes = kLines * kPitch * 4;
  float* sums;

  __device__ void put(int row, int column, float sum) const {
    sums[kRowsInside ? column * kPitch + row : row * kPitch + column] = sum;
  }
};

// Bias, residual and clamp for kCount neighbours in y from `index` on, and the write. The row of
// the i-th is row + i, or the same for all.
template <class T, bool kRowsInside, int kCount>
__device__ __forceinline__ void finish_and_store(const Epilogue& epilogue, T* y, int64_t row,
                                                 int64_t index, float (&sums)[kCount]) {
  if (epilogue.bias != nullptr) {
    const T* bias = static_cast<const T*>(epilogue.bias) + row;
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums[i] += to_float(__ldg(bias + (kRowsInside ? i : 0)));
  }
  if (epilogue.residual != nullptr) {
    float residual[kCount];
    load_vector_or_each(residual, static_cast<const T*>(epilogue.residual) + index);
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums[i] += residual[i];
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) sums[i] = clamp(sums[i], epilogue.lower, epilogue.upper);
  store_vector_or_each(y + index, sums);
}

// Writes `rows` x `columns` of the tile; a barrier must have followed the last put().
template <class T, int kRows, int kColumns, bool kRowsInside>
__device__ __forceinline__ void store_tile(const BlockCall& call, const BlockPlace& place,
                                           const SumTile<kRows, kColumns, kRowsInside>& tile) {
  using Tile = SumTile<kRows, kColumns, kRowsInside>;
  constexpr int kThreads = kTileThreads<kRows, kColumns>;
  constexpr int kPieces = Tile::kInner / kPiece<T>;
  const int rows = place.rows(call, kRows);
  const int columns =
      static_cast<int>(min(call.columns - place.first_column, static_cast<int64_t>(kColumns)));
  const int64_t row = place.row(call);
  const int64_t column = place.batch * call.columns + place.first_column;
  const int64_t outputs = call.batch * call.weight.rows * call.columns;
  const int64_t stride = kRowsInside ? call.weight.rows : call.columns;
  const int64_t start = kRowsInside
                            ? column * stride + row
                            : (place.batch * call.weight.rows + row) * stride + place.first_column;
  const int first = static_cast<int>(threadIdx.x) % kPieces * kPiece<T>;
  const int count = min((kRowsInside ? rows : columns) - first, kPiece<T>);
#pragma unroll 1
  for (int line = static_cast<int>(threadIdx.x) / kPieces; line < (kRowsInside ? columns : rows);
       line += kThreads / kPieces) {
    const float* from = tile.sums + line * Tile::kPitch + first;
    const int64_t index = start + line * stride + first;
    const int64_t first_row = kRowsInside ? row + first : row + line;
    if (call.partial != nullptr) {
      float* to = call.partial + place.split * outputs + index;
      for (int i = 0; i < count; ++i) to[i] = from[i];
    } else if (count == kPiece<T>) {
      float sums[kPiece<T>];
#pragma unroll
      for (int i = 0; i < kPiece<T>; i += 4) {
        float four[4];
        load_vector(four, from + i);
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i + j] = four[j];
      }
      finish_and_store<T, kRowsInside>(call.epilogue, static_cast<T*>(call.y), first_row, index,
                                       sums);
    } else {
#pragma unroll 1
      for (int i = 0; i < count; ++i) {
        float one[1] = {from[i]};
        finish_and_store<T, kRowsInside>(call.epilogue, static_cast<T*>(call.y),
                                         first_row + (kRowsInside ? i : 0), index + i, one);
      }
    }
  }
}

constexpr int kSumThreads = 256;

// y from the parts' sums: a thread adds up one element of it.
template <class T, bool kRowsInside>
__global__ void __launch_bounds__(kSumThreads)
    add_partial_sums(const __grid_constant__ BlockCall call) {
  const int64_t outputs = call.batch * call.weight.rows * call.columns;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x;
  if (index >= outputs) return;
  float sum[1] = {0.0f};
  for (int split = 0; split < call.splits; ++split) sum[0] += call.partial[split * outputs + index];
  const int64_t row =
      kRowsInside ? index % call.weight.rows : index / call.columns % call.weight.rows;
  finish_and_store<T, kRowsInside>(call.epilogue, static_cast<T*>(call.y), row, index, sum);
}

}  // namespace sparselt::cuda
