// SPDX-License-Identifier: Apache-2.0
//
// Turns operator arguments into what kernels are given, and refuses those that do not fit.
// sparselt/ops.py checks first and says more; these checks guard the direct callers of
// torch.ops.sparselt.
#pragma once

#include "ops/ops.h"
#include "ops/weight.h"

namespace sparselt {

// A contiguous float32 CPU tensor of `tensor`'s values; `name` is for the error.
Tensor as_float_input(const Tensor& tensor, const char* name);

// The kernel called `kernel` and the weight of these parts, which must outlive the result; `dims`
// is the rank of the weight's dense shape. Without code, a kernel that wants it would run loops.
Weight as_weight(const Parts& parts, const Ints& meta, const std::string& kernel,
                 std::string_view op, size_t dims, bool with_code = true);

// Bias, residual (of shape `shape`, the result's) and clamp. The tensors are held so that the
// pointers live.
struct HeldEpilogue {
  OptionalTensor bias;
  OptionalTensor residual;
  Epilogue pointers;  // but for the residual
  const float* residual_data() const;
};
HeldEpilogue as_epilogue(const OptionalTensor& bias, const OptionalTensor& residual,
                         const OptionalBound& lower, const OptionalBound& upper, int64_t rows,
                         const std::vector<int64_t>& shape);

// An uninitialised contiguous float32 CPU tensor.
Tensor new_output(const std::vector<int64_t>& shape);

// Refuses an `out` that is not a contiguous float32 CPU tensor of `shape`.
void check_output(const Tensor& out, const std::vector<int64_t>& shape);

std::vector<int64_t> shape_of(const Tensor& tensor);

inline float* float_data(const Tensor& tensor) {
  return static_cast<float*>(tensor.mutable_data_ptr());
}
inline const float* const_float_data(const Tensor& tensor) {
  return static_cast<const float*>(tensor.const_data_ptr());
}

inline const float* HeldEpilogue::residual_data() const {
  return residual ? const_float_data(*residual) : nullptr;
}

}  // namespace sparselt
