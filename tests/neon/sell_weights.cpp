// SPDX-License-Identifier: Apache-2.0
//
// The formats made of slices.
#include <algorithm>
#include <cmath>

#include "weights.h"

namespace neon_test {
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

// The arrays as they grow.
struct Slices {
  std::vector<int32_t> block_slices{0};
  std::vector<int32_t> slice_steps{0};
  std::vector<int32_t> slice_rows;
  std::vector<uint16_t> columns;
  std::vector<float> values;
};

// `add` adds the slices of one block of a section, given its runs and its first column.
template <class Add>
Slices slices_of(const Matrix& matrix, int64_t block_cols, int64_t num_sections, Add add) {
  Slices slices;
  const int64_t num_blocks = std::max<int64_t>(1, (matrix.cols + block_cols - 1) / block_cols);
  for (int64_t section = 0; section < num_sections; ++section) {
    for (int64_t block = 0; block < num_blocks; ++block) {
      const int64_t first_col = block * block_cols;
      add(slices,
          runs_of(matrix, section * matrix.rows / num_sections,
                  (section + 1) * matrix.rows / num_sections, first_col,
                  std::min(matrix.cols, first_col + block_cols),
                  block == 0 || block + 1 == num_blocks),
          first_col);
      slices.block_slices.push_back(static_cast<int32_t>(slices.slice_steps.size()) - 1);
    }
  }
  return slices;
}

SellArrays hold(const Slices& slices, const Matrix& matrix, int64_t slice_height,
                int64_t block_cols, int64_t num_sections, Edge edge) {
  SellArrays arrays{{slices.block_slices, edge},
                    {slices.slice_steps, edge},
                    {slices.slice_rows, edge},
                    {slices.columns, edge},
                    {slices.values, edge},
                    {},
                    {}};
  arrays.view = {arrays.block_slices.data(),
                 arrays.slice_steps.data(),
                 arrays.slice_rows.data(),
                 arrays.columns.data(),
                 arrays.values.data(),
                 matrix.rows,
                 matrix.cols,
                 slice_height,
                 block_cols,
                 std::max<int64_t>(1, (matrix.cols + block_cols - 1) / block_cols),
                 num_sections};
  return arrays;
}

Slices sell_slices(const Matrix& matrix, int64_t slice_height, int64_t block_cols,
                   int64_t num_sections) {
  const size_t height = static_cast<size_t>(slice_height);
  const auto add = [&](Slices& slices, const std::vector<Run>& runs, int64_t first_col) {
    for (size_t first = 0; first < runs.size(); first += height) {
      const size_t steps = runs[first].columns.size();
      for (size_t lane = first; lane < first + height; ++lane) {
        slices.slice_rows.push_back(lane < runs.size() ? static_cast<int32_t>(runs[lane].row) : -1);
      }
      for (size_t step = 0; step < steps; ++step) {
        for (size_t lane = first; lane < first + height; ++lane) {
          const bool held = lane < runs.size() && step < runs[lane].columns.size();
          const int64_t k = held ? runs[lane].columns[step] : first_col + block_cols;
          slices.columns.push_back(static_cast<uint16_t>(k - first_col));
          slices.values.push_back(
              held ? matrix.values[static_cast<size_t>(runs[lane].row * matrix.cols + k)] : 0.0f);
        }
      }
      slices.slice_steps.push_back(slices.slice_steps.back() + static_cast<int32_t>(steps));
    }
  };
  return slices_of(matrix, block_cols, num_sections, add);
}

}  // namespace

Matrix of_one_magnitude(const Matrix& matrix) {
  Matrix signs = matrix;
  for (size_t at = 0; at < signs.values.size(); ++at) {
    const size_t first = at / static_cast<size_t>(matrix.cols) * static_cast<size_t>(matrix.cols);
    signs.values[at] = std::copysign(matrix.values[first], matrix.values[at]);
  }
  return signs;
}

SellArrays pack_sell(const Matrix& matrix, int64_t slice_height, int64_t block_cols,
                     int64_t num_sections, Edge edge) {
  const Slices slices = sell_slices(matrix, slice_height, block_cols, num_sections);
  return hold(slices, matrix, slice_height, block_cols, num_sections, edge);
}

