// SPDX-License-Identifier: Apache-2.0
//
// Lays x out as spmv kernels read it, and shares the sections of the weight out.
#include "ops/spmv.h"

#include <algorithm>
#include <limits>
#include <optional>
#include <vector>

#include "ops/partition.h"
#include "ops/spmv_columns.h"
#include "ops/transpose.h"

namespace sparselt {
namespace {

using transpose::Places;
using transpose::Transpose;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Loads bind: a stored value takes as long with one lane as with eight, so it counts as much work.
constexpr int64_t kLeastLanes = 8;

// From so many columns on, rows of lanes are brought to torch's y by transposes: columns that lie a
// power of two apart share few places in a cache.
constexpr int64_t kTransposedColumns = 12;

// Rows [first, last) of columns that are contiguous, into `lanes` floats a row.
template <int64_t kLanes>
float* lay_out_columns(const float* x, int64_t column_stride, int64_t columns, int64_t first,
                       int64_t last, float* to) {
  constexpr float kZeros[4] = {};
  int64_t k = first;
  for (; k + 4 <= last; k += 4, to += 4 * kLanes) {
    for (int64_t n = 0; n < kLanes; n += 4) {
      const float* four[4];
      for (int64_t i = 0; i < 4; ++i) {
        four[i] = n + i < columns ? x + (n + i) * column_stride + k : kZeros;
      }
      transpose::transpose_four(four, 0, to + n, kLanes);
    }
  }
  for (; k < last; ++k, to += kLanes) {
    for (int64_t n = 0; n < kLanes; ++n) to[n] = n < columns ? x[n * column_stride + k] : 0.0f;
  }
  return to;
}

// Columns of x into `lanes` floats a row, by blocks of the weight's columns; see SpmvCall.
template <int64_t kLanes>
void lay_out(const SellView& w, const float* x, Layout layout, int64_t columns, float* to) {
  const int64_t block_floats = (w.block_cols + 1) * kLanes;
  for (int64_t block = 0; block < w.num_blocks; ++block) {
    const int64_t first = block * w.block_cols;
    const int64_t last = std::min(w.cols, first + w.block_cols);
    if (layout.row_stride != 1) {
      for (int64_t k = first; k < last; ++k, to += kLanes) {
        const float* from = x + k * layout.row_stride;
        for (int64_t n = 0; n < kLanes; ++n) {
          to[n] = n < columns ? from[n * layout.column_stride] : 0.0f;
        }
      }
    } else if constexpr (kLanes == 1) {
      to = std::copy(x + first, x + last, to);
    } else {
      to = lay_out_columns<kLanes>(x, layout.column_stride, columns, first, last, to);
    }
    to += (first + w.block_cols - last) * kLanes;
    for (int64_t n = 0; n < kLanes; ++n) *to++ = 0.0f;
    if (!w.mirrored) continue;
    for (int64_t i = 0; i < (last - first) * kLanes; ++i) to[i] = -to[i - block_floats];
    to += block_floats;
  }
}

using LayOut = void (*)(const SellView& w, const float* x, Layout layout, int64_t columns,
                        float* to);

LayOut lay_out_by(int64_t lanes) {
  if (lanes == 1) return lay_out<1>;
  if (lanes == 4) return lay_out<4>;
  return lanes == 8 ? lay_out<8> : lay_out<16>;
}

class SpmvTask final : public Task {
 public:
  SpmvTask(const Team& team, const Weight& weight, Layout x_layout, Layout y_layout,
           int64_t columns, const Epilogue& epilogue)
      : weight_(weight),
        x_layout_(x_layout),
        y_layout_(y_layout),
        epilogue_(epilogue),
        block_rows_((weight.sell.block_cols + 1) * (weight.sell.mirrored ? 2 : 1)) {
    const SellView& w = weight_.sell;
    const int64_t most = weight_.kernel->tile_columns;
    const int64_t groups = (columns + most - 1) / most;
    const int64_t rows = w.num_blocks * block_rows_;
    for (int64_t group = 0; group < groups; ++group) {
      // Whole groups, and then what is left, which may want fewer lanes.
      const int64_t first = group * most;
      const int64_t count = std::min(most, columns - first);
      // Kernels store one lane to rows that follow each other.
      const bool single = count == 1 && y_layout.row_stride == 1;
      const int64_t lanes = single ? 1 : (count <= 4 ? 4 : (count <= 8 ? 8 : 16));
      groups_.push_back({first, count, lanes, floats_});
      floats_ += whole_lines(rows * lanes);
    }
    laying_parts_ = copying_parts(team, groups, groups ? floats_ / groups : 0);
    for (Group& group : groups_) {
      if (y_layout.row_stride != 1 || group.count < kTransposedColumns) continue;
      group.after.emplace(team, weight.rows, group.count, Places(weight.rows, group.lanes));
      group.y_offset = floats_;
      floats_ += group.after->floats();
      after_parts_ = std::max(after_parts_, group.after->parts());
    }
    const int64_t lanes = groups ? groups_.front().lanes : 0;
    const int64_t threads =
        team.threads_for(stored_values(w) * std::max(lanes, kLeastLanes) * groups);
    shares_ = std::max<int64_t>(1, std::min(w.num_sections, threads));
  }

