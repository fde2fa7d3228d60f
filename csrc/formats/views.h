// SPDX-License-Identifier: Apache-2.0
//
// The parts of a packed weight as kernels see them: one view a format, chosen by the format that
// the registry names for the kernel. Types, ranks and lengths are checked here; the indices
// themselves were checked when the weight was made.
#pragma once

#include "ops/ops.h"
#include "ops/weight.h"

namespace sparselt {

// Fills in the view that `weight.kernel` reads; the weight's rows and cols are known. `block` is
// block_rows, block_cols.
void view_parts(const Parts& parts, const int64_t* block, Weight& weight);

}  // namespace sparselt
