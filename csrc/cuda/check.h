// SPDX-License-Identifier: Apache-2.0
//
// Turns operator arguments into what a launcher is given, and refuses those that do not fit.
// sparselt/ops.py checks first and says more; these checks guard the direct callers of
// torch.ops.sparselt.
#pragma once

#include "cuda/ops.h"
#include "cuda/registry.h"

namespace sparselt::cuda {

using torch::headeronly::MemoryFormat;

// x, contiguous in `layout`, and what follows from it: everything else must have its type and be on
// its device; residual and result are laid out alike.
struct Input {
  Tensor x;
  torch::headeronly::ScalarType type;
  int32_t device;
  MemoryFormat layout;
};
Input as_input(const Tensor& x, MemoryFormat layout = MemoryFormat::Contiguous);

// The layout of x that a kernel for convolutions, or all of a format, read.
MemoryFormat layout_for(const std::string& kernel);

// A tensor of the input's type on its device, contiguous in `layout`; `name` is for the error.
Tensor as_operand(const Input& input, const Tensor& tensor, const char* name, MemoryFormat layout);

// The weight as a launcher wants it and the kernel to run; `dims` is the rank of the weight's dense
// shape.
struct CheckedWeight {
  const KernelInfo* kernel;
  Weight weight;
};
CheckedWeight as_weight(const Input& input, const Parts& parts, const Ints& meta,
                        const std::string& kernel, std::string_view op, size_t dims);

// Bias, residual (of shape `shape`, the result's) and clamp. The tensors are held so that the
// pointers live.
struct HeldEpilogue {
  OptionalTensor bias;
  OptionalTensor residual;
  Epilogue pointers;
};
HeldEpilogue as_epilogue(const Input& input, const OptionalTensor& bias,
                         const OptionalTensor& residual, const OptionalBound& lower,
                         const OptionalBound& upper, int64_t rows, const Ints& shape);

// An uninitialised tensor of the type of x on its device.
Tensor new_output(const Tensor& x, MemoryFormat layout, const Ints& shape);

// Refuses a result that a kernel cannot write as it is.
void check_output(const Input& input, const Tensor& out, const Ints& shape);

// Uninitialised float32 on the input's device, which lives as long as the tensor; null for none.
struct Workspace {
  OptionalTensor tensor;
  float* floats = nullptr;
};
Workspace new_workspace(const Input& input, int64_t floats);

// PyTorch's current stream on the input's device.
cudaStream_t current_stream(const Input& input);

// Throws what a launcher has to say.
void check_launch(const KernelInfo& kernel, int32_t device, cudaError_t result);

Ints shape_of(const Tensor& tensor);

}  // namespace sparselt::cuda
