// SPDX-License-Identifier: Apache-2.0
#include "problems.h"

#include <algorithm>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <limits>

namespace neon_test {
namespace {

char current[512];  // what a signal handler may read

extern "C" void report_fault(int) {
  constexpr char kText[] = "touched memory that is not its own: ";
  ssize_t written = write(STDERR_FILENO, kText, sizeof(kText) - 1);
  written = write(STDERR_FILENO, current, strlen(current));
  written = write(STDERR_FILENO, "\n", 1);
  _exit(written == 1 ? 1 : 2);
}

}  // namespace

void begin_problem(const std::string& text) {
  static const bool watching =
      std::signal(SIGSEGV, report_fault) != SIG_ERR && std::signal(SIGBUS, report_fault) != SIG_ERR;
  if (!watching) std::exit(2);
  std::snprintf(current, sizeof(current), "%s", text.c_str());
}

void fail_problem(const std::string& reason) {
  std::fprintf(stderr, "%s: %s\n", current, reason.c_str());
  std::exit(1);
}

void expect_right(const Expected& expected, const float* y) {
  const std::string wrong = judge(expected, y);
  if (!wrong.empty()) fail_problem(wrong);
}

void expect_same(const Guarded<float>& whole, const Guarded<float>& cut) {
  for (size_t i = 0; i < whole.size(); ++i) {
    const float a = whole[i];
    const float b = cut[i];
    if (std::memcmp(&a, &b, sizeof(a)) != 0 && !(std::isnan(a) && std::isnan(b))) {
      fail_problem("element " + std::to_string(i) + " depends on the split");
    }
  }
}

void expect_intact(bool intact) {
  if (!intact) fail_problem("wrote outside an array");
}

std::vector<int64_t> random_cuts(Generator& random, int64_t size) {
  std::vector<int64_t> cuts{0, random_below(random, size + 1), random_below(random, size + 1),
                            size};
  std::sort(cuts.begin(), cuts.end());
  cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
  return cuts;
}

void make_special(Generator& random, std::vector<float>& values) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const float specials[] = {std::numeric_limits<float>::quiet_NaN(), kInfinity, -kInfinity};
  const int64_t which = random_below(random, 12);
  if (which >= 3 || values.empty()) return;
  const auto at = static_cast<size_t>(random_below(random, static_cast<int64_t>(values.size())));
  values[at] = specials[which];
}

HeldEnding hold_ending(const Ending& ending, Edge edge) {
  HeldEnding held{{ending.bias, edge}, {ending.residual, edge}, {}};
  held.pointers = {ending.bias.empty() ? nullptr : held.bias.data(),
                   ending.residual.empty() ? nullptr : held.residual.data(), ending.lower,
                   ending.upper};
  return held;
}

void run_panels(const KernelInfo& kernel, const SellView& weight,
                const sparselt::PanelSource& source, const float* x, float* y,
                const Epilogue& epilogue, Edge edge, Generator* random) {
  const int64_t area = source.out_height * source.out_width;
  const int64_t pixels = source.batch * area;
  sparselt::PanelMaker maker(source, weight.rows);
  for (int64_t begin = 0, end; begin < pixels; begin = end) {
    const int64_t lanes =
        random ? 1 + random_below(*random, kernel.tile_columns) : kernel.tile_columns;
    end = std::min(pixels, begin + lanes);
    sparselt::Panel panel = maker.make(begin, end);
    const int64_t image = sparselt::point(source, weight.rows, begin, x, y, &panel);
    const int64_t width = int64_t{panel.vectors} * sparselt::kPanelLanes;
    Guarded<float> x_block(static_cast<size_t>((weight.block_cols + 1) * width), edge);
    Guarded<float> sums(static_cast<size_t>(weight.rows * width), edge);
    sparselt::PanelCall call{weight, panel, epilogue, x_block.data(), sums.data()};
    if (epilogue.residual) call.epilogue.residual += image * weight.rows * area;
    const int64_t group_sections = weight.num_sections / source.groups;
    const int64_t share = random ? 1 : group_sections;
    for (int64_t last = weight.num_sections; last > 0; last -= share) {
      call.panel.x = panel.x + (last - 1) / group_sections * source.group_stride;
      kernel.panel(call, {last - share, last});
    }
    expect_intact(x_block.intact() && sums.intact());
  }
}

SlicedWeight sliced_weight(const KernelInfo& kernel, const Matrix& matrix, int64_t variant,
                           int64_t groups, Edge edge) {
  constexpr int64_t kHeights[] = {1, 2, 3, 4, 7};
  constexpr int64_t kBlockHeights[] = {4, 8, 16};
  constexpr int64_t kBlockCols[] = {1, 5, 16, 128};
  const int64_t block_cols = kBlockCols[(variant + variant / 4) % 4];
  const auto sections = [&](int64_t rows) {
    return groups * std::min<int64_t>(1 + variant % 3, rows / groups);
  };
  if (kernel.format == "bsell") {
    const int64_t height = kBlockHeights[variant / 2 % 3];
    const int64_t block_rows = (matrix.rows + height - 1) / height;
    return {filled_blocks(matrix, height, 1),
            pack_bsell(matrix, height, block_cols, sections(block_rows), edge)};
  }
  const int64_t height = kernel.tile_rows > 1 ? kernel.tile_rows : kHeights[variant % 5];
  if (kernel.format == "sign") {
    Matrix signs = of_one_magnitude(matrix);
    SellArrays arrays = pack_sign(signs, height, block_cols, sections(matrix.rows), edge);
    return {std::move(signs), std::move(arrays)};
  }
  if (kernel.format == "delta") {
    // As wide as rows of several jumps, every other time.
    const int64_t wide = variant % 2 ? 1000 : block_cols;
    return {matrix, pack_delta(matrix, height, wide, sections(matrix.rows), edge)};
  }
  return {matrix, pack_sell(matrix, height, block_cols, sections(matrix.rows), edge)};
}

}  // namespace neon_test
