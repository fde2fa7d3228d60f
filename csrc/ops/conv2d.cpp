// SPDX-License-Identifier: Apache-2.0
//
// y (B, C_out, P, Q) = clamp(conv2d(x (B, C_in, H, W), W (C_out, C_in / groups, R, S)) + bias +
// residual).
//
// x is laid out so that a convolution of any stride, padding and dilation becomes a product with
// shifted planes (kernels.h): padded with zeros, and cut into stride_h x stride_w phases so that
// the pixels that one tap meets lie next to each other. With a stride of 1 there is one phase,
// whose rows can share their halo: the zeros right of a row are the zeros left of the next. Where
// nothing is padded or cut, x is used as it is.
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <limits>

#include "ops/panels.h"
#include "ops/partition.h"

namespace sparselt {
namespace {

constexpr int64_t kMaxPixels = std::numeric_limits<int32_t>::max();

// One direction of a convolution.
struct Axis {
  int64_t size;  // of x
  int64_t kernel;
  int64_t stride;
  int64_t padding;
  int64_t dilation;
  int64_t out() const { return (size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1; }
  int64_t padded() const { return size + 2 * padding; }
  int64_t phase_size() const { return (padded() + stride - 1) / stride; }
  int64_t phase(int64_t tap) const { return tap * dilation % stride; }
  int64_t shift(int64_t tap) const { return tap * dilation / stride; }
};

struct Geometry {
  Axis h;
  Axis w;
  bool in_place() const {
    return h.stride == 1 && w.stride == 1 && h.padding == 0 && w.padding == 0;
  }
  // Sharing needs every output row to fit the shortened pitch: a 1 x 1 kernel with padding has more
  // outputs than that.
  bool shared_halo() const { return w.stride == 1 && w.out() <= w.size + w.padding; }
  int64_t pitch() const { return shared_halo() ? w.size + w.padding : w.phase_size(); }
  int64_t phase_area() const { return h.phase_size() * pitch(); }
  // Floats of all phases of a channel, plus the last row's right halo where halos are shared.
  int64_t plane() const {
    return h.stride * w.stride * phase_area() + (shared_halo() ? w.padding : 0);
  }
  int64_t tap_offset(int64_t r, int64_t s) const {
    return (h.phase(r) * w.stride + w.phase(s)) * phase_area() + h.shift(r) * pitch() + w.shift(s);
  }
  // Flat pixels up to the last output.
  int64_t flat_pixels() const { return (h.out() - 1) * pitch() + w.out(); }
};

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

// One channel of x, padded and cut into phases.
void lay_out_plane(const Geometry& g, const float* x, float* plane) {
  std::memset(plane, 0, sizeof(float) * static_cast<size_t>(g.plane()));
  for (int64_t row = 0; row < g.h.size; ++row) {
    const int64_t h = row + g.h.padding;
    const float* from = x + row * g.w.size;
    float* to = plane + h % g.h.stride * g.w.stride * g.phase_area() + h / g.h.stride * g.pitch();
    if (g.w.stride == 1) {
      std::memcpy(to + g.w.padding, from, sizeof(float) * static_cast<size_t>(g.w.size));
      continue;
    }
    for (int64_t column = 0; column < g.w.size; ++column) {
      const int64_t w = column + g.w.padding;
      to[w % g.w.stride * g.phase_area() + w / g.w.stride] = from[column];
    }
  }
}

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

std::vector<int32_t> column_offsets(const Geometry& g, int64_t channels) {
  STD_TORCH_CHECK(channels * g.plane() <= std::numeric_limits<int32_t>::max(),
                  "x: the channels of a group hold more than 2^31 floats; split the image");
  std::vector<int32_t> offsets;
  offsets.reserve(static_cast<size_t>(channels * g.h.kernel * g.w.kernel));
  for (int64_t channel = 0; channel < channels; ++channel) {
    for (int64_t r = 0; r < g.h.kernel; ++r) {
      for (int64_t s = 0; s < g.w.kernel; ++s) {
        offsets.push_back(static_cast<int32_t>(channel * g.plane() + g.tap_offset(r, s)));
      }
    }
  }
  return offsets;
}

// The checked shapes of a call, common to both variants.
struct Problem {
  Geometry geometry;
  int64_t batch, channels_in, channels_out, groups;
  std::vector<int64_t> out_shape() const {
    return {batch, channels_out, geometry.h.out(), geometry.w.out()};
  }
};

Problem make_problem(const Tensor& x, const Ints& meta, const Ints& stride, const Ints& padding,
                     const Ints& dilation, int64_t groups) {
  STD_TORCH_CHECK(meta.size() == 6 && x.dim() == 4,
                  "conv2d: expected a 4-D weight and x of (B, C_in, H, W)");
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
                  "stride, padding, dilation: expected 2 numbers each");
  const int64_t* shape = meta.data() + 2;
  STD_TORCH_CHECK(groups > 0 && shape[0] % groups == 0 && x.size(1) == shape[1] * groups,
                  "x: expected ", shape[1] * groups, " channels (", groups, " groups of ", shape[1],
                  ") and C_out divisible by groups, got ", x.size(1), " channels and C_out ",
                  shape[0]);
  const Axis h = make_axis("height", x.size(2), shape[2], stride[0], padding[0], dilation[0]);
  const Axis w = make_axis("width", x.size(3), shape[3], stride[1], padding[1], dilation[1]);
  STD_TORCH_CHECK(h.padded() <= kMaxPixels / w.padded(), "x: expected a padded map of at most ",
                  kMaxPixels, " pixels, got ", h.padded(), " x ", w.padded());
  return {{h, w}, x.size(0), x.size(1), shape[0], groups};
}

void run_conv2d(const Problem& problem, const Weight& weight, const Tensor& input,
                const Epilogue& epilogue, float* y) {
  const Geometry& g = problem.geometry;
  const int64_t group_channels = problem.channels_in / problem.groups;
  const int64_t group_rows = problem.channels_out / problem.groups;
  const int64_t out_plane = g.h.out() * g.w.out();
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

// The same for a panel kernel, which masks borders itself: x is laid out anew only where stride_w
// takes its columns apart.
void run_conv2d_panels(const Problem& problem, const Weight& weight, const Tensor& input,
                       const Epilogue& epilogue, float* y) {
  const Geometry& g = problem.geometry;
  STD_TORCH_CHECK(problem.groups == 1, weight.kernel->name, ": expected groups = 1, got ",
                  problem.groups);
  const bool in_place = g.w.stride == 1;
  const Tensor planes =
      in_place ? input : lay_out(g, const_float_data(input), problem.batch * problem.channels_in);
  const int64_t plane = in_place ? g.h.size * g.w.size : g.plane();
  PanelSource source{const_float_data(planes),
                     problem.batch,
                     problem.channels_in * plane,
                     plane,
                     in_place ? g.h.stride * g.w.size : g.pitch(),
                     g.h.out(),
                     g.w.out(),
                     g.h.stride,
                     g.h.size,
                     g.w.size,
                     in_place && (g.h.padding > 0 || g.w.padding > 0),
                     {}};
  for (int64_t r = 0; r < g.h.kernel; ++r) {
    for (int64_t s = 0; s < g.w.kernel; ++s) {
      const int64_t row = r * g.h.dilation - g.h.padding;
      const int64_t column = s * g.w.dilation - g.w.padding;
      source.taps.push_back({in_place ? row * g.w.size + column : g.tap_offset(r, s),
                             static_cast<int32_t>(row), static_cast<int32_t>(column)});
    }
  }
  run_panels(weight, source, y, epilogue);
}

}  // namespace

void conv2d_out(Tensor x, Tensor out, Parts parts, Ints meta, OptionalTensor bias,
                OptionalTensor residual, Ints stride, Ints padding, Ints dilation, int64_t groups,
                OptionalBound lower, OptionalBound upper, std::string kernel) {
  const Weight weight = as_weight(parts, meta, kernel, "conv2d", 4);
  const Problem problem = make_problem(x, meta, stride, padding, dilation, groups);
  check_output(out, problem.out_shape());
  const Tensor input = as_float_input(x, "x");
  const HeldEpilogue held =
      as_epilogue(bias, residual, lower, upper, problem.channels_out, problem.out_shape());
  if (out.numel() == 0) return;
  const auto run = weight.kernel->panel ? run_conv2d_panels : run_conv2d;
  run(problem, weight, input, held.pointers, float_data(out));
}

Tensor conv2d(Tensor x, Parts parts, Ints meta, OptionalTensor bias, OptionalTensor residual,
              Ints stride, Ints padding, Ints dilation, int64_t groups, OptionalBound lower,
              OptionalBound upper, std::string kernel) {
  Tensor out = new_output(make_problem(x, meta, stride, padding, dilation, groups).out_shape());
  conv2d_out(x, out, std::move(parts), std::move(meta), bias, residual, std::move(stride),
             std::move(padding), std::move(dilation), groups, lower, upper, std::move(kernel));
  return out;
}

}  // namespace sparselt
