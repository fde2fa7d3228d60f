// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "ops/spmv.h"

namespace sparselt {

// make_spmv_task for a weight of bits or windows.
TaskPointer make_spmv_columns_task(const Team& team, const Weight& weight, Layout x_layout,
                                   Layout y_layout, int64_t columns, const Epilogue& epilogue);

}  // namespace sparselt
