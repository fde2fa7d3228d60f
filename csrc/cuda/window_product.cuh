// SPDX-License-Identifier: Apache-2.0
//
// The inner part of every product with unstructured or column-block weights:
//
//   sums[row, column] += W[row, k] * x[k, column]   for 96 rows and one tile of columns, all k
//
// A block of 12 warps walks k in windows. It copies the window's part of x into shared memory once,
// two windows deep, and each warp applies to it the stored weights of its own 8 rows, whose sums
// stay in registers:
//
//             columns: 32 lanes x kColumns
//   x window  [k0 .. k1)   shared memory, read by all 96 rows
//   warp w    rows 8w .. 8w + 7, one stored (row-block) entry after the other: its weights are
//             broadcast, each lane multiplies its own columns
//
// A warp's rows need not lie together: each window ends when its slowest warp does, so rows are
// dealt out by length, the longest first, to and fro over the warps. On 29 DLMC layers (ResNet-50
// and Transformer, 80 to 95 % zeros), by the costs below, warps so are busy 83 % of the time and
// not 66 %; sorting all rows of a layer first would make it 85 %.
//
// Since columns are sorted in a row, the entries of a window follow each other, and a row needs no
// more than a cursor: 32 lanes look at the next 32 entries, a vote counts those inside the window.
// How x is cut into windows is the Window's business (matrix_window.cuh, patch_window.cuh).
//
// Cost of a stored entry for 32 x 4 columns of float32, in cycles of a multiprocessor's shared
// memory (128 bytes a cycle): 4 for x, 0.5 for the staged entry, and (2 + 2 + 2) / n to fetch and
// stage n entries of a row and window. Its multiply-adds take 1 cycle of the multiprocessor, so
// shared memory decides: at most 4 / (4.5 + 6 / n) of a quarter of the FP32 peak. Blocks of r rows
// share one read of x: r cycles of multiply-adds for 4 + 0.25 (1 + r) of shared memory.
#pragma once

#include "cuda/calls.h"
#include "cuda/device.cuh"

namespace sparselt::cuda {

constexpr int kWarps = 12;  // a block; two blocks of 80 registers a thread fill a multiprocessor
constexpr int kWindowThreads = kWarps * kWarpSize;  // a block
constexpr int kWarpRows = 8;                        // rows of W whose sums a warp keeps
constexpr int kTileRows = kWarps * kWarpRows;       // rows of W a block

// Compressed rows of blocks of one column, seen as slices of kBlockRows rows each: slice i is rows
// kBlockRows * i and on, of block row i / slices. CSR where kBlockRows is 1 and there is one slice.
template <int kBlockRows, class T>
struct CompressedRows {
  const int32_t* crow_indices;
  const int32_t* col_indices;
  const T* values;
  int block_rows;
  int slices;  // a block

  explicit __device__ CompressedRows(const Weight& weight)
      : crow_indices(static_cast<const int32_t*>(weight.parts[0])),
        col_indices(static_cast<const int32_t*>(weight.parts[1])),
        values(static_cast<const T*>(weight.parts[2])),
        block_rows(static_cast<int>(weight.block_rows)),
        slices(block_rows / kBlockRows) {}

