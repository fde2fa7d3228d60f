// SPDX-License-Identifier: Apache-2.0
#include <torch/headeronly/util/Exception.h>

#include <algorithm>

#include "ops/conv_problem.h"
#include "ops/partition.h"
#include "ops/run_task.h"

namespace sparselt {
namespace {

WindowAxis as_window(const Axis& axis) {
  return {axis.size, axis.kernel, axis.stride, axis.padding, axis.dilation, axis.out()};
}

// Shares out the channels of all images.
class DepthwiseTask final : public Task {
 public:
  DepthwiseTask(const Team& team, const KernelInfo& kernel, const ConvProblem& problem,
                const float* weight, const Epilogue& epilogue)
      : kernel_(kernel.depthwise),
        call_{nullptr,
              weight,
              problem.channels_out,
              problem.channels_out / problem.channels_in,
              as_window(problem.geometry.h),
              as_window(problem.geometry.w),
              nullptr,
              epilogue},
        planes_(problem.batch * problem.channels_out) {
    // A narrow map costs as much as one that fills the kernel's vectors.
    const int64_t lanes = kernel.tile_columns;
    const int64_t width = (call_.w.out + lanes - 1) / lanes * lanes;
    const int64_t window = call_.h.kernel * call_.w.kernel;
    parts_ = std::min(planes_, team.threads_for(planes_ * call_.h.out * width * window));
  }

  int64_t parts(int64_t) const override { return parts_; }

  void run(int64_t, int64_t part, const Operands& operands) const override {
    DepthwiseCall call = call_;
    call.x = operands.x;
    call.y = operands.y;
    call.epilogue.residual = operands.residual;
    kernel_(call, even_range(planes_, part, parts_));
  }

  bool may_overwrite_residual() const override { return true; }

 private:
  const DepthwiseKernel kernel_;
  const DepthwiseCall call_;
  const int64_t planes_;
  int64_t parts_;
};

}  // namespace

ConvProblem make_depthwise_problem(const Ints& x_shape, const Tensor& weight, const Ints& stride,
                                   const Ints& padding, const Ints& dilation) {
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(1) == 1 && x_shape.size() == 4 && x_shape[1] > 0,
                  "depthwise_conv2d: expected a weight (filters, 1, R, S) and x (B, C, H, W)");
  STD_TORCH_CHECK(weight.size(3) <= kMaxDepthwiseTaps, "weight: expected at most ",
                  kMaxDepthwiseTaps, " columns, got ", weight.size(3));
  Ints meta = shape_of(weight);
  meta.insert(meta.begin(), {1, 1});
  return make_conv_problem(x_shape, meta, stride, padding, dilation, x_shape[1]);
}

TaskPointer make_depthwise_task(const Team& team, const ConvProblem& problem, const float* weight,
                                const Epilogue& epilogue, const std::string& kernel) {
  const KernelInfo& chosen = find_kernel(kernel, "depthwise", 1);
  return std::make_unique<DepthwiseTask>(team, chosen, problem, weight, epilogue);
}

Tensor depthwise_conv2d(Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor residual,
                        Ints stride, Ints padding, Ints dilation, OptionalBound lower,
                        OptionalBound upper, std::string kernel) {
  const ConvProblem problem =
      make_depthwise_problem(shape_of(x), weight, stride, padding, dilation);
  Tensor out = new_output(problem.out_shape());
  const Tensor input = as_float_input(x, "x");
  const Tensor filters = as_float_input(weight, "weight");
  const HeldEpilogue held =
      as_epilogue(bias, residual, lower, upper, problem.channels_out, problem.out_shape());
  const TaskPointer task =
      make_depthwise_task(torch_team(), problem, const_float_data(filters), held.pointers, kernel);
  if (out.numel() == 0) return out;
  run_task(*task, const_float_data(input), held.residual_data(), float_data(out));
  return out;
}

}  // namespace sparselt
