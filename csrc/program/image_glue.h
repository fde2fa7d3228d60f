// SPDX-License-Identifier: Apache-2.0
//
// What lies between the layers of a network, images innermost (ops/image_layout.h). Everything is
// done vector by vector, over all channels of a pixel at once, and follows the layout of x.
#pragma once

#include "ops/conv_geometry.h"
#include "ops/image_task.h"
#include "program/loops.h"

namespace sparselt {

// As make_element_task in glue.h.
ImageTaskPointer make_image_elements(const Team& team, Element element, float lower, float upper);

// As make_max_pool_task and make_mean_pool_task.
ImageTaskPointer make_image_max_pool(const Team& team, const Axis& h, const Axis& w);
ImageTaskPointer make_image_mean_pool(const Team& team, const Axis& h, const Axis& w,
                                      bool count_padding);

// y (images, channels) = the means of maps of `area` pixels.
ImageTaskPointer make_image_mean(const Team& team, int64_t area);

// Between torch's layout and this one.
TaskPointer make_to_images_task(const Team& team, const ImageLayout& y);
TaskPointer make_from_images_task(const Team& team, const ImageLayout& x);

}  // namespace sparselt