  __device__ const T* weights(int slice, int position) const {
    const T* block = values + static_cast<int64_t>(position) * block_rows;
    return kBlockRows == 1 || slices == 1 ? block : block + slice % slices * kBlockRows;
  }
};

template <int kBlockRows>
constexpr int kWarpSlices = kWarpRows / kBlockRows;

// Deals the slices of a tile to the warps by their length; those from end_slice on do not exist and
// come last. Lane b gets the b-th of its warp. `table` is shared memory for two numbers a slice,
// free again after the next barrier.
template <int kBlockRows, class T>
__device__ __forceinline__ int deal_slices(const CompressedRows<kBlockRows, T>& weight,
                                           int first_slice, int end_slice, int* table) {
  constexpr int kSlices = kWarps * kWarpSlices<kBlockRows>;
  int* dealt = table + kSlices;
  const int thread = static_cast<int>(threadIdx.x);
  const int slice = first_slice + thread;
  int length = -1;
  if (thread < kSlices) {
    if (slice < end_slice) {
      const int32_t* crow = weight.crow_indices + slice / weight.slices;
      length = crow[1] - crow[0];
    }
    table[thread] = length;
  }
  __syncthreads();
  if (thread < kSlices) {
    int rank = 0;
#pragma unroll 8
    for (int other = 0; other < kSlices; ++other)
      rank += table[other] > length || (table[other] == length && other < thread);
    const int round = rank / kWarps;
    const int warp = round % 2 == 0 ? rank % kWarps : kWarps - 1 - rank % kWarps;
    dealt[warp * kWarpSlices<kBlockRows> + round] = slice;
  }
  __syncthreads();
  const int lane = min(thread % kWarpSize, kWarpSlices<kBlockRows> - 1);
  return dealt[thread / kWarpSize * kWarpSlices<kBlockRows> + lane];
}

// Up to 32 entries of a row that a warp has fetched, in shared memory: where in the window their x
// starts, and the weights.
template <int kBlockRows>
struct Staged {
  alignas(16) int offsets[kWarpSize];
  alignas(16) float weights[kWarpSize][kBlockRows];

  __device__ void put(int i, int offset, const float (&weight)[kBlockRows]) {
    offsets[i] = offset;
#pragma unroll
    for (int r = 0; r < kBlockRows; ++r) weights[i][r] = weight[r];
  }
  template <int kCount>
  __device__ void get(int first, int (&offset)[kCount], float (&weight)[kCount][kBlockRows]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      offset[i] = offsets[first + i];
      if constexpr (kBlockRows == 1) {
        weight[i][0] = weights[first + i][0];
      } else {
        load_vector(weight[i], weights[first + i]);
      }
    }
  }
};

// With one weight an entry, offset and weight lie together: one 16-byte read brings two entries.
template <>
struct Staged<1> {
  alignas(16) int2 entries[kWarpSize];

  __device__ void put(int i, int offset, const float (&weight)[1]) {
    entries[i] = make_int2(offset, __float_as_int(weight[0]));
  }
  template <int kCount>
  __device__ void get(int first, int (&offset)[kCount], float (&weight)[kCount][1]) const {
    if constexpr (kCount == 2) {
      const int4 pair = *reinterpret_cast<const int4*>(entries + first);
      offset[0] = pair.x;
      weight[0][0] = __int_as_float(pair.y);
      offset[1] = pair.z;
      weight[1][0] = __int_as_float(pair.w);
    } else {
      offset[0] = entries[first].x;
      weight[0][0] = __int_as_float(entries[first].y);
    }
  }
};

// What a lane holds of one entry before the warp knows whether the window reaches it.
template <int kBlockRows>
struct Fetched {
  int column;
  float weight[kBlockRows];
};

template <int kBlockRows, class T>
__device__ __forceinline__ Fetched<kBlockRows> fetch(const CompressedRows<kBlockRows, T>& weight,
                                                     int slice, int position, int end) {
  Fetched<kBlockRows> entry;
  if (position < end) {
    entry.column = __ldg(weight.col_indices + position);
    load_vector_or_each(entry.weight, weight.weights(slice, position));
  } else {
    entry.column = INT32_MAX;  // beyond every window
#pragma unroll
    for (int r = 0; r < kBlockRows; ++r) entry.weight[r] = 0.0f;
  }
  return entry;
}

template <int kCount, int kBlockRows, class Window, int kColumns>
__device__ __forceinline__ void multiply_entries(const Staged<kBlockRows>& staged, int first,
                                                 const Window& window, float (*sums)[kColumns]) {
  int offset[kCount];
  float weight[kCount][kBlockRows];
  float x[kCount][kColumns];
  staged.template get<kCount>(first, offset, weight);
#pragma unroll
  for (int i = 0; i < kCount; ++i) window.read(offset[i], x[i]);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
#pragma unroll
    for (int r = 0; r < kBlockRows; ++r) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) sums[r][c] = fmaf(weight[i][r], x[i][c], sums[r][c]);
    }
  }
}

