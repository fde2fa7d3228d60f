// SPDX-License-Identifier: Apache-2.0
//
// Lays x out as spmv kernels read it, and shares the sections of the weight out to threads.
#include "ops/spmv.h"

#include <cstring>

#include "ops/partition.h"

namespace sparselt {
namespace {

// The part of x that a small layer needs fits here, which saves it an allocation.
constexpr int64_t kStackFloats = 4096;

// Columns of x into `lanes` floats a row, by blocks of the weight's columns; see SpmvCall.
template <int64_t kLanes>
void lay_out(const SellView& w, const float* x, Layout layout, int64_t columns, float* to) {
  for (int64_t block = 0; block < w.num_blocks; ++block) {
    const int64_t first = block * w.block_cols;
    const int64_t last = std::min(w.cols, first + w.block_cols);
    for (int64_t k = first; k < last; ++k, to += kLanes) {
      const float* from = x + k * layout.row_stride;
      for (int64_t n = 0; n < kLanes; ++n) {
        to[n] = n < columns ? from[n * layout.column_stride] : 0.0f;
      }
    }
    to += (first + w.block_cols - last) * kLanes;
    for (int64_t n = 0; n < kLanes; ++n) *to++ = 0.0f;
  }
}

void run_sections(const SpmvCall& call, SpmvKernel kernel) {
  const SellView& w = call.weight;
  const int64_t sections = w.num_sections;
  const int64_t steps = w.slice_steps[w.block_slices[sections * w.num_blocks]];
  const int64_t threads = std::min<int64_t>(sections, torch::stable::get_num_threads());
  if (threads <= 1 || steps * w.slice_height * call.lanes < kSerialWork) {
    return kernel(call, {0, sections});
  }
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    kernel(call, {sections * begin / threads, sections * end / threads});
  });
}

}  // namespace

void run_spmv(const Weight& weight, const float* x, Layout x_layout, float* y, Layout y_layout,
              int64_t columns, const Epilogue& epilogue) {
  if (weight.rows == 0) return;
  const SellView& w = weight.sell;
  const int64_t groups = (columns + kMaxSpmvColumns - 1) / kMaxSpmvColumns;
  for (int64_t group = 0; group < groups; ++group) {
    // Even groups: eight columns and one more would pay for sixteen.
    const int64_t first = columns * group / groups;
    const int64_t count = columns * (group + 1) / groups - first;
    const int64_t lanes = count == 1 ? 1 : (count <= 4 ? 4 : 8);
    const int64_t floats = w.num_blocks * (w.block_cols + 1) * lanes;
    alignas(64) float on_stack[kStackFloats];
    const Tensor held = new_output({floats <= kStackFloats ? 0 : floats});
    float* laid_out = floats <= kStackFloats ? on_stack : float_data(held);
    const auto copy = lanes == 1 ? lay_out<1> : (lanes == 4 ? lay_out<4> : lay_out<8>);
    copy(w, x + first * x_layout.column_stride, x_layout, count, laid_out);
    SpmvCall call{w,
                  laid_out,
                  lanes,
                  count,
                  y + first * y_layout.column_stride,
                  y_layout.row_stride,
                  y_layout.column_stride,
                  epilogue};
    if (epilogue.residual) call.epilogue.residual += first * y_layout.column_stride;
    run_sections(call, weight.kernel->spmv);
  }
}

}  // namespace sparselt
