// SPDX-License-Identifier: Apache-2.0
//
// y (M, N) = clamp(W (M, K) x (K, N) + bias + residual) for few columns, N = 1 to 8 at a time,
// where the bytes of W decide. Format tile8 (sparselt/formats/tile8.py) spends one byte on an
// index:
//
//   W is cut into groups of 32 rows (a slice) by at most 256 columns (a panel). In a group each row
//   is a list of chunks of 4 weights, the last one padded: 4 values of T and 4 offsets of a byte
//   into the panel. `counts` says how many weights a row has. The first chunks of all rows that
//   have one come first, in row order, then the second chunks, and so on, so that a warp whose lane
//   i reads row i reads memory in one piece:
//
//        row 0  a a a     stored:  a b d | a d | a        lane 0 1 2 3
//        row 1  b                                          step 0: a b . d
//        row 2                                             step 1: a . . d
//        row 3  d d                                        step 2: a . . .
//
//   A lane finds its chunk by a vote: those below it that have one too. Offsets of a row may come
//   in any order; the packer's spreads the lanes of a step over the banks of shared memory.
//
// A block of threads owns a slice. Its 8 warps share out the panels, keep the sums of their lane's
// row, and add them up in the end, in warp order. x is kept in shared memory, as float32.
//
// Bounds, by counting, float16, one column, density 0.1 (26 weights of a row and panel): 3.2 bytes
// a weight, padding and counts included, against 20 of the dense matrix: 6.2 times fewer. A
// multiprocessor of an H200 is sent 18 bytes a cycle, so 32 weights every 5.6 cycles, in which it
// can issue 22 instructions. Needed: 5 a weight (offset, x, conversion, test, multiply-add) and 10
// a chunk, on lanes that are busy 3/4 of the time: 10. The reads of x take 2.5 cycles,
// counted over the banks that packed random masks meet. So bytes should decide up to N = 2, reads
// of x beyond.
//
// Source: byte offsets into column panels follow from counting bytes (no published kernel is
// followed); lanes that share out lists of unequal length by votes are an old SIMD technique.
#pragma once

#include "cuda/window_product.cuh"

namespace sparselt::cuda {

constexpr int kSliceRows = kWarpSize;
constexpr int kChunk = 4;       // weights; their offsets are one 32-bit word
constexpr int kSliceWarps = 8;  // a block of threads
constexpr int kSliceThreads = kSliceWarps * kWarpSize;
constexpr int kStepsAhead = 4;   // chunks of a lane that are on their way together
constexpr int kMostColumns = 8;  // of x at a time

template <class T>
struct Tile8View {
  const int32_t* chunk_offsets;  // of each group, in chunks
  const uint8_t* counts;         // weights of each row of each group
  const uint32_t* offsets;       // 4 bytes a chunk
  const Vector<T, kChunk>* values;
  int panels;
  int width;  // of a panel
  explicit __device__ Tile8View(const Weight& weight)
      : chunk_offsets(static_cast<const int32_t*>(weight.parts[0])),
        counts(static_cast<const uint8_t*>(weight.parts[1])),
        offsets(static_cast<const uint32_t*>(weight.parts[2])),
        values(static_cast<const Vector<T, kChunk>*>(weight.parts[3])),
        panels(static_cast<int>(ceil_div(weight.cols, weight.block_cols))),
        width(static_cast<int>(weight.block_cols)) {}
};

// Panels of x that shared memory holds at a time: a multiple of the warps, up to 32 KB where that
// is possible (64 KB at 8 columns).
template <int kColumns>
constexpr int kPanelsHeld = kSliceWarps * (kColumns < 4 ? 4 / kColumns : 1);

// Adds the products of this lane's row in one group. `x` holds the group's panel.
template <class T, int kColumns>
__device__ __forceinline__ void multiply_group(const Tile8View<T>& weight, int64_t group,
                                               const float* x, float (&sums)[kColumns]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const unsigned lanes_below = (1u << lane) - 1;
  const int count = __ldg(weight.counts + group * kSliceRows + lane);
  int64_t first = __ldg(weight.chunk_offsets + group);
  for (int begin = 0; __ballot_sync(kFullWarp, begin < count) != 0; begin += kStepsAhead * kChunk) {
    uint32_t offsets[kStepsAhead];
    float values[kStepsAhead][kChunk];
#pragma unroll
    for (int step = 0; step < kStepsAhead; ++step) {
      const bool has = begin + step * kChunk < count;
      const unsigned have = __ballot_sync(kFullWarp, has);
      if (has) {
        const int64_t chunk = first + __popc(have & lanes_below);
        offsets[step] = load_once(weight.offsets + chunk);
        const Vector<T, kChunk> four = load_once(weight.values + chunk);
#pragma unroll
        for (int i = 0; i < kChunk; ++i) values[step][i] = to_float(four.elements[i]);
      }
      first += __popc(have);
    }
#pragma unroll
    for (int step = 0; step < kStepsAhead; ++step) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        if (begin + step * kChunk + i >= count)
          continue;  // padding must not meet x: 0 * inf is NaN
        const int offset = static_cast<int>(offsets[step] >> (8 * i) & 0xff);
        float from[kColumns];
        load_vector(from, x + offset * kColumns);
#pragma unroll
        for (int n = 0; n < kColumns; ++n) sums[n] = fmaf(values[step][i], from[n], sums[n]);
      }
    }
  }
}

