// SPDX-License-Identifier: Apache-2.0
//
// Cuts a product or a convolution into the panels that a panel kernel computes.
#pragma once

#include <array>
#include <map>
#include <utility>
#include <vector>

#include "ops/panel_maker.h"
#include "ops/task.h"
#include "ops/weight.h"

namespace sparselt {

// y, and the residual, are (batch, rows, out_height, out_width), contiguous.
class PanelTask : public Task {
 public:
  PanelTask(const Team& team, const Weight& weight, const Epilogue& epilogue, PanelSource source);

  int64_t parts(int64_t) const override { return parts_; }
  int64_t own_floats() const override;
  // Each element of the residual is read right before the same element of y is written.
  bool may_overwrite_residual() const override { return layouts_.residual == layouts_.y; }
  std::optional<PanelLayout> x_in_panels() const override;
  std::optional<PanelLayout> y_in_panels(bool) const override;
  void lay_out(const Layouts& layouts) override;
  void run(int64_t stage, int64_t part, const Operands& operands) const override;
  void prepare() override;

 private:
  // Flat pixels and sections that one part computes.
  struct Share {
    Range pixels;
    Range sections;
  };
  // A panel with pieces of its own.
  struct Stored {
    std::vector<Piece> loads;
    std::vector<Piece> extra_loads;
    std::vector<int32_t> tap_extra;
    std::vector<Piece> stores;
    Panel panel;
  };

  Share share_of(int64_t part) const;
  int64_t panels_of(Range pixels) const;
  Range panel_pixels(Range pixels, int64_t index) const;
  Lines first_lines(Range pixels, const float* x) const;
  void run_panel(Panel panel, int64_t begin, Range sections, const Operands& operands) const;
  PanelCall call_of(Panel panel, int64_t begin, const Operands& operands) const;
  void write_zeros(int64_t begin, int vectors, float* y) const;

  const Weight weight_;
  const Epilogue epilogue_;
  const PanelSource source_;
  const int64_t lanes_;  // of the widest panel
  const int64_t pixels_;
  int64_t parts_ = 1;
  Layouts layouts_;
  std::array<int64_t, kMaxPanelVectors> x_places_{};  // of values in panels
  std::vector<Piece> y_pieces_;
  std::vector<Piece> residual_pieces_;
  // By the first pixel's place in its image and the number of pixels; empty until prepared.
  std::map<std::pair<int64_t, int64_t>, Stored> stored_;
};

}  // namespace sparselt