SellArrays pack_sign(const Matrix& matrix, int64_t slice_height, int64_t block_cols,
                     int64_t num_sections, Edge edge) {
  Slices slices = sell_slices(matrix, slice_height, block_cols, num_sections);
  for (size_t i = 0; i < slices.columns.size(); ++i) {
    if (std::signbit(slices.values[i])) slices.columns[i] += static_cast<uint16_t>(block_cols + 1);
  }
  slices.values.clear();
  for (int64_t m = 0; m < matrix.rows; ++m) {
    slices.values.push_back(std::fabs(matrix.values[static_cast<size_t>(m * matrix.cols)]));
  }
  return hold(slices, matrix, slice_height, block_cols, num_sections, edge);
}

// The columns of SELL become distances, and rows grow by a place for each jump; so does a slice by
// the most of its rows.
SellArrays pack_delta(const Matrix& matrix, int64_t slice_height, int64_t block_cols,
                      int64_t num_sections, Edge edge) {
  const Slices sell = sell_slices(matrix, slice_height, block_cols, num_sections);
  const size_t height = static_cast<size_t>(slice_height);
  Slices slices{sell.block_slices, {0}, sell.slice_rows, {}, {}};
  std::vector<uint8_t> deltas;
  for (size_t slice = 0; slice + 1 < sell.slice_steps.size(); ++slice) {
    std::vector<std::vector<std::pair<uint8_t, float>>> rows(height);
    size_t steps = 0;
    for (size_t lane = 0; lane < height; ++lane) {
      int64_t last = 0;
      for (int64_t step = sell.slice_steps[slice]; step < sell.slice_steps[slice + 1]; ++step) {
        const size_t at = static_cast<size_t>(step) * height + lane;
        const int64_t column = sell.columns[at];
        if (column == block_cols) break;
        for (; column - last >= sparselt::kJump; last += sparselt::kJump) {
          rows[lane].emplace_back(sparselt::kJump, 0.0f);
        }
        rows[lane].emplace_back(static_cast<uint8_t>(column - last), sell.values[at]);
        last = column;
      }
      steps = std::max(steps, rows[lane].size());
    }
    for (size_t step = 0; step < steps; ++step) {
      for (const auto& row : rows) {
        deltas.push_back(step < row.size() ? row[step].first : sparselt::kJump);
        slices.values.push_back(step < row.size() ? row[step].second : 0.0f);
      }
    }
    slices.slice_steps.push_back(slices.slice_steps.back() + static_cast<int32_t>(steps));
  }
  SellArrays arrays = hold(slices, matrix, slice_height, block_cols, num_sections, edge);
  arrays.deltas = {deltas, edge};
  arrays.view.deltas = arrays.deltas.data();
  return arrays;
}

SellArrays pack_bsell(const Matrix& matrix, int64_t slice_height, int64_t block_cols,
                      int64_t num_sections, Edge edge) {
  const Matrix filled = filled_blocks(matrix, slice_height, 1);
  Matrix blocks{(matrix.rows + slice_height - 1) / slice_height, matrix.cols, {}, {}};
  for (int64_t m = 0; m < matrix.rows; m += slice_height) {
    const auto first = filled.stored.begin() + m * matrix.cols;
    blocks.stored.insert(blocks.stored.end(), first, first + matrix.cols);
  }
  const auto add = [&](Slices& slices, const std::vector<Run>& runs, int64_t first_col) {
    for (const Run& run : runs) {
      const int64_t first_row = run.row * slice_height;
      for (int64_t m = first_row; m < first_row + slice_height; ++m) {
        slices.slice_rows.push_back(m < matrix.rows ? static_cast<int32_t>(m) : -1);
      }
      for (const int64_t k : run.columns) {
        slices.columns.push_back(static_cast<uint16_t>(k - first_col));
        for (int64_t m = first_row; m < first_row + slice_height; ++m) {
          slices.values.push_back(
              m < matrix.rows ? filled.values[static_cast<size_t>(m * matrix.cols + k)] : 0.0f);
        }
      }
      slices.slice_steps.push_back(static_cast<int32_t>(slices.columns.size()));
    }
  };
  const Slices slices = slices_of(blocks, block_cols, num_sections, add);
  return hold(slices, matrix, slice_height, block_cols, num_sections, edge);
}

}  // namespace neon_test
