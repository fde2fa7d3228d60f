// SPDX-License-Identifier: Apache-2.0
//
// The operators that bindings.cpp registers for CUDA, with the schemas of ../bindings.cpp. Each one
// checks its arguments, allocates the result on the input's device unless it is given, and puts one
// kernel on the current stream: the one named by the last argument, or the first of kernels.inc for
// the weight's format and type. Indices in `parts` are trusted here: the format classes in Python
// check every index when a weight is made.
//
// A given result `out` is on the device and of the type of x, and laid out as the operator without
// it would: with channels last for a weight in bsr_nhwc, contiguous otherwise.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

namespace sparselt::cuda {

using torch::stable::Tensor;
using Parts = std::vector<Tensor>;
using Ints = std::vector<int64_t>;
using OptionalTensor = std::optional<Tensor>;
using OptionalBound = std::optional<double>;

// x (K, N) -> (M, N).
Tensor spmm(Tensor x, Parts parts, Ints meta, OptionalTensor bias, OptionalTensor residual,
            OptionalBound lower, OptionalBound upper, std::string kernel);
void spmm_out(Tensor x, Tensor out, Parts parts, Ints meta, OptionalTensor bias,
              OptionalTensor residual, OptionalBound lower, OptionalBound upper,
              std::string kernel);

// x (..., K) -> (..., M), by an spmm kernel.
Tensor linear(Tensor x, Parts parts, Ints meta, OptionalTensor bias, OptionalTensor residual,
              OptionalBound lower, OptionalBound upper, std::string kernel);

// x (B, C_in, H, W), weight (C_out, C_in / groups, R, S) -> (B, C_out, P, Q).
Tensor conv2d(Tensor x, Parts parts, Ints meta, OptionalTensor bias, OptionalTensor residual,
              Ints stride, Ints padding, Ints dilation, int64_t groups, OptionalBound lower,
              OptionalBound upper, std::string kernel);
void conv2d_out(Tensor x, Tensor out, Parts parts, Ints meta, OptionalTensor bias,
                OptionalTensor residual, Ints stride, Ints padding, Ints dilation, int64_t groups,
                OptionalBound lower, OptionalBound upper, std::string kernel);

}  // namespace sparselt::cuda
