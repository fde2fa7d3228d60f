// SPDX-License-Identifier: Apache-2.0
//
// What lies between the layers of a network: activations, sums, pooling, copies. Plain loops over
// contiguous rows, which compilers turn into vectors; each is bound by memory.
#pragma once

#include <vector>

#include "ops/conv_geometry.h"
#include "ops/task.h"
#include "program/loops.h"

namespace sparselt {

// y[i] = clamp(f(x[i]), lower, upper); of those with two operands, f(x[i], residual[i]).
TaskPointer make_element_task(const Team& team, Element element, int64_t floats, float lower,
                              float upper);

// y (rows, floats) = x, whose rows lie x_stride apart, as those of y do y_stride.
TaskPointer make_copy_task(const Team& team, int64_t rows, int64_t floats, int64_t x_stride,
                           int64_t y_stride);

// y (batch, channels, area) = clamp(x * scale + shift, lower, upper), one scale and shift a
// channel, which outlive the task.
TaskPointer make_affine_task(const Team& team, int64_t batch, int64_t channels, int64_t area,
                             const float* scale, const float* shift, float lower, float upper);

// y (planes, P, Q) = the maxima of the windows of x (planes, H, W), NaN where one holds a NaN. Each
// window meets x; the axes' dilation is 1.
TaskPointer make_max_pool_task(const Team& team, int64_t planes, const Axis& h, const Axis& w);

// The means of the windows; padding counts as zeros if `count_padding`, and not at all otherwise.
TaskPointer make_mean_pool_task(const Team& team, int64_t planes, const Axis& h, const Axis& w,
                                bool count_padding);

// y (rows) = the means of x (rows, floats).
TaskPointer make_mean_task(const Team& team, int64_t rows, int64_t floats);

// y (outer, period, inner) = x + z or x * z for z (period), which is given as the residual.
TaskPointer make_broadcast_task(const Team& team, Element element, int64_t outer, int64_t period,
                                int64_t inner);

// y, contiguous and of these sizes, = the elements of x at the sums of index times stride.
TaskPointer make_gather_task(const Team& team, std::vector<int64_t> sizes,
                             std::vector<int64_t> strides);

// y (rows, floats) = exp(x) over its sum in each row.
TaskPointer make_softmax_task(const Team& team, int64_t rows, int64_t floats);

// y (rows, floats) = (x - mean) / sqrt(variance + epsilon) of each row, times z (floats) where one
// is given as the residual.
TaskPointer make_standardize_task(const Team& team, int64_t rows, int64_t floats, float epsilon);

}  // namespace sparselt
