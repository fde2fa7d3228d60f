// SPDX-License-Identifier: Apache-2.0
//
// y (M, N) = clamp(W (M, K) x (K, N) + bias + residual) for up to 16 columns where 30 to 70 % of
// the weights are kept, so that an index costs more than a bit a position. Format bitmask
// (sparselt/formats/bitmask.py): for each patch of 4 x 64 (patch_product.cuh) 256 bits and two
// queues of values, one for even places and one for odd ones, in the order of the places.
//
// A lane copies its queues to its private memory and takes from their heads: a place whose bit is
// set loads a value and moves the head on, so that the number of set bits before a place, where its
// value is, never has to be counted. In 16 bits even and odd places are the two halves of a word of
// an operand of the tensor cores; a word of the queues holds one value of each. float32 multiplies
// and adds on the FP32 cores, and then only what is kept.
//
// In 16 bits an infinite or NaN x meets the zeros of its panel too, as in a dense layer.
//
// Bounds, by counting, 16 bits, density 0.5, N up to 8: 1.2 bytes a position, of which 0.125 are
// bits and 0.07 fill queues and chunks up, against 2: 1.66 times fewer. A multiprocessor of an H200
// is sent 18 bytes a cycle: 15 positions, for which it can issue 8.4 instructions of a lane each
// (an H100: 11 positions, 12 instructions). Needed, from the code for sm_90a: 6.4 a position: a
// test, a load, a step of the head and a zero each, the operands put together, a copy of the
// queues, 1 / 8 multiplication. Shared memory: 1/32 of a cycle to take, d / 64 for the copy, 1/256
// for x: 23 positions a cycle. So bytes decide if three quarters of the slots can be used (H100:
// half).
//
// Source: a bit a position as in SpInfer (EuroSys 2025), which counts bits instead; queues in a
// lane's own bank are this file's.
#pragma once

#include <type_traits>

#include "cuda/patch_product.cuh"

namespace sparselt::cuda {

constexpr int kQueueChunk = 4;    // words of a chunk
constexpr int kMaskWords = 8;     // of a patch
constexpr int kExactColumns = 8;  // of x that float32 keeps the sums of

template <class T>
struct BitmaskLane {
  // A word of the queues: an even value and an odd one.
  static constexpr SharedPlace kStride = kWordStride / 4 * 2 * sizeof(T);
  static constexpr int kBytes = kPatchWords * static_cast<int>(kStride);  // of a warp
  static constexpr SharedPlace kOdd = sizeof(T) == 2 ? 2 : kWordStride;   // from the even value
  static constexpr int kQueueAhead = sizeof(T) == 2 ? 12 : 6;  // chunks that are read together
  using Chunk = Vector<uint32_t, kQueueChunk * 2 * sizeof(T) / 4>;

  const uint4* masks;
  const Chunk* values;
  GroupStream stream;
  SharedPlace memory;  // the lane's first word
  int64_t next_mask;   // of the next group, the lane's
  Vector<uint32_t, kMaskWords> mask;
  Vector<uint32_t, kMaskWords> mask_ahead;
  Chunk ahead[kQueueAhead];
  int ahead_count = 0;    // chunks of the lane in `ahead`
  SharedPlace even, odd;  // heads of the queues

  __device__ BitmaskLane(const Weight& weight, const PatchPlace& place, SharedPlace warp_memory)
      : masks(static_cast<const uint4*>(weight.parts[2])),
        values(static_cast<const Chunk*>(weight.parts[3])),
        stream(weight, place),
        memory(warp_memory + static_cast<SharedPlace>(threadIdx.x % kWarpSize) * 4),
        next_mask(place.group * 2 * kWarpSize + threadIdx.x % kWarpSize) {
    advance();
  }

