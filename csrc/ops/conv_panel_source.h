// SPDX-License-Identifier: Apache-2.0
//
// A convolution as a source of panels: where each tap finds its x, and the cut into phases that a
// stride along the width asks for. Knows no torch.
#pragma once

#include "ops/conv_geometry.h"
#include "ops/panel_maker.h"

namespace sparselt {

// Floor division and its remainder, for a column that may lie left of x.
inline int64_t floor_quotient(int64_t a, int64_t b) { return (a - (a % b + b) % b) / b; }
inline int64_t floor_remainder(int64_t a, int64_t b) { return (a % b + b) % b; }

inline int64_t phase_columns(const Axis& w) { return (w.size + w.stride - 1) / w.stride; }

// One phase of a row; a phase that ends early is filled up with a zero.
inline void cut_row(const Axis& w, int64_t phase, const float* from, float* to) {
  const int64_t whole = phase < w.size ? (w.size - phase + w.stride - 1) / w.stride : 0;
  if (w.stride == 2) {  // a constant stride is what compilers can turn into shuffles
    for (int64_t j = 0; j < whole; ++j) to[j] = from[2 * j + phase];
  } else {
    for (int64_t j = 0; j < whole; ++j) to[j] = from[j * w.stride + phase];
  }
  for (int64_t j = whole; j < phase_columns(w); ++j) to[j] = 0.0f;
}

// For x of (batch, channels, H, W), with a stride along the width cut into (batch, channels,
// stride_w, H, phase_columns).
inline PanelSource conv_panel_source(const Geometry& g, int64_t batch, int64_t channels) {
  const Axis& h = g.h;
  const Axis& w = g.w;
  const int64_t pitch = phase_columns(w);  // W itself where stride_w is 1
  const int64_t plane = w.stride * h.size * pitch;
  PanelSource source{batch,    channels * plane,
                     plane,    h.stride * pitch,
                     h.out(),  w.out(),
                     h.stride, h.size,
                     pitch,    false,
                     {}};
  for (int64_t r = 0; r < h.kernel; ++r) {
    for (int64_t s = 0; s < w.kernel; ++s) {
      const int64_t row = r * h.dilation - h.padding;
      const int64_t column = s * w.dilation - w.padding;
      const int64_t phase = floor_remainder(column, w.stride);
      const int64_t shift = floor_quotient(column, w.stride);
      source.taps.push_back({(phase * h.size + row) * pitch + shift, static_cast<int32_t>(row),
                             static_cast<int32_t>(shift)});
      source.bordered = source.bordered || row < 0 || shift < 0 ||
                        row + (h.out() - 1) * h.stride >= h.size || shift + w.out() > pitch;
    }
  }
  return source;
}

}  // namespace sparselt
