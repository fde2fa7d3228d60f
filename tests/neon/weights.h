// SPDX-License-Identifier: Apache-2.0
//
// Random weights, and their packing as kernels want them: the plainest way that keeps the rules of
// kernels.h.
#pragma once

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "guarded.h"
#include "kernels.h"

namespace neon_test {

using sparselt::SellView;
using sparselt::SparseView;

using Generator = std::mt19937;

float random_float(Generator& random);                 // in [-1, 1)
int64_t random_below(Generator& random, int64_t end);  // in [0, end)
std::vector<float> random_floats(Generator& random, int64_t count);

// A dense matrix, row-major, and which of its values are stored.
struct Matrix {
  int64_t rows;
  int64_t cols;
  std::vector<float> values;
  std::vector<bool> stored;
};

// Each value is stored with probability `density`; a fourth of the rows is empty where `ragged`,
// and one is full. Some stored values are zeros.
Matrix random_matrix(Generator& random, int64_t rows, int64_t cols, double density, bool ragged);

// The matrix with every value stored that shares a block with a stored one: what BSR holds.
Matrix filled_blocks(const Matrix& matrix, int64_t block_rows, int64_t block_cols);

// CSR (blocks of 1 x 1) and BSR.
struct SparseArrays {
  Guarded<int32_t> crow_indices;
  Guarded<int32_t> col_indices;
  Guarded<float> values;
  SparseView view;
  bool intact() const { return crow_indices.intact() && col_indices.intact() && values.intact(); }
};
SparseArrays pack_sparse(const Matrix& matrix, int64_t block_rows, int64_t block_cols, Edge edge);

// A bit for each place, and the stored values.
struct BitsArrays {
  Guarded<int32_t> crow_indices;
  Guarded<uint16_t> masks;
  Guarded<float> values;
  sparselt::BitsView view;
  bool intact() const { return crow_indices.intact() && masks.intact() && values.intact(); }
};
BitsArrays pack_bits(const Matrix& matrix, Edge edge);

// The matrix with values of one magnitude a row: what the sign format holds.
Matrix of_one_magnitude(const Matrix& matrix);

// SELL, its sign and delta formats and BSELL.
struct SellArrays {
  Guarded<int32_t> block_slices;
  Guarded<int32_t> slice_steps;
  Guarded<int32_t> slice_rows;
  Guarded<uint16_t> columns;
  Guarded<float> values;
  SellView view;
  Guarded<uint8_t> deltas;
  bool intact() const {
    return deltas.intact() && block_slices.intact() && slice_steps.intact() &&
           slice_rows.intact() && columns.intact() && values.intact();
  }
};
SellArrays pack_sell(const Matrix& matrix, int64_t slice_height, int64_t block_cols,
                     int64_t num_sections, Edge edge);
// Of a matrix `of_one_magnitude`.
SellArrays pack_sign(const Matrix& matrix, int64_t slice_height, int64_t block_cols,
                     int64_t num_sections, Edge edge);
SellArrays pack_delta(const Matrix& matrix, int64_t slice_height, int64_t block_cols,
                      int64_t num_sections, Edge edge);
SellArrays pack_bsell(const Matrix& matrix, int64_t slice_height, int64_t block_cols,
                      int64_t num_sections, Edge edge);

}  // namespace neon_test
