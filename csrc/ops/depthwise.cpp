// SPDX-License-Identifier: Apache-2.0
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>

#include "ops/conv_problem.h"
#include "ops/run_task.h"

namespace sparselt {
namespace {

WindowAxis as_window(const Axis& axis) {
  return {axis.size, axis.kernel, axis.stride, axis.padding, axis.dilation, axis.out()};
}

}  // namespace

Tensor depthwise_conv2d(Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor residual,
                        Ints stride, Ints padding, Ints dilation, OptionalBound lower,
                        OptionalBound upper, std::string kernel) {
  const KernelInfo& chosen = find_kernel(kernel, "depthwise", "dense", 1);
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(1) == 1 && x.dim() == 4 && x.size(1) > 0,
                  "depthwise_conv2d: expected a weight (filters, 1, R, S) and x (B, C, H, W)");
  STD_TORCH_CHECK(weight.size(3) <= kMaxDepthwiseTaps, "weight: expected at most ",
                  kMaxDepthwiseTaps, " columns, got ", weight.size(3));
  Ints meta = shape_of(weight);
  meta.insert(meta.begin(), {1, 1});
  const ConvProblem problem =
      make_conv_problem(shape_of(x), meta, stride, padding, dilation, x.size(1));
  Tensor out = new_output(problem.out_shape());
  const Tensor input = as_float_input(x, "x");
  const Tensor filters = as_float_input(weight, "weight");
  const HeldEpilogue held =
      as_epilogue(bias, residual, lower, upper, problem.channels_out, problem.out_shape());
  Epilogue epilogue = held.pointers;
  epilogue.residual = held.residual_data();
  const DepthwiseCall call{const_float_data(input),
                           const_float_data(filters),
                           problem.channels_out,
                           problem.channels_out / problem.channels_in,
                           as_window(problem.geometry.h),
                           as_window(problem.geometry.w),
                           float_data(out),
                           epilogue};
  // A narrow map costs as much as one that fills the kernel's vectors.
  const int64_t width = (call.w.out + chosen.tile_columns - 1) / chosen.tile_columns;
  const int64_t work = std::max<int64_t>(
      1, call.h.out * width * chosen.tile_columns * call.h.kernel * call.w.kernel);
  const int64_t grain = (torch_team().least_work + work - 1) / work;
  torch::stable::parallel_for(
      0, problem.batch * problem.channels_out, grain,
      [&](int64_t begin, int64_t end) { chosen.depthwise(call, {begin, end}); });
  return out;
}

}  // namespace sparselt
