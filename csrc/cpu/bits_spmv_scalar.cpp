// SPDX-License-Identifier: Apache-2.0
//
// y = clamp(W x + bias + residual) with up to 4 columns for W of bits and values: the teaching
// version and the fallback. kernels.h says how the weight and x are laid out. A row's values are
// met in order, each where the next bit of the row's masks is set.
#include "cpu/bits_row.h"

namespace sparselt::cpu {

void bits_spmv_scalar(const SpmvCall& call, Range rows) {
  const BitsView& w = call.bits;
  const int64_t chunks = (w.cols + kMaskBits - 1) / kMaskBits;
  for (int64_t m = rows.begin; m < rows.end; ++m) {
    float sums[kMaxSpmvColumns] = {};
    const float* value = w.values + w.crow_indices[m];
    for (int64_t k = 0; k < w.cols; ++k) {
      const unsigned mask = w.masks[m * chunks + k / kMaskBits];
      if ((mask >> (k % kMaskBits) & 1) == 0) continue;
      for (int64_t n = 0; n < call.columns; ++n) {
        sums[n] += *value * call.x[n * call.block_stride + k];
      }
      ++value;
    }
    for (int64_t n = 0; n < call.columns; ++n) store_sum(call, m, n, sums[n]);
  }
}

}  // namespace sparselt::cpu
