// SPDX-License-Identifier: Apache-2.0
#include "ops/check.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <limits>

#include "formats/views.h"
#include "huge_pages.h"
#include "ops/code_table.h"

namespace sparselt {
namespace {

using torch::headeronly::ScalarType;

std::string describe(const std::vector<int64_t>& shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + ")";
}

}  // namespace

std::vector<int64_t> shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

Tensor as_float_input(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu(), name,
                  ": expected a CPU tensor, as the weight is; move it with .cpu()");
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, name,
                  ": expected float32; convert it with .float()");
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

Weight as_weight(const Parts& parts, const Ints& meta, const std::string& kernel,
                 std::string_view op, size_t dims, bool with_code) {
  STD_TORCH_CHECK(meta.size() == dims + 2, "meta: expected block_rows, block_cols and a shape of ",
                  dims, " sizes, got ", meta.size(), " numbers");
  STD_TORCH_CHECK(meta[0] > 0 && meta[1] > 0, "meta: blocks must be at least 1 x 1");
  STD_TORCH_CHECK(*std::min_element(meta.begin() + 2, meta.end()) >= 0, "meta: a size is negative");
  Weight weight{};
  weight.rows = meta[2];
  weight.cols = 1;
  for (size_t i = 3; i < meta.size(); ++i) weight.cols *= meta[i];
  weight.kernel = &find_kernel(kernel, op, meta[0]);
  view_parts(parts, meta.data(), weight);
  if (with_code && weight.kernel->op == "code") {
    weight.code = code_for(parts, weight.sell);
    weight.sell.code = weight.code->view();
  }
  return weight;
}

HeldEpilogue as_epilogue(const OptionalTensor& bias, const OptionalTensor& residual,
                         const OptionalBound& lower, const OptionalBound& upper, int64_t rows,
                         const std::vector<int64_t>& shape) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  HeldEpilogue held;
  held.pointers = {nullptr, nullptr, -kInfinity, kInfinity};
  if (lower) held.pointers.lower = static_cast<float>(*lower);
  if (upper) held.pointers.upper = static_cast<float>(*upper);
  STD_TORCH_CHECK(held.pointers.lower <= held.pointers.upper, "lower: expected at most upper (",
                  held.pointers.upper, "), got ", held.pointers.lower);
  if (bias) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->numel() == rows, "bias: expected ", rows,
                    " elements, got shape ", describe(shape_of(*bias)));
    held.bias = as_float_input(*bias, "bias");
    held.pointers.bias = const_float_data(*held.bias);
  }
  if (residual) {
    STD_TORCH_CHECK(shape_of(*residual) == shape, "residual: expected the result's shape ",
                    describe(shape), ", got ", describe(shape_of(*residual)));
    held.residual = as_float_input(*residual, "residual");
  }
  return held;
}

Tensor new_output(const std::vector<int64_t>& shape) {
  Tensor out = torch::stable::empty({shape.data(), shape.size()}, ScalarType::Float);
  advise_huge_pages(out.mutable_data_ptr(), sizeof(float) * static_cast<size_t>(out.numel()));
  return out;
}

void check_output(const Tensor& out, const std::vector<int64_t>& shape) {
  STD_TORCH_CHECK(out.is_cpu() && out.scalar_type() == ScalarType::Float && out.is_contiguous(),
                  "out: expected a contiguous float32 CPU tensor");
  STD_TORCH_CHECK(shape_of(out) == shape, "out: expected shape ", describe(shape), ", got ",
                  describe(shape_of(out)));
}

}  // namespace sparselt
