// SPDX-License-Identifier: Apache-2.0
//
// The bodies of loops.h. Included by one unit for each instruction set, inside its target region,
// so it includes declarations only and defines nothing that units could share.
#pragma once

#include "program/loops.h"

namespace sparselt {
namespace {

// Sums and maxima go in so many chains, whatever the width of a vector.
constexpr int kLanes = 16;

// Written so that a NaN stays a NaN.
inline float clamp(float value, float lower, float upper) {
  value = value < lower ? lower : value;
  return value > upper ? upper : value;
}

inline float larger(float a, float b) {
  const float most = a > b ? a : b;
  return a != a ? a : most;
}

// exp(x) to about 1e-7 of itself, without branches or calls (after Cephes' expf: 2^n times a
// polynomial of what is left of x / ln 2 after rounding). A NaN stays a NaN: the polynomial is one.
inline float exponential(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float rounded = x * 1.44269504f + kRound;
  const float n = rounded - kRound;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  // The last bits of `rounded` are n, and the shift drops all others.
  const uint32_t exponent = (__builtin_bit_cast(uint32_t, rounded) + 127) << 23;
  return p * __builtin_bit_cast(float, exponent);
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

// x / 2 * (1 + erf(x / sqrt(2))), erf to 1.5e-7 after Abramowitz and Stegun, 7.1.26.
inline float gelu(float x) {
  const float a = __builtin_fabsf(x) * 0.70710678f;
  const float t = 1.0f / (1.0f + 0.3275911f * a);
  float p = 1.061405429f;
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const float tail = p * t * exponential(-a * a);  // 1 - erf(a)
  return 0.5f * x * (x < 0.0f ? tail : 2.0f - tail);
}

inline float hardswish(float x) { return x * clamp(x + 3.0f, 0.0f, 6.0f) / 6.0f; }

template <class F>
void transform(int64_t count, const float* x, float* y, float lower, float upper, const F& f) {
  for (int64_t i = 0; i < count; ++i) y[i] = clamp(f(x[i]), lower, upper);
}

template <class F>
void combine(int64_t count, const float* x, const float* z, float* y, float lower, float upper,
             const F& f) {
  for (int64_t i = 0; i < count; ++i) y[i] = clamp(f(x[i], z[i]), lower, upper);
}

// The lanes joined by halves.
template <class F>
float joined(float* lanes, const F& f) {
  for (int step = kLanes / 2; step > 0; step /= 2) {
    for (int lane = 0; lane < step; ++lane) lanes[lane] = f(lanes[lane], lanes[lane + step]);
  }
  return lanes[0];
}

// f folded over term(0), term(1) ... in chains, each of which begins with `first`.
template <class F, class Term>
float folded(int64_t count, float first, const F& f, const Term& term) {
  float lanes[kLanes];
  for (float& lane : lanes) lane = first;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = f(lanes[lane], term(i + lane));
  }
  for (int lane = 0; i < count; ++i, ++lane) lanes[lane] = f(lanes[lane], term(i));
  return joined(lanes, f);
}

constexpr auto kSum = [](float a, float b) { return a + b; };

void run_elements(Element element, int64_t count, const float* x, const float* z, float* y,
                  float lower, float upper) {
  switch (element) {
    case Element::kIdentity:
      return transform(count, x, y, lower, upper, [](float a) { return a; });
    case Element::kAdd:
      return combine(count, x, z, y, lower, upper, [](float a, float b) { return a + b; });
    case Element::kMultiply:
      return combine(count, x, z, y, lower, upper, [](float a, float b) { return a * b; });
    case Element::kLarger:
      return combine(count, x, z, y, lower, upper, [](float a, float b) { return larger(a, b); });
    case Element::kSigmoid:
      return transform(count, x, y, lower, upper, [](float a) { return sigmoid(a); });
    case Element::kSilu:
      return transform(count, x, y, lower, upper, [](float a) { return a * sigmoid(a); });
    case Element::kGelu:
      return transform(count, x, y, lower, upper, [](float a) { return gelu(a); });
    case Element::kHardswish:
      return transform(count, x, y, lower, upper, [](float a) { return hardswish(a); });
  }
}

void run_affine(int64_t count, const float* x, float scale, float shift, float* y, float lower,
                float upper) {
  transform(count, x, y, lower, upper, [=](float a) { return a * scale + shift; });
}

void run_softmax(int64_t count, const float* x, float* y) {
  const float most = folded(
      count, x[0], [](float a, float b) { return larger(a, b); }, [=](int64_t i) { return x[i]; });
  for (int64_t i = 0; i < count; ++i) y[i] = exponential(x[i] - most);
  const float share = 1.0f / folded(count, 0.0f, kSum, [=](int64_t i) { return y[i]; });
  for (int64_t i = 0; i < count; ++i) y[i] *= share;
}

void run_standardize(int64_t count, const float* x, const float* z, float epsilon, float* y) {
  const float mean = folded(count, 0.0f, kSum, [=](int64_t i) { return x[i]; }) / count;
  const auto square = [=](int64_t i) { return (x[i] - mean) * (x[i] - mean); };
  const float variance = folded(count, 0.0f, kSum, square) / count;
  const float scale = 1.0f / __builtin_sqrtf(variance + epsilon);
  if (z == nullptr) {
    for (int64_t i = 0; i < count; ++i) y[i] = (x[i] - mean) * scale;
  } else {
    for (int64_t i = 0; i < count; ++i) y[i] = (x[i] - mean) * scale * z[i];
  }
}

}  // namespace
}  // namespace sparselt
