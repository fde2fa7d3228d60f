// SPDX-License-Identifier: Apache-2.0
//
// Convolution by a conv2d kernel. x is laid out so that a convolution of any stride, padding and
// dilation becomes a product with shifted planes (kernels.h): padded with zeros, and cut into
// stride_h x stride_w phases so that the pixels that one tap meets lie next to each other. With a
// stride of 1 there is one phase, whose rows can share their halo: the zeros right of a row are the
// zeros left of the next. Where nothing is padded or cut, x is used as it is.
#include <torch/headeronly/util/Exception.h>

#include <limits>

#include "ops/conv_problem.h"
#include "ops/partition.h"

namespace sparselt {
namespace {

Tensor lay_out(const Geometry& g, const float* x, int64_t planes) {
  Tensor out = new_output({planes, g.plane()});
  float* data = float_data(out);
  const int64_t grain = std::max<int64_t>(1, (1 << 14) / g.plane());
  torch::stable::parallel_for(0, planes, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      lay_out_plane(g, x + i * g.h.size * g.w.size, data + i * g.plane());
  });
  return out;
}

}  // namespace

void run_conv_planes(const ConvProblem& problem, const Weight& weight, const Tensor& input,
                     const Epilogue& epilogue, float* y) {
  const Geometry& g = problem.geometry;
  const int64_t group_channels = problem.channels_in / problem.groups;
  const int64_t group_rows = problem.channels_out / problem.groups;
  const int64_t out_plane = g.h.out() * g.w.out();
  STD_TORCH_CHECK(group_channels * g.plane() <= std::numeric_limits<int32_t>::max(),
                  "x: the channels of a group hold more than 2^31 floats; split the image");
  const std::vector<int32_t> offsets = column_offsets(g, group_channels);
  const Tensor planes =
      g.in_place() ? input
                   : lay_out(g, const_float_data(input), problem.batch * problem.channels_in);
  const float* x = const_float_data(planes);
  const auto rows_of = [&](int64_t item) {
    const int64_t group = item % problem.groups;
    return Range{group * group_rows, (group + 1) * group_rows};
  };
  const auto run = [&](int64_t item, Range rows, Range pixels) {
    const int64_t image = item / problem.groups;
    Conv2dCall call{
        weight.view, x + item * group_channels * g.plane(),        offsets.data(), g.pitch(),
        g.w.out(),   y + image * problem.channels_out * out_plane, out_plane,      epilogue};
    if (epilogue.residual) call.epilogue.residual += image * problem.channels_out * out_plane;
    weight.kernel->conv2d(call, rows, pixels);
  };
  parallel_product(weight.view, problem.batch * problem.groups, g.flat_pixels(),
                   weight.kernel->tile_columns, rows_of, run);
}

}  // namespace sparselt
