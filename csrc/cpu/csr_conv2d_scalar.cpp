// SPDX-License-Identifier: Apache-2.0
//
// y[m, p, q] = clamp(sum_k W[m, k] * plane_k[p, q] + bias[m] + residual[m, p, q]): the teaching
// version and the fallback.
//
// kernels.h says how column k of W becomes a shifted plane. A call owns rows [rows.begin, rows.end)
// and flat pixels [pixels.begin, pixels.end), and writes those of them that are outputs, a stretch
// of one output row at a time.
#include "kernels.h"

namespace sparselt::cpu {

void csr_conv2d_scalar(const Conv2dCall& call, Range rows, Range pixels) {
  const SparseView& w = call.weight;
  const Epilogue& e = call.epilogue;
  for (int64_t begin = pixels.begin, end; begin < pixels.end; begin = end) {
    const int64_t p = begin / call.pitch;
    end = (p + 1) * call.pitch < pixels.end ? (p + 1) * call.pitch : pixels.end;
    const int64_t count =
        (p * call.pitch + call.out_width < end ? p * call.pitch + call.out_width : end) - begin;
    for (int64_t m = rows.begin; m < rows.end; ++m) {
      const int64_t target = m * call.y_stride + p * call.out_width + begin - p * call.pitch;
      float* y = call.y + target;
      for (int64_t j = 0; j < count; ++j) y[j] = e.bias ? e.bias[m] : 0.0f;
      for (int32_t i = w.crow_indices[m]; i < w.crow_indices[m + 1]; ++i) {
        const float value = w.values[i];
        const float* x = call.x + call.column_offsets[w.col_indices[i]] + begin;
        for (int64_t j = 0; j < count; ++j) y[j] += value * x[j];
      }
      for (int64_t j = 0; j < count; ++j) {
        float sum = e.residual ? y[j] + e.residual[target + j] : y[j];
        sum = sum < e.lower ? e.lower : sum;  // written so that a NaN stays a NaN
        y[j] = sum > e.upper ? e.upper : sum;
      }
    }
  }
}

}  // namespace sparselt::cpu
