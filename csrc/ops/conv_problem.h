// SPDX-License-Identifier: Apache-2.0
//
// A convolution's checked shapes, and the ways to compute it.
#pragma once

#include "ops/check.h"
#include "ops/conv_geometry.h"
#include "ops/task.h"

namespace sparselt {

// The checked shapes of a call, common to all ways.
struct ConvProblem {
  Geometry geometry;
  int64_t batch, channels_in, channels_out, groups;
  std::vector<int64_t> out_shape() const {
    return {batch, channels_out, geometry.h.out(), geometry.w.out()};
  }
};

// `x_shape` is (B, C_in, H, W), `meta` as in ops.h.
ConvProblem make_conv_problem(const Ints& x_shape, const Ints& meta, const Ints& stride,
                              const Ints& padding, const Ints& dilation, int64_t groups);

// By the way that suits the kernel, one of the following.
TaskPointer make_conv_task(const Team& team, const ConvProblem& problem, const Weight& weight,
                           const Epilogue& epilogue);

// By a conv2d kernel: x is padded and cut into phases, see conv_planes.cpp.
TaskPointer make_conv_planes(const Team& team, const ConvProblem& problem, const Weight& weight,
                             const Epilogue& epilogue);

// By a band kernel: each band of x is padded by itself, see conv_bands.cpp.
TaskPointer make_conv_bands(const Team& team, const ConvProblem& problem, const Weight& weight,
                            const Epilogue& epilogue);

// By a panel kernel, which masks borders itself; the weight keeps groups in sections of their own.
TaskPointer make_conv_panels(const Team& team, const ConvProblem& problem, const Weight& weight,
                             const Epilogue& epilogue);

// Of a dense weight (C * multiplier, 1, R, S); the kernel may be "", as everywhere.
ConvProblem make_depthwise_problem(const Ints& x_shape, const Tensor& weight, const Ints& stride,
                                   const Ints& padding, const Ints& dilation);
TaskPointer make_depthwise_task(const Team& team, const ConvProblem& problem, const float* weight,
                                const Epilogue& epilogue, const std::string& kernel);

}  // namespace sparselt