  // Starts reading the next group: its bits and the first chunks of its queues.
  __device__ __forceinline__ void advance() {
    const bool exists = stream.next < stream.end;
    stream.advance();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 four = exists ? __ldcs(masks + next_mask + half * kWarpSize) : uint4{0, 0, 0, 0};
      mask_ahead.elements[4 * half] = four.x;
      mask_ahead.elements[4 * half + 1] = four.y;
      mask_ahead.elements[4 * half + 2] = four.z;
      mask_ahead.elements[4 * half + 3] = four.w;
    }
    next_mask += 2 * kWarpSize;
    read();
  }
  __device__ __forceinline__ void read() {
    ahead_count = stream.count;
    if (stream.most_left() <= 0) return;
#pragma unroll
    for (int step = 0; step < kQueueAhead; ++step) {
      const Chunk* chunk = values + stream.chunk_at(step);
      if constexpr (sizeof(T) == 2) {
        ahead[step] = load_once(chunk);
      } else {
        const auto* halves = reinterpret_cast<const Vector<uint32_t, 4>*>(chunk);
        const Vector<uint32_t, 4> first = load_once(halves);
        const Vector<uint32_t, 4> second = load_once(halves + 1);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          ahead[step].elements[i] = first.elements[i];
          ahead[step].elements[4 + i] = second.elements[i];
        }
      }
    }
    stream.count -= kQueueAhead;
  }

  // Copies the queues of the next group to private memory and starts reading the group after.
  __device__ __forceinline__ void unpack() {
    constexpr int kChunkWords = static_cast<int>(sizeof(Chunk) / 4);
    mask = mask_ahead;
    SharedPlace tail = memory;
    while (true) {
#pragma unroll
      for (int step = 0; step < kQueueAhead; ++step) {
        if (step < ahead_count) {
#pragma unroll
          for (int i = 0; i < kChunkWords; ++i)
            store_shared(tail + static_cast<SharedPlace>(step * kChunkWords + i) * kWordStride,
                         ahead[step].elements[i]);
        }
      }
      if (stream.most_left() <= 0) break;
      read();
      tail += kQueueAhead * kChunkWords * kWordStride;
    }
    advance();
    even = memory;
    odd = memory + kOdd;
  }

  // The next value of the even or the odd queue, which it leaves, if bit kBit is set; else 0.
  template <int kBit>
  __device__ __forceinline__ auto take(uint32_t bits) {
    using Element = std::conditional_t<sizeof(T) == 2, uint16_t, float>;
    SharedPlace& head = kBit % 2 == 0 ? even : odd;
    return load_next_if<1u << kBit, static_cast<int>(kStride)>(bits, head, Element{});
  }
};

// Sums of a lane's four rows over its own columns of the panels, by kColumns columns, in float32.
template <int kColumns>
struct ExactSums {
  using Input = PatchInput<float, kColumns>;
  float sums[4][kColumns] = {};

  __device__ __forceinline__ void multiply(SharedPlace x, BitmaskLane<float>& lane) {
    const int quarter = static_cast<int>(threadIdx.x) % 4 * kPatchCols;
    x += static_cast<SharedPlace>(Input::place(0, quarter)) * sizeof(float);
#pragma unroll 1  // a panel's steps are too many instructions
    for (int word = 0; word < kMaskWords; ++word) {
      uint32_t bits = lane.mask.elements[0];
#pragma unroll
      for (int i = 0; i + 1 < kMaskWords; ++i) lane.mask.elements[i] = lane.mask.elements[i + 1];
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        Vector<float, 4> from[kColumns];
#pragma unroll
        for (int n = 0; n < kColumns; ++n)
          from[n] = load_shared<Vector<float, 4>>(
              x + static_cast<SharedPlace>(n * Input::kPitch + 4 * step) * sizeof(float));
        for_constants(std::make_integer_sequence<int, 2 * kStepWords>(), [&](auto index) {
          constexpr int kPlace = decltype(index)::value;
          const float value = lane.template take<kPlace>(bits);
          constexpr int kRow = kPlace / 2 % 2 + kPlace / 8 * 2;
          constexpr int kColumn = kPlace / 4 % 2 * 2 + kPlace % 2;
#pragma unroll
          for (int n = 0; n < kColumns; ++n) {
            if (bits >> kPlace & 1)
              sums[kRow][n] = fmaf(value, from[n].elements[kColumn], sums[kRow][n]);
          }
        });
        bits >>= 2 * kStepWords;
      }
      x += 8 * sizeof(float);
    }
  }

  __device__ void store(const SpmmCall& call, const PatchPlace& place) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        float sum = sums[r][n];
        sum += __shfl_xor_sync(kFullWarp, sum, 1);
        sum += __shfl_xor_sync(kFullWarp, sum, 2);
        const int64_t row = place.slice * kGroupRows + 8 * r + lane / 4;
        const int64_t column = place.split.first_column + n;
        if (lane % 4 == n % 4 && row < call.weight.rows && column < call.columns)
          place.split.store<float>(call, row, column, sum);
      }
    }
  }
};

