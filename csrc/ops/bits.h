// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "ops/spmv.h"

namespace sparselt {

// make_spmv_task for a weight of the bits format.
TaskPointer make_bits_task(const Team& team, const Weight& weight, Layout x_layout, Layout y_layout,
                           int64_t columns, const Epilogue& epilogue);

}  // namespace sparselt
