// SPDX-License-Identifier: Apache-2.0
//
// The case tables, one an operation. Each function runs a kernel over its table: every problem once
// with every array before a forbidden page and once behind one, whole and cut at random places.
// Returns how many problems there were; ends the program at the first wrong result.
#pragma once

#include <string>

#include "expected.h"
#include "ops/panel_maker.h"
#include "registry.h"

namespace neon_test {

using sparselt::KernelInfo;

int64_t check_spmm(const KernelInfo& kernel);
int64_t check_conv2d(const KernelInfo& kernel);
int64_t check_panel_spmm(const KernelInfo& kernel);
int64_t check_panel_conv2d(const KernelInfo& kernel);
int64_t check_spmv(const KernelInfo& kernel);

// What is said if the program ends before the next problem, by a fault of memory too.
void begin_problem(const std::string& text);
[[noreturn]] void fail_problem(const std::string& reason);

// Fails unless y is as expected.
void expect_right(const Expected& expected, const float* y);
// Fails unless both hold the same bits; any NaN equals any other.
void expect_same(const Guarded<float>& whole, const Guarded<float>& cut);
void expect_intact(bool intact);

// Increasing bounds from 0 to `size`, up to two of them in between.
std::vector<int64_t> random_cuts(Generator& random, int64_t size);

// Sometimes replaces one of the values by a NaN or an infinity.
void make_special(Generator& random, std::vector<float>& values);

// The bias and residual of an ending as kernels want them.
struct HeldEnding {
  Guarded<float> bias;
  Guarded<float> residual;
  Epilogue pointers;
  bool intact() const { return bias.intact() && residual.intact(); }
};
HeldEnding hold_ending(const Ending& ending, Edge edge);

// The whole product by a panel kernel; with `random` cut into panels of any width, a section at a
// time.
void run_panels(const KernelInfo& kernel, const SellView& weight,
                const sparselt::PanelSource& source, const float* x, float* y,
                const Epilogue& epilogue, Edge edge, Generator* random);

// A weight as a kernel for slices reads it: of the height that its registers want, or of any where
// it reads all, in blocks of some columns and up to three sections for each group of rows.
struct SlicedWeight {
  Matrix matrix;  // what of the given one the format holds
  SellArrays arrays;
};
SlicedWeight sliced_weight(const KernelInfo& kernel, const Matrix& matrix, int64_t variant,
                           int64_t groups, Edge edge);

}  // namespace neon_test
