// SPDX-License-Identifier: Apache-2.0
//
// Convolution by a band kernel. The output is cut into bands of lines whose input fits the L1 cache
// where it can; what a band meets of x is copied into the running thread's scratch, padded with
// zeros and cut into stride_h x stride_w phases, so that every tap is a shifted plane (kernels.h).
// Lines of the copy begin at a cache line. Copying is part of the band: no stage of its own, no
// scratch that another thread reads. Where nothing is padded or cut, x is used as it is.
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <limits>

#include "ops/conv_problem.h"
#include "ops/partition.h"

namespace sparselt {
namespace {

constexpr int64_t kBandFloats = 12 << 10;  // of all channels: 48 KB
constexpr int64_t kLeastLines = 8;         // which share the lines above and below them

int64_t rounded_up(int64_t floats) { return whole_lines(floats); }

// The copy of a channel for some lines of the output.
class BandLayout {
 public:
  BandLayout(const Geometry& g, int64_t lines)
      : w_(g.w),
        stride_(g.h.stride),
        lines_((lines - 1) * g.h.stride + g.h.dilation * (g.h.kernel - 1) + 1),
        phase_lines_((lines_ + stride_ - 1) / stride_),
        shared_(g.shared_halo()),
        front_(shared_ ? rounded_up(g.w.padding) - g.w.padding : 0),
        pitch_(rounded_up(g.pitch())) {}

  int64_t lines() const { return lines_; }
  int64_t pitch() const { return pitch_; }
  int64_t phase_floats() const { return phase_lines_ * pitch_; }
  int64_t channel_floats() const {
    return rounded_up(front_ + stride_ * w_.stride * phase_floats() + (shared_ ? w_.padding : 0));
  }
  std::vector<int32_t> column_offsets(const Geometry& g, int64_t channels) const {
    std::vector<int32_t> offsets;
    for (int64_t channel = 0; channel < channels; ++channel) {
      for (int64_t r = 0; r < g.h.kernel; ++r) {
        for (int64_t s = 0; s < g.w.kernel; ++s) {
          const int64_t phase = g.h.phase(r) * g.w.stride + g.w.phase(s);
          offsets.push_back(static_cast<int32_t>(channel * channel_floats() + front_ +
                                                 phase * phase_floats() + g.h.shift(r) * pitch_ +
                                                 g.w.shift(s)));
        }
      }
    }
    return offsets;
  }

  // Where the first line of a band begins that is not cut.
  int64_t first_pixel() const { return front_ + w_.padding; }

  // Cuts line `line` of the band, from a line of x or zeros, into its phases; what lies beside them
  // is zero already.
  void cut_line(const float* from, int64_t line, float* channel) const {
    float* to =
        channel + front_ + line % stride_ * w_.stride * phase_floats() + line / stride_ * pitch_;
    for (int64_t i = 0; i < w_.size; ++i) {
      const int64_t place = i + w_.padding;
      to[place % w_.stride * phase_floats() + place / w_.stride] = from ? from[i] : 0.0f;
    }
  }

 private:
  const Axis w_;
  const int64_t stride_;
  const int64_t lines_;  // of padded x that the band meets
  const int64_t phase_lines_;
  const bool shared_;
  const int64_t front_;
  const int64_t pitch_;
};

// As many as fit the cache, of about the same number in each band.
int64_t band_lines(const Geometry& g, int64_t channels) {
  int64_t lines = g.h.out();
  while (lines > kLeastLines && channels * BandLayout(g, lines).channel_floats() > kBandFloats) {
    lines = std::max(kLeastLines, lines / 2);
  }
  return lines;
}

class ConvBandTask final : public Task {
 public:
  ConvBandTask(const Team& team, const ConvProblem& problem, const Weight& weight,
               const Epilogue& epilogue)
      : problem_(problem),
        weight_(weight),
        epilogue_(epilogue),
        channels_(problem.channels_in / problem.groups),
        lines_(band_lines(problem.geometry, channels_)),
        bands_((problem.geometry.h.out() + lines_ - 1) / lines_),
        layout_(problem.geometry, lines_),
        offsets_(in_place() ? column_offsets(problem.geometry, channels_)
                            : layout_.column_offsets(problem.geometry, channels_)) {
    const int64_t pixels = problem.geometry.h.out() * problem.geometry.w.out();
    const int64_t threads = team.threads_for(stored_values(weight.view) * pixels * problem.batch);
    units_ = problem.batch * problem.groups * bands_;
    // Each thread that has some rows of a band copies all of it.
    row_shares_ = units_ < threads ? threads : 1;
    parts_ = row_shares_ > 1 ? units_ * row_shares_ : std::min(units_, threads);
  }

