// SPDX-License-Identifier: Apache-2.0
//
// y (..., M) = clamp(x (..., K) W^T + bias + residual): torch's layout, where features lie next to
// each other. Kernels want the batch to lie next to each other instead, so x is transposed before
// and y after; a batch of one needs neither, and spmv kernels take any layout.
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <limits>

#include "ops/check.h"
#include "ops/partition.h"
#include "ops/run_task.h"
#include "ops/spmm.h"
#include "ops/spmv.h"

namespace sparselt {
namespace {

constexpr int64_t kTransposeBlock = 16;  // rows and columns: 16 cache lines in, 16 out
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Writes to (columns, rows) = clamp(from (rows, columns)^T + residual), in parts of whole blocks of
// rows.
class Transpose {
 public:
  Transpose(const Team& team, int64_t rows, int64_t columns)
      : rows_(rows),
        columns_(columns),
        blocks_((rows + kTransposeBlock - 1) / kTransposeBlock),
        parts_(copying_parts(team, blocks_, columns * kTransposeBlock)) {}

  int64_t parts() const { return parts_; }

  void run(int64_t part, const float* from, const Epilogue& e, float* to) const {
    const Range blocks = even_range(blocks_, part, parts_);
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      const int64_t last_row = std::min(rows_, (block + 1) * kTransposeBlock);
      for (int64_t first = 0; first < columns_; first += kTransposeBlock) {
        const int64_t last = std::min(columns_, first + kTransposeBlock);
        for (int64_t column = first; column < last; ++column) {
          for (int64_t row = block * kTransposeBlock; row < last_row; ++row) {
            float value = from[row * columns_ + column];
            if (e.residual) value += e.residual[column * rows_ + row];
            value = value < e.lower ? e.lower : value;  // written so that a NaN stays a NaN
            to[column * rows_ + row] = value > e.upper ? e.upper : value;
          }
        }
      }
    }
  }

 private:
  int64_t rows_;
  int64_t columns_;
  int64_t blocks_;
  int64_t parts_;
};

// The product between two transposes.
class TransposedTask final : public Task {
 public:
  TransposedTask(const Team& team, const Weight& weight, int64_t batch, const Epilogue& epilogue)
      : epilogue_(epilogue),
        product_(
            make_spmm_task(team, weight, batch, {epilogue.bias, nullptr, -kInfinity, kInfinity})),
        before_(team, batch, weight.cols),
        after_(team, weight.rows, batch),
        in_floats_(whole_lines(weight.cols * batch)),
        out_floats_(whole_lines(weight.rows * batch)) {}

  int64_t stages() const override { return product_->stages() + 2; }
  int64_t parts(int64_t stage) const override {
    if (stage == 0) return before_.parts();
    return stage + 1 == stages() ? after_.parts() : product_->parts(stage - 1);
  }
  int64_t shared_floats() const override {
    return in_floats_ + out_floats_ + product_->shared_floats();
  }
  int64_t own_floats() const override { return product_->own_floats(); }
  bool may_overwrite_residual() const override { return true; }
  void prepare() override { product_->prepare(); }

  void run(int64_t stage, int64_t part, const Operands& operands) const override {
    float* in = operands.shared;
    float* out = in + in_floats_;
    if (stage == 0) {
      before_.run(part, operands.x, {nullptr, nullptr, -kInfinity, kInfinity}, in);
    } else if (stage + 1 == stages()) {
      Epilogue after = epilogue_;
      after.residual = operands.residual;
      after_.run(part, out, after, operands.y);
    } else {
      product_->run(stage - 1, part, {in, nullptr, out, out + out_floats_, operands.own});
    }
  }

 private:
  const Epilogue epilogue_;
  const TaskPointer product_;
  const Transpose before_;
  const Transpose after_;
  const int64_t in_floats_;
  const int64_t out_floats_;
};

}  // namespace

TaskPointer make_linear_task(const Team& team, const Weight& weight, int64_t batch,
                             const Epilogue& epilogue) {
  if (weight.kernel->spmv) {
    return make_spmv_task(team, weight, {1, weight.cols}, {1, weight.rows}, batch, epilogue);
  }
  if (batch <= 1) return make_spmm_task(team, weight, batch, epilogue);
  return std::make_unique<TransposedTask>(team, weight, batch, epilogue);
}

Tensor linear(Tensor x, Parts parts, Ints meta, OptionalTensor bias, OptionalTensor residual,
              OptionalBound lower, OptionalBound upper, std::string kernel) {
  const Weight weight = as_weight(parts, meta, kernel, "spmm", 2);
  std::vector<int64_t> shape = shape_of(x);
  STD_TORCH_CHECK(!shape.empty() && shape.back() == weight.cols, "x: expected (..., ", weight.cols,
                  "), got a last size of ", shape.empty() ? 0 : shape.back());
  int64_t batch = 1;
  for (size_t i = 0; i + 1 < shape.size(); ++i) batch *= shape[i];
  shape.back() = weight.rows;
  const Tensor input = as_float_input(x, "x");
  const HeldEpilogue held = as_epilogue(bias, residual, lower, upper, weight.rows, shape);
  Tensor out = new_output(shape);
  const TaskPointer task = make_linear_task(torch_team(), weight, batch, held.pointers);
  run_task(*task, const_float_data(input), held.residual_data(), float_data(out));
  return out;
}

}  // namespace sparselt
