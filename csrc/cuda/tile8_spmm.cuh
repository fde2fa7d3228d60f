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
//   A lane finds its chunk by a vote: those below it that have one too. The packer orders the
//   offsets of a row so that the lanes of a step spread over the banks of shared memory.
//
// A block of threads owns a slice; its warps share out the panels, keep the sums of their lane's
// row, and add them up in the end, in warp order. Weights with few slices get more warps a block,
// then pieces of K (split_sums.cuh). A warp reads the batch of 3 chunks a lane after the one that
// it multiplies: 1.1 KB of a 16-bit type are on their way to each warp at any time.
//
// Bounds, by counting, float16, density 0.1 (26 weights of a row and panel): 3.2 bytes a weight,
// padding and counts included, against 20 of the dense matrix: 6.2 times fewer. A multiprocessor of
// an H200 is sent 18 bytes a cycle (an H100: 13), so 32 weights every 5.7 (7.9) cycles, in which it
// can issue 23 (31) instructions. Needed, from the loop compiled for sm_90a: a warp runs as many
// batches as its longest row has, 4 of 12 weights a lane for 26; shared memory as the banks meet.
//
//        N    instructions for 32 weights    cycles of shared memory    of full bandwidth, at most
//        1    21                             2.5                        100 % (H100: 100 %)
//        2    27                             2.6                         85 % (100 %)
//        4    34                             5                           67 % (93 %)
//        8    54                             10                          42 % (58 %): see patch8
//
// Source: byte offsets follow from counting bytes; lanes that share out lists of unequal length by
// votes are an old SIMD technique. No published kernel is followed.
#pragma once

#include "cuda/shared_place.cuh"
#include "cuda/split_sums.cuh"

namespace sparselt::cuda {

constexpr int kSliceRows = kWarpSize;
constexpr int kChunk = 4;                    // weights; their offsets are one 32-bit word
constexpr int kStepsAhead = 3;               // chunks of a lane that are on their way together
constexpr int kMostColumns = kTile8Columns;  // of x at a time
constexpr int kFewWarps = 8;                 // a block of threads; many where there are few slices
constexpr int kManyWarps = 16;
constexpr int64_t kManySlices = 256;

template <class T>
struct Tile8View {
  const int32_t* chunk_offsets;  // of each group, in chunks
  const uint8_t* counts;         // weights of each row of each group
  const uint32_t* offsets;       // 4 bytes a chunk
  const Vector<T, kChunk>* values;
  int panels;
  int width;  // of a panel
  int64_t groups;
  explicit __device__ Tile8View(const Weight& weight)
      : chunk_offsets(static_cast<const int32_t*>(weight.parts[0])),
        counts(static_cast<const uint8_t*>(weight.parts[1])),
        offsets(static_cast<const uint32_t*>(weight.parts[2])),
        values(static_cast<const Vector<T, kChunk>*>(weight.parts[3])),
        panels(static_cast<int>(ceil_div(weight.cols, weight.block_cols))),
        width(static_cast<int>(weight.block_cols)),
        groups(ceil_div(weight.rows, weight.block_rows) * panels) {}
};

// How x lies in shared memory, [k][column]: a single column as float32, which saves a conversion a
// weight, several as they come, which saves half of the bytes.
template <class T, int kColumns>
using Held = std::conditional_t<kColumns == 1, float, T>;

// Panels of x that shared memory holds at a time, 64 KB.
template <class T, int kColumns>
constexpr int kPanelsHeld =
    64 * 1024 / (256 * kColumns * static_cast<int>(sizeof(Held<T, kColumns>)));

// What a lane has read of its row: up to kStepsAhead chunks, of which `count` weights are real.
template <class T>
struct Batch {
  uint32_t offsets[kStepsAhead];
  Vector<T, kChunk> values[kStepsAhead];
  int count;
  SharedPlace x;  // where the panel's x is held
};

// The chunks of a warp's panels, `panel`, panel + stride and so on below `end`, in the order of
// memory.
template <class T>
struct ChunkStream {
  const Tile8View<T>& weight;
  int64_t first_group;
  int panel, stride, end;
  SharedPlace x, x_stride;  // where the panel's x is held, and how far to the warp's next one
  int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  int count = 0;   // weights of the lane's row in `panel` that are still to be read
  int chunk = 0;   // the next one of the warp
  int last_chunk;  // of the weight
  int next_count = 0;
  int next_chunk = 0;

