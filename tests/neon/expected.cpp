// SPDX-License-Identifier: Apache-2.0
#include "expected.h"

#include <cmath>
#include <limits>
#include <sstream>

namespace neon_test {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLimits[][2] = {
    {-kInfinity, kInfinity}, {0.0f, kInfinity}, {0.0f, 6.0f}, {-0.25f, 0.25f}};
constexpr int64_t kExtraRoundings = 6;  // bias, residual, and the joining of partial sums

bool is_near(float got, double want, double bound) {
  // An infinite term leaves no error: the result is infinite or one of the limits.
  return std::isinf(bound) ? got == static_cast<float>(want) : std::fabs(got - want) <= bound;
}

}  // namespace

Ending random_ending(Generator& random, int64_t variant, int64_t rows, int64_t size) {
  const float* limits = kLimits[variant / 4 % 4];
  Ending ending{{}, {}, limits[0], limits[1]};
  if (variant & 1) ending.bias = random_floats(random, rows);
  if (variant & 2) ending.residual = random_floats(random, size);
  return ending;
}

void append_expected(Expected& expected, const Matrix& matrix, Range rows,
                     const std::vector<float>& x, int64_t columns, const Ending& ending,
                     int64_t residual_at) {
  for (int64_t m = rows.begin; m < rows.end; ++m) {
    for (int64_t n = 0; n < columns; ++n) {
      double sum = ending.bias.empty() ? 0.0 : ending.bias[static_cast<size_t>(m)];
      double size = std::fabs(sum);
      int64_t terms = kExtraRoundings;
      for (int64_t k = 0; k < matrix.cols; ++k) {
        const size_t at = static_cast<size_t>(m * matrix.cols + k);
        if (!matrix.stored[at]) continue;
        const double term =
            static_cast<double>(matrix.values[at]) * x[static_cast<size_t>(k * columns + n)];
        sum += term;
        size += std::fabs(term);
        ++terms;
      }
      if (!ending.residual.empty()) {
        const double residual =
            ending.residual[static_cast<size_t>(residual_at + (m - rows.begin) * columns + n)];
        sum += residual;
        size += std::fabs(residual);
      }
      if (sum < ending.lower) sum = ending.lower;  // written so that a NaN stays a NaN
      if (sum > ending.upper) sum = ending.upper;
      const double roundings = static_cast<double>(terms) * 0x1p-24;
      expected.values.push_back(sum);
      expected.bounds.push_back(roundings / (1 - roundings) * size);
    }
  }
}

std::string judge(const Expected& expected, const float* y) {
  for (size_t i = 0; i < expected.values.size(); ++i) {
    const double want = expected.values[i];
    const double bound = expected.bounds[i];
    if (std::isnan(want) ? std::isnan(y[i]) : is_near(y[i], want, bound)) continue;
    std::ostringstream text;
    text << "element " << i << ": expected " << want << " +- " << bound << ", got " << y[i];
    return text.str();
  }
  return "";
}

}  // namespace neon_test