template <class T, int kColumns>
__global__ void __launch_bounds__(kSliceThreads, 3)
    tile8_spmm_slices(const __grid_constant__ SpmmCall call) {
  const Tile8View<T> weight(call.weight);
  const int64_t slices = ceil_div(call.weight.rows, kSliceRows);
  const int64_t column_tiles = ceil_div(call.columns, kColumns);
  const int64_t slice = blockIdx.x % slices;
  const int64_t first_column = blockIdx.x / slices % column_tiles * kColumns;
  const int64_t batch = blockIdx.x / slices / column_tiles;
  const int columns =
      static_cast<int>(min(call.columns - first_column, static_cast<int64_t>(kColumns)));
  const T* x = static_cast<const T*>(call.x) + batch * call.x_batch + first_column * call.x_column;
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarpSize;
  float* shared = reinterpret_cast<float*>(shared_memory());

  float sums[kColumns] = {};
  for (int held = 0; held < weight.panels; held += kPanelsHeld<kColumns>) {
    const int end = min(held + kPanelsHeld<kColumns>, weight.panels);
    const int64_t first_k = static_cast<int64_t>(held) * weight.width;
    const int depth =
        static_cast<int>(min(static_cast<int64_t>(end) * weight.width, call.weight.cols) - first_k);
    __syncthreads();  // nobody reads the panels held before any more
    for (int i = thread; i < depth * kColumns; i += kSliceThreads) {
      // Neighbouring threads read neighbours in x, whichever way it lies.
      const int k = call.x_column == 1 ? i / kColumns : i % depth;
      const int n = call.x_column == 1 ? i % kColumns : i / depth;
      if (n < columns)
        shared[k * kColumns + n] = to_float(x[(first_k + k) * call.x_row + n * call.x_column]);
    }
    __syncthreads();
    for (int panel = held + warp; panel < end; panel += kSliceWarps) {
      multiply_group(weight, slice * weight.panels + panel,
                     shared + (panel - held) * weight.width * kColumns, sums);
    }
  }

  __syncthreads();
#pragma unroll
  for (int n = 0; n < kColumns; ++n) shared[n * kSliceThreads + thread] = sums[n];
  __syncthreads();
  for (int i = thread; i < kSliceRows * columns; i += kSliceThreads) {
    const int64_t row = slice * kSliceRows + i % kSliceRows;
    const int n = i / kSliceRows;
    if (row >= call.weight.rows) continue;
    float sum = 0.0f;
    for (int w = 0; w < kSliceWarps; ++w)
      sum += shared[(n * kSliceWarps + w) * kWarpSize + i % kSliceRows];
    const int64_t index =
        batch * call.y_batch + row * call.y_row + (first_column + n) * call.y_column;
    static_cast<T*>(call.y)[index] = from_float<T>(finish<T>(call.epilogue, sum, row, index));
  }
}

template <class T, int kColumns>
cudaError_t launch_slices(const SpmmCall& call, cudaStream_t stream) {
  const int64_t panels = ceil_div(call.weight.cols, call.weight.block_cols);
  const int64_t held = panels < kPanelsHeld<kColumns> ? panels : kPanelsHeld<kColumns>;
  const int64_t for_x = held * call.weight.block_cols * kColumns;
  constexpr int64_t kForSums = kSliceThreads * kColumns;
  const size_t shared = sizeof(float) * static_cast<size_t>(for_x > kForSums ? for_x : kForSums);
  const int64_t slices = ceil_div(call.weight.rows, kSliceRows) * ceil_div(call.columns, kColumns);
  return launch(tile8_spmm_slices<T, kColumns>, slices * call.batch, kSliceThreads, shared, stream,
                call);
}

template <class T>
cudaError_t tile8_spmm(const SpmmCall& call, cudaStream_t stream) {
  if (call.weight.block_rows != kSliceRows || call.weight.block_cols > 256)
    return cudaErrorNotSupported;
  if (!is_aligned<T>(call.weight.parts[2], 0, kChunk) ||
      !is_aligned<T>(call.weight.parts[3], 0, kChunk * sizeof(T))) {
    return cudaErrorNotSupported;
  }
  if (call.columns <= 1) return launch_slices<T, 1>(call, stream);
  if (call.columns <= 2) return launch_slices<T, 2>(call, stream);
  if (call.columns <= 4) return launch_slices<T, 4>(call, stream);
  return launch_slices<T, kMostColumns>(call, stream);
}

}  // namespace sparselt::cuda