  __device__ ChunkStream(const Tile8View<T>& view, int64_t slice, int begin, int step, int limit,
                         SharedPlace x_of_begin, SharedPlace panel_bytes)
      : weight(view),
        first_group(slice * view.panels),
        panel(begin - step),
        stride(step),
        end(limit),
        x(x_of_begin - static_cast<SharedPlace>(step) * panel_bytes),
        x_stride(static_cast<SharedPlace>(step) * panel_bytes),
        last_chunk(__ldg(view.chunk_offsets + view.groups) - 1) {
    look_ahead();
  }

  // What says where a panel's chunks are comes a panel early.
  __device__ void look_ahead() {
    if (panel + stride >= end) return;
    const int64_t group = first_group + panel + stride;
    next_count = __ldg(weight.counts + group * kSliceRows + lane);
    next_chunk = __ldg(weight.chunk_offsets + group);
  }

  // Starts reading the next batch; false after the last.
  __device__ __forceinline__ bool read(Batch<T>& batch) {
    while (__ballot_sync(kFullWarp, count > 0) == 0) {
      if (panel + stride >= end) return false;
      panel += stride;
      x += x_stride;
      count = next_count;
      chunk = next_chunk;
      look_ahead();
    }
    batch.count = count;
    batch.x = x;
    const unsigned lanes_below = (1u << lane) - 1;
#pragma unroll
    for (int step = 0; step < kStepsAhead; ++step) {
      const unsigned have = __ballot_sync(kFullWarp, step * kChunk < count);
      // A lane without a chunk reads one of a neighbour: no branch, and no bytes of its own.
      const int mine = min(chunk + __popc(have & lanes_below), last_chunk);
      batch.offsets[step] = load_once(weight.offsets + mine);
      batch.values[step] = load_once(weight.values + mine);
      chunk += __popc(have);
    }
    count -= kStepsAhead * kChunk;
    return true;
  }
};

template <class T, int kColumns>
__device__ __forceinline__ void multiply_batch(const Batch<T>& batch, float (&sums)[kColumns]) {
  using Row = Vector<Held<T, kColumns>, kColumns>;
#pragma unroll
  for (int step = 0; step < kStepsAhead; ++step) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const float value = to_float(batch.values[step].elements[i]);
      const bool real = step * kChunk + i < batch.count;  // padding must not meet x: 0 * inf is NaN
      const Row from =
          load_shared<Row>(place_of_byte(batch.x, batch.offsets[step], i, sizeof(Row)));
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        if (real) sums[n] = fmaf(value, to_float(from.elements[n]), sums[n]);
      }
    }
  }
}

// Copies x[first_k .. first_k + depth, 0 .. columns) to shared memory, kWidth elements at a time
// along K where kWidth > 1.
template <class T, int kColumns, int kWidth, int kThreads>
__device__ void hold(const SpmmCall& call, const T* x, int depth, int columns,
                     Held<T, kColumns>* shared) {
  const int steps = depth / kWidth;
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < steps * kColumns; i += kThreads) {
    // Neighbouring threads read neighbours in x, whichever way it lies.
    const int k = (kWidth == 1 && call.x_column == 1 ? i / kColumns : i % steps) * kWidth;
    const int n = kWidth == 1 && call.x_column == 1 ? i % kColumns : i / steps;
    if (n >= columns) continue;
    const Vector<T, kWidth> some =
        *reinterpret_cast<const Vector<T, kWidth>*>(x + k * call.x_row + n * call.x_column);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      if constexpr (kColumns == 1) {
        shared[k + j] = to_float(some.elements[j]);
      } else {
        shared[(k + j) * kColumns + n] = some.elements[j];
      }
    }
  }
}

