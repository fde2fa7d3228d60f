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
// evenly, and two threads write to the cache line at their border in each row of y. Panels have no
// such border, and columns shared out alike from layer to layer stay in the caches of their thread.
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

int64_t vectors_of(int64_t lanes) { return (lanes + kPanelLanes - 1) / kPanelLanes; }

// Where the vectors of a panel in a value's layout begin.
std::vector<Piece> vector_pieces(const std::optional<PanelLayout>& layout) {
  std::vector<Piece> pieces;
  for (int v = 0; layout && v < kMaxPanelVectors; ++v) {
    pieces.push_back({static_cast<int32_t>(v * layout->vector_floats()), static_cast<uint16_t>(v),
                      static_cast<uint16_t>(kAllLanes)});
  }
  return pieces;
}

PanelRows panel_rows(const PanelLayout& layout, const std::vector<Piece>& pieces, int vectors) {
  return {kPanelLanes, static_cast<uint32_t>(layout.period), pieces.data(), vectors};
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
  return (weight_.sell.block_cols + 1 + weight_.rows) * vectors_of(lanes_) * kPanelLanes;
}

PanelTask::Share PanelTask::share_of(int64_t part) const {
  const int64_t sections = weight_.sell.num_sections;
  const int64_t vectors = vectors_of(pixels_);
  const bool is_tall = weight_.rows >= kTall * weight_.sell.cols;
  const bool in_panels = layouts_.x || layouts_.y;
  const int64_t least = is_tall && !in_panels ? kWorthSharingTall : kWorthSharing;
  if (vectors >= parts_ * least || sections < parts_) {
    return {even_columns(pixels_, part, parts_), {0, sections}};
  }
  return {{0, pixels_}, even_range(sections, part, parts_)};
}

// The last panel may be as wide as the kernel's lanes, those before are whole vectors.
int64_t PanelTask::panels_of(Range pixels) const {
  const int64_t most = lanes_ / kPanelLanes * kPanelLanes;
  const int64_t count = pixels.end - pixels.begin;
  if (count <= lanes_) return count > 0 ? 1 : 0;
  return (count - lanes_ + most - 1) / most + 1;
}

// The vectors that are over go to the last panels, which is why that may be wider.
Range PanelTask::panel_pixels(Range pixels, int64_t index) const {
  const int64_t vectors = vectors_of(pixels.end - pixels.begin);
  const int64_t panels = panels_of(pixels);
  const int64_t end = pixels.begin + vectors * (index + 1) / panels * kPanelLanes;
  return {pixels.begin + vectors * index / panels * kPanelLanes, std::min(pixels.end, end)};
}

std::optional<PanelLayout> PanelTask::x_in_panels() const {
  const PanelSource& s = source_;
  const bool is_pointwise = s.taps.size() == 1 && s.taps[0].offset == 0 && !s.bordered &&
                            s.groups == 1 && s.height == s.out_height && s.width == s.out_width;
  if (!is_pointwise) return {};
  return PanelLayout{weight_.sell.cols, source_.batch, pixels_, weight_.sell.block_cols};
}

std::optional<PanelLayout> PanelTask::y_in_panels(bool) const {
  return PanelLayout{weight_.rows, source_.batch, pixels_, 0};
}

void PanelTask::lay_out(const Layouts& layouts) {
  layouts_ = layouts;
  for (size_t v = 0; v < x_places_.size(); ++v) {
    x_places_[v] = static_cast<int64_t>(v) * (layouts.x ? layouts.x->vector_floats() : 0);
  }
  y_pieces_ = vector_pieces(layouts.y);
  residual_pieces_ = vector_pieces(layouts.residual);
}

// The rows of zeros of some vectors of y.
void PanelTask::write_zeros(int64_t begin, int vectors, float* y) const {
  const PanelLayout& layout = *layouts_.y;
  float* vector = y + begin / kPanelLanes * layout.vector_floats();
  for (int v = 0; v < vectors; ++v, vector += layout.vector_floats()) {
    for (int64_t i = 1; i <= layout.periods(); ++i) {
      std::fill_n(vector + (i * (layout.period + 1) - 1) * kPanelLanes, kPanelLanes, 0.0f);
    }
  }
}

// What the first block of the panel of some pixels reads of x. With several taps a channel is read
// several times and has been in a cache since the first: nothing.
Lines PanelTask::first_lines(Range pixels, const float* x) const {
  const int64_t vectors = vectors_of(pixels.end - pixels.begin);
  const int64_t rows = std::min(weight_.sell.cols, weight_.sell.block_cols);
  if (layouts_.x) {
    const int64_t apart = layouts_.x->vector_floats();
    return {x + pixels.begin / kPanelLanes * apart, apart, vectors, rows};
  }
  if (source_.taps.size() > 1) return {};
  return {x + first_place(source_, pixels.begin), source_.channel_stride, rows, vectors + 1};
}

PanelCall PanelTask::call_of(Panel panel, int64_t begin, const Operands& operands) const {
  const int64_t image = point(source_, weight_.rows, begin, operands.x, operands.y, &panel);
  const float* residual = operands.residual;
  const int64_t vector = begin / kPanelLanes;
  if (layouts_.x) {
    panel.loads = nullptr;
    panel.x = operands.x + vector * layouts_.x->vector_floats();
    panel.x_places = x_places_.data();
    panel.x_block_stride = (weight_.sell.block_cols + 1) * kPanelLanes;
  }
  if (layouts_.y) {
    panel.y = operands.y + vector * layouts_.y->vector_floats();
    panel.y_rows = panel_rows(*layouts_.y, y_pieces_, panel.vectors);
  }
  if (residual && layouts_.residual) {
    residual += vector * layouts_.residual->vector_floats();
    panel.residual_rows = panel_rows(*layouts_.residual, residual_pieces_, panel.vectors);
  } else if (residual) {
    residual += image * weight_.rows * source_.out_height * source_.out_width;
  }
  PanelCall call{weight_.sell, panel, epilogue_, operands.own,
                 operands.own + (weight_.sell.block_cols + 1) * vectors_of(lanes_) * kPanelLanes};
  call.epilogue.residual = residual;
  return call;
}

void PanelTask::run_panel(Panel panel, int64_t begin, Range sections,
                          const Operands& operands) const {
  PanelCall call = call_of(panel, begin, operands);
  if (layouts_.y && sections.begin == 0) write_zeros(begin, panel.vectors, operands.y);
  const float* const x = call.panel.x;
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
      Panel panel = stored_.find({pixels.begin % area, pixels.end - pixels.begin})->second.panel;
      if (i + 1 < panels) panel.next = first_lines(panel_pixels(share.pixels, i + 1), operands.x);
      run_panel(panel, pixels.begin, share.sections, operands);
    }
    return;
  }
  PanelMaker maker(source_, weight_.rows);
  for (int64_t i = 0; i < panels; ++i) {
    const Range pixels = panel_pixels(share.pixels, i);
    Panel panel = maker.make(pixels.begin, pixels.end);
    if (i + 1 < panels) panel.next = first_lines(panel_pixels(share.pixels, i + 1), operands.x);
    run_panel(panel, pixels.begin, share.sections, operands);
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
      stored.stores.assign(made.y_rows.pieces, made.y_rows.pieces + made.y_rows.num_pieces);
      stored.panel = made;
      stored.panel.loads = stored.loads.data();
      stored.panel.extra_loads = stored.extra_loads.data();
      stored.panel.tap_extra = stored.tap_extra.data();
      stored.panel.y_rows.pieces = stored.stores.data();
      stored.panel.residual_rows.pieces = stored.stores.data();
    }
  }
}

}  // namespace sparselt
