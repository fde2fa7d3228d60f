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

namespace {

// One row's part of a block of columns.
struct Run {
  int64_t row;
  std::vector<int64_t> columns;
};

// The rows of a section that get a slice in a block, longest first.
std::vector<Run> runs_of(const Matrix& matrix, int64_t first_row, int64_t last_row,
                         int64_t first_col, int64_t last_col, bool every_row) {
  std::vector<Run> runs;
  for (int64_t m = first_row; m < last_row; ++m) {
    Run run{m, {}};
    for (int64_t k = first_col; k < last_col; ++k) {
      if (matrix.stored[static_cast<size_t>(m * matrix.cols + k)]) run.columns.push_back(k);
    }
    if (every_row || !run.columns.empty()) runs.push_back(run);
  }
  std::stable_sort(runs.begin(), runs.end(),
                   [](const Run& a, const Run& b) { return a.columns.size() > b.columns.size(); });
  return runs;
}

}  // namespace

SellArrays pack_sell(const Matrix& matrix, int64_t slice_height, int64_t block_cols,
                     int64_t num_sections, Edge edge) {
  const int64_t num_blocks = std::max<int64_t>(1, (matrix.cols + block_cols - 1) / block_cols);
  std::vector<int32_t> block_slices{0};
  std::vector<int32_t> slice_steps{0};
  std::vector<int32_t> slice_rows;
  std::vector<uint16_t> columns;
  std::vector<float> values;
  const size_t height = static_cast<size_t>(slice_height);
  for (int64_t section = 0; section < num_sections; ++section) {
    for (int64_t block = 0; block < num_blocks; ++block) {
      const int64_t first_col = block * block_cols;
      const std::vector<Run> runs = runs_of(matrix, section * matrix.rows / num_sections,
                                            (section + 1) * matrix.rows / num_sections, first_col,
                                            std::min(matrix.cols, first_col + block_cols),
                                            block == 0 || block + 1 == num_blocks);
      for (size_t first = 0; first < runs.size(); first += height) {
        const size_t steps = runs[first].columns.size();
        for (size_t lane = first; lane < first + height; ++lane) {
          slice_rows.push_back(lane < runs.size() ? static_cast<int32_t>(runs[lane].row) : -1);
        }
        for (size_t step = 0; step < steps; ++step) {
          for (size_t lane = first; lane < first + height; ++lane) {
            const bool held = lane < runs.size() && step < runs[lane].columns.size();
            const int64_t k = held ? runs[lane].columns[step] : first_col + block_cols;
            columns.push_back(static_cast<uint16_t>(k - first_col));
            values.push_back(
                held ? matrix.values[static_cast<size_t>(runs[lane].row * matrix.cols + k)] : 0.0f);
          }
        }
        slice_steps.push_back(slice_steps.back() + static_cast<int32_t>(steps));
      }
      block_slices.push_back(static_cast<int32_t>(slice_rows.size() / height));
    }
  }
  SellArrays arrays{{block_slices, edge}, {slice_steps, edge}, {slice_rows, edge},
                    {columns, edge},      {values, edge},      {}};
  arrays.view = {arrays.block_slices.data(),
                 arrays.slice_steps.data(),
                 arrays.slice_rows.data(),
                 arrays.columns.data(),
                 arrays.values.data(),
                 matrix.rows,
                 matrix.cols,
                 slice_height,
                 block_cols,
                 num_blocks,
                 num_sections};
  return arrays;
}

}  // namespace neon_test
