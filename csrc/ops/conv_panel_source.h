// SPDX-License-Identifier: Apache-2.0
//
// A convolution as a source of panels: where each tap finds its x, and the cut into phases that a
// stride along the width asks for. Knows no torch.
#pragma once

#include <algorithm>
#include <vector>

#include "ops/conv_geometry.h"
#include "ops/panel_maker.h"

namespace sparselt {

// Floor division and its remainder, for a place that may lie before x.
inline int64_t floor_quotient(int64_t a, int64_t b) { return (a - (a % b + b) % b) / b; }
inline int64_t floor_remainder(int64_t a, int64_t b) { return (a % b + b) % b; }

// An axis of x in phases: element j of phase i is element i + j * phases of x, zero where x ends
// earlier. One phase is x as it is.
struct PhasedAxis {
  PhasedAxis(const Axis& of_x, bool is_cut)
      : axis(of_x),
        phases(is_cut ? of_x.stride : 1),
        length((of_x.size + phases - 1) / phases),
        step(of_x.stride / phases) {}

  int64_t place(int64_t tap) const { return tap * axis.dilation - axis.padding; }
  int64_t phase(int64_t tap) const { return floor_remainder(place(tap), phases); }
  int64_t shift(int64_t tap) const { return floor_quotient(place(tap), phases); }
  // How many elements of a phase x has.
  int64_t whole(int64_t phase) const {
    return phase < axis.size ? (axis.size - phase + phases - 1) / phases : 0;
  }
  bool sticks_out(int64_t tap) const {
    return shift(tap) < 0 || shift(tap) + (axis.out() - 1) * step >= length;
  }

  Axis axis;
  int64_t phases;
  int64_t length;  // of a phase
  int64_t step;    // elements of a phase from one output to the next
};

// The cut of a channel (H, W) into (stride_h, stride_w, phase rows, phase columns). Where padding
// keeps the size, a phase is as wide as the output, so all pixels that a tap meets lie in one
// piece. What no tap meets is left as it is.
class ChannelCut {
 public:
  explicit ChannelCut(const Geometry& g) : h_(g.h, true), w_(g.w, true) {
    std::vector<bool> rows(static_cast<size_t>(h_.phases * h_.length), false);
    for (int64_t r = 0; r < g.h.kernel; ++r) {
      const int64_t first = std::max<int64_t>(h_.shift(r), 0);
      const int64_t last = std::min(h_.shift(r) + g.h.out(), h_.length);
      for (int64_t row = first; row < last; ++row) {
        rows[static_cast<size_t>(h_.phase(r) * h_.length + row)] = true;
      }
    }
    std::vector<bool> phases(static_cast<size_t>(w_.phases), false);
    for (int64_t s = 0; s < g.w.kernel; ++s) phases[static_cast<size_t>(w_.phase(s))] = true;
    for (int64_t i = 0; i < h_.phases * h_.length; ++i) {
      const int64_t phase = i / h_.length;
      const int64_t row = i % h_.length;
      for (int64_t column = 0; rows[static_cast<size_t>(i)] && column < w_.phases; ++column) {
        if (!phases[static_cast<size_t>(column)]) continue;
        const int64_t whole = row < h_.whole(phase) ? w_.whole(column) : 0;
        rows_.push_back({(phase + row * h_.phases) * g.w.size + column,
                         ((phase * w_.phases + column) * h_.length + row) * w_.length, whole});
      }
    }
  }

  int64_t floats() const { return h_.phases * w_.phases * h_.length * w_.length; }

  void run(const float* x, float* cut) const {
    for (const Row& row : rows_) {
      const float* from = x + row.from;
      float* to = cut + row.to;
      if (w_.phases == 2) {  // a constant stride is what compilers turn into shuffles
        for (int64_t j = 0; j < row.whole; ++j) to[j] = from[2 * j];
      } else {
        for (int64_t j = 0; j < row.whole; ++j) to[j] = from[j * w_.phases];
      }
      for (int64_t j = row.whole; j < w_.length; ++j) to[j] = 0.0f;
    }
  }

 private:
  // `whole` elements from `from` on, stride_w apart, to w_.length of `to`.
  struct Row {
    int64_t from;
    int64_t to;
    int64_t whole;
  };

  const PhasedAxis h_;
  const PhasedAxis w_;
  std::vector<Row> rows_;
};

// For x of (batch, channels, H, W); with a stride along the width, of channels that ChannelCut cut.
inline PanelSource conv_panel_source(const Geometry& g, int64_t batch, int64_t channels,
                                     int64_t groups = 1) {
  const PhasedAxis h(g.h, g.w.stride > 1);
  const PhasedAxis w(g.w, g.w.stride > 1);
  const int64_t phase_floats = h.length * w.length;
  const int64_t plane = h.phases * w.phases * phase_floats;
  PanelSource source{batch,     channels * plane, plane,    h.step * w.length, g.h.out(),
                     g.w.out(), h.step,           h.length, w.length,          false,
                     {}};
  source.groups = groups;
  source.group_stride = channels / groups * plane;
  for (int64_t r = 0; r < g.h.kernel; ++r) {
    for (int64_t s = 0; s < g.w.kernel; ++s) {
      const int64_t phase = h.phase(r) * w.phases + w.phase(s);
      const int64_t offset = phase * phase_floats + h.shift(r) * w.length + w.shift(s);
      source.taps.push_back(
          {offset, static_cast<int32_t>(h.shift(r)), static_cast<int32_t>(w.shift(s))});
      source.bordered = source.bordered || h.sticks_out(r) || w.sticks_out(s);
    }
  }
  return source;
}

}  // namespace sparselt
