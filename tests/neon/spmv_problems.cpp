// SPDX-License-Identifier: Apache-2.0
//
// Products with few columns, x laid out as kernels.h says.
#include <algorithm>

#include "problems.h"

namespace neon_test {
namespace {

// The last is longer than the chains in which kernels add up.
constexpr int64_t kShapes[][2] = {{1, 1},    {2, 3},  {5, 7},   {17, 33},
                                  {33, 131}, {8, 64}, {3, 300}, {21, 900}};
constexpr double kDensities[] = {0.0, 0.02, 0.1, 0.5, 1.0};

// The columns of x (cols x columns, row-major), and behind them, of the sign format, their
// negatives.
Guarded<float> laid_out(const SellView& w, bool mirrored, const std::vector<float>& x,
                        int64_t columns, int64_t lanes, Edge edge) {
  std::vector<float> floats;
  for (int64_t block = 0; block < w.num_blocks; ++block) {
    for (const float sign : mirrored ? std::vector<float>{1.0f, -1.0f} : std::vector<float>{1.0f}) {
      for (int64_t c = 0; c <= w.block_cols; ++c) {
        const int64_t k = block * w.block_cols + c;
        const bool held = c < w.block_cols && k < w.cols;
        for (int64_t n = 0; n < lanes; ++n) {
          floats.push_back(held && n < columns ? sign * x[static_cast<size_t>(k * columns + n)]
                                               : 0.0f);
        }
      }
    }
  }
  return {floats, edge};
}

// The columns of x one after the other, each with zeros up to a multiple of 16.
Guarded<float> laid_in_columns(const std::vector<float>& x, int64_t rows, int64_t columns,
                               int64_t stride, Edge edge) {
  std::vector<float> floats(static_cast<size_t>(columns * stride));
  for (int64_t n = 0; n < columns; ++n) {
    for (int64_t k = 0; k < rows; ++k) {
      floats[static_cast<size_t>(n * stride + k)] = x[static_cast<size_t>(k * columns + n)];
    }
  }
  return {floats, edge};
}

// A weight and its x as a kernel wants them.
struct Held {
  Matrix matrix;  // what of the given one the format holds
  SellArrays slices;
  BitsArrays bits;
  Guarded<float> x;
  sparselt::SpmvCall call;  // with the arrays above
  int64_t sections;
  bool intact() const { return slices.intact() && bits.intact() && x.intact(); }
};

Held hold_bits(const Matrix& matrix, const std::vector<float>& x, int64_t columns, Edge edge) {
  const int64_t stride =
      (matrix.cols + sparselt::kMaskBits - 1) / sparselt::kMaskBits * sparselt::kMaskBits;
  Held held{matrix,
            {},
            pack_bits(matrix, edge),
            laid_in_columns(x, matrix.cols, columns, stride, edge),
            {},
            matrix.rows};
  held.call.bits = held.bits.view;
  held.call.block_stride = stride;
  held.call.lanes = 1;
  return held;
}

Held hold_slices(const KernelInfo& kernel, const Matrix& matrix, const std::vector<float>& x,
                 int64_t columns, int64_t variant, Edge edge) {
  SlicedWeight weight = sliced_weight(kernel, matrix, variant, 1, edge);
  const SellView w = weight.arrays.view;
  const int64_t lanes = columns == 1 ? 1 : (columns <= 4 ? 4 : (columns <= 8 ? 8 : 16));
  const bool mirrored = kernel.format == "sign";
  Held held{std::move(weight.matrix),
            std::move(weight.arrays),
            {},
            laid_out(w, mirrored, x, columns, lanes, edge),
            {},
            w.num_sections};
  held.call.weight = w;
  held.call.block_stride = (w.block_cols + 1) * lanes * (mirrored ? 2 : 1);
  held.call.lanes = lanes;
  return held;
}

// A row-major matrix in an array in which element (m, n) is at m * row_stride + n * column_stride,
// and bytes of 0xff in between.
Guarded<float> laid_apart(const std::vector<float>& values, int64_t rows, int64_t columns,
                          int64_t row_stride, int64_t column_stride, Edge edge) {
  const int64_t last = (rows - 1) * row_stride + (columns - 1) * column_stride;
  Guarded<float> apart(static_cast<size_t>(last + 1), edge);
  for (size_t i = 0; i < values.size(); ++i) {
    const int64_t m = static_cast<int64_t>(i) / columns;
    apart.data()[m * row_stride + static_cast<int64_t>(i) % columns * column_stride] = values[i];
  }
  return apart;
}

void run_product(const KernelInfo& kernel, const Matrix& matrix, const std::vector<float>& x,
                 int64_t columns, const Ending& terms, int64_t variant, Edge edge) {
  const Held held = kernel.format == "bits"
                        ? hold_bits(matrix, x, columns, edge)
                        : hold_slices(kernel, matrix, x, columns, variant, edge);
  const int64_t rows = matrix.rows;
  Expected expected;
  append_expected(expected, held.matrix, {0, rows}, x, columns, terms, 0);
  const bool turned = columns == 1 || variant % 2 == 0;
  const int64_t row_stride = turned ? 1 : columns + variant % 3;
  const int64_t column_stride = turned ? rows + variant % 3 : 1;
  const auto apart = [&](const std::vector<float>& values) {
    return laid_apart(values, rows, columns, row_stride, column_stride, edge);
  };
  HeldEnding ending = hold_ending(terms, edge);
  if (ending.pointers.residual) {
    ending.residual = apart(terms.residual);
    ending.pointers.residual = ending.residual.data();
  }
  Guarded<float> y = apart({});
  Guarded<float> y_cut = apart({});
  sparselt::SpmvCall call = held.call;
  call.x = held.x.data();
  call.columns = columns;
  call.y = y.data();
  call.y_row_stride = row_stride;
  call.y_column_stride = column_stride;
  call.epilogue = ending.pointers;
  kernel.spmv(call, {0, held.sections});
  call.y = y_cut.data();
  for (int64_t section = held.sections; section-- > 0;) kernel.spmv(call, {section, section + 1});

  std::vector<float> got;
  const Guarded<float> untouched = apart({});
  std::vector<bool> is_gap(y.size(), true);
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t n = 0; n < columns; ++n) {
      const auto at = static_cast<size_t>(m * row_stride + n * column_stride);
      got.push_back(y[at]);
      is_gap[at] = false;
    }
  }
  expect_right(expected, got.data());
  expect_same(y, y_cut);
  for (size_t at = 0; at < y.size(); ++at) {
    expect_intact(!is_gap[at] ||
                  std::memcmp(y.data() + at, untouched.data() + at, sizeof(float)) == 0);
  }
  expect_intact(held.intact() && y.intact() && y_cut.intact() && ending.intact());
}

}  // namespace

int64_t check_spmv(const KernelInfo& kernel) {
  int64_t variant = 0;
  const int64_t repeats = std::max<int64_t>(2, 16 / kernel.tile_columns);
  for (int64_t columns = 1; columns <= kernel.tile_columns; ++columns) {
    for (const auto& [rows, cols] : kShapes) {
      for (const double density : kDensities) {
        for (int64_t repeat = 0; repeat < repeats; ++repeat, ++variant) {
          begin_problem(std::string(kernel.name) + " M=" + std::to_string(rows) +
                        " K=" + std::to_string(cols) + " N=" + std::to_string(columns) +
                        " density=" + std::to_string(density) +
                        " variant=" + std::to_string(variant));
          Generator random(static_cast<uint32_t>(variant));
          const Matrix matrix = random_matrix(random, rows, cols, density, variant % 3 == 2);
          std::vector<float> x = random_floats(random, cols * columns);
          make_special(random, x);
          const Ending ending = random_ending(random, variant, rows, rows * columns);
          for (const Edge edge : {Edge::kFront, Edge::kBack}) {
            run_product(kernel, matrix, x, columns, ending, variant, edge);
          }
        }
      }
    }
  }
  return variant;
}

}  // namespace neon_test
