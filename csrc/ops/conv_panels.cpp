// SPDX-License-Identifier: Apache-2.0
//
// Convolution by a panel kernel. Borders are masks of the kernel's own copy of x, so x is used as
// it is, but for a stride along the width: it would put the pixels that one tap meets stride_w
// apart. Then what the taps meet of x is first cut into phases.
#include <torch/headeronly/util/Exception.h>

#include <algorithm>

#include "ops/conv_panel_source.h"
#include "ops/conv_problem.h"
#include "ops/panels.h"
#include "ops/partition.h"

namespace sparselt {
namespace {

// Whether each of `groups` ranges of rows is as many sections as the others are.
bool keeps_groups_apart(const SellView& w, int64_t groups) {
  if (groups == 1 || w.rows == 0) return true;
  if (w.num_sections % groups != 0) return false;
  const int64_t group_rows = w.rows / groups;
  const int64_t group_sections = w.num_sections / groups;
  for (int64_t section = 0; section < w.num_sections; ++section) {
    const int64_t group = section / group_sections;
    // The first block has all rows.
    const int32_t* slices = w.block_slices + section * w.num_blocks;
    for (int64_t i = slices[0] * w.slice_height; i < slices[1] * w.slice_height; ++i) {
      if (w.slice_rows[i] >= 0 && w.slice_rows[i] / group_rows != group) return false;
    }
  }
  return true;
}

// A first stage cuts the channels of x into phases.
class CutPanelTask final : public PanelTask {
 public:
  CutPanelTask(const Team& team, const ConvProblem& problem, const Weight& weight,
               const Epilogue& epilogue, PanelSource source)
      : PanelTask(team, weight, epilogue, std::move(source)),
        cut_(problem.geometry),
        channel_floats_(problem.geometry.h.size * problem.geometry.w.size),
        channels_(problem.batch * problem.channels_in),
        // Threads that the products wake are there for the cut, however little it is.
        cutting_parts_(PanelTask::parts(0) > 1 ? std::clamp<int64_t>(channels_, 1, team.threads)
                                               : copying_parts(team, channels_, channel_floats_)) {}

  int64_t stages() const override { return 2; }
  int64_t parts(int64_t stage) const override {
    return stage == 0 ? cutting_parts_ : PanelTask::parts(0);
  }
  int64_t shared_floats() const override { return channels_ * cut_.floats(); }
  std::optional<PanelLayout> x_in_panels() const override { return {}; }
  void run(int64_t stage, int64_t part, const Operands& operands) const override {
    if (stage == 0) {
      const Range channels = even_range(channels_, part, cutting_parts_);
      for (int64_t c = channels.begin; c < channels.end; ++c) {
        cut_.run(operands.x + c * channel_floats_, operands.shared + c * cut_.floats());
      }
      return;
    }
    Operands cut_operands = operands;
    cut_operands.x = operands.shared;
    PanelTask::run(0, part, cut_operands);
  }

 private:
  const ChannelCut cut_;
  const int64_t channel_floats_;
  const int64_t channels_;
  const int64_t cutting_parts_;
};

}  // namespace

TaskPointer make_conv_panels(const Team& team, const ConvProblem& problem, const Weight& weight,
                             const Epilogue& epilogue) {
  STD_TORCH_CHECK(keeps_groups_apart(weight.sell, problem.groups), weight.kernel->name,
                  ": expected a weight whose sections of rows lie in one group each; pack it for ",
                  problem.groups, " groups");
  PanelSource source =
      conv_panel_source(problem.geometry, problem.batch, problem.channels_in, problem.groups);
  if (problem.geometry.w.stride == 1) {
    return std::make_unique<PanelTask>(team, weight, epilogue, std::move(source));
  }
  return std::make_unique<CutPanelTask>(team, problem, weight, epilogue, std::move(source));
}

}  // namespace sparselt
