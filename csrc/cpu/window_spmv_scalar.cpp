// SPDX-License-Identifier: Apache-2.0
//
// The teaching version of y = clamp(W x + bias + residual) for W in windows; see kernels.h.
#include "cpu/bits_row.h"
#include "kernels.h"

namespace sparselt::cpu {

void window_spmv_scalar(const SpmvCall& call, Range slices) {
  const WindowView& w = call.window;
  for (int64_t slice = slices.begin; slice < slices.end; ++slice) {
    for (int64_t lane = 0; lane < kWindowLanes; ++lane) {
      const int32_t row = w.slice_rows[slice * kWindowLanes + lane];
      if (row < 0) continue;
      float sum = 0.0f;
      for (int64_t step = w.slice_steps[slice]; step < w.slice_steps[slice + 1]; ++step) {
        const int64_t at = step * kWindowLanes + lane;
        if (w.columns[at] < kWindowKept) continue;  // the lane waits
        const float* window = call.x + w.windows[step] * kWindowLanes;
        sum += w.values[at] * window[w.columns[at] - kWindowKept];
      }
      store_sum(call, row, 0, sum);
    }
  }
}

}  // namespace sparselt::cpu