// Adds to `sums` the products of this warp's slices, of which lane b names the b-th (deal_slices);
// only slices before end_slice exist. `staging` is Staged<kBlockRows>[kWarps] in shared memory. The
// window offers
//   count(), end(w)     how many windows there are, and the first column after window w
//   stage(w)            starts copying window w into buffer w % 2; all threads of the block take
//   part offset(w, column)   what read() needs to find the row of x of a column of window w
//   read(offset, x)     this lane's kColumns elements of that row
template <int kBlockRows, class T, class Window, int kColumns>
__device__ __forceinline__ void multiply_windows(const CompressedRows<kBlockRows, T>& weight,
                                                 int slice, int end_slice, const Window& window,
                                                 Staged<kBlockRows>* staging,
                                                 float (&sums)[kWarpRows][kColumns]) {
  static_assert(kWarpRows % kBlockRows == 0, "a warp keeps whole slices");
  constexpr int kSlices = kWarpSlices<kBlockRows>;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  Staged<kBlockRows>& staged = staging[warp];

  // Lane b keeps how far the warp's b-th slice has been read, and where it ends.
  int cursor = 0;
  int end = 0;
  if (lane < kSlices && slice < end_slice) {
    const int block_row = slice / weight.slices;
    cursor = weight.crow_indices[block_row];
    end = weight.crow_indices[block_row + 1];
  }

  // The entries that the warp's lanes look at first in its b-th slice.
  const auto fetch_slice = [&](int b) {
    const int of = kBlockRows == 1 ? slice : __shfl_sync(kFullWarp, slice, b);
    return fetch(weight, of, __shfl_sync(kFullWarp, cursor, b) + lane,
                 __shfl_sync(kFullWarp, end, b));
  };
  Fetched<kBlockRows> next = fetch_slice(0);
  const int windows = window.count();
  if (windows > 0) window.stage(0);
  copy_commit();
  for (int w = 0; w < windows; ++w) {
    copy_wait<0>();
    __syncthreads();  // window w has arrived for all, and nobody reads window w - 1 any more
    if (w + 1 < windows) window.stage(w + 1);
    copy_commit();
#pragma unroll
    for (int b = 0; b < kSlices; ++b) {
      int position = __shfl_sync(kFullWarp, cursor, b);
      bool more = true;  // this row may have more entries in the window than a warp can look at
      while (more) {
        const bool inside = next.column < window.end(w);
        const int count = __popc(__ballot_sync(kFullWarp, inside));
        if (inside) staged.put(lane, window.offset(w, next.column), next.weight);
        position += count;
        if (lane == b) cursor = position;
        more = count == kWarpSize;

        // What is read next is fetched now: the rest of this row, or the next row; after the last,
        // the first once more.
        next = fetch_slice(more ? b : (b + 1) % kSlices);
        __syncwarp();
        int i = 0;
#pragma unroll 1  // more entries at once would not fit the registers
        for (; i + 2 <= count; i += 2)
          multiply_entries<2>(staged, i, window, &sums[b * kBlockRows]);
        if (i < count) multiply_entries<1>(staged, i, window, &sums[b * kBlockRows]);
        __syncwarp();
      }
    }
  }
}

// What becomes of a finished sum of row m, whose place in y is `index`.
template <class T>
__device__ __forceinline__ float finish(const Epilogue& epilogue, float sum, int64_t row,
                                        int64_t index) {
  if (epilogue.bias != nullptr) sum += to_float(static_cast<const T*>(epilogue.bias)[row]);
  if (epilogue.residual != nullptr)
    sum += to_float(static_cast<const T*>(epilogue.residual)[index]);
  sum = sum < epilogue.lower ? epilogue.lower : sum;  // written so that a NaN stays a NaN
  return sum > epilogue.upper ? epilogue.upper : sum;
}

}  // namespace sparselt::cuda
