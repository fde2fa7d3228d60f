// SPDX-License-Identifier: Apache-2.0
#include "cuda/ops.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/Exception.h>

#include "cuda/check.h"
#include "cuda/split_plan.h"

namespace sparselt::cuda {
namespace {

using torch::stable::accelerator::DeviceGuard;

int64_t out_size(const char* name, int64_t size, int64_t kernel, int64_t stride, int64_t padding,
                 int64_t dilation) {
  STD_TORCH_CHECK(stride > 0 && dilation > 0 && padding >= 0, name,
                  ": expected stride > 0, dilation > 0 and padding >= 0");
  const int64_t reach = dilation * (kernel - 1) + 1;
  STD_TORCH_CHECK(kernel > 0 && size + 2 * padding >= reach, name, ": the padded input (",
                  size + 2 * padding, ") is smaller than the kernel's reach (", reach, ")");
  return (size + 2 * padding - reach) / stride + 1;
}

// The call with the workspace that its kernel can use, and its launch.
template <class Call, class Launcher>
void run(const Input& input, const KernelInfo& kernel, Launcher launcher, Call call) {
  const size_t element = kernel.dtype == "float32" ? 4 : 2;
  const Workspace workspace = new_workspace(input, workspace_floats(kernel.format, call, element));
  call.workspace = workspace.floats;
  const DeviceGuard guard(input.device);
  check_launch(kernel, launcher(call, current_stream(input)));
}

}  // namespace

Tensor spmm(Tensor x, Parts parts, Ints meta, OptionalTensor bias, OptionalTensor residual,
            OptionalBound lower, OptionalBound upper, std::string kernel) {
  const Input input = as_input(x);
  const CheckedWeight checked = as_weight(input, parts, meta, kernel, "spmm", 2);
  const int64_t rows = checked.weight.rows;
  const int64_t cols = checked.weight.cols;
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == cols, "x: expected (", cols, ", N), got rank ",
                  x.dim(), " with ", x.dim() > 0 ? x.size(0) : 0, " rows");
  const int64_t columns = x.size(1);
  const HeldEpilogue held = as_epilogue(input, bias, residual, lower, upper, rows, {rows, columns});
  const Tensor y = new_output(input, {rows, columns});
  const SpmmCall call{checked.weight,
                      input.x.const_data_ptr(),
                      columns,
                      1,
                      cols * columns,
                      y.mutable_data_ptr(),
                      columns,
                      1,
                      rows * columns,
                      columns,
                      1,
                      held.pointers};
  run(input, *checked.kernel, checked.kernel->spmm, call);
  return y;
}

Tensor linear(Tensor x, Parts parts, Ints meta, OptionalTensor bias, OptionalTensor residual,
              OptionalBound lower, OptionalBound upper, std::string kernel) {
  const Input input = as_input(x);
  const CheckedWeight checked = as_weight(input, parts, meta, kernel, "spmm", 2);
  const int64_t rows = checked.weight.rows;
  const int64_t cols = checked.weight.cols;
  Ints shape = shape_of(x);
  STD_TORCH_CHECK(!shape.empty() && shape.back() == cols, "x: expected (..., ", cols,
                  "), got a last size of ", shape.empty() ? 0 : shape.back());
  int64_t columns = 1;
  for (size_t i = 0; i + 1 < shape.size(); ++i) columns *= shape[i];
  shape.back() = rows;
  const HeldEpilogue held = as_epilogue(input, bias, residual, lower, upper, rows, shape);
  const Tensor y = new_output(input, shape);
  const SpmmCall call{checked.weight,
                      input.x.const_data_ptr(),
                      1,
                      cols,
                      cols * columns,
                      y.mutable_data_ptr(),
                      1,
                      rows,
                      rows * columns,
                      columns,
                      1,
                      held.pointers};
  run(input, *checked.kernel, checked.kernel->spmm, call);
  return y;
}

Tensor conv2d(Tensor x, Parts parts, Ints meta, OptionalTensor bias, OptionalTensor residual,
              Ints stride, Ints padding, Ints dilation, int64_t groups, OptionalBound lower,
              OptionalBound upper, std::string kernel) {
  const Input input = as_input(x, layout_for(parts));
  const CheckedWeight checked = as_weight(input, parts, meta, kernel, "conv2d", 4);
  STD_TORCH_CHECK(x.dim() == 4, "x: expected (B, C_in, H, W), got rank ", x.dim());
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
                  "stride, padding, dilation: expected 2 numbers each");
  const int64_t* filters = meta.data() + 2;
  STD_TORCH_CHECK(groups > 0 && filters[0] % groups == 0 && x.size(1) == filters[1] * groups,
                  "x: expected ", filters[1] * groups, " channels (", groups, " groups of ",
                  filters[1], ") and C_out divisible by groups, got ", x.size(1),
                  " channels and C_out ", filters[0]);
  const int64_t out_h =
      out_size("height", x.size(2), filters[2], stride[0], padding[0], dilation[0]);
  const int64_t out_w =
      out_size("width", x.size(3), filters[3], stride[1], padding[1], dilation[1]);
  const Ints shape{x.size(0), filters[0], out_h, out_w};
  const HeldEpilogue held = as_epilogue(input, bias, residual, lower, upper, filters[0], shape);
  const Tensor y = new_output(input, shape);
  const Conv2dCall call{checked.weight,
                        input.x.const_data_ptr(),
                        y.mutable_data_ptr(),
                        x.size(0),
                        x.size(1),
                        x.size(2),
                        x.size(3),
                        out_h,
                        out_w,
                        filters[2],
                        filters[3],
                        stride[0],
                        stride[1],
                        padding[0],
                        padding[1],
                        dilation[0],
                        dilation[1],
                        groups,
                        held.pointers};
  run(input, *checked.kernel, checked.kernel->conv2d, call);
  return y;
}

}  // namespace sparselt::cuda
