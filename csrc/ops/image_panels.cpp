// SPDX-License-Identifier: Apache-2.0
#include "ops/image_panels.h"

#include <torch/headeronly/util/Exception.h>

#include <limits>
#include <vector>

#include "ops/panel_maker.h"

namespace sparselt {
namespace {

// Vectors that a thread must have for pixels to be shared out rather than rows.
constexpr int64_t kWorthSharing = 4;
// Cache lines of x to bring ahead of a panel: half of a small second-level cache.
constexpr int64_t kMostAhead = 4096;
constexpr int64_t kMaxPlace = std::numeric_limits<uint16_t>::max();

// Where a column of the weight finds its x: rows of 16 floats from the vector of the first filter
// position on.
class ColumnPlaces {
 public:
  ColumnPlaces(const Geometry& g, const ImageLayout& x) {
    const int64_t rows = x.channels + 1;
    for (int64_t r = 0; r < g.h.kernel; ++r) {
      for (int64_t s = 0; s < g.w.kernel; ++s) {
        taps_.push_back((r * g.h.dilation * x.pitch() + s * g.w.dilation) * rows);
      }
    }
    zeros_ = taps_.back() + x.channels;
  }
  int64_t of(int64_t column) const {
    const auto taps = static_cast<int64_t>(taps_.size());
    return taps_[static_cast<size_t>(column % taps)] + column / taps;
  }
  // The row of zeros of the last filter position, beyond which no column lies.
  int64_t zeros() const { return zeros_; }

 private:
  std::vector<int64_t> taps_;
  int64_t zeros_ = 0;
};

class ImagePanelTask final : public ImageTask {
 public:
  ImagePanelTask(const Team& team, const ConvProblem& problem, const Weight& weight,
                 const Epilogue& epilogue)
      : weight_(weight),
        epilogue_(epilogue),
        geometry_(problem.geometry),
        x_{problem.batch,    problem.channels_in, geometry_.h.size,
           geometry_.w.size, geometry_.h.padding, geometry_.w.padding},
        y_{problem.batch, weight.rows, geometry_.h.out(), geometry_.w.out()},
        most_(weight.kernel->tile_columns / kPanelLanes),
        parts_(team.threads_for(stored_values(weight.sell) * y_.pixels() * kPanelLanes)) {}

  int64_t parts(int64_t) const override { return parts_; }
  int64_t own_floats() const override { return weight_.rows * most_ * kPanelLanes; }
  bool may_overwrite_residual() const override { return residual_ && *residual_ == y_; }
  std::optional<ImageLayout> own_map() const override { return x_; }
  bool accept(const ImageLayout& x) override { return x.same_map(x_); }
  ImageLayout y_map() const override { return y_; }
  bool can_read(const ImageLayout& x) const override {
    return ColumnPlaces(geometry_, x).zeros() <= kMaxPlace;
  }
  void lay_out_maps(const ImageLayout& x, const std::optional<ImageLayout>& residual,
                    const ImageLayout& y) override {
    x_ = x;
    y_ = y;
    residual_ = residual;
    check_offsets(y);
    if (residual) check_offsets(*residual);
    place_columns();
    if (weight_.kernel->op == "code") {
      code_ = std::make_shared<const jit::PanelCode>(placed_);
      placed_.code = code_->view();
    }
  }

  void run(int64_t, int64_t part, const Operands& operands) const override {
    write_zeros(y_, part, parts_, operands.y);
    const int64_t sections = placed_.num_sections;
    Range pixels{0, y_.pixels()};
    Range own_sections{0, sections};
    if (y_.pixels() >= parts_ * kWorthSharing || sections < parts_) {
      pixels = even_range(y_.pixels(), part, parts_);
    } else {
      own_sections = even_range(sections, part, parts_);
    }
    const int64_t count = pixels.end - pixels.begin;
    const int64_t panels = (count + most_ - 1) / most_;
    for (int64_t i = 0; i < panels; ++i) {
      const Range share = even_range(count, i, panels);
      const Range next = i + 1 < panels ? even_range(count, i + 1, panels) : Range{};
      const Lines ahead = new_lines(moved(next, pixels.begin), operands.x);
      run_panel(moved(share, pixels.begin), own_sections, operands, ahead);
    }
  }

 private:
  // Pieces count from the first vector of a panel, which may reach into a few groups of images.
  void check_offsets(const ImageLayout& map) const {
    const int64_t groups = kMaxPanelVectors / map.area() + 2;
    STD_TORCH_CHECK(groups * map.lines() * map.pitch() <
                        std::numeric_limits<int32_t>::max() / map.vector_floats(),
                    "x: images of this size need more than 32-bit offsets; split them");
  }