template <class T, int kColumns>
__global__ void __launch_bounds__(kPatchThreads, sizeof(T) == 2 ? 2 : 1)
    bitmask_spmm_panels(const __grid_constant__ SpmmCall call) {
  using Input = PatchInput<T, kColumns>;
  const PatchPlace place(call, bitmask_cut(), kColumns);
  const int columns = static_cast<int>(
      min(call.columns - place.split.first_column, static_cast<int64_t>(kColumns)));
  unsigned char* shared = shared_memory();
  const Input input{call,
                    static_cast<const T*>(call.x) + place.split.batch * call.x_batch +
                        place.split.first_column * call.x_column,
                    columns, reinterpret_cast<T*>(shared)};
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  BitmaskLane<T> lane(call.weight, place,
                      shared_place(shared + 2 * Input::kBytes + warp * BitmaskLane<T>::kBytes));
  const auto unpack = [&] { lane.unpack(); };
  if constexpr (sizeof(T) == 4) {
    ExactSums<kColumns> sums;
    for_each_panel(place, input, unpack, [&](SharedPlace x) { sums.multiply(x, lane); });
    sums.store(call, place);
  } else {
    TensorSums<T, kColumns> sums;
    for_each_panel(place, input, unpack, [&](SharedPlace x) {
      sums.multiply(x, [&](int j, uint32_t (&words)[kStepWords]) {
        const uint32_t bits = lane.mask.elements[j / 2] >> (2 * kStepWords * (j % 2));
        for_constants(std::make_integer_sequence<int, kStepWords>(), [&](auto index) {
          constexpr int kWord = decltype(index)::value;
          const uint32_t low = lane.template take<2 * kWord>(bits);
          const uint32_t high = lane.template take<2 * kWord + 1>(bits);
          words[kWord] = join_halves(low, high);
        });
      });
    });
    sums.store(call, place);
  }
}

template <class T, int kColumns>
cudaError_t launch_bitmask(const SpmmCall& call, cudaStream_t stream) {
  constexpr size_t kShared =
      2 * PatchInput<T, kColumns>::kBytes + kPatchWarps * BitmaskLane<T>::kBytes;
  return launch_split<T>(bitmask_spmm_panels<T, kColumns>, call, bitmask_cut(), kColumns,
                         kPatchThreads, kShared, stream);
}

template <class T>
cudaError_t bitmask_spmm(const SpmmCall& call, cudaStream_t stream) {
  const Weight& w = call.weight;
  if (w.block_rows != 4 || w.block_cols != kPatchCols || !is_aligned<T>(w.parts[2], 0, 16) ||
      !is_aligned<T>(w.parts[3], 0, 16)) {
    return cudaErrorNotSupported;
  }
  if constexpr (sizeof(T) == 4) {
    if (call.columns <= 1) return launch_bitmask<T, 1>(call, stream);
    if (call.columns <= 4) return launch_bitmask<T, 4>(call, stream);
    return launch_bitmask<T, kExactColumns>(call, stream);
  } else {
    if (call.columns <= 8) return launch_bitmask<T, 8>(call, stream);
    return launch_bitmask<T, 16>(call, stream);
  }
}

}  // namespace sparselt::cuda
