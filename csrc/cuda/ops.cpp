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

// (B, C_out, P, Q).
Ints conv2d_shape(const Tensor& x, const Ints& meta, const Ints& stride, const Ints& padding,
                  const Ints& dilation, int64_t groups) {
  STD_TORCH_CHECK(meta.size() == 6, "meta: expected block_rows, block_cols and a shape of 4 sizes");
  STD_TORCH_CHECK(x.dim() == 4, "x: expected (B, C_in, H, W), got rank ", x.dim());
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
                  "stride, padding, dilation: expected 2 numbers each");
  const int64_t* filters = meta.data() + 2;
  STD_TORCH_CHECK(groups > 0 && filters[0] % groups == 0 && x.size(1) == filters[1] * groups,
                  "x: expected ", filters[1] * groups, " channels (", groups, " groups of ",
                  filters[1], ") and C_out divisible by groups, got ", x.size(1),
                  " channels and C_out ", filters[0]);
  return {x.size(0), filters[0],
          out_size("height", x.size(2), filters[2], stride[0], padding[0], dilation[0]),
          out_size("width", x.size(3), filters[3], stride[1], padding[1], dilation[1])};
}

// The call with the workspace that its kernel can use, and its launch.
template <class Call, class Launcher>
void run(const Input& input, const KernelInfo& kernel, Launcher launcher, Call call) {
  const size_t element = kernel.dtype == "float32" ? 4 : 2;
  const Workspace workspace = new_workspace(input, workspace_floats(kernel.format, call, element));
  call.workspace = workspace.floats;
  const DeviceGuard guard(input.device);
  check_launch(kernel, input.device, launcher(call, current_stream(input)));
}

// x (K, N) to out (M, N); with `turned`, x (N, K) to out (N, M).
void multiply(const Input& input, const CheckedWeight& checked, int64_t columns, bool turned,
              const Tensor& out, const Epilogue& epilogue) {
  const int64_t rows = checked.weight.rows;
  const int64_t cols = checked.weight.cols;
  const SpmmCall call{checked.weight,
                      input.x.const_data_ptr(),
                      turned ? 1 : columns,
                      turned ? cols : 1,
                      cols * columns,
                      out.mutable_data_ptr(),
                      turned ? 1 : columns,
                      turned ? rows : 1,
                      rows * columns,
                      columns,
                      1,
                      epilogue};
  run(input, *checked.kernel, checked.kernel->spmm, call);
}

}  // namespace

void spmm_out(Tensor x, Tensor out, Parts parts, Ints meta, OptionalTensor bias,
              OptionalTensor residual, OptionalBound lower, OptionalBound upper,
              std::string kernel) {
  const Input input = as_input(x);
  const CheckedWeight checked = as_weight(input, parts, meta, kernel, "spmm", 2);
  const int64_t rows = checked.weight.rows;
  const int64_t cols = checked.weight.cols;
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == cols, "x: expected (", cols, ", N), got rank ",
                  x.dim(), " with ", x.dim() > 0 ? x.size(0) : 0, " rows");
  const Ints shape{rows, x.size(1)};
  check_output(input, out, shape);
  const HeldEpilogue held = as_epilogue(input, bias, residual, lower, upper, rows, shape);
  multiply(input, checked, x.size(1), false, out, held.pointers);
}

Tensor spmm(Tensor x, Parts parts, Ints meta, OptionalTensor bias, OptionalTensor residual,
            OptionalBound lower, OptionalBound upper, std::string kernel) {
  STD_TORCH_CHECK(meta.size() == 4 && x.dim() == 2, "spmm: expected a 2-D weight and x of (K, N)");
  const Tensor out = new_output(x, MemoryFormat::Contiguous, {meta[2], x.size(1)});
  spmm_out(x, out, std::move(parts), std::move(meta), bias, residual, lower, upper,
           std::move(kernel));
  return out;
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
  const Tensor out = new_output(x, MemoryFormat::Contiguous, shape);
  multiply(input, checked, columns, true, out, held.pointers);
  return out;
}

void conv2d_out(Tensor x, Tensor out, Parts parts, Ints meta, OptionalTensor bias,
                OptionalTensor residual, Ints stride, Ints padding, Ints dilation, int64_t groups,
                OptionalBound lower, OptionalBound upper, std::string kernel) {
  const Input input = as_input(x, layout_for(kernel));
  const CheckedWeight checked = as_weight(input, parts, meta, kernel, "conv2d", 4);
  const Ints shape = conv2d_shape(x, meta, stride, padding, dilation, groups);
  check_output(input, out, shape);
  const HeldEpilogue held = as_epilogue(input, bias, residual, lower, upper, shape[1], shape);
  const Conv2dCall call{checked.weight,
                        input.x.const_data_ptr(),
                        out.mutable_data_ptr(),
                        x.size(0),
                        x.size(1),
                        x.size(2),
                        x.size(3),
                        shape[2],
                        shape[3],
                        meta[4],
                        meta[5],
                        stride[0],
                        stride[1],
                        padding[0],
                        padding[1],
                        dilation[0],
                        dilation[1],
                        groups,
                        held.pointers};
  run(input, *checked.kernel, checked.kernel->conv2d, call);
}

Tensor conv2d(Tensor x, Parts parts, Ints meta, OptionalTensor bias, OptionalTensor residual,
              Ints stride, Ints padding, Ints dilation, int64_t groups, OptionalBound lower,
              OptionalBound upper, std::string kernel) {
  const Tensor out =
      new_output(x, layout_for(kernel), conv2d_shape(x, meta, stride, padding, dilation, groups));
  conv2d_out(x, out, std::move(parts), std::move(meta), bias, residual, std::move(stride),
             std::move(padding), std::move(dilation), groups, lower, upper, std::move(kernel));
  return out;
}

}  // namespace sparselt::cuda
