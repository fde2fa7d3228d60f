// SPDX-License-Identifier: Apache-2.0
//
// A convolution's checked shapes, and the ways to compute it.
#pragma once

#include "ops/check.h"

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

// The checked shapes of a call, common to all ways.
struct ConvProblem {
  Geometry geometry;
  int64_t batch, channels_in, channels_out, groups;
  std::vector<int64_t> out_shape() const {
    return {batch, channels_out, geometry.h.out(), geometry.w.out()};
  }
};

ConvProblem make_conv_problem(const Tensor& x, const Ints& meta, const Ints& stride,
                              const Ints& padding, const Ints& dilation, int64_t groups);

// By a conv2d kernel: x is padded and cut into phases, see conv_planes.cpp.
void run_conv_planes(const ConvProblem& problem, const Weight& weight, const Tensor& input,
                     const Epilogue& epilogue, float* y);

// By a panel kernel, which masks borders itself; one group only.
void run_conv_panels(const ConvProblem& problem, const Weight& weight, const Tensor& input,
                     const Epilogue& epilogue, float* y);

}  // namespace sparselt
