// SPDX-License-Identifier: Apache-2.0
//
// The reference, in double, and the judgement of a result by the bound of a float dot product in
// any order of summation.
#pragma once

#include <string>
#include <vector>

#include "weights.h"

namespace neon_test {

using sparselt::Epilogue;
using sparselt::Range;

// Bias (a value a row), residual (as y) and limits; empty vectors for none.
struct Ending {
  std::vector<float> bias;
  std::vector<float> residual;
  float lower;
  float upper;
};

// The `variant`-th way to end a product: with and without bias and residual, under several limits.
Ending random_ending(Generator& random, int64_t variant, int64_t rows, int64_t size);

struct Expected {
  std::vector<double> values;
  std::vector<double> bounds;  // the greatest error allowed
};

// Appends clamp(rows [first, last) of the matrix times x (cols x columns, row-major) + ...);
// element (m, n) has its residual at residual_at + (m - first) * columns + n.
void append_expected(Expected& expected, const Matrix& matrix, Range rows,
                     const std::vector<float>& x, int64_t columns, const Ending& ending,
                     int64_t residual_at);

// Empty where y is right; otherwise the first place that is not.
std::string judge(const Expected& expected, const float* y);

}  // namespace neon_test
