// SPDX-License-Identifier: Apache-2.0
#include "ops/panels.h"

#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <limits>

#include "ops/partition.h"

namespace sparselt {
namespace {

// Vectors of 16 columns that a thread must have for columns to be shared out rather than rows. Each
// thread that has all columns of some rows copies all of x, which is little where the weight has
// kTall times as many rows as columns; then rows are better for longer, since columns rarely divide
// evenly, and two threads write to the cache line at their border in each row of y.
constexpr int64_t kWorthSharing = 4;
constexpr int64_t kTall = 2;
constexpr int64_t kWorthSharingTall = 8;

// Wide panels pay off code that is read from L3 for each of them. Where it stays in L2, half as
// much x and half as many sums beside it are better.
constexpr size_t kCodeInL2 = 768 << 10;

int64_t lanes_of(const Weight& weight) {
  const int64_t most = weight.kernel->tile_columns;
  return weight.code && weight.code->bytes() <= kCodeInL2 ? most / 2 : most;
}

}  // namespace

PanelTask::PanelTask(const Team& team, const Weight& weight, const Epilogue& epilogue,
                     PanelSource source)
    : weight_(weight),
      epilogue_(epilogue),
      source_(std::move(source)),
      lanes_(lanes_of(weight)),
      pixels_(source_.batch * source_.out_height * source_.out_width) {
  if (pixels_ == 0 || weight.rows == 0) return;
  // Pieces count from the first image that a panel meets, and it may meet a few more.
  const int64_t area = source_.out_height * source_.out_width;
  const int64_t images = std::min(source_.batch, (kMaxPanelLanes - 1) / area + 2);
  STD_TORCH_CHECK(images * std::max(source_.image_stride, weight.rows * area) <
                      std::numeric_limits<int32_t>::max(),
                  "x: images of this size need more than 32-bit offsets; split them");
  parts_ = team.threads_for(stored_values(weight.sell) * pixels_);
}

int64_t PanelTask::own_floats() const {
  return (weight_.sell.block_cols + 1 + weight_.rows) * lanes_;
}

PanelTask::Share PanelTask::share_of(int64_t part) const {
  const int64_t sections = weight_.sell.num_sections;
  const int64_t vectors = (pixels_ + kPanelLanes - 1) / kPanelLanes;
  const bool is_tall = weight_.rows >= kTall * weight_.sell.cols;
  if (vectors >= parts_ * (is_tall ? kWorthSharingTall : kWorthSharing) || sections < parts_) {
    return {even_columns(pixels_, part, parts_), {0, sections}};
  }
  return {{0, pixels_}, even_range(sections, part, parts_)};
}

int64_t PanelTask::panels_of(Range pixels) const {
  const int64_t vectors = (pixels.end - pixels.begin + kPanelLanes - 1) / kPanelLanes;
  const int64_t most = lanes_ / kPanelLanes;
  return (vectors + most - 1) / most;
}

Range PanelTask::panel_pixels(Range pixels, int64_t index) const {
  const int64_t vectors = (pixels.end - pixels.begin + kPanelLanes - 1) / kPanelLanes;
  const int64_t panels = panels_of(pixels);
  const int64_t end = pixels.begin + vectors * (index + 1) / panels * kPanelLanes;
  return {pixels.begin + vectors * index / panels * kPanelLanes, std::min(pixels.end, end)};
}

void PanelTask::run_panel(Panel panel, int64_t begin, Range sections,
                          const Operands& operands) const {
  const int64_t image = point(source_, weight_.rows, begin, operands.x, operands.y, &panel);
  const float* const x = panel.x;
  PanelCall call{weight_.sell, panel, epilogue_, operands.own,
                 operands.own + (weight_.sell.block_cols + 1) * lanes_};
  if (operands.residual) {
    call.epilogue.residual =
        operands.residual + image * weight_.rows * source_.out_height * source_.out_width;
  }
  const int64_t group_sections = weight_.sell.num_sections / source_.groups;
  for (int64_t first = sections.begin; first < sections.end;) {
    const int64_t group = first / group_sections;
    const int64_t last = std::min(sections.end, (group + 1) * group_sections);
    call.panel.x = x + group * source_.group_stride;
    weight_.kernel->panel(call, {first, last});
    first = last;
  }
}

void PanelTask::run(int64_t, int64_t part, const Operands& operands) const {
  if (pixels_ == 0 || weight_.rows == 0) return;
  const Share share = share_of(part);
  const int64_t area = source_.out_height * source_.out_width;
  const int64_t panels = panels_of(share.pixels);
  if (!stored_.empty()) {
    for (int64_t i = 0; i < panels; ++i) {
      const Range pixels = panel_pixels(share.pixels, i);
      const Stored& stored = stored_.find({pixels.begin % area, pixels.end - pixels.begin})->second;
      run_panel(stored.panel, pixels.begin, share.sections, operands);
    }
    return;
  }
  PanelMaker maker(source_, weight_.rows);
  for (int64_t i = 0; i < panels; ++i) {
    const Range pixels = panel_pixels(share.pixels, i);
    run_panel(maker.make(pixels.begin, pixels.end), pixels.begin, share.sections, operands);
  }
}

void PanelTask::prepare() {
  if (pixels_ == 0 || weight_.rows == 0) return;
  const int64_t area = source_.out_height * source_.out_width;
  PanelMaker maker(source_, weight_.rows);
  for (int64_t part = 0; part < parts_; ++part) {
    const Range all = share_of(part).pixels;
    for (int64_t i = 0; i < panels_of(all); ++i) {
      const Range pixels = panel_pixels(all, i);
      const auto [place, is_new] =
          stored_.try_emplace({pixels.begin % area, pixels.end - pixels.begin});
      if (!is_new) continue;
      const Panel made = maker.make(pixels.begin, pixels.end);
      Stored& stored = place->second;
      stored.loads.assign(made.loads, made.loads + made.taps * made.vectors);
      stored.tap_extra.assign(made.tap_extra, made.tap_extra + made.taps + 1);
      stored.extra_loads.assign(made.extra_loads, made.extra_loads + made.tap_extra[made.taps]);
      stored.stores.assign(made.stores, made.stores + made.num_stores);
      stored.panel = made;
      stored.panel.loads = stored.loads.data();
      stored.panel.extra_loads = stored.extra_loads.data();
      stored.panel.tap_extra = stored.tap_extra.data();
      stored.panel.stores = stored.stores.data();
    }
  }
}

}  // namespace sparselt
