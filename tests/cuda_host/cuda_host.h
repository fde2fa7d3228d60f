// SPDX-License-Identifier: Apache-2.0
//
// Runs CUDA kernels on a CPU, one fiber a thread, one block after the other: what
// csrc/cuda/device.cuh includes where no CUDA compiler reads it. It is made to find mistakes, not
// to be fast:
//   - Threads of a block run in an order that the caller picks; a result that depends on it betrays
//   a missing barrier.
//   - Shared memory starts as NaN in every block, in an allocation of its exact size.
//   - A background copy turns its destination into NaN at once and delivers at the wait for it, so
//   what is read too early
//     or overwritten too early shows.
//   - A barrier or a warp step that some thread never reaches ends the program with what every
//   thread waits for.
// Built with the address sanitizer, every access outside a buffer ends the program too.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define threadIdx (::cuda_host::thread_index())
#define blockIdx (::cuda_host::block_index())

using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorNotSupported = 801,
};

// What csrc/cuda/registry.cpp asks a driver, which operators/machine.cpp answers.
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
};
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaGetLastError();
cudaError_t cudaRuntimeGetVersion(int* version);

struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
inline int2 make_int2(int x, int y) { return {x, y}; }

// 16-bit floats as bits; arithmetic goes through float, as the kernels do it.
struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
float __half2float(__half value);
__half __float2half_rn(float value);
float __bfloat162float(__nv_bfloat16 value);
__nv_bfloat16 __float2bfloat16_rn(float value);

namespace cuda_host {

constexpr int kWarp = 32;
constexpr size_t kSharedLimit = 163 * 1024;  // of a block, on the smallest GPU supported (8.0)

uint3 thread_index();
uint3 block_index();

// Runs `body` once a thread of every block.
cudaError_t run(int64_t blocks, int threads, size_t shared_bytes,
                const std::function<void()>& body);

// 0: threads run in order; 1: in reverse; otherwise shuffled by this seed.
void set_schedule(unsigned schedule);

unsigned char* shared_memory();
void barrier();

enum class Step { kShuffle, kVote, kMeet, kLoadMatrices, kMultiplyTile };
// Shows `bytes` (at most 64) of every lane to the whole warp, once all its threads have come to the
// same step. The result holds lane l's bytes at 64 * l and stays as it is until this thread's next
// step.
const unsigned char* exchange(Step step, const void* mine, size_t bytes);

void copy_async(void* shared, const void* global, size_t bytes, bool valid);
void copy_commit();
void copy_wait(int pending);

[[noreturn]] void fail(const char* what);

template <class T>
T of_lane(const unsigned char* exchanged, int lane) {
  T value;
  std::memcpy(&value, exchanged + 64 * lane, sizeof(T));
  return value;
}

inline void require_full(unsigned mask) {
  if (mask != 0xffffffffu) fail("a warp step with a partial mask");
}

}  // namespace cuda_host

inline void __syncthreads() { cuda_host::barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  cuda_host::require_full(mask);
  cuda_host::exchange(cuda_host::Step::kMeet, nullptr, 0);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  cuda_host::require_full(mask);
  return cuda_host::of_lane<T>(cuda_host::exchange(cuda_host::Step::kShuffle, &value, sizeof(T)),
                               lane % 32);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return __shfl_sync(mask, value, static_cast<int>(threadIdx.x % 32) ^ lanes);
}
inline unsigned __ballot_sync(unsigned mask, bool vote) {
  cuda_host::require_full(mask);
  const unsigned char* all = cuda_host::exchange(cuda_host::Step::kVote, &vote, sizeof(vote));
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane)
    votes |= static_cast<unsigned>(cuda_host::of_lane<bool>(all, lane)) << lane;
  return votes;
}
inline int __reduce_max_sync(unsigned mask, int value) {
  cuda_host::require_full(mask);
  const unsigned char* all = cuda_host::exchange(cuda_host::Step::kShuffle, &value, sizeof(value));
  for (int lane = 0; lane < 32; ++lane) value = std::max(value, cuda_host::of_lane<int>(all, lane));
  return value;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
inline int __ffs(int bits) { return __builtin_ffs(bits); }
template <class T>
T __ldg(const T* from) {
  return *from;
}
template <class T>
T __ldcs(const T* from) {
  return *from;
}
inline int __float_as_int(float value) {
  return cuda_host::of_lane<int>(reinterpret_cast<unsigned char*>(&value), 0);
}
inline float __int_as_float(int value) {
  return cuda_host::of_lane<float>(reinterpret_cast<unsigned char*>(&value), 0);
}
template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}
using std::fmaf;

