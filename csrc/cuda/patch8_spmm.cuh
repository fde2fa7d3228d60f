// SPDX-License-Identifier: Apache-2.0
//
// y (M, N) = clamp(W (M, K) x (K, N) + bias + residual) for 8 to 64 columns, where a weight is used
// too seldom for dense products to pay for its bytes, and too often for a core a column. Format
// patch8 (sparselt/formats/patch8.py): a list of values and one-byte places for each patch of 4 x
// 64 (patch_product.cuh). A lane spreads its list into its private memory, which is 0 elsewhere,
// and the tensor cores multiply the dense patches, 16 bits with float32 sums. Afterwards the places
// of a short list become 0 again one by one; after a longer one all of private memory does. A
// portion of 12 chunks a lane is read while the one before is spread and multiplied.
//
// An infinite or NaN x meets the zeros of its panel too, as in a dense layer.
//
// Bounds, by counting, 16 bits. A multiprocessor of an H200 is sent 18 bytes a cycle (an H100: 13),
// of which a dense matrix needs 2 a position: 9.2 positions a cycle (6.4). For a position at
// density d, in cycles of 128 bytes of shared memory and instructions of a lane (the code for
// sm_90a):
//
//   shared memory   1/64 to load operands, 1/64 to clear (or d / 32), d / 32 to spread,
//                   N / 2048 for x
//   instructions    0.6 to load operands, N / 64 multiplications, and in 256 positions 470 to read
//                   and spread 12 chunks a lane, and 170 to take them back or 50 to clear
//
//     d = 0.1, N = 16:  bytes allow 6.2 times the dense rate; shared memory 32 positions a cycle,
//                       3.5 times (H100: 5); 3.5 instructions, 4.0 times (5.7)
//     d = 0.3, N = 16:  bytes 2.2 times; shared memory 20, 2.2 times (3.2); 5.2 instructions, 2.7
//                       times (3.8)
//
// So shared memory decides on an H200 at 90 % zeros and next to bytes at 70 %; on an H100 bytes
// decide at 70 %. Beyond N = 32 loads of x pass those of weights, since each warp makes its own.
//
// Source: sparse loads and dense products as in Flash-LLM (VLDB 2024); the patches in a lane's own
// bank, which need neither conflict-free orders nor barriers, are this file's.
#pragma once

#include "cuda/patch_product.cuh"

namespace sparselt::cuda {

constexpr int kPlaceChunk = 4;  // places, one word
constexpr int kPortion = 12;    // chunks of a lane that are read together
constexpr int kTogether = 4;    // that are spread without a test whether any lane has them

// What a lane has read of its list.
struct Portion {
  uint32_t places[kPortion];
  Vector<uint16_t, kPlaceChunk> values[kPortion];
  int count;  // chunks of the lane
  int most;   // of all lanes
};

struct Patch8Lane {
  const uint32_t* places;
  const Vector<uint16_t, kPlaceChunk>* values;
  GroupStream stream;
  SharedPlace memory;  // the lane's word 0
  Portion now;
  uint32_t spread[kPortion];  // the places that are not 0, if they are few
  int spread_count = -1;      // chunks of `spread`; -1 where all of memory may be other than 0
  int spread_most = 0;        // of all lanes

  __device__ Patch8Lane(const Weight& weight, const PatchPlace& place, SharedPlace warp_memory)
      : places(static_cast<const uint32_t*>(weight.parts[2])),
        values(static_cast<const Vector<uint16_t, kPlaceChunk>*>(weight.parts[3])),
        stream(weight, place),
        memory(warp_memory + static_cast<SharedPlace>(threadIdx.x % kWarpSize) * 4) {
    stream.advance();
    read(now);
  }

  __device__ __forceinline__ void read(Portion& portion) {
    portion.count = stream.count;
    portion.most = stream.most_left();
#pragma unroll
    for (int first = 0; first < kPortion; first += kTogether) {
      if (first >= portion.most) break;
#pragma unroll
      for (int step = first; step < first + kTogether; ++step) {
        const int chunk = stream.chunk_at(step);
        portion.places[step] = load_once(places + chunk);
        portion.values[step] = load_once(values + chunk);
      }
    }
    stream.count -= kPortion;
  }

