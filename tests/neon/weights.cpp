// SPDX-License-Identifier: Apache-2.0
#include "weights.h"

#include <algorithm>

namespace neon_test {

float random_float(Generator& random) {
  return static_cast<float>(static_cast<int64_t>(random() >> 8) - (1 << 23)) * 0x1p-23f;
}

int64_t random_below(Generator& random, int64_t end) {
  return static_cast<int64_t>(random()) % end;
}

std::vector<float> random_floats(Generator& random, int64_t count) {
  std::vector<float> floats(static_cast<size_t>(count));
  for (float& value : floats) value = random_float(random);
  return floats;
}

Matrix random_matrix(Generator& random, int64_t rows, int64_t cols, double density, bool ragged) {
  Matrix matrix{rows, cols, random_floats(random, rows * cols),
                std::vector<bool>(static_cast<size_t>(rows * cols))};
  const int64_t full_row = ragged ? random_below(random, rows) : -1;
  for (int64_t m = 0; m < rows; ++m) {
    const bool empty = ragged && random_below(random, 4) == 0;
    for (int64_t k = 0; k < cols; ++k) {
      const size_t at = static_cast<size_t>(m * cols + k);
      const bool chosen = (random_float(random) + 1) / 2 < density;
      matrix.stored[at] = m == full_row || (chosen && !empty);
      if (random_below(random, 8) == 0) matrix.values[at] = 0.0f;
    }
  }
  return matrix;
}

Matrix filled_blocks(const Matrix& matrix, int64_t block_rows, int64_t block_cols) {
  Matrix filled = matrix;
  for (int64_t m = 0; m < matrix.rows; ++m) {
    for (int64_t k = 0; k < matrix.cols; ++k) {
      const size_t at = static_cast<size_t>(m * matrix.cols + k);
      if (!matrix.stored[at]) filled.values[at] = 0.0f;
      const int64_t first_row = m / block_rows * block_rows;
      const int64_t first_col = k / block_cols * block_cols;
      for (int64_t r = first_row; r < std::min(matrix.rows, first_row + block_rows); ++r) {
        for (int64_t c = first_col; c < std::min(matrix.cols, first_col + block_cols); ++c) {
          if (matrix.stored[static_cast<size_t>(r * matrix.cols + c)]) filled.stored[at] = true;
        }
      }
    }
  }
  return filled;
}

SparseArrays pack_sparse(const Matrix& matrix, int64_t block_rows, int64_t block_cols, Edge edge) {
  std::vector<int32_t> crow{0};
  std::vector<int32_t> columns;
  std::vector<float> values;
  for (int64_t first = 0; first < matrix.rows; first += block_rows) {
    for (int64_t k = 0; k < matrix.cols; k += block_cols) {
      bool stored = false;
      std::vector<float> block;
      for (int64_t m = first; m < first + block_rows; ++m) {
        for (int64_t c = k; c < k + block_cols; ++c) {
          const bool inside = m < matrix.rows && c < matrix.cols;
          const size_t at = static_cast<size_t>(m * matrix.cols + c);
          block.push_back(inside && matrix.stored[at] ? matrix.values[at] : 0.0f);
          stored = stored || (inside && matrix.stored[at]);
        }
      }
      if (!stored) continue;
      columns.push_back(static_cast<int32_t>(k / block_cols));
      values.insert(values.end(), block.begin(), block.end());
    }
    crow.push_back(static_cast<int32_t>(columns.size()));
  }
  SparseArrays arrays{{crow, edge}, {columns, edge}, {values, edge}, {}};
  arrays.view = {arrays.crow_indices.data(),
                 arrays.col_indices.data(),
                 arrays.values.data(),
                 matrix.rows,
                 matrix.cols,
                 block_rows,
                 block_cols};
  return arrays;
}

BitsArrays pack_bits(const Matrix& matrix, Edge edge) {
  const auto chunks =
      static_cast<size_t>((matrix.cols + sparselt::kMaskBits - 1) / sparselt::kMaskBits);
  std::vector<int32_t> crow{0};
  std::vector<uint16_t> masks(static_cast<size_t>(matrix.rows) * chunks);
  std::vector<float> values;
  for (int64_t m = 0; m < matrix.rows; ++m) {
    for (int64_t k = 0; k < matrix.cols; ++k) {
      const auto at = static_cast<size_t>(m * matrix.cols + k);
      if (!matrix.stored[at]) continue;
      const auto chunk = static_cast<size_t>(k / sparselt::kMaskBits);
      uint16_t& mask = masks[static_cast<size_t>(m) * chunks + chunk];
      mask = static_cast<uint16_t>(mask | 1 << k % sparselt::kMaskBits);
      values.push_back(matrix.values[at]);
    }
    crow.push_back(static_cast<int32_t>(values.size()));
  }
  values.resize(values.size() + sparselt::kMaskBits);
  BitsArrays arrays{{crow, edge}, {masks, edge}, {values, edge}, {}};
  arrays.view = {arrays.crow_indices.data(), arrays.masks.data(), arrays.values.data(), matrix.rows,
                 matrix.cols};
  return arrays;
}

}  // namespace neon_test
