// SPDX-License-Identifier: Apache-2.0
//
// Products of dense blocks with few columns, x (N, K), where the bytes of W decide. A block of
// threads owns 16 rows of a block row (block_tile.cuh: W', t); its 8 warps share out the columns of
// W', 64 bytes of a row at a time, and add up in the end, in warp order. Nothing goes through
// shared memory before that: a lane reads 16 bytes of rows g and g + 8 of W' and of a column of x,
// at the same t.
//
//   16 bits    the order of columns of W' does not matter to a sum, as long as x agrees: what a
//   lane
//              has read are its fragments for two tensor-core products (m16n8k16) of 16 columns
//              each
//   float32    a lane has 4 columns of W' of two rows, exactly; four lanes share a row
//
// By counting, 16 bits and 8 columns: 1024 bytes of W take 3 loads, 2 mma and some 30 other
// instructions of a warp; a multiprocessor of an H200 is sent that much in 57 cycles, in which its
// four schedulers issue 228. So bytes should decide. M / 16 blocks of threads with up to 8 KB of W
// each on the way fill the machine from some M = 2048 on.
#pragma once

#include "cuda/block_store.cuh"

namespace sparselt::cuda {

constexpr int kStripRows = 16;
constexpr int kStripWarps = 8;
constexpr int kStripThreads = kStripWarps * kWarpSize;
constexpr int kStripPieces = 4;  // of a row of W' that a warp reads at a time
// Such reads that are on their way together, as registers allow.
template <int kInputs>
constexpr int kStripsAhead = kInputs > 2 ? 2 : 4;

template <class T>
__device__ __forceinline__ Vector<uint32_t, 4> load_piece(const T* from, bool exists, bool once) {
  const auto* piece = reinterpret_cast<const Vector<uint32_t, 4>*>(from);
  Vector<uint32_t, 4> zeros{};
  if (!exists) return zeros;
  return once ? load_once(piece) : *piece;
}

// What a lane keeps of a strip's sums: kColumns columns of W x.
template <class T, int kColumns>
struct StripSums {
  float sums[kColumns / 8][4] = {};

  __device__ void add(const Vector<uint32_t, 4> (&w)[2], const Vector<uint32_t, 4>* x) {
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
#pragma unroll
      for (int half = 0; half < 4; half += 2) {
        const uint32_t a[4] = {w[0].elements[half], w[1].elements[half], w[0].elements[half + 1],
                               w[1].elements[half + 1]};
        multiply_tile(sums[j], a, x[j].elements[half], x[j].elements[half + 1], T{});
      }
    }
  }
  // As rows of kColumns.
  __device__ void put(float* to) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k)
        to[(lane / 4 + k / 2 * 8) * kColumns + j * 8 + lane % 4 * 2 + k % 2] = sums[j][k];
    }
  }
};

template <int kColumns>
struct StripSums<float, kColumns> {
  float sums[2][kColumns] = {};

  __device__ void add(const Vector<uint32_t, 4> (&w)[2], const Vector<uint32_t, 4>* x) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          sums[r][n] = fmaf(__int_as_float(static_cast<int>(w[r].elements[i])),
                            __int_as_float(static_cast<int>(x[n].elements[i])), sums[r][n]);
      }
    }
  }
  __device__ void put(float* to) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        float sum = sums[r][n];
        sum += __shfl_xor_sync(kFullWarp, sum, 1);
        sum += __shfl_xor_sync(kFullWarp, sum, 2);
        if (lane % 4 == 0) to[(lane / 4 + 8 * r) * kColumns + n] = sum;
      }
    }
  }
};

template <class T, int kColumns>
__global__ void __launch_bounds__(kStripThreads, 2)
    multiply_strips(const __grid_constant__ BlockCall call) {
  constexpr bool kExact = sizeof(T) == 4;
  constexpr int kInputs = kExact ? kColumns : kColumns / 8;  // pieces of x a lane and read
  constexpr int kWidth = kStripPieces * kPiece<T>;
  constexpr int kAhead = kStripsAhead<kInputs>;
  const BlockPlace place(call, kStripRows, kColumns);
  const BlockRow<T> row(call, place, kStripRows);
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int cols = static_cast<int>(call.weight.cols);
  const int columns =
      static_cast<int>(min(call.columns - place.first_column, static_cast<int64_t>(kColumns)));
  const T* x = static_cast<const T*>(call.x) +
               (place.first_column + (kExact ? 0 : lane / 4)) * call.weight.cols;
  const T* weights = row.weights + lane / 4 * row.block_cols;

  StripSums<T, kColumns> sums;
#pragma unroll 1
  for (int first = warp * kWidth; first < row.depth; first += kAhead * kStripWarps * kWidth) {
    Vector<uint32_t, 4> w[kAhead][2];
    Vector<uint32_t, 4> from_x[kAhead][kInputs];
    int k[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int t = first + i * kStripWarps * kWidth + lane % 4 * kPiece<T>;
      const int block = row.block_of(t);
      const bool exists = t < row.depth;
      k[i] = exists ? (__ldg(row.indices + block) - block) * row.block_cols + t : cols;
      const T* from = weights + block * (row.block_size - row.block_cols) + t;
#pragma unroll
      for (int r = 0; r < 2; ++r)
        w[i][r] =
            load_piece(from + 8 * r * row.block_cols, exists && lane / 4 + 8 * r < row.rows, true);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
#pragma unroll
      for (int n = 0; n < kInputs; ++n) {
        const int column = kExact ? n : lane / 4 + 8 * n;
        from_x[i][n] = load_piece(x + (kExact ? n : 8 * n) * call.weight.cols + k[i],
                                  k[i] < cols && column < columns, false);
      }
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) sums.add(w[i], from_x[i]);
  }

  float* shared = reinterpret_cast<float*>(shared_memory());
  sums.put(shared + warp * kStripRows * kColumns);
  __syncthreads();
  const int rows = place.rows(call, kStripRows);
  for (int i = static_cast<int>(threadIdx.x); i < kStripRows * columns; i += kStripThreads) {
    const int r = i % kStripRows;
    const int n = i / kStripRows;
    if (r >= rows) continue;
    float sum[1] = {0.0f};
#pragma unroll
    for (int other = 0; other < kStripWarps; ++other)
      sum[0] += shared[(other * kStripRows + r) * kColumns + n];
    finish_and_store<T, true>(call.epilogue, static_cast<T*>(call.y), place.row(call) + r,
                              (place.first_column + n) * call.weight.rows + place.row(call) + r,
                              sum);
  }
}

template <class T, int kColumns>
cudaError_t launch_strips(const BlockCall& given, cudaStream_t stream) {
  BlockCall call = given;
  const int64_t strips = fill_grid(call, kStripRows, kColumns);
  constexpr size_t kShared = kStripWarps * kStripRows * kColumns * sizeof(float);
  return launch(multiply_strips<T, kColumns>, strips, kStripThreads, kShared, stream, call);
}

// For columns up to strip_columns(); whether x and W come in pieces is the caller's to know.
template <class T>
cudaError_t launch_strips_of(const BlockCall& call, cudaStream_t stream) {
  if constexpr (sizeof(T) == 4) {
    if (call.columns <= 1) return launch_strips<T, 1>(call, stream);
    if (call.columns <= 2) return launch_strips<T, 2>(call, stream);
    if (call.columns <= 4) return launch_strips<T, 4>(call, stream);
    return launch_strips<T, 8>(call, stream);
  } else {
    return call.columns <= 8 ? launch_strips<T, 8>(call, stream)
                             : launch_strips<T, 16>(call, stream);
  }
}

}  // namespace sparselt::cuda