  int64_t stages() const override { return after_parts_ > 0 ? 3 : 2; }
  int64_t parts(int64_t stage) const override {
    return stage == 0 ? laying_parts_ : (stage == 1 ? shares_ : after_parts_);
  }
  int64_t shared_floats() const override { return floats_; }

  void run(int64_t stage, int64_t part, const Operands& operands) const override {
    if (stage == 0) {
      const Range some = even_range(static_cast<int64_t>(groups_.size()), part, laying_parts_);
      for (int64_t i = some.begin; i < some.end; ++i) {
        const Group& group = groups_[static_cast<size_t>(i)];
        lay_out_by(group.lanes)(weight_.sell, operands.x + group.first * x_layout_.column_stride,
                                x_layout_, group.count, operands.shared + group.offset);
      }
      return;
    }
    if (weight_.rows == 0) return;
    for (const Group& group : groups_) {
      if (stage == 1) {
        multiply(group, part, operands);
      } else if (group.after && part < group.after->parts()) {
        const int64_t first = group.first * y_layout_.column_stride;
        Epilogue after = epilogue_;
        after.residual = operands.residual ? operands.residual + first : nullptr;
        group.after->to_torch(part, operands.shared + group.y_offset, after, operands.y + first);
      }
    }
  }

 private:
  // Some columns, and where they are laid out.
  struct Group {
    int64_t first;
    int64_t count;
    int64_t lanes;
    int64_t offset;
    std::optional<Transpose> after{};  // of y, which lies at y_offset until then
    int64_t y_offset = 0;
  };

  void multiply(const Group& group, int64_t part, const Operands& operands) const {
    const SellView& w = weight_.sell;
    const int64_t first = group.first * y_layout_.column_stride;
    SpmvCall call{w,
                  operands.shared + group.offset,
                  block_rows_ * group.lanes,
                  group.lanes,
                  group.count,
                  operands.y + first,
                  y_layout_.row_stride,
                  y_layout_.column_stride,
                  epilogue_};
    if (operands.residual) call.epilogue.residual = operands.residual + first;
    if (group.after) {
      call.columns = group.lanes;
      call.y = operands.shared + group.y_offset;
      call.y_row_stride = group.lanes;
      call.y_column_stride = 1;
      call.epilogue = {epilogue_.bias, nullptr, -kInfinity, kInfinity};
    }
    weight_.kernel->spmv(call, even_range(w.num_sections, part, shares_));
  }

  const Weight weight_;
  const Layout x_layout_;
  const Layout y_layout_;
  const Epilogue epilogue_;
  const int64_t block_rows_;  // of x, a block
  std::vector<Group> groups_;
  int64_t floats_ = 0;
  int64_t laying_parts_ = 1;
  int64_t shares_ = 1;
  int64_t after_parts_ = 0;
};

}  // namespace

TaskPointer make_spmv_task(const Team& team, const Weight& weight, Layout x_layout, Layout y_layout,
                           int64_t columns, const Epilogue& epilogue) {
  if (weight.bits.crow_indices || weight.window.slice_steps) {
    return make_spmv_columns_task(team, weight, x_layout, y_layout, columns, epilogue);
  }
  return std::make_unique<SpmvTask>(team, weight, x_layout, y_layout, columns, epilogue);
}

}  // namespace sparselt
