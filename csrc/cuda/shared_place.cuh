// SPDX-License-Identifier: Apache-2.0
//
// Shared memory by numbers instead of pointers: the steps of the machine for kernels that reckon
// with places in it. Like device.cuh, which it belongs to, it knows no format.
#pragma once

#include <type_traits>
#include <utility>

#include "cuda/device.cuh"

namespace sparselt::cuda {

#if defined(__CUDACC__)

// A place in shared memory by its number. Kernels that reckon with places do it in these, since a
// pointer would be made anew, from the block's rank in its cluster, wherever the compiler moves a
// load.
using SharedPlace = uint32_t;
__device__ __forceinline__ SharedPlace shared_place(const void* pointer) {
  return shared_address(pointer);
}

// first + unit * (byte i of a word), for units below 256: a dot product of bytes with one of them.
__device__ __forceinline__ SharedPlace place_of_byte(SharedPlace first, uint32_t word, int i,
                                                     uint32_t unit) {
  return __dp4a(word, unit << (8 * i), first);
}

// A value of 2, 4, 8, 16 or 32 bytes, aligned to its size, but to no more than 16.
template <class V>
__device__ __forceinline__ V load_shared(SharedPlace place) {
  union {
    V value;
    uint16_t half;
    uint32_t words[8];
  } loaded;
  if constexpr (sizeof(V) == 2) {
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(loaded.half) : "r"(place));
  } else if constexpr (sizeof(V) == 4) {
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(loaded.words[0]) : "r"(place));
  } else if constexpr (sizeof(V) == 8) {
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                 : "=r"(loaded.words[0]), "=r"(loaded.words[1])
                 : "r"(place));
  } else {
    static_assert(sizeof(V) == 16 || sizeof(V) == 32, "one load or two");
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(V) / 16); ++i) {
      uint32_t* words = loaded.words + 4 * i;
      asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                   : "r"(place + 16u * static_cast<unsigned>(i)));
    }
  }
  return loaded.value;
}
// Of uint16_t, uint32_t or uint4.
template <class V>
__device__ __forceinline__ void store_shared(SharedPlace place, V value) {
  if constexpr (sizeof(V) == 2) {
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(place), "h"(value));
  } else if constexpr (sizeof(V) == 4) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(place), "r"(value));
  } else {
    static_assert(sizeof(V) == 16, "one store");
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(place), "r"(value.x),
                 "r"(value.y), "r"(value.z), "r"(value.w));
  }
}

// The same where `wanted` is not 0, without a branch.
__device__ __forceinline__ void store_shared_if(uint32_t wanted, SharedPlace place,
                                                uint16_t value) {
  asm volatile(
      "{ .reg .pred wanted; setp.ne.u32 wanted, %2, 0; @wanted st.shared.u16 [%0], %1; }" ::"r"(
          place),
      "h"(value), "r"(wanted));
}

// Loads what is at `place` and moves on by kStep bytes where `wanted` has a bit of kBits; gives 0
// elsewhere. Without a branch, and with a single test.
template <uint32_t kBits, int kStep>
__device__ __forceinline__ uint32_t load_next_if(uint32_t wanted, SharedPlace& place, uint16_t) {
  uint32_t value;
  asm volatile(
      "{ .reg .pred wanted; .reg .b32 bits; and.b32 bits, %2, %3; setp.ne.u32 wanted, bits, 0; "
      "mov.b32 %0, 0; @wanted ld.shared.u16 %0, [%1]; @wanted add.u32 %1, %1, %4; }"
      : "=&r"(value), "+r"(place)
      : "r"(wanted), "n"(kBits), "n"(kStep));
  return value;
}
template <uint32_t kBits, int kStep>
__device__ __forceinline__ float load_next_if(uint32_t wanted, SharedPlace& place, float) {
  float value;
  asm volatile(
      "{ .reg .pred wanted; .reg .b32 bits; and.b32 bits, %2, %3; setp.ne.u32 wanted, bits, 0; "
      "mov.f32 %0, 0f00000000; @wanted ld.shared.f32 %0, [%1]; @wanted add.u32 %1, %1, %4; }"
      : "=&f"(value), "+r"(place)
      : "r"(wanted), "n"(kBits), "n"(kStep));
  return value;
}

// A word of two halves, whose other bits are 0.
__device__ __forceinline__ uint32_t join_halves(uint32_t low, uint32_t high) {
  return __byte_perm(low, high, 0x5410);
}

#endif

// Calls body(0), body(1) and so on, with numbers that are constants.
template <int... kIndices, class Body>
__host__ __device__ __forceinline__ void for_constants(std::integer_sequence<int, kIndices...>,
                                                       const Body& body) {
  (body(std::integral_constant<int, kIndices>()), ...);
}

}  // namespace sparselt::cuda
