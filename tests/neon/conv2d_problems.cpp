// SPDX-License-Identifier: Apache-2.0
//
// Convolutions of every kind of geometry, laid out by the same code as in the library.
#include <algorithm>

#include "ops/conv_geometry.h"
#include "ops/conv_panel_source.h"
#include "problems.h"

namespace neon_test {
namespace {

using sparselt::Axis;
using sparselt::Geometry;

struct Shape {
  int64_t batch, channels, filters, groups;
  Axis h, w;  // size, kernel, stride, padding, dilation
};

constexpr Shape kShapes[] = {
    {1, 1, 1, 1, {1, 1, 1, 0, 1}, {1, 1, 1, 0, 1}},
    {2, 3, 5, 1, {7, 1, 1, 0, 1}, {10, 1, 1, 0, 1}},
    {3, 4, 6, 1, {7, 3, 1, 1, 1}, {7, 3, 1, 1, 1}},
    {1, 4, 7, 1, {14, 3, 1, 1, 1}, {14, 3, 1, 1, 1}},
    {2, 4, 6, 2, {9, 3, 1, 1, 1}, {11, 3, 1, 1, 1}},
    {2, 4, 6, 2, {8, 3, 1, 0, 1}, {9, 3, 1, 0, 1}},
    {1, 4, 6, 1, {9, 3, 2, 1, 1}, {11, 3, 2, 0, 1}},
    {2, 3, 8, 1, {20, 7, 2, 3, 1}, {21, 7, 2, 3, 1}},
    {1, 2, 3, 1, {12, 3, 1, 2, 2}, {13, 3, 1, 2, 2}},
    {1, 2, 3, 1, {13, 2, 3, 1, 2}, {17, 5, 3, 4, 1}},
    {2, 2, 5, 1, {1, 1, 1, 0, 1}, {70, 5, 1, 2, 1}},
    {1, 2, 4, 1, {5, 5, 1, 0, 1}, {5, 5, 1, 0, 1}},
    {1, 2, 4, 1, {4, 1, 1, 1, 1}, {6, 1, 1, 1, 1}},
    {1, 3, 4, 3, {6, 3, 1, 1, 1}, {3, 3, 1, 1, 1}},
    {1, 2, 3, 1, {30, 3, 1, 1, 1}, {2, 1, 1, 0, 1}},
    {5, 2, 3, 1, {3, 3, 1, 1, 1}, {3, 3, 1, 1, 1}},
    {1, 3, 9, 1, {6, 3, 1, 1, 1}, {67, 3, 1, 1, 1}},
};
constexpr double kDensities[] = {0.0, 0.1, 0.3, 1.0};
constexpr int64_t kRepeats = 8;  // of each shape and density, under different endings

struct Convolution {
  int64_t variant;
  Shape shape;
  Geometry geometry;
  int64_t groups;
  Matrix weight;
  std::vector<float> x;
  Ending ending;
  int64_t area() const { return geometry.h.out() * geometry.w.out(); }
};

Convolution random_convolution(Generator& random, const Shape& shape, int64_t groups,
                               double density, int64_t variant) {
  const int64_t filters = shape.filters / groups * groups;
  Convolution conv{variant, shape, {shape.h, shape.w}, groups, {}, {}, {}};
  conv.shape.filters = filters;
  conv.weight =
      random_matrix(random, filters, shape.channels / groups * shape.h.kernel * shape.w.kernel,
                    density, variant % 3 == 2);
  conv.x = random_floats(random, shape.batch * shape.channels * shape.h.size * shape.w.size);
  conv.ending = random_ending(random, variant, filters, shape.batch * filters * conv.area());
  make_special(random, conv.x);
  return conv;
}

// What the weights of a group meet, column by column, as a matrix (cols, P * Q); padding as zeros.
std::vector<float> patches(const Convolution& conv, int64_t image, int64_t group) {
  const Axis& h = conv.geometry.h;
  const Axis& w = conv.geometry.w;
  const int64_t channels = conv.shape.channels / conv.groups;
  std::vector<float> matrix;
  for (int64_t k = 0; k < conv.weight.cols; ++k) {
    const int64_t channel = k / (h.kernel * w.kernel) + group * channels;
    const int64_t r = k / w.kernel % h.kernel;
    const int64_t s = k % w.kernel;
    for (int64_t i = 0; i < conv.area(); ++i) {
      const int64_t row = i / w.out() * h.stride + r * h.dilation - h.padding;
      const int64_t column = i % w.out() * w.stride + s * w.dilation - w.padding;
      const bool inside = row >= 0 && row < h.size && column >= 0 && column < w.size;
      const int64_t plane = image * conv.shape.channels + channel;
      matrix.push_back(
          inside ? conv.x[static_cast<size_t>((plane * h.size + row) * w.size + column)] : 0.0f);
    }
  }
  return matrix;
}

// `weight` is what is stored of the convolution's.
Expected expect(const Convolution& conv, const Matrix& weight) {
  Expected expected;
  const int64_t group_rows = conv.weight.rows / conv.groups;
  for (int64_t image = 0; image < conv.shape.batch; ++image) {
    for (int64_t group = 0; group < conv.groups; ++group) {
      append_expected(expected, weight, {group * group_rows, (group + 1) * group_rows},
                      patches(conv, image, group), conv.area(), conv.ending,
                      static_cast<int64_t>(expected.values.size()));
    }
  }
  return expected;
}

// The convolution by a conv2d kernel, as ops/conv_planes.cpp runs it; with `random` cut.
void run_planes(const KernelInfo& kernel, const Convolution& conv, const SparseView& weight,
                const float* planes, float* y, const Epilogue& epilogue, Generator* random) {
  const Geometry& g = conv.geometry;
  const int64_t group_channels = conv.shape.channels / conv.groups;
  const int64_t group_rows = conv.weight.rows / conv.groups;
  const std::vector<int32_t> offsets = sparselt::column_offsets(g, group_channels);
  for (int64_t item = 0; item < conv.shape.batch * conv.groups; ++item) {
    const int64_t image_at = item / conv.groups * conv.weight.rows * conv.area();
    const int64_t first_row = item % conv.groups * group_rows;
    sparselt::Conv2dCall call{weight,         planes + item * group_channels * g.plane(),
                              offsets.data(), g.pitch(),
                              g.w.out(),      y + image_at,
                              conv.area(),    epilogue};
    if (epilogue.residual) call.epilogue.residual += image_at;
    std::vector<int64_t> rows{0, group_rows};
    std::vector<int64_t> pixels{0, g.flat_pixels()};
    if (random) {
      rows = random_cuts(*random, group_rows);
      pixels = random_cuts(*random, g.flat_pixels());
    }
    for (size_t i = 1; i < rows.size(); ++i) {
      for (size_t j = 1; j < pixels.size(); ++j) {
        kernel.conv2d(call, {first_row + rows[i - 1], first_row + rows[i]},
                      {pixels[j - 1], pixels[j]});
      }
    }
  }
}

void run_convolution(const KernelInfo& kernel, const Convolution& conv, Edge edge,
                     Generator& random) {
  const Geometry& g = conv.geometry;
  const Expected expected = expect(conv, conv.weight);
  const SparseArrays weight = pack_sparse(conv.weight, 1, 1, edge);
  const int64_t channels = conv.shape.batch * conv.shape.channels;
  Guarded<float> planes(conv.x, edge);
  if (!g.in_place()) {
    planes = Guarded<float>(static_cast<size_t>(channels * g.plane()), edge);
    for (int64_t i = 0; i < channels; ++i) {
      sparselt::lay_out_plane(g, conv.x.data() + i * g.h.size * g.w.size,
                              planes.data() + i * g.plane());
    }
  }
  Guarded<float> y(expected.values.size(), edge);
  Guarded<float> y_cut(expected.values.size(), edge);
  const HeldEnding ending = hold_ending(conv.ending, edge);
  run_planes(kernel, conv, weight.view, planes.data(), y.data(), ending.pointers, nullptr);
  expect_right(expected, y.data());
  run_planes(kernel, conv, weight.view, planes.data(), y_cut.data(), ending.pointers, &random);
  expect_same(y, y_cut);
  expect_intact(planes.intact() && y.intact() && y_cut.intact() && weight.intact() &&
                ending.intact());
}

void run_panel_convolution(const KernelInfo& kernel, const Convolution& conv, Edge edge,
                           Generator& random) {
  const SlicedWeight weight = sliced_weight(kernel, conv.weight, conv.variant, conv.groups, edge);
  const Expected expected = expect(conv, weight.matrix);
  const int64_t channels = conv.shape.batch * conv.shape.channels;
  const int64_t area = conv.geometry.h.size * conv.geometry.w.size;
  const bool is_cut = conv.geometry.w.stride > 1;
  const sparselt::ChannelCut cut(conv.geometry);
  Guarded<float> planes(static_cast<size_t>(channels * (is_cut ? cut.floats() : area)), edge);
  for (int64_t i = 0; i < channels; ++i) {
    if (is_cut) {
      cut.run(conv.x.data() + i * area, planes.data() + i * cut.floats());
    } else {
      std::copy_n(conv.x.data() + i * area, area, planes.data() + i * area);
    }
  }
  const sparselt::PanelSource source = sparselt::conv_panel_source(
      conv.geometry, conv.shape.batch, conv.shape.channels, conv.groups);
  Guarded<float> y(expected.values.size(), edge);
  Guarded<float> y_cut(expected.values.size(), edge);
  const HeldEnding ending = hold_ending(conv.ending, edge);
  run_panels(kernel, weight.arrays.view, source, planes.data(), y.data(), ending.pointers, edge,
             nullptr);
  expect_right(expected, y.data());
  run_panels(kernel, weight.arrays.view, source, planes.data(), y_cut.data(), ending.pointers, edge,
             &random);
  expect_same(y, y_cut);
  expect_intact(planes.intact() && y.intact() && y_cut.intact() && weight.arrays.intact() &&
                ending.intact());
}

template <class Run>
int64_t walk(const KernelInfo& kernel, bool grouped, Run run) {
  int64_t variant = 0;
  for (const Shape& shape : kShapes) {
    for (const double density : kDensities) {
      for (int64_t repeat = 0; repeat < kRepeats; ++repeat) {
        begin_problem(std::string(kernel.name) + " shape " + std::to_string(&shape - kShapes) +
                      " density=" + std::to_string(density) +
                      " variant=" + std::to_string(variant));
        Generator random(static_cast<uint32_t>(variant));
        const Convolution conv =
            random_convolution(random, shape, grouped ? shape.groups : 1, density, variant);
        for (const Edge edge : {Edge::kFront, Edge::kBack}) run(kernel, conv, edge, random);
        ++variant;
      }
    }
  }
  return variant;
}

}  // namespace

int64_t check_conv2d(const KernelInfo& kernel) { return walk(kernel, true, run_convolution); }
int64_t check_panel_conv2d(const KernelInfo& kernel) {
  // The groups of this table are smaller than a row of blocks.
  return walk(kernel, kernel.format != "bsell", run_panel_convolution);
}

}  // namespace neon_test
