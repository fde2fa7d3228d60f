// SPDX-License-Identifier: Apache-2.0
//
// Products: sizes around every kernel's tile, densities from nothing to everything.
#include <algorithm>

#include "ops/panel_layout.h"
#include "problems.h"

namespace neon_test {

using sparselt::PanelLayout;

namespace {

constexpr int64_t kColumns[] = {1,  2,  3,  4,  5,  7,  8,  9,  12, 15, 16, 17, 23,  24,  25, 31,
                                32, 33, 47, 48, 49, 60, 63, 64, 65, 66, 67, 96, 127, 129, 160};
constexpr int64_t kShapes[][2] = {{1, 1}, {2, 3}, {5, 7}, {17, 33}, {33, 131}, {8, 64}};
constexpr double kDensities[] = {0.0, 0.02, 0.1, 0.5, 1.0};
constexpr int64_t kBlocks[][2] = {{1, 1}, {4, 1}, {8, 1}, {16, 1}, {2, 2},
                                  {3, 5}, {1, 4}, {7, 2}, {16, 16}};

struct Product {
  int64_t variant;
  int64_t columns;
  Matrix weight;
  std::vector<float> x;
  Ending ending;
};

Product random_product(Generator& random, int64_t rows, int64_t cols, int64_t columns,
                       double density, int64_t variant) {
  Product product{variant, columns, random_matrix(random, rows, cols, density, variant % 3 == 2),
                  random_floats(random, cols * columns),
                  random_ending(random, variant, rows, rows * columns)};
  make_special(random, product.x);
  return product;
}

// A row-major matrix with rows `stride` floats apart, and bytes of 0xff in between.
Guarded<float> spread(const std::vector<float>& values, int64_t rows, int64_t columns,
                      int64_t stride, Edge edge) {
  Guarded<float> apart(static_cast<size_t>((rows - 1) * stride + columns), edge);
  for (int64_t row = 0; row < rows && !values.empty(); ++row) {
    std::memcpy(apart.data() + row * stride, values.data() + row * columns,
                static_cast<size_t>(columns) * sizeof(float));
  }
  return apart;
}

std::vector<float> gather(const Guarded<float>& apart, int64_t rows, int64_t columns,
                          int64_t stride) {
  std::vector<float> values;
  for (int64_t i = 0; i < rows * stride; ++i) {
    const auto at = static_cast<size_t>(i);
    if (i % stride < columns) {
      values.push_back(apart[at]);
    } else if (at < apart.size()) {
      const float gap = apart[at];
      constexpr unsigned char kUntouched[] = {0xff, 0xff, 0xff, 0xff};
      expect_intact(std::memcmp(&gap, kUntouched, sizeof(gap)) == 0);
    }
  }
  return values;
}

void run_product(const KernelInfo& kernel, const Product& product, Edge edge, Generator& random) {
  const int64_t* block = kBlocks[kernel.format == "bsr" ? product.variant % 9 : 0];
  const Matrix stored = filled_blocks(product.weight, block[0], block[1]);
  const Range rows{0, stored.rows};
  Expected expected;
  append_expected(expected, stored, rows, product.x, product.columns, product.ending, 0);
  const SparseArrays weight = pack_sparse(product.weight, block[0], block[1], edge);
  const int64_t x_stride = product.columns + product.variant % 2 * 3;
  const int64_t y_stride = product.columns + product.variant % 3 * 2;
  const Guarded<float> x = spread(product.x, stored.cols, product.columns, x_stride, edge);
  Guarded<float> y = spread({}, stored.rows, product.columns, y_stride, edge);
  Guarded<float> y_cut = spread({}, stored.rows, product.columns, y_stride, edge);
  HeldEnding ending = hold_ending(product.ending, edge);
  if (!product.ending.residual.empty()) {
    ending.residual = spread(product.ending.residual, stored.rows, product.columns, y_stride, edge);
    ending.pointers.residual = ending.residual.data();
  }
  sparselt::SpmmCall call{weight.view, x.data(),        x_stride,       y.data(),
                          y_stride,    product.columns, ending.pointers};
  const int64_t stored_rows = (stored.rows + block[0] - 1) / block[0];
  kernel.spmm(call, {0, stored_rows}, {0, product.columns});
  expect_right(expected, gather(y, stored.rows, product.columns, y_stride).data());

  call.y = y_cut.data();
  const std::vector<int64_t> row_cuts = random_cuts(random, stored_rows);
  const std::vector<int64_t> column_cuts = random_cuts(random, product.columns);
  for (size_t i = 1; i < row_cuts.size(); ++i) {
    for (size_t j = 1; j < column_cuts.size(); ++j) {
      kernel.spmm(call, {row_cuts[i - 1], row_cuts[i]}, {column_cuts[j - 1], column_cuts[j]});
    }
  }
  expect_same(y, y_cut);
  expect_intact(x.intact() && y.intact() && y_cut.intact() && weight.intact() && ending.intact());
}

// Where an element of a matrix lies in panels.
size_t place_in(const PanelLayout& layout, int64_t row, int64_t pixel) {
  const int64_t vector = pixel / PanelLayout::kLanes * layout.vector_floats();
  const int64_t below = (row + row / layout.period) * PanelLayout::kLanes;
  return static_cast<size_t>(vector + below + pixel % PanelLayout::kLanes);
}

// With zeros in the rows and lanes that belong to no element.
Guarded<float> in_panels(const std::vector<float>& values, const PanelLayout& layout, Edge edge) {
  const std::vector<float> zeros(static_cast<size_t>(layout.floats()), 0.0f);
  Guarded<float> panels(zeros, edge);
  for (size_t i = 0; i < values.size(); ++i) {
    const auto at = static_cast<int64_t>(i);
    panels.data()[place_in(layout, at / layout.pixels, at % layout.pixels)] = values[i];
  }
  return panels;
}

// The product of x in panels, to y in panels, with a residual in panels.
std::vector<float> multiply_in_panels(const KernelInfo& kernel, const SellView& weight,
                                      const Product& product, Edge edge) {
  constexpr int kVectors = sparselt::kMaxPanelVectors;
  const PanelLayout x_layout{weight.cols, 1, product.columns, weight.block_cols};
  const PanelLayout y_layout{weight.rows, 1, product.columns, 1 + product.variant % 5};
  const Guarded<float> x = in_panels(product.x, x_layout, edge);
  const Guarded<float> residual = in_panels(product.ending.residual, y_layout, edge);
  Guarded<float> y(static_cast<size_t>(y_layout.floats()), edge);
  const HeldEnding ending = hold_ending(product.ending, edge);
  int64_t places[kVectors];
  sparselt::Piece pieces[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    places[v] = v * x_layout.vector_floats();
    pieces[v] = {static_cast<int32_t>(v * y_layout.vector_floats()), static_cast<uint16_t>(v),
                 static_cast<uint16_t>(sparselt::kAllLanes)};
  }
  const int64_t vectors = (product.columns + PanelLayout::kLanes - 1) / PanelLayout::kLanes;
  const int64_t most = kernel.tile_columns / PanelLayout::kLanes;
  for (int64_t first = 0; first < vectors; first += most) {
    const auto count = static_cast<int>(std::min(most, vectors - first));
    Guarded<float> sums(static_cast<size_t>(weight.rows * count * PanelLayout::kLanes), edge);
    const sparselt::PanelRows rows{PanelLayout::kLanes, static_cast<uint32_t>(y_layout.period),
                                   pieces, count};
    sparselt::PanelCall call{weight, {}, ending.pointers, nullptr, sums.data()};
    call.panel.x = x.data() + first * x_layout.vector_floats();
    call.panel.x_places = places;
    call.panel.x_block_stride = (weight.block_cols + 1) * PanelLayout::kLanes;
    call.panel.taps = 1;
    call.panel.vectors = count;
    call.panel.y = y.data() + first * y_layout.vector_floats();
    call.panel.y_rows = call.panel.residual_rows = rows;
    if (call.epilogue.residual) {
      call.epilogue.residual = residual.data() + first * y_layout.vector_floats();
    }
    kernel.panel(call, {0, weight.num_sections});
    expect_intact(sums.intact());
  }
  expect_intact(x.intact() && residual.intact() && y.intact() && ending.intact());
  std::vector<float> values;
  for (int64_t i = 0; i < weight.rows * product.columns; ++i) {
    values.push_back(y[place_in(y_layout, i / product.columns, i % product.columns)]);
  }
  return values;
}

void run_panel_product(const KernelInfo& kernel, const Product& product, Edge edge,
                       Generator& random) {
  const SlicedWeight weight = sliced_weight(kernel, product.weight, product.variant, 1, edge);
  Expected expected;
  append_expected(expected, weight.matrix, {0, product.weight.rows}, product.x, product.columns,
                  product.ending, 0);
  const Guarded<float> x(product.x, edge);
  Guarded<float> y(expected.values.size(), edge);
  Guarded<float> y_cut(expected.values.size(), edge);
  const HeldEnding ending = hold_ending(product.ending, edge);
  const int64_t columns = product.columns;
  const sparselt::PanelSource source{1, 0, columns, columns, 1,          columns,
                                     1, 1, columns, false,   {{0, 0, 0}}};
  run_panels(kernel, weight.arrays.view, source, x.data(), y.data(), ending.pointers, edge,
             nullptr);
  expect_right(expected, y.data());
  run_panels(kernel, weight.arrays.view, source, x.data(), y_cut.data(), ending.pointers, edge,
             &random);
  expect_same(y, y_cut);
  expect_same(y, {multiply_in_panels(kernel, weight.arrays.view, product, edge), edge});
  expect_intact(x.intact() && y.intact() && y_cut.intact() && weight.arrays.intact() &&
                ending.intact());
}

template <class Run>
int64_t walk(const KernelInfo& kernel, Run run) {
  int64_t variant = 0;
  for (const int64_t columns : kColumns) {
    for (const auto& [rows, cols] : kShapes) {
      for (const double density : kDensities) {
        begin_problem(std::string(kernel.name) + " M=" + std::to_string(rows) +
                      " K=" + std::to_string(cols) + " N=" + std::to_string(columns) + " density=" +
                      std::to_string(density) + " variant=" + std::to_string(variant));
        Generator random(static_cast<uint32_t>(variant));
        const Product product = random_product(random, rows, cols, columns, density, variant);
        for (const Edge edge : {Edge::kFront, Edge::kBack}) run(kernel, product, edge, random);
        ++variant;
      }
    }
  }
  return variant;
}

}  // namespace

int64_t check_spmm(const KernelInfo& kernel) { return walk(kernel, run_product); }
int64_t check_panel_spmm(const KernelInfo& kernel) { return walk(kernel, run_panel_product); }

}  // namespace neon_test
