// SPDX-License-Identifier: Apache-2.0
//
// The loops over floats of what lies between layers, compiled once for each instruction set: plain
// code, which compilers turn into vectors. Knows neither torch nor threads.
#pragma once

#include <stdint.h>

namespace sparselt {

enum class Element { kIdentity, kAdd, kMultiply, kLarger, kSigmoid, kSilu, kGelu, kHardswish };

// Each works on `count` floats, and y may be x or z.
struct Loops {
  // y[i] = clamp(f(x[i]), lower, upper); of those with two operands, f(x[i], z[i]).
  void (*elements)(Element element, int64_t count, const float* x, const float* z, float* y,
                   float lower, float upper);
  // y[i] = clamp(x[i] * scale + shift, lower, upper)
  void (*affine)(int64_t count, const float* x, float scale, float shift, float* y, float lower,
                 float upper);
  // y[i] = exp(x[i]) / sum(exp(x))
  void (*softmax)(int64_t count, const float* x, float* y);
  // y[i] = (x[i] - mean(x)) / sqrt(variance(x) + epsilon) * z[i]; z may be null for ones.
  void (*standardize)(int64_t count, const float* x, const float* z, float epsilon, float* y);
};

// Those of the instruction set in use.
const Loops& loops();

extern const Loops kScalarLoops;
#if defined(__x86_64__)
extern const Loops kAvx2Loops;
extern const Loops kAvx512Loops;
#endif

}  // namespace sparselt