  // A place is a word, times 2, and which half of it. Without branches: most lanes have most steps.
  template <class Value>
  __device__ __forceinline__ void put(const uint32_t (&four)[kPortion], int count, int most,
                                      const Value& value) const {
#pragma unroll
    for (int first = 0; first < kPortion; first += kTogether) {
      if (first >= most) break;
#pragma unroll
      for (int step = first; step < first + kTogether; ++step) {
        const uint32_t words = four[step] & 0xfefefefeu;
        const uint32_t halves = four[step] & 0x01010101u;
#pragma unroll
        for (int i = 0; i < kPlaceChunk; ++i) {
          const SharedPlace word = place_of_byte(memory, words, i, kWordStride / 2);
          store_shared_if(step < count, place_of_byte(word, halves, i, 2), value(step, i));
        }
      }
    }
  }

  __device__ __forceinline__ void clear() {
    if (spread_count >= 0) {
      put(spread, spread_count, spread_most, [](int, int) { return uint16_t{0}; });
      return;
    }
    // All lanes together, 16 bytes each.
    const SharedPlace first = memory + 12 * static_cast<SharedPlace>(threadIdx.x % kWarpSize);
    __syncwarp();
#pragma unroll 8
    for (int i = 0; i < kPatchWords / 4; ++i)
      store_shared(first + static_cast<SharedPlace>(i) * 4 * kWordStride, uint4{0, 0, 0, 0});
    __syncwarp();
  }

  // Puts the next group into private memory and starts reading the one after.
  __device__ __forceinline__ void unpack() {
    clear();
    spread_count = now.count;
    spread_most = now.most;
    while (true) {
      const bool more = stream.most_left() > 0;
      Portion next;
      if (!more) stream.advance();
      read(next);
      put(now.places, now.count, now.most,
          [&](int step, int i) { return now.values[step].elements[i]; });
#pragma unroll
      for (int step = 0; step < kPortion; ++step) spread[step] = now.places[step];
      now = next;
      if (!more) return;
      spread_count = -1;
    }
  }
};

template <class T, int kColumns>
__global__ void __launch_bounds__(kPatchThreads, 2)
    patch8_spmm_panels(const __grid_constant__ SpmmCall call) {
  using Input = PatchInput<T, kColumns>;
  const PatchPlace place(call, patch8_cut(), kColumns);
  const int columns = static_cast<int>(
      min(call.columns - place.split.first_column, static_cast<int64_t>(kColumns)));
  unsigned char* shared = shared_memory();
  const Input input{call,
                    static_cast<const T*>(call.x) + place.split.batch * call.x_batch +
                        place.split.first_column * call.x_column,
                    columns, reinterpret_cast<T*>(shared)};
  const auto warp = static_cast<int>(threadIdx.x) / kWarpSize;
  Patch8Lane lane(call.weight, place,
                  shared_place(shared + 2 * Input::kBytes + warp * kPatchWords * kWordStride));
  TensorSums<T, kColumns> sums;
  for_each_panel(
      place, input, [&] { lane.unpack(); },
      [&](SharedPlace x) {
        sums.multiply(x, [&](int j, uint32_t (&words)[kStepWords]) {
#pragma unroll
          for (int i = 0; i < kStepWords; ++i)
            words[i] = load_shared<uint32_t>(
                lane.memory + static_cast<SharedPlace>(j * kStepWords + i) * kWordStride);
        });
      });
  sums.store(call, place);
}

template <class T, int kColumns>
cudaError_t launch_panels(const SpmmCall& call, cudaStream_t stream) {
  constexpr size_t kShared =
      2 * PatchInput<T, kColumns>::kBytes + kPatchWarps * kPatchWords * kWordStride;
  return launch_split<T>(patch8_spmm_panels<T, kColumns>, call, patch8_cut(), kColumns,
                         kPatchThreads, kShared, stream);
}

template <class T>
cudaError_t patch8_spmm(const SpmmCall& call, cudaStream_t stream) {
  const Weight& w = call.weight;
  if (w.block_rows != 4 || w.block_cols != kPatchCols || !is_aligned<T>(w.parts[2], 0, 4) ||
      !is_aligned<T>(w.parts[3], 0, kPlaceChunk * sizeof(T))) {
    return cudaErrorNotSupported;
  }
  if (call.columns <= 8) return launch_panels<T, 8>(call, stream);
  if (call.columns > 16) {
    const cudaError_t wide = call.columns <= 32 ? launch_panels<T, 32>(call, stream)
                                                : launch_panels<T, 64>(call, stream);
    if (wide != cudaErrorNotSupported) return wide;  // 8.6 and 8.9 have too little shared memory
  }
  return launch_panels<T, 16>(call, stream);
}

}  // namespace sparselt::cuda
