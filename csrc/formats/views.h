// SPDX-License-Identifier: Apache-2.0
//
// The parts of a packed weight as kernels see them. Types and lengths are checked here; the indices
// themselves were checked when the weight was made.
#pragma once

#include "kernels.h"
#include "ops/ops.h"

namespace sparselt {

// The format that parts belong to, by their number and rank: "csr", "bsr", "sell", "bsell" or
// "sign".
const char* format_of(const Parts& parts);

// `block` is block_rows, block_cols; the weight's flattened shape is rows x cols.
SparseView as_sparse_view(const Parts& parts, const int64_t* block, int64_t rows, int64_t cols);
// Of sell, bsell and sign.
SellView as_sell_view(const Parts& parts, const int64_t* block, int64_t rows, int64_t cols);

}  // namespace sparselt
