// SPDX-License-Identifier: Apache-2.0
#include "ops/conv_problem.h"

#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <limits>

namespace sparselt {
namespace {

constexpr int64_t kMaxPixels = std::numeric_limits<int32_t>::max();

Axis make_axis(const char* name, int64_t size, int64_t kernel, int64_t stride, int64_t padding,
               int64_t dilation) {
  STD_TORCH_CHECK(stride > 0 && dilation > 0 && padding >= 0, name,
                  ": expected stride > 0, dilation > 0 and padding >= 0");
  // Below these limits nothing that is computed from an axis overflows.
  STD_TORCH_CHECK(std::max({size, kernel, padding, dilation}) <= kMaxPixels, name,
                  ": expected sizes, padding and dilation of at most ", kMaxPixels);
  // A stride beyond the input meets one output, as one of the input's size does: no more phases.
  const Axis axis{size, kernel, std::min(stride, std::max<int64_t>(1, size + 2 * padding)), padding,
                  dilation};
  STD_TORCH_CHECK(kernel > 0 && axis.padded() >= dilation * (kernel - 1) + 1, name,
                  ": the padded input (", axis.padded(), ") is smaller than the kernel's reach (",
                  dilation * (kernel - 1) + 1, ")");
  return axis;
}

}  // namespace

ConvProblem make_conv_problem(const Ints& x_shape, const Ints& meta, const Ints& stride,
                              const Ints& padding, const Ints& dilation, int64_t groups) {
  STD_TORCH_CHECK(meta.size() == 6 && x_shape.size() == 4,
                  "conv2d: expected a 4-D weight and x of (B, C_in, H, W)");
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
                  "stride, padding, dilation: expected 2 numbers each");
  const int64_t* shape = meta.data() + 2;
  STD_TORCH_CHECK(groups > 0 && shape[0] % groups == 0 && x_shape[1] == shape[1] * groups,
                  "x: expected ", shape[1] * groups, " channels (", groups, " groups of ", shape[1],
                  ") and C_out divisible by groups, got ", x_shape[1], " channels and C_out ",
                  shape[0]);
  const Axis h = make_axis("height", x_shape[2], shape[2], stride[0], padding[0], dilation[0]);
  const Axis w = make_axis("width", x_shape[3], shape[3], stride[1], padding[1], dilation[1]);
  STD_TORCH_CHECK(h.padded() <= kMaxPixels / w.padded(), "x: expected a padded map of at most ",
                  kMaxPixels, " pixels, got ", h.padded(), " x ", w.padded());
  return {{h, w}, x_shape[0], x_shape[1], shape[0], groups};
}

}  // namespace sparselt
