// SPDX-License-Identifier: Apache-2.0
//
// Turns operator arguments into what a launcher is given, and refuses those that do not fit.
// sparselt/ops.py checks first and says more; these checks guard the direct callers of
// torch.ops.sparselt.
#pragma once

#include "cuda/ops.h"
#include "cuda/registry.h"

namespace sparselt::cuda {

// x, contiguous, and what follows from it: everything else must have its type and be on its device.
struct Input {
  Tensor x;
  torch::headeronly::ScalarType type;
  int32_t device;
};
Input as_input(const Tensor& x);

// A contiguous tensor of the input's type on its device; `name` is for the error.
Tensor as_operand(const Input& input, const Tensor& tensor, const char* name);

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

// An uninitialised contiguous tensor of the input's type on its device.
Tensor new_output(const Input& input, const Ints& shape);

// PyTorch's current stream on the input's device.
cudaStream_t current_stream(const Input& input);

// Throws what a launcher has to say.
void check_launch(const KernelInfo& kernel, cudaError_t result);

Ints shape_of(const Tensor& tensor);

}  // namespace sparselt::cuda
