// SPDX-License-Identifier: Apache-2.0
//
// y (..., M) = clamp(x (..., K) W^T + bias + residual): torch's layout, where features lie next to
// each other. Kernels want the batch to lie next to each other instead, so x is transposed before
// and y after, from and to panels for kernels that run them; a batch of one needs neither, and spmv
// kernels take any layout.
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <limits>
#include <optional>

#include "ops/check.h"
#include "ops/partition.h"
#include "ops/run_task.h"
#include "ops/spmm.h"
#include "ops/spmv.h"
#include "ops/transpose.h"

namespace sparselt {
namespace {

using transpose::Places;
using transpose::Transpose;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The product between two transposes, but for values that already lie in panels.
class TransposedTask final : public Task {
 public:
  TransposedTask(const Team& team, const Weight& weight, int64_t batch, const Epilogue& epilogue)
      : team_(team), weight_(weight), batch_(batch), epilogue_(epilogue) {
    make_stages();
  }

  int64_t stages() const override { return product_->stages() + !layouts_.x + !layouts_.y; }
  int64_t parts(int64_t stage) const override {
    if (is_before(stage)) return before_->parts();
    return is_after(stage) ? after_->parts() : product_->parts(stage - !layouts_.x);
  }
  int64_t shared_floats() const override {
    return before_->floats() + after_->floats() + product_->shared_floats();
  }
  int64_t own_floats() const override { return product_->own_floats(); }
  bool may_overwrite_residual() const override { return !layouts_.y; }
  std::optional<PanelLayout> x_in_panels() const override {
    return of_samples(product_->x_in_panels());
  }
  std::optional<PanelLayout> y_in_panels(bool has_residual) const override {
    return has_residual ? std::nullopt : of_samples(product_->y_in_panels(false));
  }
  void lay_out(const Layouts& layouts) override {
    layouts_ = layouts;
    make_stages();
  }
  void prepare() override { product_->prepare(); }

  void run(int64_t stage, int64_t part, const Operands& operands) const override {
    float* in = operands.shared;
    float* out = in + before_->floats();
    if (is_before(stage)) {
      before_->from_torch(part, operands.x, in);
    } else if (is_after(stage)) {
      Epilogue after = epilogue_;
      after.residual = operands.residual;
      after_->to_torch(part, out, after, operands.y);
    } else {
      product_->run(stage - !layouts_.x, part,
                    {layouts_.x ? operands.x : in, nullptr, layouts_.y ? operands.y : out,
                     out + after_->floats(), operands.own});
    }
  }

 private:
  // A matrix (features, batch), whose samples lie one after the other in torch.
  std::optional<PanelLayout> of_samples(std::optional<PanelLayout> layout) const {
    if (layout) layout->images = batch_;
    return layout;
  }
  bool is_before(int64_t stage) const { return stage == 0 && !layouts_.x; }
  bool is_after(int64_t stage) const { return stage + 1 == stages() && !layouts_.y; }

  void make_stages() {
    const bool clamps = layouts_.y.has_value();
    product_ = make_spmm_task(team_, weight_, batch_,
                              {epilogue_.bias, nullptr, clamps ? epilogue_.lower : -kInfinity,
                               clamps ? epilogue_.upper : kInfinity});
    Layouts inner = layouts_;
    if (!inner.x) inner.x = product_->x_in_panels();
    if (!inner.y) inner.y = product_->y_in_panels(false);
    if (inner.y) inner.y = inner.y->chosen();
    product_->lay_out(inner);
    before_.emplace(team_, weight_.cols, batch_,
                    inner.x ? Places(*inner.x) : Places(weight_.cols, batch_));
    after_.emplace(team_, weight_.rows, batch_,
                   inner.y ? Places(*inner.y) : Places(weight_.rows, batch_));
  }

  const Team team_;
  const Weight weight_;
  const int64_t batch_;
  const Epilogue epilogue_;
  Layouts layouts_;
  TaskPointer product_;
  std::optional<Transpose> before_;
  std::optional<Transpose> after_;
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
