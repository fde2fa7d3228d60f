// SPDX-License-Identifier: Apache-2.0
//
// The few steps of the machine that kernels use, each behind a thin function, so that the same
// kernel source also runs on a CPU (tests/cuda_host replaces this file's upper half). Nothing here
// knows a format.
#pragma once

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include "cuda_host.h"
#endif
#include <stdint.h>

namespace sparselt::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

#if defined(__CUDACC__)

extern __shared__ __align__(1024) unsigned char dynamic_shared[];

// The block's dynamic shared memory, aligned to 1024 bytes.
__device__ __forceinline__ unsigned char* shared_memory() { return dynamic_shared; }

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies 16 or 4 bytes from global to shared memory in the background; zeros instead of the source
// where !valid. Both addresses are multiples of the size. The bytes are there for this thread after
// copy_wait, for others after a barrier more.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void copy_async_4(void* shared, const void* global, bool valid = true) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(valid ? 4 : 0)
               : "memory");
}
__device__ __forceinline__ void copy_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most kPending of this thread's committed groups are still under way.
template <int kPending>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements from shared memory: lane l gives the address of row l % 8
// of matrix l / 8, and gets elements (l / 4, 2 * (l % 4)) and the next of each matrix; of each
// transposed matrix with kTransposed.
template <bool kTransposed>
__device__ __forceinline__ void load_matrices(uint32_t (&fragments)[4], const void* row) {
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragments[0]), "=r"(fragments[1]), "=r"(fragments[2]), "=r"(fragments[3])
                 : "r"(shared_address(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragments[0]), "=r"(fragments[1]), "=r"(fragments[2]), "=r"(fragments[3])
                 : "r"(shared_address(row))
                 : "memory");
  }
}

// sums (16 x 8, float32) += a (16 x 16) b (16 x 8), on the tensor cores, a warp together. PTX ISA,
// mma.m16n8k16.
__device__ __forceinline__ void multiply_tile(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0,
                                              uint32_t b1, __half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, "
      "%9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void multiply_tile(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0,
                                              uint32_t b1, __nv_bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The value, or the nearest of two limits; a NaN stays a NaN.
__device__ __forceinline__ float clamp(float value, float lower, float upper) {
  float clamped;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(clamped) : "f"(value), "f"(lower));
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(clamped) : "f"(clamped), "f"(upper));
  return clamped;
}

constexpr size_t kSharedWithoutAsking =
    48 * 1024;  // bytes a block may use before its limit is raised

// Puts kernel(call) on the stream and says whether the launch was accepted. No blocks: nothing to
// do.
template <class Call>
cudaError_t launch(void (*kernel)(Call), int64_t blocks, int threads, size_t shared_bytes,
                   cudaStream_t stream, const Call& call) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (shared_bytes > kSharedWithoutAsking) {
    const cudaError_t refused = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (refused == cudaErrorInvalidValue) {
      cudaGetLastError();  // forgotten: what the call needs, this device does not have
      return cudaErrorNotSupported;
    }
    if (refused != cudaSuccess) return refused;
  }
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, stream>>>(call);
  return cudaGetLastError();
}

#endif

__host__ __device__ constexpr int64_t ceil_div(int64_t value, int64_t unit) {
  return (value + unit - 1) / unit;
}

// Division of numbers below 2^31 by one that the CPU knows: a multiplication and a shift. With l
// the bits of divisor - 1 and m = floor(2^32 (2^l - divisor) / divisor) + 1, value / divisor is
// (high(m value) + value) >> l (Granlund and Montgomery, 1994).
struct Divisor {
  uint32_t divisor = 1;
  uint32_t multiplier = 1;
  uint32_t shift = 0;
  Divisor() = default;
  explicit Divisor(int64_t by) : divisor(static_cast<uint32_t>(by)) {
    while ((int64_t{1} << shift) < by) ++shift;
    multiplier = static_cast<uint32_t>((((uint64_t{1} << shift) - divisor) << 32) / divisor + 1);
  }
  __device__ __forceinline__ int quotient(int value) const {
    const uint32_t number = static_cast<uint32_t>(value);
    return static_cast<int>((__umulhi(multiplier, number) + number) >> shift);
  }
};

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <class T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// kCount elements that one access moves; the address is a multiple of its size.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Vector {
  T elements[kCount];
};

template <class T, int kCount>
__device__ __forceinline__ void load_vector(float (&to)[kCount], const T* from) {
  const Vector<T, kCount> vector = *reinterpret_cast<const Vector<T, kCount>*>(from);
#pragma unroll
  for (int i = 0; i < kCount; ++i) to[i] = to_float(vector.elements[i]);
}

template <class T, int kCount>
__device__ __forceinline__ void store_vector(T* to, const float (&from)[kCount]) {
  Vector<T, kCount> vector;
#pragma unroll
  for (int i = 0; i < kCount; ++i) vector.elements[i] = from_float<T>(from[i]);
  *reinterpret_cast<Vector<T, kCount>*>(to) = vector;
}

// An aligned value of 4, 8 or 16 bytes that nobody will read again: it should not push others out
// of the caches.
template <class V>
__device__ __forceinline__ V load_once(const V* from) {
  static_assert(sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16, "one access");
  union {
    V value;
    unsigned words[sizeof(V) / 4];
  } loaded;
  if constexpr (sizeof(V) == 4) {
    loaded.words[0] = __ldcs(reinterpret_cast<const unsigned*>(from));
  } else if constexpr (sizeof(V) == 8) {
    const uint2 pair = __ldcs(reinterpret_cast<const uint2*>(from));
    loaded.words[0] = pair.x;
    loaded.words[1] = pair.y;
  } else {
    const uint4 four = __ldcs(reinterpret_cast<const uint4*>(from));
    loaded.words[0] = four.x;
    loaded.words[1] = four.y;
    loaded.words[2] = four.z;
    loaded.words[3] = four.w;
  }
  return loaded.value;
}

// As load_vector, with one access only where the address allows it.
template <class T, int kCount>
__device__ __forceinline__ void load_vector_or_each(float (&to)[kCount], const T* from) {
  if (reinterpret_cast<uintptr_t>(from) % sizeof(Vector<T, kCount>) == 0) {
    load_vector(to, from);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] = to_float(from[i]);
  }
}

template <class T, int kCount>
__device__ __forceinline__ void store_vector_or_each(T* to, const float (&from)[kCount]) {
  if (reinterpret_cast<uintptr_t>(to) % sizeof(Vector<T, kCount>) == 0) {
    store_vector(to, from);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] = from_float<T>(from[i]);
  }
}

// Whether every element group of `bytes` that starts at a multiple of `stride` elements from
// `pointer` is aligned to it.
template <class T>
__host__ __device__ bool is_aligned(const void* pointer, int64_t stride, size_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0 && stride * sizeof(T) % bytes == 0;
}

}  // namespace sparselt::cuda
