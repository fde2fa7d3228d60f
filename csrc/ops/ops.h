// SPDX-License-Identifier: Apache-2.0
//
// The operators that bindings.cpp registers for the CPU. Each one checks its arguments, allocates,
// splits the work over torch's threads, and calls the kernel named by its last argument, or the
// first usable one of kernels.inc for the format named there.
//
//   parts   the weight's arrays: crow_indices int32, col_indices int32, values float32. Their
//   indices are trusted here: the
//           format classes in Python check every index when a weight is made.
//   meta    block_rows, block_cols, then the weight's dense shape
//   bias    one a row of the weight; residual: shaped as the result; lower, upper: the clamp's
//   bounds
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

namespace sparselt {

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

// A depthwise convolution of a dense weight (C * multiplier, 1, R, S) and x (B, C, H, W) -> (B, C *
// multiplier, P, Q): a neighbour of sparse layers that torch runs slowly on contiguous images.
Tensor depthwise_conv2d(Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor residual,
                        Ints stride, Ints padding, Ints dilation, OptionalBound lower,
                        OptionalBound upper, std::string kernel);

}  // namespace sparselt