  int64_t parts(int64_t) const override { return parts_; }
  int64_t own_floats() const override {
    return in_place() ? 0 : channels_ * layout_.channel_floats();
  }
  bool may_overwrite_residual() const override { return true; }

  void run(int64_t, int64_t part, const Operands& operands) const override {
    const Range units = even_range(units_, part / row_shares_, parts_ / row_shares_);
    if (!in_place()) {
      std::memset(operands.own, 0, sizeof(float) * static_cast<size_t>(own_floats()));
    }
    for (int64_t unit = units.begin; unit < units.end; ++unit) {
      run_band(unit / bands_, unit % bands_, part % row_shares_, operands);
    }
  }

 private:
  bool in_place() const { return problem_.geometry.in_place(); }
  bool is_cut() const { return problem_.geometry.h.stride > 1 || problem_.geometry.w.stride > 1; }

  // `item` is an image and a group.
  void run_band(int64_t item, int64_t band, int64_t row_share, const Operands& operands) const {
    const Geometry& g = problem_.geometry;
    const int64_t first = band * lines_;
    const int64_t count = std::min(lines_, g.h.out() - first);
    const int64_t group_rows = problem_.channels_out / problem_.groups;
    const int64_t group = item % problem_.groups;
    const Range rows = balanced_rows(weight_.view, {group * group_rows, (group + 1) * group_rows},
                                     row_share, row_shares_);
    const int64_t out_plane = g.h.out() * g.w.out();
    const int64_t y =
        item / problem_.groups * problem_.channels_out * out_plane + first * g.w.out();
    const float* x = operands.x + item * channels_ * g.h.size * g.w.size;
    BandCall call{{},
                  {weight_.view, x + first * g.w.size, offsets_.data(), g.w.size, g.w.out(),
                   operands.y + y, out_plane, epilogue_}};
    if (operands.residual) call.product.epilogue.residual = operands.residual + y;
    if (!in_place()) {
      call.product.x = operands.own;
      call.product.pitch = layout_.pitch();
      if (is_cut()) {
        cut(x, first, operands.own);
      } else {
        call.copy = {x,
                     g.h.size * g.w.size,
                     first - g.h.padding,
                     g.h.size,
                     g.w.size,
                     operands.own + layout_.first_pixel(),
                     layout_.channel_floats(),
                     layout_.pitch(),
                     channels_,
                     layout_.lines()};
      }
    }
    weight_.kernel->band(call, rows, {0, count});
  }

  // The lines of all channels of a group that the lines of y from `first` on meet.
  void cut(const float* x, int64_t first, float* to) const {
    const Axis& h = problem_.geometry.h;
    const int64_t width = problem_.geometry.w.size;
    const int64_t top = first * h.stride - h.padding;
    for (int64_t c = 0; c < channels_; ++c) {
      for (int64_t i = 0; i < layout_.lines(); ++i) {
        const int64_t line = top + i;
        const bool inside = line >= 0 && line < h.size;
        layout_.cut_line(inside ? x + (c * h.size + line) * width : nullptr, i,
                         to + c * layout_.channel_floats());
      }
    }
  }

  const ConvProblem problem_;
  const Weight weight_;
  const Epilogue epilogue_;
  const int64_t channels_;  // of a group
  const int64_t lines_;     // of the output, in a band
  const int64_t bands_;
  const BandLayout layout_;
  const std::vector<int32_t> offsets_;
  int64_t units_;
  int64_t row_shares_;
  int64_t parts_;
};

}  // namespace

TaskPointer make_conv_bands(const Team& team, const ConvProblem& problem, const Weight& weight,
                            const Epilogue& epilogue) {
  const Geometry& g = problem.geometry;
  const int64_t channels = problem.channels_in / problem.groups;
  const int64_t floats =
      std::max(g.h.size * g.w.size, BandLayout(g, band_lines(g, channels)).channel_floats());
  STD_TORCH_CHECK(channels * floats <= std::numeric_limits<int32_t>::max(),
                  "x: the channels of a group hold more than 2^31 floats; split the image");
  return std::make_unique<ConvBandTask>(team, problem, weight, epilogue);
}

}  // namespace sparselt
