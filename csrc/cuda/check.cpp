// SPDX-License-Identifier: Apache-2.0
#include "cuda/check.h"

#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <limits>

namespace sparselt::cuda {
namespace {

using torch::headeronly::ScalarType;

std::string_view type_name(ScalarType type) {
  if (type == ScalarType::Half) return "float16";
  if (type == ScalarType::BFloat16) return "bfloat16";
  return "float32";
}

std::string describe(const Ints& shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + ")";
}

void check_place(const Input& input, const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == input.device, name,
                  ": expected a tensor on device ", input.device,
                  ", where x is; move it with .to(x.device)");
  STD_TORCH_CHECK(tensor.scalar_type() == input.type, name, ": expected ", type_name(input.type),
                  ", the type of x; convert it with .to(x.dtype)");
}

// Of (B, C, H, W). The stride of a size below 2 says nothing.
bool has_channels_last(const Tensor& tensor) {
  if (tensor.numel() == 0) return true;
  int64_t expected = 1;
  for (const int64_t axis : {1, 3, 2, 0}) {
    if (tensor.size(axis) > 1 && tensor.stride(axis) != expected) return false;
    expected *= tensor.size(axis);
  }
  return true;
}

const void* check_part(const Input& input, const Tensor& part, const char* name, ScalarType type,
                       int64_t length) {
  STD_TORCH_CHECK(part.is_cuda() && part.get_device_index() == input.device, name,
                  ": expected a tensor on device ", input.device,
                  ", where x is; move the weight with .to(x.device)");
  STD_TORCH_CHECK(part.scalar_type() == type, name, ": wrong dtype; expected ",
                  type == ScalarType::Int    ? "int32"
                  : type == ScalarType::Byte ? "uint8"
                                             : "that of x");
  STD_TORCH_CHECK(part.is_contiguous() && part.numel() == length, name, ": expected ", length,
                  " contiguous elements, got ", part.numel());
  return part.const_data_ptr();
}

int64_t blocks_along(int64_t size, int64_t block) { return (size + block - 1) / block; }

// Lengths and shapes only: what the arrays hold is on the device, and reading it would wait for the
// stream.
void check_indexed(const Input& input, const Parts& parts, int64_t index_size, Weight& weight) {
  weight.index_size = index_size;
  weight.stored = parts[1].numel() / index_size;
  weight.parts[0] = check_part(input, parts[0], "crow_indices", ScalarType::Int,
                               blocks_along(weight.rows, weight.block_rows) + 1);
  weight.parts[1] =
      check_part(input, parts[1], "col_indices", ScalarType::Int, weight.stored * index_size);
  weight.parts[2] = check_part(input, parts[2], "values", input.type,
                               weight.stored * weight.block_rows * weight.block_cols);
}

void check_compressed(const Input& input, const Parts& parts, Weight& weight) {
  check_indexed(input, parts, 1, weight);
}

void check_bsr_nhwc(const Input& input, const Parts& parts, Weight& weight) {
  check_indexed(input, parts, 2, weight);
}

void check_tile8(const Input& input, const Parts& parts, Weight& weight) {
  const int64_t groups =
      blocks_along(weight.rows, weight.block_rows) * blocks_along(weight.cols, weight.block_cols);
  const int64_t stored = parts[3].numel();
  weight.parts[0] = check_part(input, parts[0], "chunk_offsets", ScalarType::Int, groups + 1);
  weight.parts[1] =
      check_part(input, parts[1], "counts", ScalarType::Byte, groups * weight.block_rows);
  weight.parts[2] = check_part(input, parts[2], "offsets", ScalarType::Byte, stored);
  weight.parts[3] = check_part(input, parts[3], "values", input.type, stored);
}

// What patch8 and bitmask share, of 32 rows by 256 columns a group, in patches of block_rows x
// block_cols. Returns the number of patches.
int64_t check_patches(const Input& input, const Parts& parts, Weight& weight) {
  constexpr int64_t kLanes = 32;
  const int64_t groups = blocks_along(weight.rows, 32) * blocks_along(weight.cols, 256);
  weight.parts[0] = check_part(input, parts[0], "chunk_offsets", ScalarType::Int, groups + 1);
  weight.parts[1] = check_part(input, parts[1], "counts", ScalarType::Byte, groups * kLanes);
  weight.parts[3] = check_part(input, parts[3], "values", input.type, parts[3].numel());
  return groups * kLanes;
}

void check_patch8(const Input& input, const Parts& parts, Weight& weight) {
  check_patches(input, parts, weight);
  weight.parts[2] = check_part(input, parts[2], "places", ScalarType::Byte, parts[3].numel());
}

void check_bitmask(const Input& input, const Parts& parts, Weight& weight) {
  const int64_t patches = check_patches(input, parts, weight);
  weight.parts[2] = check_part(input, parts[2], "masks", ScalarType::Int, patches * 8);
}

// How the parts of a format are checked, and how x and y are laid out for its convolutions.
struct Format {
  std::string_view name;
  size_t parts;
  int64_t rank;  // of the third part, which tells similar formats apart
  void (*check)(const Input& input, const Parts& parts, Weight& weight);
  MemoryFormat layout = MemoryFormat::Contiguous;
};

// A line a format that kernels of CUDA read.
constexpr Format kFormats[] = {
    {"csr", 3, 1, check_compressed},
    {"bsr", 3, 3, check_compressed},
    {"bsr_nhwc", 3, 3, check_bsr_nhwc, MemoryFormat::ChannelsLast},
    {"tile8", 4, 2, check_tile8},
    {"patch8", 4, 1, check_patch8},
    {"bitmask", 4, 4, check_bitmask},
};

const Format& find_format(std::string_view name) {
  for (const Format& format : kFormats) {
    if (format.name == name) return format;
  }
  STD_TORCH_CHECK(false, "format ", name, " has no line in cuda/check.cpp");
}

}  // namespace

