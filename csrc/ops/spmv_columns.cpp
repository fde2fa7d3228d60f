// SPDX-License-Identifier: Apache-2.0
//
// Lays the columns of x out one after the other, as kernels for bits and windows read them, and
// shares the weight out: the rows of bits, the slices of windows.
#include "ops/spmv_columns.h"

#include "ops/partition.h"

namespace sparselt {
namespace {

// The steps of a row bind, whatever the columns: they count as much work as with so many.
constexpr int64_t kLeastColumns = 8;

class SpmvColumnsTask final : public Task {
 public:
  SpmvColumnsTask(const Team& team, const Weight& weight, Layout x_layout, Layout y_layout,
                  int64_t columns, const Epilogue& epilogue)
      : weight_(weight),
        x_layout_(x_layout),
        y_layout_(y_layout),
        columns_(columns),
        epilogue_(epilogue),
        x_stride_(whole_lines(weight.cols) + kWindowLanes),
        laying_parts_(copying_parts(team, columns, x_stride_)) {
    shares_ = team.threads_for(stored() * std::max(columns, kLeastColumns));
    shares_ = std::max<int64_t>(1, std::min(sections(), shares_));
  }

  int64_t stages() const override { return 2; }
  int64_t parts(int64_t stage) const override { return stage == 0 ? laying_parts_ : shares_; }
  int64_t shared_floats() const override { return columns_ * x_stride_; }

  void run(int64_t stage, int64_t part, const Operands& operands) const override {
    if (stage == 0) return lay_out(even_range(columns_, part, laying_parts_), operands);
    const int64_t most = weight_.kernel->tile_columns;
    for (int64_t first = 0; first < columns_; first += most) {
      SpmvCall call{weight_.sell,
                    operands.shared + first * x_stride_,
                    x_stride_,
                    1,
                    std::min(most, columns_ - first),
                    operands.y + first * y_layout_.column_stride,
                    y_layout_.row_stride,
                    y_layout_.column_stride,
                    epilogue_,
                    weight_.bits,
                    weight_.window};
      if (operands.residual) {
        call.epilogue.residual = operands.residual + first * y_layout_.column_stride;
      }
      weight_.kernel->spmv(call, share(part));
    }
  }

 private:
  const int32_t* slice_steps() const { return weight_.window.slice_steps; }
  int64_t sections() const {
    return slice_steps() ? (weight_.rows + kWindowLanes - 1) / kWindowLanes : weight_.rows;
  }
  int64_t stored() const {
    return slice_steps() ? slice_steps()[sections()] * kWindowLanes
                         : weight_.bits.crow_indices[weight_.rows];
  }
  // A row of bits takes as many steps as any other.
  Range share(int64_t part) const {
    if (!slice_steps()) return even_range(sections(), part, shares_);
    return balanced_runs(slice_steps(), {0, sections()}, part, shares_);
  }

  void lay_out(Range columns, const Operands& operands) const {
    for (int64_t n = columns.begin; n < columns.end; ++n) {
      const float* from = operands.x + n * x_layout_.column_stride;
      float* to = operands.shared + n * x_stride_;
      if (x_layout_.row_stride == 1) {
        std::copy(from, from + weight_.cols, to);
      } else {
        for (int64_t k = 0; k < weight_.cols; ++k) to[k] = from[k * x_layout_.row_stride];
      }
      std::fill(to + weight_.cols, to + x_stride_, 0.0f);
    }
  }

  const Weight weight_;
  const Layout x_layout_;
  const Layout y_layout_;
  const int64_t columns_;
  const Epilogue epilogue_;
  const int64_t x_stride_;
  const int64_t laying_parts_;
  int64_t shares_ = 1;
};

}  // namespace

TaskPointer make_spmv_columns_task(const Team& team, const Weight& weight, Layout x_layout,
                                   Layout y_layout, int64_t columns, const Epilogue& epilogue) {
  return std::make_unique<SpmvColumnsTask>(team, weight, x_layout, y_layout, columns, epilogue);
}

}  // namespace sparselt
