// SPDX-License-Identifier: Apache-2.0
#include "program/layers.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <functional>
#include <numeric>

#include "ops/check.h"
#include "ops/conv_problem.h"
#include "ops/image_panels.h"
#include "ops/spmm.h"
#include "program/program.h"

namespace sparselt {
namespace {

StepValues as_step(const Ints& values) {
  STD_TORCH_CHECK(values.size() == 3, "values: expected x, residual and y, got ", values.size());
  return {values[0], values[1], values[2]};
}

// The tensors that tasks point into.
Parts held_by(Parts parts, const HeldEpilogue& epilogue) {
  if (epilogue.bias) parts.push_back(*epilogue.bias);
  return parts;
}

Tensor from_floats(float* data, const Ints& shape) {
  Ints strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * shape[i];
  return torch::stable::from_blob(data, {shape.data(), shape.size()},
                                  {strides.data(), strides.size()},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                  torch::headeronly::ScalarType::Float);
}

template <size_t kCount>
Tensor call(const char* name, std::array<StableIValue, kCount> stack) {
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  const Tensor result = torch::stable::detail::to<Tensor>(stack[0]);
  return result.is_contiguous() ? result : torch::stable::contiguous(result);
}

// Torch's linear where there is no stride, a convolution otherwise.
class DenseCall final : public TorchCall {
 public:
  DenseCall(Ints x_shape, Tensor weight, OptionalTensor bias, Ints stride, Ints padding,
            Ints dilation, int64_t groups, OptionalTensor packed)
      : x_shape_(std::move(x_shape)),
        weight_(std::move(weight)),
        bias_(std::move(bias)),
        stride_(std::move(stride)),
        padding_(std::move(padding)),
        dilation_(std::move(dilation)),
        output_padding_(stride_.size(), 0),
        groups_(groups),
        packed_(std::move(packed)),
        rows_(std::accumulate(x_shape_.begin(), x_shape_.end() - 1, int64_t{1},
                              std::multiplies<int64_t>())) {}

  Tensor run(float* x) const override {
    using torch::stable::detail::from;
    const Tensor input = from_floats(x, x_shape_);
    if (packed_) {
      return call<5>("mkl::_mkl_linear",
                     {from(input), from(*packed_), from(weight_), from(bias_), from(rows_)});
    }
    if (stride_.empty()) {
      return call<3>("aten::linear", {from(input), from(weight_), from(bias_)});
    }
    return call<9>("aten::convolution",
                   {from(input), from(weight_), from(bias_), from(stride_), from(padding_),
                    from(dilation_), from(false), from(output_padding_), from(groups_)});
  }

 private:
  const Ints x_shape_;
  const Tensor weight_;
  const OptionalTensor bias_;
  const Ints stride_;
  const Ints padding_;
  const Ints dilation_;
  const Ints output_padding_;
  const int64_t groups_;
  const OptionalTensor packed_;
  const int64_t rows_;
};

}  // namespace

void program_linear(int64_t program, Ints values, int64_t batch, Parts parts, Ints meta,
                    OptionalTensor bias, OptionalBound lower, OptionalBound upper,
                    std::string kernel) {
  Program& target = Program::of_handle(program);
  const Team team = target.team();
  const auto weight = [=](bool with_code) {
    return as_weight(parts, meta, kernel, "spmm", 2, with_code);
  };
  const Weight bare = weight(false);
  const HeldEpilogue held = as_epilogue(bias, {}, lower, upper, bare.rows, {});
  target.keep(held_by(parts, held));
  const Epilogue end = held.pointers;
  ImageTaskPointer images;
  if (target.images_innermost()) {
    const Axis pixel{1, 1, 1, 0, 1};
    images = make_image_panels(team, {{pixel, pixel}, batch, bare.cols, bare.rows, 1}, bare, end);
  }
  target.add_layer([=] { return make_linear_task(team, weight(true), batch, end); },
                   as_step(values), std::move(images));
}

void program_conv2d(int64_t program, Ints values, Ints x_shape, Parts parts, Ints meta,
                    OptionalTensor bias, Ints stride, Ints padding, Ints dilation, int64_t groups,
                    OptionalBound lower, OptionalBound upper, std::string kernel) {
  Program& target = Program::of_handle(program);
  const Team team = target.team();
  const auto weight = [=](bool with_code) {
    return as_weight(parts, meta, kernel, "conv2d", 4, with_code);
  };
  const Weight bare = weight(false);
  const ConvProblem problem = make_conv_problem(x_shape, meta, stride, padding, dilation, groups);
  const HeldEpilogue held = as_epilogue(bias, {}, lower, upper, bare.rows, {});
  target.keep(held_by(parts, held));
  const Epilogue end = held.pointers;
  ImageTaskPointer images;
  if (target.images_innermost()) images = make_image_panels(team, problem, bare, end);
  target.add_layer([=] { return make_conv_task(team, problem, weight(true), end); },
                   as_step(values), std::move(images));
}

void program_dense(int64_t program, Ints values, Ints x_shape, Tensor weight, OptionalTensor bias,
                   Ints stride, Ints padding, Ints dilation, int64_t groups,
                   OptionalTensor packed) {
  Program::of_handle(program).add_torch(
      std::make_unique<DenseCall>(std::move(x_shape), std::move(weight), std::move(bias),
                                  std::move(stride), std::move(padding), std::move(dilation),
                                  groups, std::move(packed)),
      as_step(values));
}

void program_depthwise(int64_t program, Ints values, Ints x_shape, Tensor weight,
                       OptionalTensor bias, Ints stride, Ints padding, Ints dilation,
                       OptionalBound lower, OptionalBound upper, std::string kernel) {
  Program& target = Program::of_handle(program);
  const Tensor filters = as_float_input(weight, "weight");
  const ConvProblem problem = make_depthwise_problem(x_shape, filters, stride, padding, dilation);
  const HeldEpilogue held = as_epilogue(bias, {}, lower, upper, problem.channels_out, {});
  target.add_task(
      make_depthwise_task(target.team(), problem, const_float_data(filters), held.pointers, kernel),
      as_step(values));
  target.keep(held_by({filters}, held));
}

}  // namespace sparselt
