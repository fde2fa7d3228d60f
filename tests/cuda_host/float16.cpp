// SPDX-License-Identifier: Apache-2.0
//
// float16 and bfloat16 to and from float, rounding to nearest even as the GPU does.
#include <bit>

#include "cuda_host.h"

float __bfloat162float(__nv_bfloat16 value) {
  return std::bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
}

__nv_bfloat16 __float2bfloat16_rn(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if (std::isnan(value)) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

float __half2float(__half value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
  const uint32_t exponent = value.bits >> 10 & 0x1f;
  const uint32_t mantissa = value.bits & 0x3ff;
  if (exponent == 0x1f) return std::bit_cast<float>(sign | 0x7f800000 | mantissa << 13);
  if (exponent == 0)
    return std::copysign(std::ldexp(static_cast<float>(mantissa), -24), sign ? -1.0f : 1.0f);
  return std::bit_cast<float>(sign | (exponent + 112) << 23 | mantissa << 13);
}

__half __float2half_rn(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  if (std::isnan(value)) return {0x7fff};
  const float size = std::fabs(value);
  if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  // Below 2^-14 a unit in the last place is 2^-24; adding and rounding in units gives the mantissa
  // and its carry.
  int exponent = 0;
  std::frexp(size, &exponent);
  const int unit = size == 0.0f || exponent < -13 ? -24 : exponent - 11;
  const float units = std::nearbyint(std::ldexp(size, -unit));
  const uint32_t base = unit == -24 ? 0 : static_cast<uint32_t>(unit + 24) << 10;
  return {static_cast<uint16_t>(sign | (base + static_cast<uint32_t>(units)))};
}
