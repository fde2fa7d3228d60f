// SPDX-License-Identifier: Apache-2.0
//
// The arithmetic of a convolution by shifted planes (kernels.h), and how a channel of x becomes
// such planes. Knows no torch.
#pragma once

#include <stdint.h>

#include <cstring>
#include <vector>

namespace sparselt {

// One direction of a convolution.
struct Axis {
  int64_t size;  // of x
  int64_t kernel;
  int64_t stride;
  int64_t padding;
  int64_t dilation;
  int64_t out() const { return (size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1; }
  int64_t padded() const { return size + 2 * padding; }
  int64_t phase_size() const { return (padded() + stride - 1) / stride; }
  int64_t phase(int64_t tap) const { return tap * dilation % stride; }
  int64_t shift(int64_t tap) const { return tap * dilation / stride; }
};

struct Geometry {
  Axis h;
  Axis w;
  bool in_place() const {
    return h.stride == 1 && w.stride == 1 && h.padding == 0 && w.padding == 0;
  }
  // Sharing needs every output row to fit the shortened pitch: a 1 x 1 kernel with padding has more
  // outputs than that.
  bool shared_halo() const { return w.stride == 1 && w.out() <= w.size + w.padding; }
  int64_t pitch() const { return shared_halo() ? w.size + w.padding : w.phase_size(); }
  int64_t phase_area() const { return h.phase_size() * pitch(); }
  // Floats of all phases of a channel, plus the last row's right halo where halos are shared.
  int64_t plane() const {
    return h.stride * w.stride * phase_area() + (shared_halo() ? w.padding : 0);
  }
  int64_t tap_offset(int64_t r, int64_t s) const {
    return (h.phase(r) * w.stride + w.phase(s)) * phase_area() + h.shift(r) * pitch() + w.shift(s);
  }
  // Flat pixels up to the last output.
  int64_t flat_pixels() const { return (h.out() - 1) * pitch() + w.out(); }
};

// One channel of x, padded and cut into phases.
inline void lay_out_plane(const Geometry& g, const float* x, float* plane) {
  std::memset(plane, 0, sizeof(float) * static_cast<size_t>(g.plane()));
  for (int64_t row = 0; row < g.h.size; ++row) {
    const int64_t h = row + g.h.padding;
    const float* from = x + row * g.w.size;
    float* to = plane + h % g.h.stride * g.w.stride * g.phase_area() + h / g.h.stride * g.pitch();
    if (g.w.stride == 1) {
      std::memcpy(to + g.w.padding, from, sizeof(float) * static_cast<size_t>(g.w.size));
      continue;
    }
    for (int64_t column = 0; column < g.w.size; ++column) {
      const int64_t w = column + g.w.padding;
      to[w % g.w.stride * g.phase_area() + w / g.w.stride] = from[column];
    }
  }
}

// Where each column of the weight, (channel, r, s) in order, starts in the planes of its group. The
// planes must hold fewer than 2^31 floats.
inline std::vector<int32_t> column_offsets(const Geometry& g, int64_t channels) {
  std::vector<int32_t> offsets;
  offsets.reserve(static_cast<size_t>(channels * g.h.kernel * g.w.kernel));
  for (int64_t channel = 0; channel < channels; ++channel) {
    for (int64_t r = 0; r < g.h.kernel; ++r) {
      for (int64_t s = 0; s < g.w.kernel; ++s) {
        offsets.push_back(static_cast<int32_t>(channel * g.plane() + g.tap_offset(r, s)));
      }
    }
  }
  return offsets;
}

}  // namespace sparselt
