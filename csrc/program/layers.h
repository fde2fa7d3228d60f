// SPDX-License-Identifier: Apache-2.0
//
// The operators that add a layer to a program: what takes tensors comes through torch's dispatcher,
// as the stable ABI asks for. `program` is a Program's handle, `values` are x, residual (-1 for
// none) and y.
#pragma once

#include "ops/ops.h"

namespace sparselt {

// As the operators of the same names in ops.h, for x of the given shape.
void program_linear(int64_t program, Ints values, int64_t batch, Parts parts, Ints meta,
                    OptionalTensor bias, OptionalBound lower, OptionalBound upper,
                    std::string kernel);
void program_conv2d(int64_t program, Ints values, Ints x_shape, Parts parts, Ints meta,
                    OptionalTensor bias, Ints stride, Ints padding, Ints dilation, int64_t groups,
                    OptionalBound lower, OptionalBound upper, std::string kernel);

// Torch's own linear (no stride) or convolution, of two or one axes as the weight has them, on a
// dense weight. The residual is no part of it. `packed` is the weight of a linear layer as
// mkl::_mkl_linear reads it for this number of rows.
void program_dense(int64_t program, Ints values, Ints x_shape, Tensor weight, OptionalTensor bias,
                   Ints stride, Ints padding, Ints dilation, int64_t groups, OptionalTensor packed);

void program_depthwise(int64_t program, Ints values, Ints x_shape, Tensor weight,
                       OptionalTensor bias, Ints stride, Ints padding, Ints dilation,
                       OptionalBound lower, OptionalBound upper, std::string kernel);

}  // namespace sparselt
