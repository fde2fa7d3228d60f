// SPDX-License-Identifier: Apache-2.0
//
// Convolutions and linear layers by a panel kernel, images innermost.
#pragma once

#include "ops/conv_problem.h"
#include "ops/image_task.h"

namespace sparselt {

// Null where the kernel runs no panels, or channels come in groups. A linear layer is a convolution
// of maps of one pixel.
ImageTaskPointer make_image_panels(const Team& team, const ConvProblem& problem,
                                   const Weight& weight, const Epilogue& epilogue);

}  // namespace sparselt