  // The weight with places instead of columns, so that kernels read x where it lies.
  void place_columns() {
    const SellView& w = weight_.sell;
    const ColumnPlaces places(geometry_, x_);
    const int64_t a_step = w.shared_columns ? 1 : w.slice_height;
    const int64_t slices = w.block_slices[w.num_sections * w.num_blocks];
    columns_.resize(static_cast<size_t>(a_step * w.slice_steps[slices]));
    for (int64_t i = 0; i < w.num_sections * w.num_blocks; ++i) {
      const int64_t first_column = i % w.num_blocks * w.block_cols;
      const int64_t last = a_step * w.slice_steps[w.block_slices[i + 1]];
      for (int64_t at = a_step * w.slice_steps[w.block_slices[i]]; at < last; ++at) {
        const int64_t column = w.columns[at];
        const int64_t place =
            column == w.block_cols ? places.zeros() : places.of(first_column + column);
        columns_[static_cast<size_t>(at)] = static_cast<uint16_t>(place);
      }
    }
    placed_ = w;
    placed_.columns = columns_.data();
    placed_.block_cols = places.zeros();
    placed_.code = {};
  }

  static Range moved(Range range, int64_t by) { return {range.begin + by, range.end + by}; }

  // What the panel of some pixels reads of x that the one before did not.
  Lines new_lines(Range pixels, const float* x) const {
    if (pixels.begin == pixels.end) return {};
    const Pixel at = Pixel::of(y_, pixels.begin);
    const Axis& w = geometry_.w;
    const Axis& h = geometry_.h;
    const int64_t read = (w.kernel - 1) * w.dilation - w.padding;  // beyond a pixel's first vector
    const bool in_line = at.column > 0;
    const int64_t first = in_line ? (at.column - 1) * w.stride + read + 1 : -w.padding;
    const int64_t last = (at.column + pixels.end - pixels.begin - 1) * w.stride + read;
    const int64_t lines = std::max<int64_t>(0, last + 1 - first) * (x_.channels + 1);
    const int64_t rows = std::min(h.kernel, kMostAhead / std::max<int64_t>(1, lines));
    return {x + x_.place(at.group, at.line * h.stride - h.padding, first),
            h.dilation * x_.pitch() * x_.vector_floats(), rows, lines};
  }

  void run_panel(Range pixels, Range sections, const Operands& operands, const Lines& next) const {
    int64_t x_places[kMaxPanelVectors];
    Piece y_pieces[kMaxPanelVectors];
    Piece residual_pieces[kMaxPanelVectors];
    int64_t x_begin = 0;
    int64_t y_begin = 0;
    int64_t residual_begin = 0;
    int v = 0;
    visit_pixels(y_, pixels, [&](const Pixel& at) {
      const int64_t x = x_.place(at.group, at.line * geometry_.h.stride - geometry_.h.padding,
                                 at.column * geometry_.w.stride - geometry_.w.padding);
      const int64_t y = y_.place(at.group, at.line, at.column);
      const int64_t residual = residual_ ? residual_->place(at.group, at.line, at.column) : 0;
      if (v == 0) {
        x_begin = x;
        y_begin = y;
        residual_begin = residual;
      }
      x_places[v] = x - x_begin;
      y_pieces[v] = whole_piece(y - y_begin, v);
      residual_pieces[v] = whole_piece(residual - residual_begin, v);
      ++v;
    });
    Panel panel{};
    panel.x = operands.x + x_begin;
    panel.taps = 1;
    panel.vectors = v;
    panel.x_places = x_places;
    panel.next = next;
    panel.y = operands.y + y_begin;
    panel.y_rows = {kPanelLanes, kNoPeriod, y_pieces, v};
    panel.residual_rows = {kPanelLanes, kNoPeriod, residual_pieces, v};
    PanelCall call{placed_, panel, epilogue_, nullptr, operands.own};
    if (operands.residual) call.epilogue.residual = operands.residual + residual_begin;
    weight_.kernel->panel(call, sections);
  }

  static Piece whole_piece(int64_t offset, int vector) {
    return {static_cast<int32_t>(offset), static_cast<uint16_t>(vector),
            static_cast<uint16_t>(kAllLanes)};
  }

  const Weight weight_;
  const Epilogue epilogue_;
  const Geometry geometry_;
  ImageLayout x_;
  ImageLayout y_;
  std::optional<ImageLayout> residual_;
  const int64_t most_;  // vectors of a panel
  const int64_t parts_;
  std::vector<uint16_t> columns_;
  SellView placed_{};
  std::shared_ptr<const jit::PanelCode> code_;
};

}  // namespace

ImageTaskPointer make_image_panels(const Team& team, const ConvProblem& problem,
                                   const Weight& weight, const Epilogue& epilogue) {
  if (!weight.kernel->panel || problem.groups > 1 || problem.batch == 0 || weight.rows == 0) {
    return nullptr;
  }
  auto task = std::make_unique<ImagePanelTask>(team, problem, weight, epilogue);
  if (!task->can_read(*task->own_map())) return nullptr;
  return task;
}

}  // namespace sparselt
