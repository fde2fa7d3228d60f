// SPDX-License-Identifier: Apache-2.0
//
// Cuts a product or a convolution into the panels that a panel kernel computes, and runs them.
#pragma once

#include <vector>

#include "ops/check.h"

namespace sparselt {

// A filter position: what it adds to the place in x of an output pixel, and to its row and column.
struct Tap {
  int64_t offset;
  int32_t row_shift;
  int32_t column_shift;
};

// Where output pixel (image, p, q) finds the x of channel c under a tap:
//   x + image * image_stride + c * channel_stride + p * row_stride + q + tap.offset
// With `bordered`, row p * row_step + row_shift and column q + column_shift must lie in the
// height x width of x; elsewhere x counts as zero. A matrix (K, N) is one image of one row.
struct PanelSource {
  const float* x;
  int64_t batch;
  int64_t image_stride;
  int64_t channel_stride;
  int64_t row_stride;
  int64_t out_height;
  int64_t out_width;
  int64_t row_step;
  int64_t height;
  int64_t width;
  bool bordered;
  std::vector<Tap> taps;
};

// y, and the residual, are (batch, rows, out_height, out_width), contiguous.
void run_panels(const Weight& weight, const PanelSource& source, float* y,
                const Epilogue& epilogue);

}  // namespace sparselt
