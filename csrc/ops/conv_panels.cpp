// SPDX-License-Identifier: Apache-2.0
//
// Convolution by a panel kernel. Borders are masks of the kernel's own copy of x, so x is used as
// it is, but for a stride along the width: it would put the pixels that one tap meets stride_w
// apart. Then each row of x that a tap meets is first cut into phases, columns j * stride_w + phase
// lying next to each other.
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>

#include "ops/conv_panel_source.h"
#include "ops/conv_problem.h"
#include "ops/panels.h"

namespace sparselt {
namespace {

// Which of `count` rows (or phases) the taps of an axis meet at all.
std::vector<bool> rows_met(const Axis& h) {
  std::vector<bool> met(static_cast<size_t>(h.size), false);
  for (int64_t r = 0; r < h.kernel; ++r) {
    const int64_t first = r * h.dilation - h.padding;
    for (int64_t p = 0; p < h.out(); ++p) {
      const int64_t row = p * h.stride + first;
      if (row >= 0 && row < h.size) met[static_cast<size_t>(row)] = true;
    }
  }
  return met;
}

std::vector<bool> phases_met(const Axis& w) {
  std::vector<bool> met(static_cast<size_t>(w.stride), false);
  for (int64_t s = 0; s < w.kernel; ++s) {
    met[static_cast<size_t>(floor_remainder(s * w.dilation - w.padding, w.stride))] = true;
  }
  return met;
}

// x (planes, H, W) as (planes, stride_w, H, ceil(W / stride_w)); what no tap meets is left as it
// is.
Tensor cut_columns(const Axis& h, const Axis& w, const float* x, int64_t planes) {
  const int64_t pitch = phase_columns(w);
  const std::vector<bool> rows = rows_met(h);
  const std::vector<bool> phases = phases_met(w);
  Tensor out = new_output({planes, w.stride, h.size, pitch});
  float* data = float_data(out);
  const int64_t grain = std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(1, h.size * w.size));
  torch::stable::parallel_for(0, planes, grain, [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {
      for (int64_t row = 0; row < h.size; ++row) {
        if (!rows[static_cast<size_t>(row)]) continue;
        const float* from = x + (plane * h.size + row) * w.size;
        for (int64_t phase = 0; phase < w.stride; ++phase) {
          if (!phases[static_cast<size_t>(phase)]) continue;
          cut_row(w, phase, from, data + ((plane * w.stride + phase) * h.size + row) * pitch);
        }
      }
    }
  });
  return out;
}

}  // namespace

void run_conv_panels(const ConvProblem& problem, const Weight& weight, const Tensor& input,
                     const Epilogue& epilogue, float* y) {
  const Axis& h = problem.geometry.h;
  const Axis& w = problem.geometry.w;
  STD_TORCH_CHECK(problem.groups == 1, weight.kernel->name, ": expected groups = 1, got ",
                  problem.groups);
  const Tensor planes = w.stride == 1 ? input
                                      : cut_columns(h, w, const_float_data(input),
                                                    problem.batch * problem.channels_in);
  const PanelSource source = conv_panel_source(problem.geometry, problem.batch, problem.channels_in,
                                               const_float_data(planes));
  run_panels(weight, source, y, epilogue);
}

}  // namespace sparselt