template <class T, int kColumns, int kWarpsHere>
__global__ void __launch_bounds__(kWarpsHere* kWarpSize,
                                  (kColumns < kMostColumns ? 24 : 16) / kWarpsHere)
    tile8_spmm_slices(const __grid_constant__ SpmmCall call) {
  constexpr int kThreads = kWarpsHere * kWarpSize;
  constexpr int kRowBytes = kColumns * static_cast<int>(sizeof(Held<T, kColumns>));
  constexpr int kAtOnce = 16 / static_cast<int>(sizeof(T));
  const Tile8View<T> weight(call.weight);
  const SplitPlace place(call, tile8_cut(call.weight), kColumns);
  const int columns =
      static_cast<int>(min(call.columns - place.first_column, static_cast<int64_t>(kColumns)));
  const T* x = static_cast<const T*>(call.x) + place.batch * call.x_batch +
               place.first_column * call.x_column;
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarpSize;
  auto* shared = reinterpret_cast<Held<T, kColumns>*>(shared_memory());
  const SharedPlace place_of_x = shared_place(shared);

  float sums[kColumns] = {};
  const int first_panel = place.first_panel(weight.panels);
  const int end_panel = place.end_panel(weight.panels);
  for (int held = first_panel; held < end_panel; held += kPanelsHeld<T, kColumns>) {
    const int end = min(held + kPanelsHeld<T, kColumns>, end_panel);
    const int64_t first_k = static_cast<int64_t>(held) * weight.width;
    const int depth =
        static_cast<int>(min(static_cast<int64_t>(end) * weight.width, call.weight.cols) - first_k);
    const auto panel_bytes = static_cast<SharedPlace>(weight.width * kRowBytes);
    ChunkStream<T> stream(weight, place.row_tile, held + warp, kWarpsHere, end,
                          place_of_x + static_cast<SharedPlace>(warp) * panel_bytes, panel_bytes);
    Batch<T> now;
    Batch<T> next;
    bool more = stream.read(now);  // on its way while x is copied
    __syncthreads();               // nobody reads the panels held before any more
    const T* from = x + first_k * call.x_row;
    if (call.x_row == 1 && depth % kAtOnce == 0 && is_aligned<T>(from, call.x_column, 16)) {
      hold<T, kColumns, kAtOnce, kThreads>(call, from, depth, columns, shared);
    } else {
      hold<T, kColumns, 1, kThreads>(call, from, depth, columns, shared);
    }
    __syncthreads();
    while (more) {
      more = stream.read(next);
      multiply_batch<T, kColumns>(now, sums);
      if (!more) break;
      more = stream.read(now);
      multiply_batch<T, kColumns>(next, sums);
    }
  }

  float* partial = reinterpret_cast<float*>(shared_memory());
  __syncthreads();
#pragma unroll
  for (int n = 0; n < kColumns; ++n) partial[n * kThreads + thread] = sums[n];
  __syncthreads();
  for (int i = thread; i < kSliceRows * columns; i += kThreads) {
    const int64_t row = place.row_tile * kSliceRows + i % kSliceRows;
    const int n = i / kSliceRows;
    if (row >= call.weight.rows) continue;
    float sum = 0.0f;
    for (int w = 0; w < kWarpsHere; ++w)
      sum += partial[(n * kWarpsHere + w) * kWarpSize + i % kSliceRows];
    place.store<T>(call, row, place.first_column + n, sum);
  }
}

template <class T, int kColumns, int kWarpsHere>
cudaError_t launch_slices(const SpmmCall& call, cudaStream_t stream) {
  const int64_t panels = ceil_div(call.weight.cols, call.weight.block_cols);
  const int64_t held = panels < kPanelsHeld<T, kColumns> ? panels : kPanelsHeld<T, kColumns>;
  const size_t for_x =
      static_cast<size_t>(held * call.weight.block_cols * kColumns) * sizeof(Held<T, kColumns>);
  constexpr size_t kForSums = kWarpsHere * kWarpSize * kColumns * sizeof(float);
  return launch_split<T>(tile8_spmm_slices<T, kColumns, kWarpsHere>, call, tile8_cut(call.weight),
                         kColumns, kWarpsHere * kWarpSize, for_x > kForSums ? for_x : kForSums,
                         stream);
}

template <class T, int kColumns>
cudaError_t choose_warps(const SpmmCall& call, cudaStream_t stream) {
  const int64_t slices = ceil_div(call.weight.rows, kSliceRows) * ceil_div(call.columns, kColumns);
  return slices * call.batch < kManySlices ? launch_slices<T, kColumns, kManyWarps>(call, stream)
                                           : launch_slices<T, kColumns, kFewWarps>(call, stream);
}

template <class T>
cudaError_t tile8_spmm(const SpmmCall& call, cudaStream_t stream) {
  if (call.weight.block_rows != kSliceRows || call.weight.block_cols > 256)
    return cudaErrorNotSupported;
  if (!is_aligned<T>(call.weight.parts[2], 0, kChunk) ||
      !is_aligned<T>(call.weight.parts[3], 0, kChunk * sizeof(T))) {
    return cudaErrorNotSupported;
  }
  if (call.columns <= 1) return choose_warps<T, 1>(call, stream);
  if (call.columns <= 2) return choose_warps<T, 2>(call, stream);
  if (call.columns <= 4) return choose_warps<T, 4>(call, stream);
  return choose_warps<T, kMostColumns>(call, stream);
}

}  // namespace sparselt::cuda
