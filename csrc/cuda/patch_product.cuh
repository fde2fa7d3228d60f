// SPDX-License-Identifier: Apache-2.0
//
// What products with patches share (sparselt/formats/patches.py). A block of 4 warps walks the
// panels of 256 columns of W. Each warp has 32 rows of its own and each lane its patch of them and
// of the panel: with g = lane / 4 and t = lane % 4, rows g, g + 8, g + 16, g + 24 by columns 64 t
// to 64 t + 63. That is what a lane holds of the operand of mma.m16n8k16, if step j of a panel
// takes columns 4 j to 4 j + 3 of each patch: the order of columns inside a sum is free. So no lane
// ever needs another lane's weights, and what it unpacks stays its own:
//
//   private memory    128 words, one below the other in the lane's own bank of shared memory:
//                     stores and loads at any place, by all lanes at once, never meet in a bank
//   x                 the panel's columns of x, 16 bits or float32, two panels deep, copied in the
//                     background; [column][patch column] with a gap after each 64, so that the
//                     16-byte loads of a warp meet in no bank either
#pragma once

#include "cuda/shared_place.cuh"
#include "cuda/split_sums.cuh"

namespace sparselt::cuda {

constexpr int kPatchWarps = 4;
constexpr int kPatchThreads = kPatchWarps * kWarpSize;
constexpr int kGroupRows = 32;
constexpr int kGroupCols = 256;
constexpr int kPatchCols = 64;
constexpr int kPatchWords = 128;  // of 32 bits, two places each
constexpr int kWordStride = kWarpSize * 4;
constexpr int kSteps = kPatchCols / 4;  // of a panel
constexpr int kStepWords = 8;           // of private memory a step: two operands of 16 x 16

// Panels of x in shared memory.
template <class T, int kColumns>
struct PatchInput {
  static constexpr int kCopy = 16 / static_cast<int>(sizeof(T));  // elements of a 16-byte copy
  static constexpr int kQuarter = kPatchCols + kCopy;
  static constexpr int kPitch = 4 * kQuarter;
  static constexpr int kBytes = kColumns * kPitch * static_cast<int>(sizeof(T));  // of a panel

  const SpmmCall& call;
  const T* x;   // x[0, first column]
  int columns;  // that exist
  T* shared;    // two panels

  // Starts copying a panel; what does not exist becomes 0.
  __device__ void stage(int panel) const {
    T* to = shared + panel % 2 * (kColumns * kPitch);
    const int first = panel * kGroupCols;
    if (call.x_row == 1 && is_aligned<T>(x, call.x_column, 16) && call.weight.cols % kCopy == 0) {
      constexpr int kUnits = kGroupCols / kCopy;
      constexpr int kRows = kPatchThreads / kUnits;  // that the threads copy at a time
      const int k = static_cast<int>(threadIdx.x) % kUnits * kCopy;
      const int row = static_cast<int>(threadIdx.x) / kUnits;
      const bool inside = first + k < call.weight.cols;
      const T* from = x + row * call.x_column + first + k;
#pragma unroll
      for (int n = 0; n < kColumns; n += kRows) {
        if (kColumns % kRows != 0 && n + row >= kColumns) break;
        const bool exists = inside && n + row < columns;
        copy_async_16(to + place(n + row, k), exists ? from : x, exists);
        from += kRows * call.x_column;
      }
      return;
    }
    for (int i = static_cast<int>(threadIdx.x); i < kColumns * kGroupCols; i += kPatchThreads) {
      // Neighbouring threads read neighbours in x, whichever way it lies.
      const int k = call.x_column == 1 ? i / kColumns : i % kGroupCols;
      const int n = call.x_column == 1 ? i % kColumns : i / kGroupCols;
      const bool exists = n < columns && first + k < call.weight.cols;
      to[place(n, k)] =
          exists ? x[(first + k) * call.x_row + n * call.x_column] : from_float<T>(0.0f);
    }
  }
  static __device__ int place(int column, int k) {
    return column * kPitch + k / kPatchCols * kQuarter + k % kPatchCols;
  }
};

// Where a warp works: its groups follow each other, one a panel.
struct PatchPlace {
  SplitPlace split;
  int64_t slice;  // of 32 rows; may be beyond the last one
  int first_panel, end_panel;
  int64_t group;    // of the first panel
  bool has_groups;  // whether the slice exists
  __device__ PatchPlace(const SpmmCall& call, const Cut& cut, int columns)
      : split(call, cut, columns) {
    const int panels = static_cast<int>(ceil_div(call.weight.cols, kGroupCols));
    slice = split.row_tile * kPatchWarps + threadIdx.x / kWarpSize;
    first_panel = split.first_panel(panels);
    end_panel = split.end_panel(panels);
    group = slice * panels + first_panel;
    has_groups = slice * kGroupRows < call.weight.rows;
  }
};

// Calls unpack() and then multiply(place of x) for every panel. In multiply, x is there; unpack
// works while it is copied.
template <class Input, class Unpack, class Multiply>
__device__ __forceinline__ void for_each_panel(const PatchPlace& place, const Input& input,
                                               const Unpack& unpack, const Multiply& multiply) {
  if (place.first_panel < place.end_panel) input.stage(place.first_panel);
  copy_commit();
  const SharedPlace x = shared_place(input.shared);
  for (int panel = place.first_panel; panel < place.end_panel; ++panel) {
    unpack();
    copy_wait<0>();
    __syncthreads();  // the panel has arrived for all, and nobody reads the one before any more
    if (panel + 1 < place.end_panel) input.stage(panel + 1);
    copy_commit();
    multiply(x + static_cast<SharedPlace>(panel % 2 * Input::kBytes));
  }
  copy_wait<0>();
}

// Sums of a warp's 32 rows by kColumns columns on the tensor cores.
template <class T, int kColumns>
struct TensorSums {
  using Input = PatchInput<T, kColumns>;
  static constexpr int kTiles = kColumns / 8;
  float sums[2][kTiles][4] = {};