namespace sparselt::cuda {

constexpr int kMultiprocessors = 2;  // a small machine, which small cases fill
constexpr int kDeepProduct = 16;

inline unsigned char* shared_memory() { return cuda_host::shared_memory(); }
using SharedPlace = uintptr_t;
inline SharedPlace shared_place(const void* pointer) {
  return reinterpret_cast<SharedPlace>(pointer);
}
inline SharedPlace place_of_byte(SharedPlace first, uint32_t word, int i, uint32_t unit) {
  return first + unit * (word >> (8 * i) & 0xff);
}
template <class V>
V load_shared(SharedPlace place) {
  if (place % (sizeof(V) < 16 ? sizeof(V) : 16) != 0)
    cuda_host::fail("an unaligned load from shared memory");
  V value;
  std::memcpy(&value, reinterpret_cast<const void*>(place), sizeof(V));
  return value;
}
template <class V>
void store_shared(SharedPlace place, V value) {
  if (place % sizeof(V) != 0) cuda_host::fail("an unaligned store to shared memory");
  *reinterpret_cast<V*>(place) = value;
}
template <class V>
void store_shared_if(uint32_t wanted, SharedPlace place, V value) {
  if (wanted) store_shared(place, value);
}
template <uint32_t kBits, int kStep, class V>
V load_next_if(uint32_t wanted, SharedPlace& place, V) {
  if ((wanted & kBits) == 0) return V{};
  const V value = load_shared<V>(place);
  place += kStep;
  return value;
}
inline uint32_t join_halves(uint32_t low, uint32_t high) { return high << 16 | low; }
inline void copy_async_16(void* shared, const void* global, bool valid = true) {
  cuda_host::copy_async(shared, global, 16, valid);
}
inline void copy_async_4(void* shared, const void* global, bool valid = true) {
  cuda_host::copy_async(shared, global, 4, valid);
}
inline void copy_commit() { cuda_host::copy_commit(); }
template <int kPending>
void copy_wait() {
  cuda_host::copy_wait(kPending);
}

// PTX ISA, ldmatrix: lane l gets elements (l / 4, 2 * (l % 4)) and the next of matrix i, whose row
// r lane 8 * i + r gave.
template <bool kTransposed>
void load_matrices(uint32_t (&fragments)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0)
    cuda_host::fail("a matrix row that is not aligned to 16 bytes");
  const unsigned char* rows =
      cuda_host::exchange(cuda_host::Step::kLoadMatrices, &row, sizeof(row));
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int i = 0; i < 4; ++i) {
    uint16_t pair[2];
    for (int j = 0; j < 2; ++j) {
      const int r = kTransposed ? lane % 4 * 2 + j : lane / 4;
      const int c = kTransposed ? lane / 4 : lane % 4 * 2 + j;
      pair[j] = cuda_host::of_lane<const uint16_t*>(rows, 8 * i + r)[c];
    }
    fragments[i] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
  }
  cuda_host::exchange(cuda_host::Step::kMeet, nullptr,
                      0);  // nobody may write the rows before all have read
}

inline float half_of(uint32_t pair, int i, __half) {
  return __half2float({static_cast<uint16_t>(pair >> (16 * i))});
}
inline float half_of(uint32_t pair, int i, __nv_bfloat16) {
  return __bfloat162float({static_cast<uint16_t>(pair >> (16 * i))});
}

// PTX ISA, mma.m16n8k16 with 16-bit operands. With g = lane / 4 and t = lane % 4, lane holds rows g
// and g + 8 of a at columns 2t, 2t + 1 (registers 0, 1) and 2t + 8, 2t + 9 (2, 3); column g of b at
// the same rows; and of the sums rows g and g + 8 at columns 2t, 2t + 1.
template <class T>
void multiply_tile(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T type) {
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const unsigned char* all =
      cuda_host::exchange(cuda_host::Step::kMultiplyTile, mine, sizeof(mine));
  const auto fragment = [&](int lane, int i) {
    return cuda_host::of_lane<uint32_t>(all + 4 * i, lane);
  };
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8;
    const int column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const float left =
          half_of(fragment(row % 8 * 4 + k % 8 / 2, row / 8 + k / 8 * 2), k % 2, type);
      const float right = half_of(fragment(column * 4 + k % 8 / 2, 4 + k / 8), k % 2, type);
      sums[i] = fmaf(left, right, sums[i]);
    }
  }
}

inline float clamp(float value, float lower, float upper) {
  value = value < lower ? lower : value;  // written so that a NaN stays a NaN
  return value > upper ? upper : value;
}

template <class Call>
cudaError_t launch(void (*kernel)(Call), int64_t blocks, int threads, size_t shared_bytes,
                   cudaStream_t, const Call& call) {
  return cuda_host::run(blocks, threads, shared_bytes, [&] { kernel(call); });
}

}  // namespace sparselt::cuda
