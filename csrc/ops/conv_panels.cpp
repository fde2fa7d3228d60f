// SPDX-License-Identifier: Apache-2.0
//
// Convolution by a panel kernel. Borders are masks of the kernel's own copy of x, so x is used as
// it is, but for a stride along the width: it would put the pixels that one tap meets stride_w
// apart. Then each row of x that a tap meets is first cut into phases, columns j * stride_w + phase
// lying next to each other.
#include <torch/headeronly/util/Exception.h>

#include "ops/conv_panel_source.h"
#include "ops/conv_problem.h"
#include "ops/panels.h"
#include "ops/partition.h"

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

// A first stage turns x (planes, H, W) into (planes, stride_w, H, ceil(W / stride_w)); what no tap
// meets is left as it is.
class CutPanelTask final : public PanelTask {
 public:
  CutPanelTask(const Team& team, const ConvProblem& problem, const Weight& weight,
               const Epilogue& epilogue, PanelSource source)
      : PanelTask(team, weight, epilogue, std::move(source)),
        h_(problem.geometry.h),
        w_(problem.geometry.w),
        planes_(problem.batch * problem.channels_in),
        cutting_parts_(copying_parts(team, planes_, h_.size * w_.size)),
        rows_(rows_met(h_)),
        phases_(phases_met(w_)) {}

  int64_t stages() const override { return 2; }
  int64_t parts(int64_t stage) const override {
    return stage == 0 ? cutting_parts_ : PanelTask::parts(0);
  }
  int64_t shared_floats() const override {
    return planes_ * w_.stride * h_.size * phase_columns(w_);
  }
  void run(int64_t stage, int64_t part, const Operands& operands) const override {
    if (stage == 0) {
      const Range planes = even_range(planes_, part, cutting_parts_);
      for (int64_t plane = planes.begin; plane < planes.end; ++plane) cut(plane, operands);
      return;
    }
    Operands cut_operands = operands;
    cut_operands.x = operands.shared;
    PanelTask::run(0, part, cut_operands);
  }

 private:
  void cut(int64_t plane, const Operands& operands) const {
    const int64_t pitch = phase_columns(w_);
    for (int64_t row = 0; row < h_.size; ++row) {
      if (!rows_[static_cast<size_t>(row)]) continue;
      const float* from = operands.x + (plane * h_.size + row) * w_.size;
      for (int64_t phase = 0; phase < w_.stride; ++phase) {
        if (!phases_[static_cast<size_t>(phase)]) continue;
        const int64_t to = (plane * w_.stride + phase) * h_.size + row;
        cut_row(w_, phase, from, operands.shared + to * pitch);
      }
    }
  }

  const Axis h_;
  const Axis w_;
  const int64_t planes_;
  const int64_t cutting_parts_;
  const std::vector<bool> rows_;
  const std::vector<bool> phases_;
};

}  // namespace

TaskPointer make_conv_panels(const Team& team, const ConvProblem& problem, const Weight& weight,
                             const Epilogue& epilogue) {
  STD_TORCH_CHECK(problem.groups == 1, weight.kernel->name, ": expected groups = 1, got ",
                  problem.groups);
  PanelSource source = conv_panel_source(problem.geometry, problem.batch, problem.channels_in);
  if (problem.geometry.w.stride == 1) {
    return std::make_unique<PanelTask>(team, weight, epilogue, std::move(source));
  }
  return std::make_unique<CutPanelTask>(team, problem, weight, epilogue, std::move(source));
}

}  // namespace sparselt
