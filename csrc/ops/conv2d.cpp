// SPDX-License-Identifier: Apache-2.0
//
// y (B, C_out, P, Q) = clamp(conv2d(x (B, C_in, H, W), W (C_out, C_in / groups, R, S)) + bias +
// residual), by the way that suits the kernel: conv_planes.cpp, conv_bands.cpp or conv_panels.cpp.
#include "ops/conv_problem.h"
#include "ops/run_task.h"

namespace sparselt {

TaskPointer make_conv_task(const Team& team, const ConvProblem& problem, const Weight& weight,
                           const Epilogue& epilogue) {
  if (weight.kernel->band) return make_conv_bands(team, problem, weight, epilogue);
  const auto make = weight.kernel->panel ? make_conv_panels : make_conv_planes;
  return make(team, problem, weight, epilogue);
}

void conv2d_out(Tensor x, Tensor out, Parts parts, Ints meta, OptionalTensor bias,
                OptionalTensor residual, Ints stride, Ints padding, Ints dilation, int64_t groups,
                OptionalBound lower, OptionalBound upper, std::string kernel) {
  const Weight weight = as_weight(parts, meta, kernel, "conv2d", 4);
  const ConvProblem problem =
      make_conv_problem(shape_of(x), meta, stride, padding, dilation, groups);
  check_output(out, problem.out_shape());
  const Tensor input = as_float_input(x, "x");
  const HeldEpilogue held =
      as_epilogue(bias, residual, lower, upper, problem.channels_out, problem.out_shape());
  if (out.numel() == 0) return;
  const TaskPointer task = make_conv_task(torch_team(), problem, weight, held.pointers);
  run_task(*task, const_float_data(input), held.residual_data(), float_data(out));
}

Tensor conv2d(Tensor x, Parts parts, Ints meta, OptionalTensor bias, OptionalTensor residual,
              Ints stride, Ints padding, Ints dilation, int64_t groups, OptionalBound lower,
              OptionalBound upper, std::string kernel) {
  Tensor out = new_output(
      make_conv_problem(shape_of(x), meta, stride, padding, dilation, groups).out_shape());
  conv2d_out(x, out, std::move(parts), std::move(meta), bias, residual, std::move(stride),
             std::move(padding), std::move(dilation), groups, lower, upper, std::move(kernel));
  return out;
}

}  // namespace sparselt
