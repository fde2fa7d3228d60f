// SPDX-License-Identifier: Apache-2.0
//
// Lays the columns of x out one after the other, as kernels for bits read them, and shares the rows
// of the weight out.
#include "ops/bits.h"

#include "ops/partition.h"

namespace sparselt {
namespace {

// The steps of a row bind, whatever the columns: they count as much work as with so many.
constexpr int64_t kLeastColumns = 8;

class BitsTask final : public Task {
 public:
  BitsTask(const Team& team, const Weight& weight, Layout x_layout, Layout y_layout,
           int64_t columns, const Epilogue& epilogue)
      : weight_(weight),
        x_layout_(x_layout),
        y_layout_(y_layout),
        columns_(columns),
        epilogue_(epilogue),
        x_stride_(whole_lines(weight.cols)),
        laying_parts_(copying_parts(team, columns, x_stride_)) {
    const int64_t stored = weight.bits.crow_indices[weight.rows];
    shares_ = team.threads_for(stored * std::max(columns, kLeastColumns));
    shares_ = std::max<int64_t>(1, std::min(weight.rows, shares_));
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
                    weight_.bits};
      if (operands.residual) {
        call.epilogue.residual = operands.residual + first * y_layout_.column_stride;
      }
      // A row takes as many steps as any other.
      weight_.kernel->spmv(call, even_range(weight_.rows, part, shares_));
    }
  }

 private:
  void lay_out(Range columns, const Operands& operands) const {
    for (int64_t n = columns.begin; n < columns.end; ++n) {
      const float* from = operands.x + n * x_layout_.column_stride;
      float* to = operands.shared + n * x_stride_;
      for (int64_t k = 0; k < weight_.cols; ++k) to[k] = from[k * x_layout_.row_stride];
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

TaskPointer make_bits_task(const Team& team, const Weight& weight, Layout x_layout, Layout y_layout,
                           int64_t columns, const Epilogue& epilogue) {
  return std::make_unique<BitsTask>(team, weight, x_layout, y_layout, columns, epilogue);
}

}  // namespace sparselt