Ints shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

MemoryFormat layout_for(const std::string& kernel) {
  const std::string_view format = format_of(kernel);
  return format.empty() ? MemoryFormat::Contiguous : find_format(format).layout;
}

Input as_input(const Tensor& x, MemoryFormat layout) {
  STD_TORCH_CHECK(x.is_cuda(), "x: expected a CUDA tensor, as the weight is; move it with .cuda()");
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16,
      "x: expected float32, float16 or bfloat16");
  const bool plain = layout == MemoryFormat::Contiguous;
  STD_TORCH_CHECK(plain || x.dim() == 4, "x: expected (B, C_in, H, W), got rank ", x.dim());
  return {plain && x.is_contiguous() ? x : torch::stable::contiguous(x, layout), type,
          x.get_device_index(), layout};
}

Tensor as_operand(const Input& input, const Tensor& tensor, const char* name, MemoryFormat layout) {
  check_place(input, tensor, name);
  if (layout == MemoryFormat::Contiguous && tensor.is_contiguous()) return tensor;
  return torch::stable::contiguous(tensor, layout);
}

CheckedWeight as_weight(const Input& input, const Parts& parts, const Ints& meta,
                        const std::string& kernel, std::string_view op, size_t dims) {
  const KernelInfo& found = find_kernel(kernel, op, type_name(input.type), input.device);
  const Format& format = find_format(found.format);
  STD_TORCH_CHECK(parts.size() == format.parts && parts[2].dim() == format.rank,
                  "parts: expected the ", format.parts, " of format ", format.name, ", which ",
                  found.name, " reads, got those of another");
  STD_TORCH_CHECK(meta.size() == dims + 2, "meta: expected block_rows, block_cols and a shape of ",
                  dims, " sizes, got ", meta.size(), " numbers");
  Weight weight{};
  weight.block_rows = meta[0];
  weight.block_cols = meta[1];
  STD_TORCH_CHECK(weight.block_rows > 0 && weight.block_cols > 0,
                  "meta: blocks must be at least 1 x 1");
  weight.rows = meta[2];
  weight.cols = 1;
  for (size_t i = 3; i < meta.size(); ++i) weight.cols *= meta[i];
  constexpr int64_t kLargest = std::numeric_limits<int32_t>::max();
  STD_TORCH_CHECK(
      weight.rows >= 0 && weight.cols >= 0 && weight.rows <= kLargest && weight.cols <= kLargest,
      "meta: expected sizes from 0 to ", kLargest);
  format.check(input, parts, weight);
  return {&found, weight};
}

HeldEpilogue as_epilogue(const Input& input, const OptionalTensor& bias,
                         const OptionalTensor& residual, const OptionalBound& lower,
                         const OptionalBound& upper, int64_t rows, const Ints& shape) {
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
    held.bias = as_operand(input, *bias, "bias", MemoryFormat::Contiguous);
    held.pointers.bias = held.bias->const_data_ptr();
  }
  if (residual) {
    STD_TORCH_CHECK(shape_of(*residual) == shape, "residual: expected the result's shape ",
                    describe(shape), ", got ", describe(shape_of(*residual)));
    held.residual = as_operand(input, *residual, "residual", input.layout);
    held.pointers.residual = held.residual->const_data_ptr();
  }
  return held;
}

Tensor new_output(const Tensor& x, MemoryFormat layout, const Ints& shape) {
  if (layout == MemoryFormat::Contiguous)
    return torch::stable::new_empty(x, {shape.data(), shape.size()});
  return torch::stable::empty({shape.data(), shape.size()}, x.scalar_type(), std::nullopt,
                              x.device(), std::nullopt, layout);
}

void check_output(const Input& input, const Tensor& out, const Ints& shape) {
  check_place(input, out, "out");
  STD_TORCH_CHECK(shape_of(out) == shape, "out: expected shape ", describe(shape), ", got ",
                  describe(shape_of(out)));
  const bool plain = input.layout == MemoryFormat::Contiguous;
  STD_TORCH_CHECK(plain ? out.is_contiguous() : has_channels_last(out), "out: expected ",
                  plain ? "contiguous" : "channels-last", " memory");
}

Workspace new_workspace(const Input& input, int64_t floats) {
  if (floats == 0) return {};
  Workspace workspace;
  workspace.tensor = torch::stable::new_empty(input.x, {&floats, 1}, ScalarType::Float);
  workspace.floats = static_cast<float*>(workspace.tensor->mutable_data_ptr());
  return workspace;
}

cudaStream_t current_stream(const Input& input) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(input.device, &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_launch(const KernelInfo& kernel, int32_t device, cudaError_t result) {
  STD_TORCH_CHECK(
      result != cudaErrorNotSupported, kernel.name,
      " does not handle this block shape or geometry; name another kernel or keep the layer dense");
  STD_TORCH_CHECK(result != cudaErrorNoKernelImageForDevice, kernel.name,
                  " is not in this build for device ", device, "; ", how_to_rebuild(device));
  STD_CUDA_CHECK(result);
}

}  // namespace sparselt::cuda
