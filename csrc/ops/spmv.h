// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "ops/task.h"
#include "ops/weight.h"

namespace sparselt {

// Element (i, j) of a matrix lies at i * row_stride + j * column_stride.
struct Layout {
  int64_t row_stride;
  int64_t column_stride;
};

// y (M, N) = clamp(W x (K, N) + bias + residual) by a spmv kernel, its tile_columns at a time. The
// residual is laid out as y; of one column the row strides are 1.
TaskPointer make_spmv_task(const Team& team, const Weight& weight, Layout x_layout, Layout y_layout,
                           int64_t columns, const Epilogue& epilogue);

}  // namespace sparselt
