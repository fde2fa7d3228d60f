// SPDX-License-Identifier: Apache-2.0
//
// A depthwise convolution, an output at a time.
#include "kernels.h"

namespace sparselt::cpu {
namespace {

// The sum of one output's taps that meet x.
float sum_taps(const DepthwiseCall& call, const float* x, const float* weight, int64_t p,
               int64_t q) {
  const WindowAxis& h = call.h;
  const WindowAxis& w = call.w;
  float sum = 0.0f;
  for (int64_t r = 0; r < h.kernel; ++r) {
    const int64_t row = p * h.stride + r * h.dilation - h.padding;
    if (row < 0 || row >= h.size) continue;
    for (int64_t s = 0; s < w.kernel; ++s) {
      const int64_t column = q * w.stride + s * w.dilation - w.padding;
      if (column < 0 || column >= w.size) continue;
      sum += weight[r * w.kernel + s] * x[row * w.size + column];
    }
  }
  return sum;
}

}  // namespace

void dense_depthwise_scalar(const DepthwiseCall& call, Range planes) {
  const Epilogue& epilogue = call.epilogue;
  const int64_t area = call.h.out * call.w.out;
  for (int64_t plane = planes.begin; plane < planes.end; ++plane) {
    const int64_t filter = plane % call.filters;
    const float* x = call.x + plane / call.multiplier * call.h.size * call.w.size;
    const float* weight = call.weight + filter * call.h.kernel * call.w.kernel;
    const float bias = epilogue.bias ? epilogue.bias[filter] : 0.0f;
    for (int64_t i = plane * area; i < (plane + 1) * area; ++i) {
      const int64_t pixel = i - plane * area;
      float out = bias + sum_taps(call, x, weight, pixel / call.w.out, pixel % call.w.out);
      if (epilogue.residual) out += epilogue.residual[i];
      // A NaN compares false, and survives.
      if (out < epilogue.lower) out = epilogue.lower;
      if (out > epilogue.upper) out = epilogue.upper;
      call.y[i] = out;
    }
  }
}

}  // namespace sparselt::cpu
