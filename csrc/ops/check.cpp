// SPDX-License-Identifier: Apache-2.0
#include "ops/check.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <limits>

namespace sparselt {
namespace {

using torch::headeronly::ScalarType;

std::string describe(const std::vector<int64_t>& shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + ")";
}

void check_part(const Tensor& part, const char* name, ScalarType type, int64_t length) {
  STD_TORCH_CHECK(part.is_cpu(), name, ": expected a CPU tensor; move the weight with .cpu()");
  STD_TORCH_CHECK(part.scalar_type() == type, name,
                  ": wrong dtype; indices are int32 and values float32");
  STD_TORCH_CHECK(part.is_contiguous() && part.numel() == length, name, ": expected ", length,
                  " contiguous elements, got ", part.numel());
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
                 std::string_view op, size_t dims) {
  STD_TORCH_CHECK(parts.size() == 3, "parts: expected crow_indices, col_indices, values, got ",
                  parts.size(), " tensors");
  STD_TORCH_CHECK(meta.size() == dims + 2, "meta: expected block_rows, block_cols and a shape of ",
                  dims, " sizes, got ", meta.size(), " numbers");
  Weight weight;
  weight.shape.assign(meta.begin() + 2, meta.end());
  SparseView& view = weight.view;
  view.block_rows = meta[0];
  view.block_cols = meta[1];
  STD_TORCH_CHECK(view.block_rows > 0 && view.block_cols > 0,
                  "meta: blocks must be at least 1 x 1");
  view.rows = weight.shape[0];
  view.cols = 1;
  for (size_t i = 1; i < dims; ++i) view.cols *= weight.shape[i];
  STD_TORCH_CHECK(view.rows >= 0 && view.cols >= 0, "meta: a size is negative");

  const int64_t stored_rows = (view.rows + view.block_rows - 1) / view.block_rows;
  const int64_t blocks = parts[1].numel();
  check_part(parts[0], "crow_indices", ScalarType::Int, stored_rows + 1);
  check_part(parts[1], "col_indices", ScalarType::Int, blocks);
  check_part(parts[2], "values", ScalarType::Float, blocks * view.block_rows * view.block_cols);
  view.crow_indices = static_cast<const int32_t*>(parts[0].const_data_ptr());
  view.col_indices = static_cast<const int32_t*>(parts[1].const_data_ptr());
  view.values = const_float_data(parts[2]);
  STD_TORCH_CHECK(view.crow_indices[stored_rows] == blocks, "crow_indices: expected to end at ",
                  blocks, ", got ", view.crow_indices[stored_rows]);

  // values of CSR are (nnz,), those of blocks (blocks, block_rows, block_cols), even when a block
  // is 1 x 1.
  weight.kernel = &find_kernel(kernel, op, parts[2].dim() == 1 ? "csr" : "bsr");
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
    held.pointers.residual = const_float_data(*held.residual);
  }
  return held;
}

Tensor new_output(const std::vector<int64_t>& shape) {
  return torch::stable::empty({shape.data(), shape.size()}, ScalarType::Float);
}

void check_output(const Tensor& out, const std::vector<int64_t>& shape) {
  STD_TORCH_CHECK(out.is_cpu() && out.scalar_type() == ScalarType::Float && out.is_contiguous(),
                  "out: expected a contiguous float32 CPU tensor");
  STD_TORCH_CHECK(shape_of(out) == shape, "out: expected shape ", describe(shape), ", got ",
                  describe(shape_of(out)));
}

}  // namespace sparselt