  // Adds the products of a panel. `operand(j, words)` gives the lane's words of step j.
  template <class Operand>
  __device__ __forceinline__ void multiply(SharedPlace x, const Operand& operand) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    x += static_cast<SharedPlace>(Input::place(lane / 4, lane % 4 * kPatchCols)) * sizeof(T);
#pragma unroll
    for (int j = 0; j < kSteps; j += 2) {
      uint32_t a[2][kStepWords];
      operand(j, a[0]);
      operand(j + 1, a[1]);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const uint4 b = load_shared<uint4>(
            x + static_cast<SharedPlace>(tile * 8 * Input::kPitch + 4 * j) * sizeof(T));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint32_t top[4] = {a[i][0], a[i][1], a[i][2], a[i][3]};
          const uint32_t bottom[4] = {a[i][4], a[i][5], a[i][6], a[i][7]};
          multiply_tile(sums[0][tile], top, i == 0 ? b.x : b.z, i == 0 ? b.y : b.w, T{});
          multiply_tile(sums[1][tile], bottom, i == 0 ? b.x : b.z, i == 0 ? b.y : b.w, T{});
        }
      }
    }
  }

  __device__ void store(const SpmmCall& call, const PatchPlace& place) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int64_t row = place.slice * kGroupRows + half * 16 + i / 2 * 8 + lane / 4;
          const int64_t column = place.split.first_column + tile * 8 + lane % 4 * 2 + i % 2;
          if (row < call.weight.rows && column < call.columns)
            place.split.store<T>(call, row, column, sums[half][tile][i]);
        }
      }
    }
  }
};

// What says where a lane's chunks of the next group are, read a group early.
struct GroupStream {
  const int32_t* chunk_offsets;
  const uint8_t* counts;
  int64_t next;  // group
  int64_t end;
  int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  int last_chunk;  // of the weight
  int count = 0;   // of the group at hand: the lane's chunks that are still to be read
  int chunk = 0;   // and the next one of the warp
  int next_count = 0;
  int next_chunk = 0;

  __device__ GroupStream(const Weight& weight, const PatchPlace& place)
      : chunk_offsets(static_cast<const int32_t*>(weight.parts[0])),
        counts(static_cast<const uint8_t*>(weight.parts[1])),
        next(place.group),
        end(place.has_groups ? place.group + place.end_panel - place.first_panel : place.group) {
    const int64_t groups = ceil_div(weight.rows, kGroupRows) * ceil_div(weight.cols, kGroupCols);
    last_chunk = __ldg(chunk_offsets + groups) - 1;
    look_ahead();
  }
  __device__ void look_ahead() {
    next_count = next < end ? __ldg(counts + next * kWarpSize + lane) : 0;
    next_chunk = next < end ? __ldg(chunk_offsets + next) : 0;
  }
  // Goes to the next group; one without chunks after the last.
  __device__ void advance() {
    count = next_count;
    chunk = next_chunk;
    ++next;
    look_ahead();
  }
  __device__ int most_left() const { return __reduce_max_sync(kFullWarp, count); }
  // The lane's next chunk, if it is to have one at `step`; otherwise some other chunk, or -1 where
  // nobody has one.
  __device__ __forceinline__ int chunk_at(int step) {
    const unsigned have = __ballot_sync(kFullWarp, step < count);
    const int mine = min(chunk + __popc(have & ((1u << lane) - 1)), last_chunk);
    chunk += __popc(have);
    return mine;
  }
};

}  // namespace sparselt::cuda
