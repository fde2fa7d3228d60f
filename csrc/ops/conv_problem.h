// SPDX-License-Identifier: Apache-2.0
//
// A convolution's checked shapes, and the ways to compute it.
#pragma once

#include "ops/check.h"
#include "ops/conv_geometry.h"

namespace sparselt {

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
